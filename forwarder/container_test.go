package forwarder

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"usernet/stack"
)

// A container plays the container and the stack: it calls the Forwarder as the stack would
// and keeps what it is given.
type container struct {
	t *testing.T
	f *Forwarder

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when something came
	got     []stack.Datagram
	echoes  []stack.Echo
	errors  []stack.ICMPError
}

// A clock is a Forwarder's, for the tests to move.
type clock struct{ atomic.Int64 }

func (c *clock) advance(d time.Duration) { c.Add(int64(d)) }

const patience = 20 * time.Second // what a loaded machine may need

// newContainer runs a Forwarder for the length of the test.
func newContainer(t *testing.T, cfg Config) (*container, *clock) {
	t.Helper()
	if cfg.Policy == (Policy{}) {
		cfg.Policy = testPolicy(true)
	}
	f, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	now := &clock{}
	now.Store(int64(time.Hour))
	f.now = now.Load
	f.newTables()
	c := &container{t: t, f: f, changed: make(chan struct{})}
	f.Bind(c)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error("Run:", err)
		}
		if s := f.Stats(); s.UDP.Flows+s.Echo.Flows+s.Published.Flows != 0 {
			n := s.UDP.Flows + s.Echo.Flows + s.Published.Flows
			t.Errorf("%d flows after Run", n)
		}
		f.Close()
	})
	return c, now
}

func (c *container) SendUDP(d *stack.Datagram) error {
	kept := *d
	kept.Payload = [][]byte{bytes.Join(d.Payload, nil)}
	c.keep(func() { c.got = append(c.got, kept) })
	return nil
}

func (c *container) SendEchoReply(e stack.Echo) error {
	e.Payload = bytes.Clone(e.Payload)
	c.keep(func() { c.echoes = append(c.echoes, e) })
	return nil
}

func (c *container) SendICMP(e *stack.ICMPError) error {
	kept := *e
	kept.Transport = bytes.Clone(e.Transport)
	c.keep(func() { c.errors = append(c.errors, kept) })
	return nil
}

func (c *container) keep(what func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	what()
	close(c.changed)
	c.changed = make(chan struct{})
}

// wait waits until what came satisfies ok, which runs with c.mu held.
func (c *container) wait(what string, ok func() bool) {
	c.t.Helper()
	timeout := time.After(patience)
	for {
		c.mu.Lock()
		done, changed := ok(), c.changed
		c.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			c.mu.Lock()
			defer c.mu.Unlock()
			c.t.Fatalf("waited in vain for %s: %d datagrams, %d echoes, errors %+v, %+v", what, len(c.got), len(c.echoes), c.errors, c.f.Stats())
		}
	}
}

// waitStats waits until the counters satisfy ok. The Forwarder is woken, so that a clock moved
// by the test is looked at.
func (c *container) waitStats(what string, ok func(Stats) bool) {
	c.t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok(c.f.Stats()) {
		if time.Now().After(deadline) {
			c.t.Fatalf("waited in vain for %s: %+v", what, c.f.Stats())
		}
		c.f.poller.wake()
		<-tick.C
	}
}

// datagrams is what came so far, with trains taken apart, and forgets it.
func (c *container) datagrams() []stack.Datagram {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []stack.Datagram
	for _, d := range c.got {
		all = append(all, apart(d)...)
	}
	c.got = nil
	return all
}

func apart(d stack.Datagram) []stack.Datagram {
	if d.Segment == 0 {
		return []stack.Datagram{d}
	}
	var all []stack.Datagram
	for part := range slices.Chunk(d.Payload[0], d.Segment) {
		one := d
		one.Segment, one.Payload = 0, [][]byte{part}
		all = append(all, one)
	}
	return all
}

// receive waits for n datagrams and returns them.
func (c *container) receive(n int) []stack.Datagram {
	c.t.Helper()
	c.wait("datagrams", func() bool {
		have := 0
		for _, d := range c.got {
			have += len(apart(d))
		}
		return have >= n
	})
	return c.datagrams()
}

// nextError waits for an ICMP error and returns it.
func (c *container) nextError() stack.ICMPError {
	c.t.Helper()
	c.wait("an ICMP error", func() bool { return len(c.errors) > 0 })
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.errors[0]
	c.errors = c.errors[1:]
	return e
}

// send sends one datagram.
func (c *container) send(src, dst netip.AddrPort, payload string) {
	c.f.ServeUDP([]stack.Datagram{{Src: src, Dst: dst, Payload: [][]byte{[]byte(payload)}}})
}

// A server is a socket of the host.
type server struct {
	*net.UDPConn
	t    *testing.T
	addr netip.AddrPort
	buf  []byte
}

func newServer(t *testing.T, addr string) *server {
	t.Helper()
	s, err := listenUDP(t, addr)
	check(t, err)
	return s
}

func listenUDP(t *testing.T, addr string) (*server, error) {
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { conn.Close() })
	return &server{UDPConn: conn, t: t, addr: conn.LocalAddr().(*net.UDPAddr).AddrPort(), buf: make([]byte, 1<<16)}, nil
}

// receive returns the next datagram and its sender.
func (s *server) receive() (string, netip.AddrPort) {
	s.t.Helper()
	s.SetReadDeadline(time.Now().Add(patience))
	n, from, err := s.ReadFromUDPAddrPort(s.buf)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(s.buf[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

// expect receives and compares.
func (s *server) expect(want string) netip.AddrPort {
	s.t.Helper()
	got, from := s.receive()
	if got != want {
		s.t.Fatalf("server got %d octets %.40q, want %d %.40q", len(got), got, len(want), want)
	}
	return from
}

func (s *server) send(to netip.AddrPort, payload string) {
	s.t.Helper()
	if _, err := s.WriteToUDPAddrPort([]byte(payload), to); err != nil {
		s.t.Fatal(err)
	}
}

var (
	me4 = netip.MustParseAddrPort("10.0.2.100:40001")
	me6 = netip.MustParseAddrPort("[fd00::100]:40001")
)

// gateway is the server as the container calls it: the host's loopback is behind the gateway.
func (s *server) gateway() netip.AddrPort {
	gw := testPolicy(true).Gateway4
	if s.addr.Addr().Is6() {
		gw = testPolicy(true).Gateway6
	}
	return netip.AddrPortFrom(gw, s.addr.Port())
}
