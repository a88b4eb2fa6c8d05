// Demo shows usernet at work. It serves a page on a free port of the host's loopback, runs itself in
// a namespace of its own by `usernet run --host-loopback`, and there says which addresses it has, how
// a name is resolved, and what the page says.
//
//	demo BINARY            on the host
//	demo inside PORT       in the namespace
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"time"
)

const (
	gateway = "10.0.2.2"                 // the host's loopback, because of --host-loopback
	name    = "host.containers.internal" // answered by usernet's own DNS
	page    = "Greetings from the host."
)

func main() {
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "inside":
		err = inside(os.Args[2])
	case len(os.Args) == 2:
		err = host(os.Args[1])
	default:
		err = errors.New("usage: demo BINARY")
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.ExitCode()) // usernet has said why
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func host(usernet string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, page)
	})}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()

	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		return err
	}
	fmt.Printf("host:      serving a page on %s\n", listener.Addr())
	cmd := exec.Command(usernet, "run", "--host-loopback", "--", self, "inside", port)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	runErr := cmd.Run()
	closeErr := server.Close()
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		closeErr = errors.Join(closeErr, err)
	}
	if runErr != nil {
		return runErr
	}
	return closeErr
}

func inside(port string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	interfaces, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, i := range interfaces {
		addrs, err := i.Addrs()
		if err != nil {
			return err
		}
		fmt.Printf("namespace: %-5s mtu %-6d %v\n", i.Name, i.MTU, addrs)
	}

	ips, err := net.DefaultResolver.LookupHost(ctx, name)
	if err != nil {
		return err
	}
	fmt.Printf("namespace: %s is %v\n", name, ips)

	url := "http://" + net.JoinHostPort(gateway, port) + "/"
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if string(body) != page+"\n" {
		return fmt.Errorf("%s answered %s, %q", url, response.Status, body)
	}
	fmt.Printf("namespace: %s says: %s", url, body)
	fmt.Println("namespace: the network works")
	return nil
}
