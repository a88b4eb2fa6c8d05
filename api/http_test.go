package api_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	rootlesskit "github.com/rootless-containers/rootlesskit/v3/pkg/api/client"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"

	"usernet/api"
	"usernet/api/client"
	"usernet/portdriver"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func clientAdd(t testing.TB, path string, request api.AddRequest) []api.Forward {
	t.Helper()
	c := client.New(path)
	fs, err := c.Add(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

// request speaks HTTP by hand, once.
func request(t testing.TB, path, method, url, body string) (status int, contentType, answer string) {
	t.Helper()
	c := dial(t, path)
	fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", method, url, len(body), body)
	r, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	return r.StatusCode, r.Header.Get("Content-Type"), readAll(t, r.Body)
}

// rootlesskit's API to the octet, in the order of a life.
func TestRootlesskit(t *testing.T) {
	path, _ := serve(t, newFake())
	for _, c := range []struct {
		method, url, body string
		status            int
		answer            string
	}{
		{"GET", "/v1/ports", "", 200, `null`},
		{"POST", "/v1/ports", `{"proto":"tcp","parentIP":"127.0.0.1","parentPort":18080,"childPort":80}`, 201,
			`{"id":1,"spec":{"proto":"tcp","parentIP":"127.0.0.1","parentPort":18080,"childPort":80}}`},
		{"POST", "/v1/ports", `{"proto":"tcp","parentIP":"127.0.0.1","parentPort":18080,"childPort":80}`, 400, `{"message":"conflict with ID 1"}`},
		{"POST", "/v1/ports", `x`, 400, `{"message":"invalid character 'x' looking for beginning of value"}`},
		{"POST", "/v1/ports", strings.Repeat(" ", 2<<20), 400, `{"message":"http: request body too large"}`},
		{"GET", "/v1/ports", "", 200, `[{"id":1,"spec":{"proto":"tcp","parentIP":"127.0.0.1","parentPort":18080,"childPort":80}}]`},
		{"DELETE", "/v1/ports/99", "", 400, `{"message":"unknown id: 99"}`},
		{"DELETE", "/v1/ports/abc", "", 400, `{"message":"bad id abc: strconv.Atoi: parsing \"abc\": invalid syntax"}`},
		{"DELETE", "/v1/ports/1", "", 200, ``},
		{"GET", "/v1/ports", "", 200, `null`},
		{"GET", "/v2/ports", "", 404, "404 page not found\n"},
		{"PUT", "/v1/ports", "", 405, "Method Not Allowed\n"},
		{"GET", "/v1/info", "", 200, `{"apiVersion":"1.1.3","version":"3.3.0","stateDir":"` + filepath.Dir(path) + `","childPID":4711,` +
			`"networkDriver":{"driver":"usernet","dns":["10.0.2.3","fd00::3"],"childIP":"10.0.2.100","ipv6":true},` +
			`"portDriver":{"driver":"usernet","protos":["tcp","tcp4","tcp6","udp","udp4","udp6"]}}`},
	} {
		conn := dial(t, path)
		go func() { // the answer to what is too large comes before all of it is sent
			fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", c.method, c.url, len(c.body), c.body)
		}()
		r, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%s %s: %v", c.method, c.url, err)
		}
		answer, _ := io.ReadAll(r.Body) // a reset follows what is too large
		if trimmed := strings.TrimSuffix(string(answer), "\n"); r.StatusCode != c.status || trimmed != strings.TrimSuffix(c.answer, "\n") {
			t.Errorf("%s %s %.100s\nanswer %d %s\nwant   %d %s", c.method, c.url, c.body, r.StatusCode, answer, c.status, c.answer)
		}
		r.Body.Close()
	}
}

func TestRootlesskitWithoutPorts(t *testing.T) {
	path, _ := serve(t, nil)
	if status, _, answer := request(t, path, "GET", "/v1/ports", ""); status != 400 || strings.TrimSpace(answer) != `{"message":"no PortDriver is available"}` {
		t.Errorf("%d %s", status, answer)
	}
	if _, _, answer := request(t, path, "GET", "/v1/info", ""); strings.Contains(answer, "portDriver") {
		t.Errorf("info tells of a port driver: %s", answer)
	}
}

// rootlesskit's own client.
func TestRootlesskitClient(t *testing.T) {
	path, _ := serve(t, newFake())
	c, err := rootlesskit.New(path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	info, err := c.Info(t.Context())
	if err != nil || info.APIVersion != "1.1.3" || info.NetworkDriver.ChildIP.String() != "10.0.2.100" || len(info.PortDriver.Protos) != 6 {
		t.Errorf("%v %+v", err, info)
	}
	pm := c.PortManager()
	spec := port.Spec{Proto: "udp", ParentIP: "::1", ParentPort: 5353, ChildPort: 53}
	st, err := pm.AddPort(t.Context(), spec)
	if err != nil || st.ID != 1 || st.Spec != spec {
		t.Fatalf("%v %+v", err, st)
	}
	if _, err := pm.AddPort(t.Context(), spec); err == nil || err.Error() != "conflict with ID 1" {
		t.Errorf("%v", err)
	}
	if list, err := pm.ListPorts(t.Context()); err != nil || len(list) != 1 || list[0].Spec != spec {
		t.Errorf("%v %+v", err, list)
	}
	if err := errors.Join(pm.RemovePort(t.Context(), 1)); err != nil {
		t.Error(err)
	}
	if err := pm.RemovePort(t.Context(), 77); err == nil || err.Error() != "unknown id: 77" {
		t.Errorf("%v", err)
	}
}

// rootlessctl as a distribution has it (1.x, 2.x or 3.x), and of the module that we build with.
func TestRootlessctl(t *testing.T) {
	for name, find := range map[string]func(*testing.T) string{
		"installed": func(t *testing.T) string {
			bin, err := exec.LookPath("rootlessctl")
			if err != nil {
				t.Skip("there is no rootlessctl on this machine")
			}
			return bin
		},
		"module": func(t *testing.T) string {
			if testing.Short() {
				t.Skip("building it takes its time")
			}
			// By itself, as our go.sum does not have what only the program needs.
			list := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Version}}", "github.com/rootless-containers/rootlesskit/v3")
			version, err := list.Output()
			if err != nil {
				t.Skipf("there is no Go on this machine: %v", err)
			}
			dir := t.TempDir()
			install := exec.CommandContext(t.Context(), "go", "install", "github.com/rootless-containers/rootlesskit/v3/cmd/rootlessctl@"+strings.TrimSpace(string(version)))
			install.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=")
			if out, err := install.CombinedOutput(); err != nil {
				t.Skipf("rootlessctl's modules are not to be had here: %v: %s", err, out)
			}
			bin := filepath.Join(dir, "rootlessctl")
			return bin
		},
	} {
		t.Run(name, func(t *testing.T) {
			bin := find(t)
			path, _ := serve(t, newFake())
			for _, c := range []struct {
				args string
				want string // a part of what is said
				ok   bool
			}{
				{"add-ports 0.0.0.0:8080:80/tcp 127.0.0.1:5353:53/udp", "1\n2\n", true},
				{"list-ports", "8080", true},
				{"list-ports --json", `{"id":2,"spec":{"proto":"udp","parentIP":"127.0.0.1","parentPort":5353,"childPort":53}}`, true},
				{"add-ports 0.0.0.0:8080:80/tcp", "conflict with ID 1", false},
				{"add-ports 0.0.0.0:1:80/tcp", "privileged", false},
				{"remove-ports 1 2", "1\n2\n", true},
				{"remove-ports 77", "unknown id: 77", false},
				{"add-ports bad", "bad", false},
				{"info", "1.1.3", true},
				{"info --json", `"childIP": "10.0.2.100"`, true},
			} {
				cmd := exec.CommandContext(t.Context(), bin, append([]string{"--socket", path}, strings.Fields(c.args)...)...)
				out, err := cmd.CombinedOutput()
				if (err == nil) != c.ok || !strings.Contains(string(out), c.want) {
					t.Errorf("rootlessctl %s: %v: %s, want %q", c.args, err, out, c.want)
				}
			}
		})
	}
}

func TestCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("there is no curl on this machine")
	}
	path, _ := serve(t, newFake())
	run := func(args ...string) string {
		out, err := exec.CommandContext(t.Context(), curl, append([]string{"-sS", "--unix-socket", path, "-w", "%{http_code}"}, args...)...).CombinedOutput()
		if err != nil {
			t.Errorf("curl %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	if got := run("-d", `{"publish":["8080:80"]}`, "http://usernet/v1/usernet/forwards"); !strings.HasSuffix(got, "201") {
		t.Error(got)
	}
	if got := run("-d", `{"proto":"tcp","parentPort":8081,"childPort":80}`, "http://x/v1/ports"); !strings.HasSuffix(got, "201") {
		t.Error(got)
	}
	// Before a large body curl asks whether to go on; with one that is too large it is told, and not cut off.
	for spaces, status := range map[int]string{1 << 19: "201", 3 << 20: "413"} {
		big := filepath.Join(t.TempDir(), "big")
		if err := os.WriteFile(big, []byte(`{"publish":["8082:80"`+strings.Repeat(" ", spaces)+`]}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := run("--data-binary", "@"+big, "http://x/v1/usernet/forwards"); !strings.HasSuffix(got, status) {
			t.Error(got)
		}
	}
	if got := run("-X", "DELETE", "http://x/v1/usernet/forwards/2"); got != "204" {
		t.Error(got)
	}
	if got := run("http://x/v1/usernet/metrics"); !strings.Contains(got, `usernet_forward_connections{id="1",proto="tcp",host="8080"} 1`) {
		t.Error(got)
	}
}

// Our own client, and every error that the API knows.
func TestForwards(t *testing.T) {
	ports := newFake()
	path, _ := serve(t, ports)
	c := client.New(path)
	ctx := t.Context()
	if list, err := c.List(ctx); err != nil || len(list) != 0 {
		t.Errorf("%v %v", list, err)
	}
	added, err := c.Add(ctx, api.AddRequest{
		Publish:  []string{"127.0.0.1:8080:80", "[::1]:9000-9001:9000-9001/udp"},
		Forwards: []api.Spec{{Proto: "tcp6", HostPort: 7, Container: addr("fd00::9"), ContainerPort: 70}, {Proto: "tcp", HostPath: "/run/s", ContainerPort: 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var ids []int
	for _, f := range added {
		ids = append(ids, f.ID)
	}
	if !reflect.DeepEqual(ids, []int{1, 2, 3, 4, 5}) {
		t.Errorf("IDs %v", ids)
	}
	want := api.Forward{ID: 1, Spec: api.Spec{Proto: "tcp", Host: addr("127.0.0.1"), HostPort: 8080, ContainerPort: 80},
		Path: "kernel", Active: 1, Total: 3, Refused: 1, OctetsIn: 1 << 40, OctetsOut: 7}
	if added[0] != want {
		t.Errorf("%+v\nwant %+v", added[0], want)
	}
	if list, err := c.List(ctx); err != nil || !reflect.DeepEqual(list, added) {
		t.Errorf("%v\nlist  %+v\nadded %+v", err, list, added)
	}
	if f, err := c.Get(ctx, 4); err != nil || f != added[3] {
		t.Errorf("%v %+v", err, f)
	}
	if err := c.Remove(ctx, 1, true); err != nil || ports.drains != 1 {
		t.Errorf("%v, %d drained", err, ports.drains)
	}
	if err := c.Remove(ctx, 2, false); err != nil || ports.drains != 1 {
		t.Errorf("%v, %d drained", err, ports.drains)
	}

	before := ports.List()
	for _, f := range []struct {
		request api.AddRequest
		want    api.Error
	}{
		{api.AddRequest{}, api.Error{Status: 400, Code: api.CodeBadRequest}},
		{api.AddRequest{Publish: []string{"nonsense"}}, api.Error{Status: 400, Code: api.CodeBadRequest}},
		{api.AddRequest{Publish: []string{"6:6", "[::1]:9001:1/udp"}}, api.Error{Status: 409, Code: api.CodeConflict, Conflict: 3}},
		{api.AddRequest{Publish: []string{"6:6", "1:1"}}, api.Error{Status: 403, Code: api.CodeNotPermitted}},
		{api.AddRequest{Publish: []string{"6:6", "2:2"}}, api.Error{Status: 409, Code: api.CodeInUse}},
		{api.AddRequest{Publish: []string{"6:6", "3:3"}}, api.Error{Status: 409, Code: api.CodeNotAvailable}},
		{api.AddRequest{Publish: []string{"6:6", "4:4"}}, api.Error{Status: 503, Code: api.CodeBusy}},
		{api.AddRequest{Publish: []string{"1-65535:1-65535", "1-65535:1-65535/udp", "1-65535:1-65535/tcp6"}}, api.Error{Status: 413, Code: api.CodeTooLarge}},
		{api.AddRequest{Publish: []string{"6:6", "./a.sock:80"}}, api.Error{Status: 400, Code: api.CodeBadRequest}},
		{api.AddRequest{Forwards: []api.Spec{{Proto: "tcp", HostPath: "@a", ContainerPort: 80}}}, api.Error{Status: 400, Code: api.CodeBadRequest}},
		{api.AddRequest{Forwards: []api.Spec{{}}}, api.Error{Status: 400, Code: api.CodeBadRequest}},
	} {
		_, err := c.Add(ctx, f.request)
		var got *api.Error
		if !errors.As(err, &got) || got.Message == "" {
			t.Errorf("%+v: %v", f.request, err)
			continue
		}
		if f.want.Message = got.Message; *got != f.want {
			t.Errorf("%+v: %+v, want %+v", f.request, *got, f.want)
		}
	}
	if after := ports.List(); !reflect.DeepEqual(before, after) {
		t.Errorf("requests that failed left something behind: %v", after)
	}
	var unknown *api.Error
	if _, err := c.Get(ctx, 77); !errors.As(err, &unknown) || unknown.Status != 404 || unknown.Code != api.CodeUnknownID {
		t.Errorf("%v", err)
	}
	if err := c.Remove(ctx, 77, false); !errors.As(err, &unknown) || unknown.Code != api.CodeUnknownID {
		t.Errorf("%v", err)
	}
	info, err := c.Info(ctx)
	full := testInfo()
	full.APIVersion, full.PID = api.Version, os.Getpid()
	if info.Started.Equal(full.Started) {
		info.Started = full.Started
	}
	if err != nil || !reflect.DeepEqual(info, full) {
		t.Errorf("%v\ninfo %+v\nwant %+v", err, info, full)
	}
}

// Nothing of a request is passed over: a key that is misspelt may have been what kept a port from the world.
func TestForwardsAreReadStrictly(t *testing.T) {
	ports := newFake()
	path, _ := serve(t, ports)
	for _, body := range []string{
		``, `null`, `[]`, `{`, `{"publish":"8080:80"}`, `{"publish":["8080:80"]} {}`, `{"publish":["8080:80"]} x`,
		`{"forwards":[{"proto":"tcp","hots":"127.0.0.1","hostPort":8080,"containerPort":80}]}`,
		`{"forwards":[{"proto":"tcp","host":"localhost","hostPort":8080,"containerPort":80}]}`,
		`{"forwards":[{"proto":"tcp","hostPort":70000,"containerPort":80}]}`,
		`{"forwards":[{"proto":"tcp","hostPort":-1,"containerPort":80}]}`,
	} {
		status, kind, answer := request(t, path, "POST", "/v1/usernet/forwards", body)
		var e api.Error
		if err := json.Unmarshal([]byte(answer), &e); status != 400 || kind != "application/json" || err != nil || e.Code != api.CodeBadRequest || e.Message == "" {
			t.Errorf("%s: %d %s %s", body, status, kind, answer)
		}
	}
	for url, want := range map[string]int{
		"/v1/usernet/forwards/x":                 400,
		"/v1/usernet/forwards/1?drain=no":        400,
		"/v1/usernet/forwards/1?drain=":          400,
		"/v1/usernet/forwards/1?drian=1":         400,
		"/v1/usernet/forwards/1?drain=%z":        400,
		"/v1/usernet/forwards/1?drain=1;":        400,
		"/v1/usernet/forwards/1?drain=1&drain=1": 400,
		"/v1/usernet/forwards/1?drain=1":         404,
		"/v1/usernet/forwards/1":                 404,
		"/v1/usernet/forwards/1e9":               400,
		"/v1/usernet/forwards":                   405,
		"/v1/usernet/info":                       405,
		"/v1/usernet/nothing":                    404,
		"/v1/usernet/debug/pprof/heap":           404, // not asked for
	} {
		status, kind, answer := request(t, path, "DELETE", url, "")
		if status != want || kind != "application/json" || !strings.Contains(answer, `"message":"`) {
			t.Errorf("DELETE %s: %d %s %s, want %d", url, status, kind, answer, want)
		}
	}
	if left := ports.List(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// 10 000 forwards in one request, and each in one of its own.
func TestManyForwards(t *testing.T) {
	ports := newFake()
	ports.quick = true
	path, _ := serve(t, ports)
	if n := len(clientAdd(t, path, api.AddRequest{Publish: []string{"10000-19999:10000-19999"}})); n != 10000 {
		t.Errorf("%d are added", n)
	}
	c := client.New(path)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 100 {
				if _, err := c.Add(t.Context(), api.AddRequest{Forwards: []api.Spec{{Proto: "udp", HostPort: uint16(1000 + w*100 + i), ContainerPort: 9}}}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	list, err := c.List(t.Context())
	if err != nil || len(list) != 10800 {
		t.Errorf("%d are listed: %v", len(list), err)
	}
}

func TestPprof(t *testing.T) {
	path, _ := serve(t, newFake(), func(c *api.Config) { c.Pprof = true })
	for url, want := range map[string]int{
		"goroutine?debug=1": 200, "heap": 200, "profile?seconds=1": 200, "profile?seconds=0": 400, "profile?seconds=x": 400, "nothing": 404,
	} {
		status, _, answer := request(t, path, "GET", "/v1/usernet/debug/pprof/"+url, "")
		if status != want || answer == "" {
			t.Errorf("%s: %d %.100q, want %d", url, status, answer, want)
		}
	}
}

// A client that has gone takes its request with it: nothing is published that nobody knows of.
func TestClientGoesBeforeItsRequestRuns(t *testing.T) {
	ports := newFake()
	blocked := &blockedPorts{fakePorts: ports, entered: make(chan struct{})}
	path, _ := serve(t, nil, func(c *api.Config) { c.Ports = blocked })
	c := client.New(path)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := c.Add(ctx, api.AddRequest{Publish: []string{"8080:80"}})
		done <- err
	}()
	<-blocked.entered
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	blocked.wait.Wait()
	if left := ports.List(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// blockedPorts adds when the request's client has gone.
type blockedPorts struct {
	*fakePorts
	entered chan struct{}
	wait    sync.WaitGroup
}

func (p *blockedPorts) Add(ctx context.Context, specs ...portdriver.Spec) ([]portdriver.Forward, error) {
	p.wait.Add(1)
	defer p.wait.Done()
	close(p.entered)
	<-ctx.Done()
	return p.fakePorts.Add(ctx, specs...)
}

func TestClientExplains(t *testing.T) {
	path := socketPath(t)
	c := client.New(path)
	if _, err := c.Info(t.Context()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "no usernet") {
		t.Errorf("%v", err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	go func() {
		if c, err := ln.Accept(); err == nil {
			c.Close()
		}
	}()
	if _, err := c.Info(t.Context()); err == nil || !strings.Contains(err.Error(), "only the user") {
		t.Errorf("%v", err)
	}
	go func() {
		if c, err := ln.Accept(); err == nil {
			c.Read(make([]byte, 1))
			c.Write([]byte("220 mail.example.com\r\n"))
			c.Close()
		}
	}()
	if _, err := c.Info(t.Context()); err == nil || !strings.Contains(err.Error(), "something else") || strings.Contains(err.Error(), "only the user") {
		t.Errorf("%v", err)
	}
	ln.Close()
	if _, err := c.Info(t.Context()); err == nil || !strings.Contains(err.Error(), "has ended") || strings.Contains(err.Error(), "http://") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	if _, err := c.Info(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}
