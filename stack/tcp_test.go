package stack_test

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
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/nettest"
	"golang.org/x/sys/unix"
	"usernet/stack"
	"usernet/tap/taptest"
)

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// accepting returns a handler that accepts everything and hands the connections out.
func accepting(t testing.TB) (*handler, <-chan *stack.Conn) {
	conns := make(chan *stack.Conn, 64)
	return &handler{tcp: func(_ context.Context, r *stack.TCPRequest) {
		c, err := r.Accept()
		if err != nil {
			t.Errorf("accept: %v", err)
			return
		}
		conns <- c
	}}, conns
}

// connect returns both ends of a connection from the container to the world.
func connect(t testing.TB, p *pair, conns <-chan *stack.Conn, dst netip.Addr) (container, gateway *stack.Conn) {
	t.Helper()
	c, err := p.dial(testContext(t), netip.AddrPortFrom(dst, 80))
	if err != nil {
		t.Fatal(err)
	}
	g := <-conns
	if got := g.LocalAddr().String(); got != netip.AddrPortFrom(dst, 80).String() {
		t.Errorf("the gateway's end is %s, want the address that the container dialled", got)
	}
	return c, g
}

func TestBulkBothWays(t *testing.T) {
	for _, offloads := range []uint32{0, allOffloads} {
		for _, size := range []int{1500, 65520} {
			for _, dst := range []netip.Addr{world4, world6} {
				t.Run(fmt.Sprintf("offloads=%#x/mtu=%d/%v", offloads, size, dst), func(t *testing.T) {
					h, conns := accepting(t)
					p := newPair(t, offloads, h, mtu(size))
					c, g := connect(t, p, conns, dst)
					exchange(t, c, g, 4<<20)
				})
			}
		}
	}
}

// exchange sends n octets each way at once, ends both, and compares.
func exchange(t *testing.T, a, b *stack.Conn, n int) {
	t.Helper()
	var wg sync.WaitGroup
	send := func(c *stack.Conn, seed byte) [32]byte {
		data := make([]byte, n)
		rand.NewChaCha8([32]byte{seed}).Read(data)
		wg.Go(func() {
			if _, err := c.Write(data); err != nil {
				t.Errorf("write: %v", err)
			}
			if err := c.CloseWrite(); err != nil {
				t.Errorf("close write: %v", err)
			}
		})
		return sha256.Sum256(data)
	}
	receive := func(c *stack.Conn, want [32]byte) {
		wg.Go(func() {
			h := sha256.New()
			got, err := io.Copy(h, c)
			if err != nil || got != int64(n) || !bytes.Equal(h.Sum(nil), want[:]) {
				t.Errorf("received %d octets of %d, same: %v, err %v", got, n, bytes.Equal(h.Sum(nil), want[:]), err)
			}
		})
	}
	receive(b, send(a, 1))
	receive(a, send(b, 2))
	wg.Wait()
	a.Close()
	b.Close()
}

func TestLossAndReordering(t *testing.T) {
	h, conns := accepting(t)
	var n, held atomic.Int64
	p := newPair(t, 0, h, mtu(1500), func(_, _ *stack.Config, gw, ct *taptest.PipeEnd) {
		var mu sync.Mutex
		var late []byte
		ct.Lose = func(f []byte) bool {
			if len(f) < 1000 {
				return false
			}
			switch n.Add(1) % 50 {
			case 7: // lost
				return true
			case 23: // overtaken by the next one
				mu.Lock()
				defer mu.Unlock()
				late = append([]byte(nil), f...)
				held.Add(1)
				return true
			case 24:
				mu.Lock()
				f := late
				late = nil
				mu.Unlock()
				if f != nil {
					go gw.Inject(f)
				}
			}
			return false
		}
	})
	c, g := connect(t, p, conns, world4)
	exchange(t, c, g, 1<<20)
	if n.Load() < 100 || held.Load() == 0 {
		t.Errorf("%d frames passed, %d overtaken: the link was not lossy", n.Load(), held.Load())
	}
}

// netstack in the container's place does not know all ICMP errors, so the frame itself is looked at too.
func TestRejectReasons(t *testing.T) {
	for _, test := range []struct {
		reason     error
		icmp4      []byte // type and code that must be sent; nil: a RST
		icmp6      []byte
		dial4Fails bool // netstack understands it
	}{
		{unix.ECONNREFUSED, nil, nil, true},
		{unix.EHOSTUNREACH, []byte{3, 1}, []byte{1, 3}, true},
		{unix.ENETUNREACH, []byte{3, 0}, []byte{1, 0}, true},
		{unix.EACCES, []byte{3, 13}, []byte{1, 1}, false},
	} {
		for _, dst := range []netip.Addr{world4, world6} {
			t.Run(fmt.Sprintf("%v/%v", test.reason, dst), func(t *testing.T) {
				answers := make(chan []byte, 64)
				p := newPair(t, allOffloads, &handler{tcp: func(_ context.Context, r *stack.TCPRequest) { r.Reject(test.reason) }},
					func(_, _ *stack.Config, gw, _ *taptest.PipeEnd) {
						gw.Lose = func(f []byte) bool {
							answers <- bytes.Clone(f)
							return false
						}
					})
				a, b := netip.AddrPortFrom(container4.Addr(), 4711), netip.AddrPortFrom(dst, 80)
				if dst.Is6() {
					a = netip.AddrPortFrom(container6.Addr(), 4711)
				}
				syn := tcpFrame(a, b, 1, 0, 0x02)
				p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), syn})
				want, ipLen, proto, protoAt := test.icmp4, 20, byte(1), 9
				if dst.Is6() {
					want, ipLen, proto, protoAt = test.icmp6, 40, 58, 6
				}
				if want == nil {
					proto = 6
				}
				for f := range answers {
					ip := f[stack.HeaderLen+14:]
					if f[stack.HeaderLen+12] == 0x08 && f[stack.HeaderLen+13] == 0x06 || ip[protoAt] != proto || proto == 58 && ip[ipLen] != 1 {
						continue // ARP, solicitations, advertisements
					}
					l4 := ip[ipLen:]
					if want == nil {
						if l4[13]&0x04 == 0 {
							t.Errorf("TCP flags %#x, want RST", l4[13])
						}
						return
					}
					if !bytes.Equal(l4[:2], want) {
						t.Errorf("ICMP type and code %d, want %d", l4[:2], want)
					}
					if quoted := l4[8:]; !bytes.Equal(quoted[ipLen:], syn[14+ipLen:]) {
						t.Errorf("quotes %x, want the SYN's segment", quoted[ipLen:])
					}
					return
				}
			})
		}
		if test.dial4Fails {
			p := newPair(t, allOffloads, &handler{tcp: func(_ context.Context, r *stack.TCPRequest) { r.Reject(test.reason) }})
			if _, err := p.dial(testContext(t), netip.AddrPortFrom(world4, 80)); !errors.Is(err, test.reason) {
				t.Errorf("dial: %v, want %v", err, test.reason)
			}
		}
	}
}

func TestTimeoutIsSilence(t *testing.T) {
	served := make(chan struct{}, 8)
	p := newPair(t, allOffloads, &handler{tcp: func(_ context.Context, r *stack.TCPRequest) {
		r.Reject(unix.ETIMEDOUT)
		served <- struct{}{}
	}})
	ctx, cancel := context.WithCancel(testContext(t))
	failed := make(chan error, 1)
	go func() {
		_, err := p.dial(ctx, netip.AddrPortFrom(world4, 80))
		failed <- err
	}()
	<-served
	<-served // the container has repeated its SYN: it was told nothing
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("dial: %v, want that it still waited", err)
	}
}

// A container that gives up sends a RST or stops repeating its SYN; the dial must end.
func TestDialEndsOnReset(t *testing.T) {
	began, ended := make(chan struct{}), make(chan error, 1)
	p := newPair(t, allOffloads, &handler{tcp: func(ctx context.Context, r *stack.TCPRequest) {
		close(began)
		<-ctx.Done()
		ended <- context.Cause(ctx)
		r.Reject(ctx.Err())
	}})
	a := netip.AddrPortFrom(container4.Addr(), 4711)
	b := netip.AddrPortFrom(world4, 80)
	p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), tcpFrame(a, b, 1, 0, 0x02)})
	<-began
	p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), tcpFrame(a, b, 2, 0, 0x04)})
	select {
	case <-ended:
	case <-testContext(t).Done():
		t.Fatal("the dial went on after the container's RST")
	}
}

func TestDialEndsWithoutRepeatedSYN(t *testing.T) {
	ended := make(chan struct{})
	p := newPair(t, allOffloads, &handler{tcp: func(ctx context.Context, r *stack.TCPRequest) {
		<-ctx.Done()
		r.Reject(ctx.Err())
		close(ended)
	}})
	a, b := netip.AddrPortFrom(container4.Addr(), 4711), netip.AddrPortFrom(world4, 80)
	p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), tcpFrame(a, b, 1, 0, 0x02)})
	select {
	case <-ended:
	case <-testContext(t).Done():
		t.Fatal("the dial went on though no SYN was repeated")
	}
}

// Another attempt from the same port takes the place of the one that the container has given up.
func TestNewAttemptOnTheSamePort(t *testing.T) {
	served := make(chan struct{}, 2)
	p := newPair(t, allOffloads, &handler{tcp: func(ctx context.Context, r *stack.TCPRequest) {
		served <- struct{}{}
		<-ctx.Done()
		r.Reject(ctx.Err())
	}})
	a, b := netip.AddrPortFrom(container4.Addr(), 4711), netip.AddrPortFrom(world4, 80)
	none := make([]byte, stack.HeaderLen)
	p.guestEnd.Write([][]byte{none, tcpFrame(a, b, 1, 0, 0x02)})
	<-served
	for again := time.NewTicker(10 * time.Millisecond); ; { // the new attempt's SYN, and its repetitions
		p.guestEnd.Write([][]byte{none, tcpFrame(a, b, 1000, 0, 0x02)})
		select {
		case <-served:
			again.Stop()
			return
		case <-again.C:
		case <-testContext(t).Done():
			t.Fatal("the new attempt was taken for a repetition of the old one")
		}
	}
}

// SYNs that are repeated without end while others are rejected leave nothing behind.
func TestRejectUnderRepeatedSYNs(t *testing.T) {
	p := newPair(t, allOffloads, &handler{tcp: func(_ context.Context, r *stack.TCPRequest) { r.Reject(unix.ECONNREFUSED) }})
	none := make([]byte, stack.HeaderLen)
	for i := range 20000 {
		a, b := netip.AddrPortFrom(container4.Addr(), uint16(5000+i%4)), netip.AddrPortFrom(world4, 80)
		p.guestEnd.Write([][]byte{none, tcpFrame(a, b, 1, 0, 0x02)})
	}
	// Whether all are gone shows when the stack ends (newPair waits for that), and in a dial that gets its answer.
	if _, err := p.dial(testContext(t), netip.AddrPortFrom(world4, 80)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial afterwards: %v", err)
	}
	if st := p.gateway.Stats(); st.Rejected < 4 {
		t.Errorf("counted %+v", st)
	}
}

func TestDialsAreShared(t *testing.T) {
	var waiting atomic.Int32
	p := newPair(t, allOffloads, &handler{tcp: func(ctx context.Context, r *stack.TCPRequest) {
		if r.Dst.Addr() == world4 {
			waiting.Add(1)
			<-ctx.Done()
			r.Reject(ctx.Err())
			return
		}
		r.Reject(unix.ECONNREFUSED)
	}}, func(gw, _ *stack.Config, _, _ *taptest.PipeEnd) { gw.MaxDials, gw.MaxDialsPerHost = 20, 10 })
	for i := range 30 {
		a, b := netip.AddrPortFrom(container4.Addr(), uint16(5000+i)), netip.AddrPortFrom(world4, 80)
		p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), tcpFrame(a, b, 1, 0, 0x02)})
	}
	for waiting.Load() < 10 {
		time.Sleep(time.Millisecond)
	}
	other := netip.MustParseAddr("203.0.113.99")
	if _, err := p.dial(testContext(t), netip.AddrPortFrom(other, 80)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial beside a black hole: %v", err)
	}
	if st := p.gateway.Stats(); waiting.Load() != 10 || st.SYNsOverLimit != 20 {
		t.Errorf("%d dials to the black hole, %d SYNs over the limit; want 10 and 20", waiting.Load(), st.SYNsOverLimit)
	}
}

// When black holes have taken all places, an address without a dial still gets one.
func TestNewcomerGetsADial(t *testing.T) {
	var waiting atomic.Int32
	newcomer := netip.MustParseAddr("203.0.113.99")
	p := newPair(t, allOffloads, &handler{tcp: func(ctx context.Context, r *stack.TCPRequest) {
		if r.Dst.Addr() == newcomer {
			r.Reject(unix.ECONNREFUSED)
			return
		}
		waiting.Add(1)
		<-ctx.Done()
		r.Reject(ctx.Err())
	}}, func(gw, _ *stack.Config, _, _ *taptest.PipeEnd) { gw.MaxDials, gw.MaxDialsPerHost = 40, 5 })
	for i := range 40 {
		a := netip.AddrPortFrom(container4.Addr(), uint16(5000+i))
		b := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i % 8)}), 80)
		p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), tcpFrame(a, b, 1, 0, 0x02)})
	}
	for waiting.Load() < 40 {
		time.Sleep(time.Millisecond)
	}
	if _, err := p.dial(testContext(t), netip.AddrPortFrom(newcomer, 80)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial: %v", err)
	}
	if st := p.gateway.Stats(); st.SYNsOverLimit != 0 {
		t.Errorf("%d SYNs were dropped, the newcomer's among them", st.SYNsOverLimit)
	}
}

func TestAbortIsReset(t *testing.T) {
	for _, from := range []string{"container", "gateway"} {
		t.Run(from, func(t *testing.T) {
			h, conns := accepting(t)
			p := newPair(t, allOffloads, h)
			c, g := connect(t, p, conns, world4)
			if from == "gateway" {
				c, g = g, c
			}
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			var b [8]byte
			if _, err := g.Read(b[:]); err != nil {
				t.Fatal(err)
			}
			c.Abort()
			if _, err := g.Read(b[:]); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("read after the peer's abort: %v, want ECONNRESET", err)
			}
			g.Close()
		})
	}
}

func TestHalfClose(t *testing.T) {
	h, conns := accepting(t)
	p := newPair(t, allOffloads, h)
	for _, first := range []string{"container", "gateway"} {
		t.Run(first, func(t *testing.T) {
			c, g := connect(t, p, conns, world6)
			if first == "gateway" {
				c, g = g, c
			}
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(g); err != nil || len(b) != 0 {
				t.Fatalf("%d octets, %v; want the end", len(b), err)
			}
			go func() {
				g.Write([]byte("still here"))
				g.Close()
			}()
			if b, err := io.ReadAll(c); err != nil || string(b) != "still here" {
				t.Errorf("after its own FIN the peer read %q, %v", b, err)
			}
			c.Close()
		})
	}
}

func TestConnIsANetConn(t *testing.T) {
	h, conns := accepting(t)
	p := newPair(t, allOffloads, h)
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		c, err := p.dial(context.Background(), netip.AddrPortFrom(world4, 80))
		if err != nil {
			return nil, nil, nil, err
		}
		g := <-conns
		return c, g, func() { c.Close(); g.Close() }, nil
	})
}

// Drain and Fill are the side of a Conn that the relay uses.
func TestDrainAndFill(t *testing.T) {
	h, conns := accepting(t)
	p := newPair(t, allOffloads, h)
	c, g := connect(t, p, conns, world4)
	ready := make(chan struct{}, 1024)
	g.OnReady(func(_, _, _ bool) {
		select {
		case ready <- struct{}{}:
		default:
		}
	})
	if _, err := c.Write([]byte("hello, world")); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for len(got) < 12 {
		<-ready
		for {
			// Take five octets at a time: Drain must keep the rest in order.
			_, err := g.Drain(func(pieces [][]byte) (int, error) {
				piece := pieces[0][:min(5, len(pieces[0]))]
				got = append(got, piece...)
				return len(piece), nil
			})
			if err == unix.EAGAIN {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if string(got) != "hello, world" {
		t.Errorf("drained %q", got)
	}

	text := bytes.NewReader([]byte("and back"))
	if n, err := g.Fill(8, text.Read); n != 8 || err != nil {
		t.Errorf("fill: %d, %v", n, err)
	}
	b := make([]byte, 8)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "and back" {
		t.Errorf("read %q, %v", b, err)
	}

	if _, err := g.Fill(8, func([]byte) (int, error) { return 0, unix.EIO }); err != unix.EIO {
		t.Errorf("fill with a failing read: %v", err)
	}
	for { // until the buffers are full
		if _, err := g.Fill(1<<16, func(p []byte) (int, error) { return len(p), nil }); err != nil {
			if err != unix.EAGAIN {
				t.Errorf("fill without room: %v", err)
			}
			break
		}
	}
	c.Abort()
	for g.Err() == nil {
		<-ready
	}
	if err := g.Err(); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("Err after the container's RST: %v", err)
	}
	g.Close()
}
