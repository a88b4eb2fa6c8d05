package api_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"

	"usernet/api"
	"usernet/portdriver"
	"usernet/tap/taptest"
)

func TestMain(m *testing.M) { taptest.MainHere(m, nil) }

// deadline is for what must happen at all; nothing waits for it that goes well.
const deadline = 30 * time.Second

// fakePorts is a table of forwards that listens nowhere.
type fakePorts struct {
	mu     sync.Mutex
	last   int
	table  map[int]portdriver.Forward
	drains int  // removals with drain
	quick  bool // looks for no conflicts
	fail   error
}

var _ api.Ports = (*fakePorts)(nil)

func newFake() *fakePorts { return &fakePorts{table: map[int]portdriver.Forward{}} }

func (p *fakePorts) Add(ctx context.Context, specs ...portdriver.Spec) ([]portdriver.Forward, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fail != nil {
		return nil, p.fail
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var out []portdriver.Forward
	for _, s := range specs {
		if s.Proto == "" || s.ContainerPort == 0 {
			return nil, errors.New("what is that?")
		}
		for id, f := range p.table {
			if p.quick {
				break
			}
			if f.Spec.Proto == s.Proto && f.Spec.Host == s.Host && f.Spec.HostPort == s.HostPort && f.Spec.HostPath == s.HostPath {
				return nil, portdriver.ErrConflict{ID: id}
			}
		}
		if s.HostPort == 1 {
			return nil, fmt.Errorf("listen %s :1: bind: %w: ports below 1024 are privileged here", s.Proto, syscall.EACCES)
		}
		if s.HostPort == 2 {
			return nil, fmt.Errorf("listen %s :2: bind: %w: another program of the host has it", s.Proto, syscall.EADDRINUSE)
		}
		if s.HostPort == 3 {
			return nil, fmt.Errorf("listen %s :3: bind: %w", s.Proto, syscall.EADDRNOTAVAIL)
		}
		if s.HostPort == 4 {
			return nil, fmt.Errorf("socket: %w", syscall.EMFILE)
		}
		if s.HostPort == 0 && s.HostPath == "" {
			s.HostPort = 40000
		}
		out = append(out, portdriver.Forward{Spec: s, Path: "kernel", Active: 1, Total: 3, Refused: 1, OctetsIn: 1 << 40, OctetsOut: 7})
	}
	for i := range out {
		p.last++
		out[i].ID = p.last
		p.table[p.last] = out[i]
	}
	return out, nil
}

func (p *fakePorts) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = 0
	clear(p.table)
}

func (p *fakePorts) Remove(_ context.Context, id int, drain bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.table[id]; !ok {
		return portdriver.ErrUnknownID{ID: id}
	}
	delete(p.table, id)
	if drain {
		p.drains++
	}
	return nil
}

func (p *fakePorts) List() []portdriver.Forward {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []portdriver.Forward
	for _, f := range p.table {
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b portdriver.Forward) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

func (p *fakePorts) Get(id int) (portdriver.Forward, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f, ok := p.table[id]
	return f, ok
}

// fakeManager is rootlesskit's view of fakePorts.
type fakeManager struct{ *fakePorts }

func (m fakeManager) AddPort(ctx context.Context, s port.Spec) (*port.Status, error) {
	host, _ := netip.ParseAddr(s.ParentIP)
	added, err := m.Add(ctx, portdriver.Spec{Proto: s.Proto, Host: host, HostPort: uint16(s.ParentPort), ContainerPort: uint16(s.ChildPort)})
	if conflict, ok := errors.AsType[portdriver.ErrConflict](err); ok {
		return nil, fmt.Errorf("conflict with ID %d", conflict.ID) // without the remedy, as the driver's own
	}
	if err != nil {
		return nil, err
	}
	return &port.Status{ID: added[0].ID, Spec: s}, nil
}

func (m fakeManager) ListPorts(context.Context) (out []port.Status, _ error) {
	for _, f := range m.List() {
		s := port.Spec{Proto: f.Spec.Proto, ParentPort: int(f.Spec.HostPort), ChildPort: int(f.Spec.ContainerPort)}
		if f.Spec.Host.IsValid() {
			s.ParentIP = f.Spec.Host.String()
		}
		out = append(out, port.Status{ID: f.ID, Spec: s})
	}
	return out, nil
}

func (m fakeManager) RemovePort(ctx context.Context, id int) error { return m.Remove(ctx, id, false) }

func testInfo() api.Info {
	return api.Info{
		Version: "1.2.3", Started: time.Unix(1700000000, 5e8), Namespace: `/run/"netns"`, ContainerPID: 4711,
		Interface: api.Interface{Name: "tap0", MTU: 65520, MAC: "02:00:00:00:00:01", Queues: 1, Offloads: []string{"csum", "tso4"}},
		IPv4:      &api.Addresses{Container: netip.MustParsePrefix("10.0.2.100/24"), Gateway: netip.MustParseAddr("10.0.2.2"), DNS: netip.MustParseAddr("10.0.2.3")},
		IPv6:      &api.Addresses{Container: netip.MustParsePrefix("fd00::100/64"), Gateway: netip.MustParseAddr("fd00::2"), DNS: netip.MustParseAddr("fd00::3")},
		Ports:     &portdriver.Info{Path: "auto", IPv4: &portdriver.PathInfo{Path: "stack", WhyNotKernel: "no sysctl", Loopback: true}, MaxForwards: 100, MaxConnections: 200},
	}
}

// socketPath is the name of a socket in a new directory; t.TempDir's names are too long for some.
func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// serve runs a server of ports until the test ends, or stop is called, which is then waited for.
func serve(t testing.TB, ports *fakePorts, change ...func(*api.Config)) (path string, stop func()) {
	t.Helper()
	cfg := api.Config{Path: socketPath(t), Info: testInfo}
	if ports != nil {
		cfg.Ports, cfg.Rootlesskit = ports, fakeManager{ports}
	}
	for _, c := range change {
		c(&cfg)
	}
	s, err := api.Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(deadline):
			t.Error("Serve does not end")
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(cfg.Path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left behind: %v", err)
		}
	})
	t.Cleanup(stop)
	return cfg.Path, stop
}

// dial connects to a socket.
func dial(t testing.TB, path string) *net.UnixConn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(deadline))
	return c.(*net.UnixConn)
}

// ask sends octets and returns all that comes back.
func ask(t testing.TB, path, request string) string {
	t.Helper()
	c := dial(t, path)
	defer c.Close()
	if _, err := io.WriteString(c, request); err != nil {
		t.Error(err)
		return ""
	}
	return readAll(t, c)
}

func readAll(t testing.TB, r io.Reader) string {
	t.Helper()
	var b bytes.Buffer
	if _, err := b.ReadFrom(r); err != nil {
		t.Errorf("after %q: %v", b.String(), err)
	}
	return b.String()
}

type forward = portdriver.Forward

// again runs the calling test once more in a process of its own.
func again(t *testing.T, env string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.v", "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), env)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
