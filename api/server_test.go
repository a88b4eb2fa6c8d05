package api_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"usernet/api"
	"usernet/api/client"
)

// Slow clients of every kind are cut off, and as many of them as there are places keep nobody out for longer.
func TestSlowClients(t *testing.T) {
	path := socketPath(t)
	s, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	api.SetPatience(s, 50*time.Millisecond)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	var slow []net.Conn
	for i := range api.MaxConns * 2 {
		c := dial(t, path)
		io.WriteString(c, []string{"", "{", "G", "GET /v1/usernet/info HTTP/1.1\r\nHost: x\r\n"}[i%4])
		slow = append(slow, c)
	}
	if status, _, _ := request(t, path, "GET", "/v1/usernet/info", ""); status != 200 {
		t.Errorf("status %d", status)
	}
	for i, c := range slow {
		b, err := io.ReadAll(c)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("client %d: %v", i, err)
		}
		want := []string{"", `{"error":{"desc":"bad request: cannot parse JSON"}}`, "", ""}[i%4]
		if string(b) != want && !strings.HasPrefix(string(b), "HTTP/1.1 4") {
			t.Errorf("client %d: %q, want %q", i, b, want)
		}
	}
	cancel()
	if err := errors.Join(<-done, s.Close()); err != nil {
		t.Error(err)
	}
}

// A client that does not read its answer ends with the server, and so does everything else that hangs.
func TestEndWithClientsThatHang(t *testing.T) {
	ports := newFake()
	ports.quick = true
	path, stop := serve(t, ports)
	clientAdd(t, path, api.AddRequest{Publish: []string{"1000-30000:1000-30000"}})
	deaf := dial(t, path)
	io.WriteString(deaf, "GET /v1/usernet/forwards HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := deaf.Read(make([]byte, 1)); err != nil { // it is being answered
		t.Fatal(err)
	}
	var conns []net.Conn
	for _, sent := range []string{"", "{", "GET ", "POST /v1/usernet/forwards HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"} {
		c := dial(t, path)
		io.WriteString(c, sent)
		conns = append(conns, c)
	}
	alive := dial(t, path)
	io.WriteString(alive, "GET /v1/usernet/info HTTP/1.1\r\nHost: x\r\n\r\n")
	r, err := http.ReadResponse(bufio.NewReader(alive), nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	stop()
	for _, c := range append(conns, alive) {
		if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v", err)
		}
	}
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("it still listens")
	}
}

// A request that runs at the end gets its answer.
func TestEndWaitsForRequests(t *testing.T) {
	slow := &slowPorts{fakePorts: newFake(), entered: make(chan struct{}), release: make(chan struct{})}
	path, stop := serve(t, nil, func(c *api.Config) { c.Ports = slow })
	c := client.New(path)
	answer := make(chan error, 1)
	go func() {
		_, err := c.List(t.Context())
		answer <- err
	}()
	<-slow.entered
	var stopping sync.WaitGroup
	stopping.Go(stop)
	close(slow.release)
	if err := <-answer; err != nil {
		t.Error(err)
	}
	stopping.Wait()
}

// Close alone ends Serve.
func TestCloseEndsServe(t *testing.T) {
	path := socketPath(t)
	s, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(context.Background()) }()
	if status, _, _ := request(t, path, "GET", "/v1/usernet/info", ""); status != 200 {
		t.Errorf("status %d", status)
	}
	if err := errors.Join(s.Close(), <-done); err != nil {
		t.Error(err)
	}
}

func TestConfigWithoutInfo(t *testing.T) {
	if _, err := api.Listen(api.Config{Path: socketPath(t)}); err == nil {
		t.Error("taken")
	}
}

// What is too large is refused in the dialect's words, and keeps no memory.
func TestHeadersAreBounded(t *testing.T) {
	path, _ := serve(t, newFake())
	c := dial(t, path)
	go func() {
		fmt.Fprintf(c, "GET /v1/usernet/info HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n", strings.Repeat("x", 10*api.MaxHeader))
	}()
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("%s", r.Status)
	}
	body := fmt.Sprintf(`{"publish":["8080:80"%s]}`, strings.Repeat(" ", api.MaxBody))
	if status, _, answer := request(t, path, "POST", "/v1/usernet/forwards", body[:api.MaxBody-1]); status != 400 {
		t.Errorf("%d %s", status, answer)
	}
}

// Requests run beside each other: one that waits holds up nobody.
func TestRequestsRunInParallel(t *testing.T) {
	slow := &slowPorts{fakePorts: newFake(), entered: make(chan struct{}), release: make(chan struct{})}
	path, _ := serve(t, nil, func(c *api.Config) { c.Ports = slow })
	var waiting sync.WaitGroup
	waiting.Go(func() { request(t, path, "GET", "/v1/usernet/forwards", "") })
	<-slow.entered
	if status, _, _ := request(t, path, "GET", "/v1/usernet/info", ""); status != 200 {
		t.Errorf("status %d", status)
	}
	if got := ask(t, path, add); got != `{"return":{"id":1}}` {
		t.Error(got)
	}
	close(slow.release)
	waiting.Wait()
}

// slowPorts lists when it may, the first time.
type slowPorts struct {
	*fakePorts
	once             sync.Once
	entered, release chan struct{}
}

func (p *slowPorts) List() []forward {
	p.once.Do(func() {
		close(p.entered)
		<-p.release
	})
	return p.fakePorts.List()
}

// Out of descriptors, the listener pauses and goes on.
func TestOutOfFiles(t *testing.T) {
	if os.Getenv("USERNET_TEST_FILES") == "" { // the limit is the whole process's, so it is one of its own
		again(t, "USERNET_TEST_FILES=1")
		return
	}
	path, _ := serve(t, newFake())
	c := dial(t, path) // connected before there is no descriptor left
	first := dial(t, path)
	if _, err := io.WriteString(first, add); err != nil || readAll(t, first) == "" {
		t.Fatal("no answer")
	}
	first.Close()
	next, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	var held []*os.File
	low := unix.Rlimit{Cur: 256, Max: old.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	for {
		f, err := os.Open("/dev/null")
		if err != nil {
			break
		}
		held = append(held, f)
	}
	if err := unix.Connect(next, &unix.SockaddrUnix{Name: path}); err != nil { // accepting it fails
		t.Fatal(err)
	}
	for _, f := range held {
		f.Close()
	}
	f := os.NewFile(uintptr(next), filepath.Base(path))
	defer f.Close()
	if _, err := io.WriteString(f, `{"execute":"list_hostfwd"}`); err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, f); !strings.Contains(got, "8080") {
		t.Error(got)
	}
	io.WriteString(c, `{"execute":"list_hostfwd"}`)
	if got := readAll(t, c); !strings.Contains(got, "8080") {
		t.Error(got)
	}
}
