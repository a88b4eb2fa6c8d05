package portdriver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"

	"golang.org/x/sys/unix"
)

func TestTable(t *testing.T) {
	d := bare(t, nil)
	if list := d.List(); len(list) != 0 {
		t.Errorf("at first: %v", list)
	}
	fs := publish(t, d, "127.0.0.1:0:80", "[::1]:0:81", "0:82/udp", "0:83")
	for i, f := range fs {
		if f.ID != i+1 || f.Spec.HostPort == 0 || f.Auto || f.Draining {
			t.Errorf("%+v", f)
		}
		if got, ok := d.Get(f.ID); !ok || got != f {
			t.Errorf("get: %+v, want %+v", got, f)
		}
	}
	if u := fs[2]; u.Path != PathTAP || u.Active != 1 || u.Total != 2 || u.Refused != 3 || u.OctetsIn != 4 || u.OctetsOut != 5 {
		t.Errorf("UDP: %+v", u)
	}
	if err := d.Remove(t.Context(), 2, false); err != nil {
		t.Error(err)
	}
	var unknown ErrUnknownID
	if err := d.Remove(t.Context(), 2, false); !errors.As(err, &unknown) || unknown.ID != 2 || err.Error() != "unknown id: 2" {
		t.Errorf("remove it again: %v", err)
	}
	if _, ok := d.Get(2); ok {
		t.Error("it is still there")
	}
	again := publish(t, d, fmt.Sprintf("[::1]:%d:81", fs[1].Spec.HostPort))
	if again[0].ID != 5 {
		t.Errorf("an ID was used again: %+v", again)
	}
	var ids []int
	for _, f := range d.List() {
		ids = append(ids, f.ID)
	}
	if fmt.Sprint(ids) != "[1 3 4 5]" {
		t.Errorf("list: %v", ids)
	}
	if err := d.Remove(t.Context(), 3, false); err != nil {
		t.Error(err)
	}
	if n := d.cfg.UDP.(*fakeUDP).open.Load(); n != 0 {
		t.Errorf("%d UDP ports are open", n)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := d.Add(t.Context(), Spec{Proto: "tcp", ContainerPort: 1}); !errors.Is(err, ErrClosed) {
		t.Errorf("add after Close: %v", err)
	}
}

func TestBadSpecs(t *testing.T) {
	d := bare(t, func(c *Config) { c.UDP = nil })
	for _, s := range [][]Spec{
		nil,
		{{Proto: "sctp", ContainerPort: 1}},
		{{Proto: "tcp"}},
		{{Proto: "tcp", ContainerPort: 1}, {Proto: "udp", ContainerPort: 1}}, // there is no UDP
		{{Proto: "tcp", HostPort: 40001, ContainerPort: 1}, {Proto: "tcp", HostPort: 40001, ContainerPort: 2}},
	} {
		if fs, err := d.Add(t.Context(), s...); err == nil {
			t.Errorf("%v: added %v", s, fs)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.Add(ctx, Spec{Proto: "tcp", ContainerPort: 1}); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled request: %v", err)
	}
	if list := d.List(); len(list) != 0 {
		t.Errorf("left: %v", list)
	}
}

// freePorts finds n free ports in a row.
func freePorts(t *testing.T, n int) int {
	t.Helper()
	for first := 20000; first < 30000; first += n {
		var lns []net.Listener
		for port := first; port < first+n; port++ {
			if ln, err := net.Listen("tcp", fmt.Sprintf(":%d", port)); err == nil {
				lns = append(lns, ln)
			}
		}
		for _, ln := range lns {
			ln.Close()
		}
		if len(lns) == n {
			return first
		}
	}
	t.Fatal("no ports are free")
	return 0
}

func TestRangeIsAllOrNothing(t *testing.T) {
	d := bare(t, nil)
	first := freePorts(t, 10)
	taken, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+7))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	specs, err := ParseSpec(fmt.Sprintf("%d-%d", first, first+9))
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.Add(t.Context(), specs...)
	var e *ErrListen
	if !errors.As(err, &e) || !errors.Is(err, unix.EADDRINUSE) || e.Spec.HostPort != uint16(first+7) {
		t.Fatalf("with a port taken: %v", err)
	}
	want := fmt.Sprintf("listen tcp :%d: bind: address already in use: another program of the host has it (ss -Hntlp 'sport = %[1]d' names it)", first+7)
	if !strings.HasPrefix(err.Error(), want) {
		t.Errorf("error %q, want %q", err, want)
	}
	if list := d.List(); len(list) != 0 {
		t.Errorf("left: %v", list)
	}
	taken.Close()
	fs, err := d.Add(t.Context(), specs...)
	if err != nil || len(fs) != 10 || fs[0].ID != 1 {
		t.Fatalf("with none taken: %v, %v", fs, err)
	}

	// What fails late undoes all too.
	d.cfg.UDP.(*fakeUDP).fail = unix.ENOBUFS
	if _, err := d.Add(t.Context(), Spec{Proto: "tcp", HostPort: uint16(first + 20), ContainerPort: 1}, Spec{Proto: "udp", ContainerPort: 1}); !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("no UDP: %v", err)
	}
	ln, err := net.Listen("tcp", fmt.Sprintf(":%d", first+20))
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
}

func TestConflict(t *testing.T) {
	d := bare(t, nil)
	f := publish(t, d, "127.0.0.1:0:80")[0]
	same := f.Spec
	same.ContainerPort = 81
	var conflict ErrConflict
	if _, err := d.Add(t.Context(), same); !errors.As(err, &conflict) || conflict.ID != f.ID || err.Error() != "conflict with ID 1: remove that forward, or choose another port" {
		t.Errorf("the same place: %v", err)
	}
	other := same
	other.Proto = "tcp4"
	if _, err := d.Add(t.Context(), other); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "the forward with ID 1 has it") {
		t.Errorf("the same place by another name: %v", err)
	}
	if err := d.Remove(t.Context(), f.ID, false); err != nil {
		t.Fatal(err)
	}
	wild := Spec{Proto: "tcp", HostPort: same.HostPort, ContainerPort: 80}
	if _, err := d.Add(t.Context(), wild, same); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "of the same request has it") {
		t.Errorf("both in one request: %v", err)
	}
	if _, err := d.Add(t.Context(), same); err != nil {
		t.Errorf("when it has gone: %v", err)
	}
}

// unprivileged runs f on a thread that may not bind privileged ports.
func unprivileged(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and it ends with the goroutine
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&hdr, &data[0]); err != nil {
			t.Error(err)
			return
		}
		data[0].Effective &^= 1 << unix.CAP_NET_BIND_SERVICE
		if err := unix.Capset(&hdr, &data[0]); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

func TestRemedies(t *testing.T) {
	d := bare(t, nil)
	add := func(s string) error {
		specs, err := ParseSpec(s)
		if err != nil {
			t.Fatal(err)
		}
		_, err = d.Add(t.Context(), specs...)
		return err
	}
	for _, c := range []struct {
		spec  string
		errno error
		want  string
	}{
		{"192.0.2.1:8080:80", unix.EADDRNOTAVAIL, "listen tcp 192.0.2.1:8080: bind: cannot assign requested address: the host has no address 192.0.2.1 now"},
		{"[2001:db8:9::1]:8080:80/udp6", unix.EADDRNOTAVAIL, "listen udp6 [2001:db8:9::1]:8080: bind: cannot assign"},
		{"[fe80::1%none0]:8080:80", unix.ENODEV, "the host has no interface none0"},
	} {
		if err := add(c.spec); !errors.Is(err, c.errno) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.spec, err, c.want)
		}
	}
	unprivileged(t, func() {
		for _, spec := range []string{"80:80", "80/udp", "127.0.0.1:80:80/tcp4"} {
			if err := add(spec); !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "bind: permission denied: ports below 1024 are privileged here: "+
				"choose one from 1024 on, or let root set sysctl net.ipv4.ip_unprivileged_port_start=80") {
				t.Errorf("%s: %v", spec, err)
			}
		}
		_, err := d.Manager().AddPort(t.Context(), port.Spec{Proto: "tcp", ParentPort: 80, ChildPort: 80})
		if want := "cannot expose privileged port 80, you can add 'net.ipv4.ip_unprivileged_port_start=80' to /etc/sysctl.conf (currently 1024), " +
			"or set CAP_NET_BIND_SERVICE on " + filepath.Base(os.Args[0]) + " binary, or choose a larger port number (>= 1024): listen tcp :80: bind: permission denied"; err == nil || err.Error() != want {
			t.Errorf("rootlesskit's: %v", err)
		}
	})
	small := bare(t, func(c *Config) { c.MaxFiles = 1 })
	for range minLimit {
		publish(t, small, "127.0.0.1:0:80")
	}
	_, err := small.Add(t.Context(), Spec{Proto: "tcp", ContainerPort: 80})
	var limit ErrLimit
	if !errors.As(err, &limit) || limit.Max != minLimit || !strings.Contains(err.Error(), "ulimit -n") {
		t.Errorf("one too many: %v", err)
	}
}

func TestManager(t *testing.T) {
	d := bare(t, nil)
	m := d.Manager()
	if list, err := m.ListPorts(t.Context()); list != nil || err != nil {
		t.Errorf("none is null: %v, %v", list, err)
	}
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	inUse := taken.Addr().(*net.TCPAddr).Port
	first := freePorts(t, 2)
	said := port.Spec{Proto: "tcp", ParentIP: "0:0:0::1", ParentPort: first, ChildPort: 80, ChildIP: "10.0.2.100"}
	status, err := m.AddPort(t.Context(), said)
	if err != nil || status.ID != 1 || status.Spec != said {
		t.Fatalf("%+v, %v", status, err)
	}
	for _, c := range []struct {
		spec port.Spec
		want string
	}{
		{said, "conflict with ID 1"},
		{port.Spec{Proto: "tcp4", ParentIP: "127.0.0.1", ParentPort: inUse, ChildPort: 80}, fmt.Sprintf("listen tcp4 127.0.0.1:%d: bind: address already in use", inUse)},
		{port.Spec{Proto: "sctp", ParentPort: 80, ChildPort: 80}, "unsupported port protocol sctp"},
		{port.Spec{Proto: "x", ParentPort: 80, ChildPort: 80}, `unknown proto: "x"`},
		{port.Spec{Proto: "tcp", ChildPort: 80}, "invalid ParentPort: 0"},
		{port.Spec{Proto: "tcp", ParentPort: 80, ChildPort: 65536}, "invalid ChildPort: 65536"},
		{port.Spec{Proto: "tcp", ParentIP: "x", ParentPort: 80, ChildPort: 80}, `invalid ParentIP: "x"`},
	} {
		if s, err := m.AddPort(t.Context(), c.spec); err == nil || err.Error() != c.want {
			t.Errorf("%+v: %v, %v; want %s", c.spec, s, err, c.want)
		}
	}
	publish(t, d, fmt.Sprintf("%d:80/udp4", first), "/"+filepath.Join(t.TempDir(), "a.sock")[1:]+":80")
	list, err := m.ListPorts(t.Context())
	want := []port.Status{{ID: 1, Spec: said}, {ID: 2, Spec: port.Spec{Proto: "udp4", ParentPort: first, ChildPort: 80}}}
	if err != nil || fmt.Sprint(list) != fmt.Sprint(want) {
		t.Errorf("list: %+v, %v", list, err)
	}
	if err := m.RemovePort(t.Context(), 1); err != nil {
		t.Error(err)
	}
	if err := m.RemovePort(t.Context(), 99); err == nil || err.Error() != "unknown id: 99" {
		t.Errorf("%v", err)
	}
}

// One socket serves both families, but where the protocol or the address says one of them.
func TestFamilies(t *testing.T) {
	d := bare(t, nil)
	for _, c := range []struct {
		spec   string
		v4, v6 bool
	}{
		{"0:80", true, true}, {"0:80/tcp4", true, false}, {"0:80/tcp6", false, true},
		{"0.0.0.0:0:80", true, false}, {"[::]:0:80", false, true},
	} {
		f := publish(t, d, c.spec)[0]
		if n := len(d.forwards[f.ID].listeners); n != 1 {
			t.Errorf("%s: %d listeners", c.spec, n)
		}
		for _, host := range []struct {
			addr string
			want bool
		}{{at(localhost, f), c.v4}, {at(localhost6, f), c.v6}} {
			conn, err := net.Dial("tcp", host.addr)
			if host.want != (err == nil || errors.Is(err, unix.ECONNRESET)) {
				t.Errorf("%s: dial %s: %v", c.spec, host.addr, err)
			}
			if conn != nil {
				conn.Close()
			}
		}
	}
	u := publish(t, d, "0:80/udp", "0:[fd00::7]:80/udp")
	if to := d.cfg.UDP.(*fakeUDP).to; len(u) != 2 || fmt.Sprint(to) != "[[10.0.2.100:80 [fd00::100]:80] [[fd00::7]:80]]" {
		t.Errorf("UDP leads to %v", to)
	}
}

func BenchmarkAddAndList(b *testing.B) {
	const ports = 10000
	limit := unix.Rlimit{Cur: 2 * ports, Max: 2 * ports}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		b.Fatal(err)
	}
	if was.Cur < limit.Cur {
		if was.Max < limit.Max {
			b.Skipf("it needs %d files", limit.Cur)
		}
		limit.Max = was.Max
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			b.Fatal(err)
		}
		defer unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	}
	specs := make([]Spec, ports)
	for i := range specs {
		specs[i] = Spec{Proto: "tcp", Host: localhost, HostPort: uint16(20000 + i), ContainerPort: uint16(20000 + i)}
	}
	for b.Loop() {
		d := bare(b, func(c *Config) { c.MaxFiles = 2 * ports })
		if _, err := d.Add(b.Context(), specs...); err != nil {
			b.Fatal(err)
		}
		if n := len(d.List()); n != ports {
			b.Fatalf("%d forwards", n)
		}
		d.Close()
	}
}

// Clients' sockets inherit what the relay needs: see join.
func TestListenersArePrepared(t *testing.T) {
	d := bare(t, nil)
	for _, text := range []string{"0:80", "127.0.0.1:0:80", "[::1]:0:80"} {
		specs, err := ParseSpec(text)
		if err != nil {
			t.Fatal(err)
		}
		fs, err := d.open(specs)
		if err != nil || len(fs) != 1 || len(fs[0].fds) == 0 {
			t.Fatalf("%s: %d forwards, %v", text, len(fs), err)
		}
		for _, fd := range fs[0].fds {
			for _, o := range [][2]int{{unix.IPPROTO_TCP, unix.TCP_NODELAY}, {unix.SOL_SOCKET, unix.SO_OOBINLINE}, {unix.SOL_SOCKET, unix.SO_KEEPALIVE}} {
				if is, err := unix.GetsockoptInt(fd, o[0], o[1]); is == 0 || err != nil {
					t.Errorf("%s: option %d of level %d is %d, %v", text, o[1], o[0], is, err)
				}
			}
		}
		if err := fs[0].stop(); err != nil {
			t.Error(err)
		}
	}
}
