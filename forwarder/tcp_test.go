package forwarder

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"usernet/stack"
	"usernet/tap/taptest"

	"golang.org/x/sys/unix"
)

// tcpWorld is a container in memory whose TCP goes through a gateway and a Forwarder to real
// sockets of the host; the gateway's address is the host's loopback.
type tcpWorld struct {
	t         *testing.T
	f         *Forwarder
	container *stack.Stack
	stop      func() // ends the gateway and its forwarder; called at the end too
}

func newTCPWorld(t *testing.T, cfg Config) *tcpWorld {
	t.Helper()
	cfg.Policy = Policy{
		Subnet4: netip.MustParsePrefix("10.0.2.0/24"), Subnet6: netip.MustParsePrefix("fd00::/64"),
		Gateway4: netip.MustParseAddr("10.0.2.2"), Gateway6: netip.MustParseAddr("fd00::2"),
		DNS4:         netip.MustParseAddr("10.0.2.3"),
		HostLoopback: true,
	}
	f, err := New(cfg)
	check(t, err)
	a, b := taptest.Pipe(stack.OffloadChecksum | stack.OffloadTSO4 | stack.OffloadTSO6 | stack.OffloadUSO)
	gw, err := stack.New(stack.Config{
		MTU: 65520, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1},
		Gateway4: netip.MustParsePrefix("10.0.2.2/24"), Gateway6: netip.MustParsePrefix("fd00::2/64"),
		Extra: []netip.Addr{netip.MustParseAddr("10.0.2.3")},
	}, []stack.Device{a}, f)
	check(t, err)
	f.Bind(gw)
	ct, err := stack.New(stack.Config{
		MTU: 65520, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2},
		Gateway4: netip.MustParsePrefix("10.0.2.100/24"), Gateway6: netip.MustParsePrefix("fd00::100/64"),
		LinkLocal: netip.MustParseAddr("fe80::100"),
		NextHop4:  netip.MustParseAddr("10.0.2.2"), NextHop6: netip.MustParseAddr("fd00::2"),
	}, []stack.Device{b}, quiet{})
	check(t, err)
	start := func(run ...func(context.Context) error) func() {
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		for _, r := range run {
			wg.Go(func() { check(t, r(ctx)) })
		}
		return sync.OnceFunc(func() {
			cancel()
			wg.Wait()
		})
	}
	w := &tcpWorld{t: t, f: f, container: ct, stop: start(f.Run, gw.Run)}
	stopContainer := start(ct.Run)
	t.Cleanup(func() {
		w.stop()
		f.Close()
		stopContainer()
		if st := f.Stats().TCP; st.Flows != 0 || st.Dialling != 0 {
			t.Errorf("left behind: %+v", st)
		}
	})
	return w
}

type quiet struct{}

func (quiet) ServeTCP(_ context.Context, r *stack.TCPRequest) { r.Reject(unix.ECONNREFUSED) }
func (quiet) ServeUDP([]stack.Datagram)                       {}
func (quiet) ServeEcho(stack.Echo)                            {}

func (w *tcpWorld) dial(addr netip.Addr, port uint16) (*stack.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	src := netip.MustParseAddr("10.0.2.100")
	if addr.Is6() {
		src = netip.MustParseAddr("fd00::100")
	}
	return w.container.DialFrom(ctx, "tcp", netip.AddrPortFrom(src, 0), netip.AddrPortFrom(addr, port))
}

// connect returns the container's end and the host's server's end of a flow.
func (w *tcpWorld) connect(loopback string) (*stack.Conn, *net.TCPConn) {
	w.t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(loopback, "0"))
	check(w.t, err)
	defer l.Close()
	gw := w.f.cfg.Policy.Gateway4
	if loopback == "::1" {
		gw = w.f.cfg.Policy.Gateway6
	}
	c, err := w.dial(gw, uint16(l.Addr().(*net.TCPAddr).Port))
	check(w.t, err)
	s, err := l.Accept()
	check(w.t, err)
	w.t.Cleanup(func() {
		c.Close()
		s.Close()
	})
	return c, s.(*net.TCPConn)
}

func TestTCPBothWaysAtOnce(t *testing.T) {
	for _, loopback := range []string{"127.0.0.1", "::1"} {
		t.Run(loopback, func(t *testing.T) {
			w := newTCPWorld(t, Config{})
			c, s := w.connect(loopback)
			const n = 16 << 20
			data := make([]byte, n)
			rand.NewChaCha8([32]byte{}).Read(data)
			want := sha256.Sum256(data)
			var wg sync.WaitGroup
			for _, pair := range [][2]interface {
				io.ReadWriter
				CloseWrite() error
			}{{c, s}, {s, c}} {
				wg.Go(func() {
					_, err := pair[0].Write(data)
					check(t, err)
					check(t, pair[0].CloseWrite())
				})
				wg.Go(func() {
					h := sha256.New()
					got, err := io.Copy(h, pair[1])
					check(t, err)
					if got != n || !bytes.Equal(h.Sum(nil), want[:]) {
						t.Errorf("received %d octets of %d, or others", got, n)
					}
				})
			}
			wg.Wait()
			if st := w.f.Stats().TCP; st.OctetsOut != n || st.OctetsIn != n || st.Dialled != 1 {
				t.Errorf("counted %+v", st)
			}
		})
	}
}

// The answer to a SYN is the host's: nobody listens, nobody is reached.
func TestTCPRefused(t *testing.T) {
	w := newTCPWorld(t, Config{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	if _, err := w.dial(w.f.cfg.Policy.Gateway4, port); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a closed port: %v", err)
	}
	if _, err := w.dial(w.f.cfg.Policy.DNS4, 80); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("another port of the resolver's: %v", err)
	}
	// The tests' namespace has no route to the world.
	if _, err := w.dial(netip.MustParseAddr("203.0.113.1"), 80); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("a world that the host cannot reach: %v", err)
	}
	if st := w.f.Stats().TCP; st.Dialled != 0 || st.Refused != 1 || st.Forbidden != 1 || st.Failed != 1 {
		t.Errorf("counted %+v", st)
	}
}

// A port of the host's own that nobody listens on is refused also when the kernel chooses it as the source.
func TestTCPSelfConnect(t *testing.T) {
	// Two ports to choose from: every other dial would meet itself.
	sysctl(t, "net.ipv4.ip_local_port_range", "45000 45001")
	w := newTCPWorld(t, Config{})
	for range 50 {
		if c, err := w.dial(w.f.cfg.Policy.Gateway4, 45000); !errors.Is(err, unix.ECONNREFUSED) {
			if c != nil {
				c.Close()
			}
			t.Fatalf("dial: %v, want ECONNREFUSED", err)
		}
	}
}

func TestTCPHalfClose(t *testing.T) {
	w := newTCPWorld(t, Config{})
	for _, first := range []string{"container", "host"} {
		t.Run(first, func(t *testing.T) {
			c, s := w.connect("127.0.0.1")
			type end interface {
				io.ReadWriteCloser
				CloseWrite() error
			}
			a, b := end(c), end(s)
			if first == "host" {
				a, b = b, a
			}
			check(t, a.CloseWrite())
			if got, err := io.ReadAll(b); err != nil || len(got) > 0 {
				t.Fatalf("%q, %v; want the end", got, err)
			}
			for i := range 3 { // the other direction still works, more than once
				msg := fmt.Sprintf("message %d", i)
				_, err := b.Write([]byte(msg))
				check(t, err)
				got := make([]byte, len(msg))
				_, err = io.ReadFull(a, got)
				if err != nil || string(got) != msg {
					t.Fatalf("%q, %v", got, err)
				}
			}
			check(t, b.Close())
			if got, err := io.ReadAll(a); err != nil || len(got) > 0 {
				t.Errorf("%q, %v; want the end", got, err)
			}
		})
	}
}

// An abort arrives as one, never as an orderly end.
func TestTCPReset(t *testing.T) {
	for _, test := range []struct {
		name  string
		abort func(c *stack.Conn, s *net.TCPConn)
	}{
		{"container", func(c *stack.Conn, _ *net.TCPConn) { c.Abort() }},
		{"container after its FIN", func(c *stack.Conn, s *net.TCPConn) {
			c.CloseWrite()
			io.ReadAll(s)
			c.Abort()
		}},
		{"container after its FIN, nobody writing", func(c *stack.Conn, s *net.TCPConn) {
			c.CloseWrite()
			io.ReadAll(s)
			c.Abort()
			for {
				if info, err := tcpState(s); err != nil || info != 8 { // CLOSE_WAIT no more
					return
				}
				time.Sleep(time.Millisecond)
			}
		}},
		{"container while the host does not read", func(c *stack.Conn, s *net.TCPConn) {
			c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			c.Write(make([]byte, 64<<20))
			c.Abort()
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newTCPWorld(t, Config{})
			c, s := w.connect("127.0.0.1")
			test.abort(c, s)
			s.SetReadDeadline(time.Now().Add(20 * time.Second))
			var err error
			for err == nil {
				_, err = io.CopyN(io.Discard, s, 1<<20)
				if err == io.EOF {
					_, err = s.Write([]byte("x")) // after a FIN only writing shows the reset
					if err == nil {
						time.Sleep(time.Millisecond)
					}
				}
			}
			if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
				t.Errorf("the host's server saw %v, want a reset", err)
			}
		})
	}
	for _, test := range []struct {
		name  string
		abort func(c *stack.Conn, s *net.TCPConn)
	}{
		{"host", func(_ *stack.Conn, s *net.TCPConn) {
			s.SetLinger(0)
			s.Close()
		}},
		{"host after its FIN", func(c *stack.Conn, s *net.TCPConn) {
			s.CloseWrite()
			io.ReadAll(c)
			s.SetLinger(0)
			s.Close()
		}},
		{"usernet ends", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newTCPWorld(t, Config{})
			c, s := w.connect("127.0.0.1")
			if test.abort == nil {
				w.stop()
				s.SetReadDeadline(time.Now().Add(20 * time.Second))
				if _, err := s.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the host's server saw %v, want ECONNRESET", err)
				}
			} else {
				test.abort(c, s)
			}
			c.SetReadDeadline(time.Now().Add(20 * time.Second))
			for c.Err() == nil {
				if _, err := c.Read(make([]byte, 1)); err != nil && err != io.EOF {
					// netstack in the container's place may say that it is aborted.
					if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.ECONNABORTED) {
						t.Errorf("the container read %v, want ECONNRESET", err)
					}
					return
				}
			}
			if err := c.Err(); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.ECONNABORTED) {
				t.Errorf("the container saw %v, want ECONNRESET", err)
			}
		})
	}
}

// tcpState is the state of a socket, as include/net/tcp_states.h counts.
func tcpState(c *net.TCPConn) (state uint8, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = errors.Join(raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			state = info.State
		}
	}), err)
	return state, err
}

// A host that does not read holds the container back, and loses nothing.
func TestTCPBackpressure(t *testing.T) {
	w := newTCPWorld(t, Config{})
	c, s := w.connect("127.0.0.1")
	check(t, s.SetReadBuffer(64<<10))
	const n = 48 << 20
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(data)
	wrote := make(chan error, 1)
	held := make(chan int, 1)
	go func() {
		c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		sent, err := c.Write(data)
		if !errors.Is(err, unix.ETIMEDOUT) && err == nil {
			wrote <- errors.New("48 MiB went into buffers")
			return
		}
		held <- sent
		c.SetWriteDeadline(time.Time{})
		_, err = c.Write(data[sent:])
		c.CloseWrite()
		wrote <- err
	}()
	select {
	case <-held:
	case err := <-wrote:
		t.Fatal(err)
	}
	h := sha256.New()
	got, err := io.Copy(h, s)
	want := sha256.Sum256(data)
	if err != nil || got != n || !bytes.Equal(h.Sum(nil), want[:]) {
		t.Errorf("received %d octets of %d, or others: %v", got, n, err)
	}
	check(t, <-wrote)
}

// blackHole is an address of the host's whose accept queue is full: a dial to it hangs, as one
// to a host that drops everything does.
func blackHole(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	check(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	check(t, unix.Listen(fd, 0))
	sa, err := unix.Getsockname(fd)
	check(t, err)
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(sa.(*unix.SockaddrInet4).Port))
	for range 2 { // one more than the backlog is queued
		conn, err := net.DialTimeout("tcp", addr.String(), 100*time.Millisecond)
		if err == nil {
			t.Cleanup(func() { conn.Close() })
		}
	}
	return addr
}

func TestTCPBlackHoleStopsNobody(t *testing.T) {
	w := newTCPWorld(t, Config{})
	hole := blackHole(t)
	const n = 500
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			src := netip.MustParseAddrPort("10.0.2.100:0")
			c, err := w.container.DialFrom(ctx, "tcp", src, netip.AddrPortFrom(w.f.cfg.Policy.Gateway4, hole.Port()))
			if err == nil {
				c.Abort()
			}
		})
	}
	deadline := time.Now().Add(20 * time.Second)
	for w.f.Stats().TCP.Dialling < n*9/10 {
		if time.Now().After(deadline) {
			t.Fatalf("%+v: fewer dials hang than expected", w.f.Stats().TCP)
		}
		time.Sleep(time.Millisecond)
	}
	begin := time.Now()
	c, s := w.connect("127.0.0.1")
	t.Logf("a connection beside %d hanging dials took %v", w.f.Stats().TCP.Dialling, time.Since(begin))
	_, err := c.Write([]byte("through"))
	check(t, err)
	got := make([]byte, 7)
	_, err = io.ReadFull(s, got)
	check(t, err)
	cancel() // the container resets them all, and the dials end
	wg.Wait()
	for w.f.Stats().TCP.Dialling > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("%+v: dials go on after the container's RST", w.f.Stats().TCP)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestTCPDialTimeout(t *testing.T) {
	w := newTCPWorld(t, Config{TCP: TCPConfig{DialTimeout: 50 * time.Millisecond}})
	hole := blackHole(t)
	ctx, cancel := context.WithTimeout(context.Background(), 700*time.Millisecond)
	defer cancel()
	_, err := w.container.DialFrom(ctx, "tcp", netip.MustParseAddrPort("10.0.2.100:0"), netip.AddrPortFrom(w.f.cfg.Policy.Gateway4, hole.Port()))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v; want that the container is told nothing", err)
	}
	if st := w.f.Stats().TCP; st.TimedOut == 0 {
		t.Errorf("counted %+v", st)
	}
}

// What a thousand short connections used is free again.
func TestTCPManyShortConnections(t *testing.T) {
	w := newTCPWorld(t, Config{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	var wg sync.WaitGroup
	const n = 1000
	for range 10 {
		wg.Go(func() {
			for range n / 10 {
				c, err := w.dial(w.f.cfg.Policy.Gateway4, uint16(l.Addr().(*net.TCPAddr).Port))
				if err != nil {
					t.Error(err)
					return
				}
				c.Write([]byte("ping"))
				c.CloseWrite()
				if b, err := io.ReadAll(c); err != nil || string(b) != "ping" {
					t.Errorf("%q, %v", b, err)
				}
				c.Close()
			}
		})
	}
	wg.Wait()
	deadline := time.Now().Add(20 * time.Second)
	for w.f.Stats().TCP.Flows > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("flows stay: %+v", w.f.Stats().TCP)
		}
		time.Sleep(time.Millisecond)
	}
	if st := w.f.Stats().TCP; st.Dialled != n || st.Aborted != 0 {
		t.Errorf("counted %+v", st)
	}
}

// Where containers share MaxFlows, whoever has taken most of it leaves an eighth to the others; alone it has all.
func TestTCPMaxFlowsShared(t *testing.T) {
	greedy, other := netip.MustParseAddr("10.0.2.100"), netip.MustParseAddr("10.0.2.101")
	for _, shared := range []bool{false, true} {
		var c tcpCounts
		cfg := TCPConfig{MaxFlows: 64, Shared: shared}
		took := 0
		for c.begin(greedy, cfg) {
			took++
		}
		want := 64
		if shared {
			want = 56
		}
		if took != want {
			t.Errorf("shared %v: one address has %d flows, want %d", shared, took, want)
		}
		if !shared {
			continue
		}
		for i := range 8 {
			if !c.begin(other, cfg) {
				t.Errorf("another address has %d flows, want 8", i)
			}
		}
		if c.begin(other, cfg) {
			t.Error("there are more than MaxFlows")
		}
		for range 8 {
			c.end(other)
		}
		for range took {
			c.end(greedy)
		}
		if n := c.flows.Load(); n != 0 || len(c.of) != 0 {
			t.Errorf("%d flows and %d addresses are left, want none", n, len(c.of))
		}
	}
}

// Beyond MaxFlows a SYN is dropped, and its repetition finds room again.
func TestTCPMaxFlows(t *testing.T) {
	w := newTCPWorld(t, Config{TCP: TCPConfig{MaxFlows: 1}})
	c, s := w.connect("127.0.0.1")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		c, err := w.dial(w.f.cfg.Policy.Gateway4, uint16(l.Addr().(*net.TCPAddr).Port))
		if err == nil {
			c.Close()
		}
		done <- err
	}()
	deadline := time.Now().Add(20 * time.Second)
	for w.f.Stats().TCP.Dropped == 0 {
		if time.Now().After(deadline) {
			t.Fatal("the second flow was not held back")
		}
		time.Sleep(time.Millisecond)
	}
	c.Close()
	s.Close()
	check(t, <-done)
}
