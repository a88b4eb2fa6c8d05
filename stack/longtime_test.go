package stack

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/faketime"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"usernet/tap/taptest"
)

// Hours of a connection's life, by netstack's clock in our hands.

type acceptHandler struct{ conns chan *Conn }

func (h acceptHandler) ServeTCP(_ context.Context, r *TCPRequest) {
	if c, err := r.Accept(); err == nil {
		h.conns <- c
	}
}
func (acceptHandler) ServeUDP([]Datagram) {}
func (acceptHandler) ServeEcho(Echo)      {}

// longLived is a connection from a container to a gateway that shares its clock.
type longLived struct {
	t               *testing.T
	clock           *faketime.ManualClock
	gateway         *Stack
	container, host *Conn // the two ends
	containerEnd    *taptest.PipeEnd
	cutOff          chan struct{} // closed: nothing passes any more
}

func newLongLived(t *testing.T) *longLived {
	t.Helper()
	l := &longLived{t: t, clock: faketime.NewManualClock(), cutOff: make(chan struct{})}
	a, b := taptest.Pipe(OffloadChecksum | OffloadTSO4 | OffloadTSO6)
	l.containerEnd = b
	b.Lose = func([]byte) bool {
		select {
		case <-l.cutOff:
			return true
		default:
			return false
		}
	}
	h := acceptHandler{make(chan *Conn, 1)}
	make := func(mac byte, addr, next string, dev Device) *Stack {
		cfg := Config{
			MTU: 65520, MAC: net.HardwareAddr{2, 0, 0, 0, 0, mac}, Gateway4: netip.MustParsePrefix(addr), clock: l.clock,
		}
		if next != "" {
			cfg.NextHop4 = netip.MustParseAddr(next)
		}
		s, err := New(cfg, []Device{dev}, h)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	l.gateway = make(1, "10.0.2.2/24", "", a)
	container := make(2, "10.0.2.100/24", "10.0.2.2", b)
	// Neighbours that need no asking: the clock outruns the goroutines that would answer.
	for s, peer := range map[*Stack]struct {
		addr string
		mac  byte
	}{l.gateway: {"10.0.2.100", 2}, container: {"10.0.2.2", 1}} {
		mac := tcpip.LinkAddress([]byte{2, 0, 0, 0, 0, peer.mac})
		if err := s.ns.AddStaticNeighbor(nicID, ipv4.ProtocolNumber, address(netip.MustParseAddr(peer.addr)), mac); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, s := range []*Stack{l.gateway, container} {
		wg.Go(func() {
			if err := s.Run(ctx); err != nil {
				t.Errorf("run: %v", err)
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	var err error
	l.container, err = container.DialFrom(ctx, "tcp", netip.MustParseAddrPort("10.0.2.100:0"), netip.MustParseAddrPort("203.0.113.7:80"))
	if err != nil {
		t.Fatal(err)
	}
	l.host = <-h.conns
	return l
}

// until advances the clock by step until ok, at most n times.
func (l *longLived) until(what string, step time.Duration, n int, ok func() bool) (passed time.Duration) {
	l.t.Helper()
	for range n {
		if l.settled(ok) {
			return passed
		}
		l.clock.Advance(step)
		passed += step
	}
	if !l.settled(ok) {
		l.t.Fatalf("after %v: not %s", passed, what)
	}
	return passed
}

// settled gives the goroutines of both stacks a moment of real time.
func (l *longLived) settled(ok func() bool) bool {
	for range 20 {
		if ok() {
			return true
		}
		time.Sleep(time.Millisecond)
	}
	return false
}

func (l *longLived) endpoints() int {
	return len(l.gateway.ns.RegisteredEndpoints()) + len(l.gateway.ns.CleanupEndpoints())
}

func (l *longLived) passes(msg string) {
	l.t.Helper()
	for _, ends := range [][2]*Conn{{l.container, l.host}, {l.host, l.container}} {
		if _, err := ends[0].Write([]byte(msg)); err != nil {
			l.t.Fatal(err)
		}
		got := make([]byte, len(msg))
		if _, err := io.ReadFull(ends[1], got); err != nil || string(got) != msg {
			l.t.Fatalf("%q, %v", got, err)
		}
	}
}

// A long poll or WebSocket that is silent for six hours is not ended; keepalives are answered meanwhile, for which
// the clock leaves the goroutines a moment of real time now and then.
func TestIdleConnectionLives(t *testing.T) {
	l := newLongLived(t)
	l.passes("first")
	for range 6 * 60 {
		l.clock.Advance(time.Minute)
		time.Sleep(time.Millisecond)
	}
	l.passes("six hours later")
	if err := errors.Join(l.host.Err(), l.container.Err()); err != nil {
		t.Error(err)
	}
}

// Whoever vanishes without a word is found by keepalives.
func TestVanishedContainerIsFound(t *testing.T) {
	l := newLongLived(t)
	l.passes("first")
	close(l.cutOff)
	passed := l.until("ended", time.Minute, 200, func() bool { return l.host.Err() != nil })
	if err := l.host.Err(); !errors.Is(err, unix.ETIMEDOUT) {
		t.Errorf("ended with %v, want ETIMEDOUT", err)
	}
	if passed < keepaliveIdle {
		t.Errorf("ended after %v, before the first keepalive at %v", passed, keepaliveIdle)
	}
}

// What both ends of the relay have let go does not wait for the container's FIN for ever.
func TestFinWaitIsReaped(t *testing.T) {
	l := newLongLived(t)
	l.passes("first")
	l.host.Close() // the container keeps its end open
	if n := l.endpoints(); n != 1 {
		t.Fatalf("%d endpoints before", n)
	}
	passed := l.until("reaped", time.Second, 100, func() bool { return l.endpoints() == 0 })
	if passed > finWait+5*time.Second {
		t.Errorf("reaped after %v, want %v", passed, finWait)
	}
}

// TIME-WAIT is short on a link that delays nothing.
func TestTimeWaitIsShort(t *testing.T) {
	l := newLongLived(t)
	l.passes("first")
	l.host.Close()
	if _, err := l.container.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	l.container.Close()
	passed := l.until("forgotten", 500*time.Millisecond, 60, func() bool { return l.endpoints() == 0 })
	if passed > timeWait+2*time.Second {
		t.Errorf("forgotten after %v, want %v", passed, timeWait)
	}
}
