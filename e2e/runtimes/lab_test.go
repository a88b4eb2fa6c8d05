package runtimes

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	hostAddr4    = "203.0.113.1"
	hostAddr6    = "2001:db8::1"
	outsideAddr4 = "203.0.113.2"
	outsideAddr6 = "2001:db8::2"
	moreAddr4    = "198.51.100.7" // outside too

	uid  = 4242
	home = "/home/usernet-lab"
	bin  = "/opt/lab/bin" // usernet, and slirp4netns that is a link to it

	// patience is how long something that must happen may take on a busy machine.
	patience = 20 * time.Second
)

// A place is a network namespace of the lab with a thread in it that stays there.
type place struct {
	name string
	work chan func()
	done chan struct{}
}

func newPlace(name, netns string) (*place, error) {
	p := &place{name: name, work: make(chan func()), done: make(chan struct{})}
	entered := make(chan error)
	go func() {
		defer close(p.done)
		runtime.LockOSThread() // and never unlocked, so that the thread ends with the goroutine
		err := enter(netns)
		entered <- err
		if err != nil {
			return
		}
		for f := range p.work {
			f()
		}
	}()
	if err := <-entered; err != nil {
		return nil, fmt.Errorf("enter %s: %w", name, err)
	}
	return p, nil
}

func enter(netns string) error {
	fd, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Setns(fd, unix.CLONE_NEWNET)
}

// do runs f on the place's thread: the sockets that it makes there are the place's.
func (p *place) do(f func()) {
	ended := make(chan struct{})
	p.work <- func() { defer close(ended); f() }
	<-ended
}

func (p *place) close() {
	close(p.work)
	<-p.done
}

// dial connects from the place. It takes addresses and no names: looking those up would be another thread's work.
func (p *place) dial(network, address string) (c net.Conn, err error) {
	p.do(func() { c, err = (&net.Dialer{Timeout: patience}).Dial(network, address) })
	return c, err
}

// get is the body of a web page, asked for from the place.
func (p *place) get(url string) (string, error) {
	client := http.Client{Timeout: patience, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(_ context.Context, network, address string) (net.Conn, error) { return p.dial(network, address) },
	}}
	answer, err := client.Get(url)
	if err != nil {
		return "", fmt.Errorf("from %s: %w", p.name, err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = errors.New(answer.Status)
	}
	return string(body), err
}

// serve is a web server at the place until the test ends, which says what address its client has.
func (p *place) serve(t *testing.T, network, address string) {
	t.Helper()
	var l net.Listener
	var err error
	p.do(func() { l, err = net.Listen(network, address) })
	if err != nil {
		t.Fatal(err)
	}
	server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		client, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprint(w, client)
	})}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		server.Serve(l)
	}()
	t.Cleanup(func() {
		server.Close()
		<-ended
	})
}

// serveEcho is a UDP server at the place until the test ends, which sends each datagram back with its client's address.
func (p *place) serveEcho(t *testing.T, address string) {
	t.Helper()
	var c net.PacketConn
	var err error
	p.do(func() { c, err = net.ListenPacket("udp", address) })
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b := make([]byte, 64<<10)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(append(b[:n:n], from.String()...), from)
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-ended
	})
}

// eventually waits until a condition holds, and fails with what it last said.
func eventually(t *testing.T, condition func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// A failure is a command that did not do its work.
type failure struct {
	args   []string
	err    error
	stderr string
}

func (f *failure) Error() string {
	return fmt.Sprintf("%s: %v: %s", strings.Join(f.args, " "), f.err, f.stderr)
}

// try runs a command in the lab as somebody ("user", "root" or "outside"; see .ci/lab), and gives its standard output
// without the last newline. The error holds what it said.
func (l *labType) try(as string, args ...string) (string, error) {
	return l.feed(as, "", args...)
}

// feed is try with something on the command's standard input.
func (l *labType) feed(as, input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "../../.ci/lab", append([]string{as}, args...)...)
	cmd.Env = l.env
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &stdout, &stderr
	cmd.WaitDelay = time.Second // what it left in the background may hold the pipes
	err := cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	out := strings.TrimSuffix(stdout.String(), "\n")
	if err != nil {
		return out, &failure{args, err, stderr.String()}
	}
	return out, nil
}

// user runs a command as the lab's ordinary user, which must succeed.
func (l *labType) user(t *testing.T, args ...string) string {
	t.Helper()
	out, err := l.try("user", args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// root runs a command as the lab's root on host, which must succeed.
func (l *labType) root(t *testing.T, args ...string) string {
	t.Helper()
	out, err := l.try("root", args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// sysctl sets a value of the host until the test ends. The name is a path below /proc/sys.
func (l *labType) sysctl(t *testing.T, name, value string) {
	t.Helper()
	file := "/proc/sys/" + name
	before := l.root(t, "cat", file)
	set := func(value string) {
		t.Helper()
		if _, err := l.feed("root", value, "tee", file); err != nil {
			t.Fatal(err)
		}
	}
	set(value)
	t.Cleanup(func() { set(before) })
}

// line sends something from the place and reads the line that comes back.
func line(from *place, network, address, send string) (string, error) {
	c, err := from.dial(network, address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	// A datagram may be lost while nobody listens: whoever wants an answer asks again.
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, send); err != nil {
		return "", err
	}
	got, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSuffix(got, "\n"), err
}
