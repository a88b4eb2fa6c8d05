package api_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"usernet/api"
	"usernet/api/client"
	"usernet/forwarder/relay"
	"usernet/portdriver"
)

// withDriver is a server of the real driver, which has no container behind it: whoever connects is reset.
func withDriver(t testing.TB) (path string, d *portdriver.Driver) {
	t.Helper()
	loop, err := relay.NewLoop()
	if err != nil {
		t.Fatal(err)
	}
	d, err = portdriver.New(portdriver.Config{Loop: loop, MaxFiles: 20_000, Container4: addr("10.0.2.100"), Gateway4: addr("10.0.2.2"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := loop.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		cancel()
		running.Wait()
		loop.Close()
	})
	path, _ = serve(t, nil, func(c *api.Config) {
		c.Ports, c.Rootlesskit = d, d.Manager()
		c.Info = func() api.Info { i := testInfo(); i.Ports = nil; return i }
	})
	return path, d
}

// freePort is a port of loopback that nobody has, most likely.
func freePort(t testing.TB) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

// The three dialects see one table, with one set of IDs.
func TestDriverInThreeDialects(t *testing.T) {
	path, d := withDriver(t)
	c := client.New(path)
	ctx := t.Context()
	unix := filepath.Join(filepath.Dir(path), "u")
	mine, err := c.Add(ctx, api.AddRequest{Publish: []string{"127.0.0.1:0:80", unix + ":81"}})
	if err != nil || len(mine) != 2 || mine[0].HostPort == 0 || mine[1].HostPath != unix {
		t.Fatalf("%v %+v", err, mine)
	}
	p := freePort(t)
	if got := ask(t, path, fmt.Sprintf(`{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"127.0.0.1","host_port":%d,"guest_port":82}}`, p)); got != `{"return":{"id":3}}` {
		t.Errorf("%s", got)
	}
	q := freePort(t)
	if status, _, answer := request(t, path, "POST", "/v1/ports", fmt.Sprintf(`{"proto":"tcp4","parentIP":"127.0.0.1","parentPort":%d,"childPort":83}`, q)); status != 201 ||
		answer != fmt.Sprintf(`{"id":4,"spec":{"proto":"tcp4","parentIP":"127.0.0.1","parentPort":%d,"childPort":83}}`, q) {
		t.Errorf("%d %s", status, answer)
	}
	list, err := c.List(ctx)
	if err != nil || len(list) != 4 || list[3].ID != 4 || list[3].ContainerPort != 83 {
		t.Errorf("%v %+v", err, list)
	}
	got := ask(t, path, `{"execute":"list_hostfwd"}`)
	for _, want := range []string{
		fmt.Sprintf(`{"id":1,"proto":"tcp","host_addr":"127.0.0.1","host_port":%d,"guest_addr":"10.0.2.100","guest_port":80}`, mine[0].HostPort),
		fmt.Sprintf(`{"id":3,"proto":"tcp","host_addr":"127.0.0.1","host_port":%d,"guest_addr":"10.0.2.100","guest_port":82}`, p),
		fmt.Sprintf(`{"id":4,"proto":"tcp","host_addr":"127.0.0.1","host_port":%d,"guest_addr":"10.0.2.100","guest_port":83}`, q),
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%s lacks %s", got, want)
		}
	}
	if _, _, answer := request(t, path, "GET", "/v1/ports", ""); strings.Count(answer, `"id"`) != 3 {
		t.Errorf("rootlesskit's list: %s", answer)
	}

	// Who connects is counted. There is no container, so that he is reset.
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", p))
	if err == nil { // else the reset has come already
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("somebody speaks")
		}
		conn.Close()
	}
	if f, err := c.Get(ctx, 3); err != nil || f.Total != 1 || f.Refused != 1 {
		t.Errorf("%v %+v", err, f)
	}
	var metrics bytes.Buffer
	if err := c.Metrics(ctx, &metrics); err != nil || !strings.Contains(metrics.String(), fmt.Sprintf(`usernet_forward_refused_total{id="3",proto="tcp",host="127.0.0.1:%d"} 1`, p)) {
		t.Errorf("%v\n%s", err, metrics.String())
	}

	// Each takes away what another has made.
	if status, _, _ := request(t, path, "DELETE", "/v1/ports/3", ""); status != 200 {
		t.Errorf("status %d", status)
	}
	if got := ask(t, path, `{"execute":"remove_hostfwd","arguments":{"id":1}}`); got != `{"return":{}}` {
		t.Error(got)
	}
	if err := errors.Join(c.Remove(ctx, 4, false), c.Remove(ctx, 2, true)); err != nil {
		t.Error(err)
	}
	if left := d.List(); len(left) > 0 {
		t.Errorf("left: %+v", left)
	}
	if _, err := os.Lstat(unix); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the forward's socket is left: %v", err)
	}
	info, err := c.Info(ctx)
	if err != nil || info.Ports == nil || info.Ports.IPv4 == nil || info.Ports.MaxForwards == 0 {
		t.Errorf("%v %+v", err, info.Ports)
	}
	if _, _, answer := request(t, path, "GET", "/v1/info", ""); !strings.Contains(answer, `"disallowLoopbackChildIP":true`) {
		t.Errorf("without a kernel path, the loopback of the container is offered: %s", answer)
	}
}

// The reason and its remedy arrive in each dialect, and a request that failed leaves nothing.
func TestDriverRefuses(t *testing.T) {
	path, d := withDriver(t)
	c := client.New(path)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := taken.Addr().(*net.TCPAddr).Port
	free := freePort(t)
	var e *api.Error
	_, err = c.Add(t.Context(), api.AddRequest{Publish: []string{fmt.Sprintf("127.0.0.1:%d:1", free), fmt.Sprintf("127.0.0.1:%d:80", port)}})
	if !errors.As(err, &e) || e.Code != api.CodeInUse || e.Status != 409 || !strings.Contains(e.Message, "another program") {
		t.Errorf("%v", err)
	}
	_, err = c.Add(t.Context(), api.AddRequest{Publish: []string{fmt.Sprintf("127.0.0.1:%d:1", free), "198.51.100.7:1234:80"}})
	if !errors.As(err, &e) || e.Code != api.CodeNotAvailable || e.Status != 409 {
		t.Errorf("%v", err)
	}
	if _, err = c.Add(t.Context(), api.AddRequest{Forwards: []api.Spec{{Proto: "sctp", HostPort: free, ContainerPort: 1}}}); !errors.As(err, &e) || e.Code != api.CodeBadRequest {
		t.Errorf("%v", err)
	}
	if got := ask(t, path, fmt.Sprintf(`{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"127.0.0.1","host_port":%d,"guest_port":82}}`, port)); !strings.HasPrefix(got,
		`{"error":{"desc":"bad request: add_hostfwd: slirp_add_hostfwd failed: listen tcp`) || !strings.Contains(got, "address already in use") {
		t.Error(got)
	}
	if status, _, answer := request(t, path, "POST", "/v1/ports", fmt.Sprintf(`{"proto":"tcp","parentIP":"127.0.0.1","parentPort":%d,"childPort":80}`, port)); status != 400 ||
		!strings.Contains(answer, "bind: address already in use") {
		t.Errorf("%d %s", status, answer)
	}
	if left := d.List(); len(left) > 0 {
		t.Errorf("left: %+v", left)
	}
	if ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", free)); err != nil {
		t.Errorf("a port of a request that failed is held: %v", err)
	} else {
		ln.Close()
	}
}

// BenchmarkForwards adds and lists 10 000 ports by one request each, and takes the driver's time for the rest.
func BenchmarkForwards(b *testing.B) {
	path, d := withDriver(b)
	c := client.New(path)
	for b.Loop() {
		added, err := c.Add(b.Context(), api.AddRequest{Publish: []string{"127.0.0.1:20000-29999:20000-29999"}})
		if err != nil {
			b.Skipf("this machine does not give 10 000 ports: %v", err)
		}
		list, err := c.List(b.Context())
		if err != nil || len(list) != len(added) || len(list) != 10000 {
			b.Fatalf("%d of %d: %v", len(list), len(added), err)
		}
		b.StopTimer()
		for _, f := range added {
			if err := d.Remove(b.Context(), f.ID, false); err != nil {
				b.Fatal(err)
			}
		}
		b.StartTimer()
	}
}
