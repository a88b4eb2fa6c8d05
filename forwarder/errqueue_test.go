package forwarder

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
	"time"

	"usernet/stack"
)

// checkQuote checks that e quotes the datagram that the container sent from me to dst.
func checkQuote(t *testing.T, e stack.ICMPError, me, dst netip.AddrPort, payload string) {
	t.Helper()
	if e.Protocol != protoUDP || e.Src != me.Addr() || e.Dst != dst.Addr() {
		t.Errorf("protocol %d from %v to %v; want %v to %v", e.Protocol, e.Src, e.Dst, me, dst)
	}
	if len(e.Transport) < udpHeaderLen {
		t.Fatalf("%d octets are quoted", len(e.Transport))
	}
	h := e.Transport
	if sport, dport := binary.BigEndian.Uint16(h), binary.BigEndian.Uint16(h[2:]); sport != me.Port() || dport != dst.Port() {
		t.Errorf("ports %d, %d; want %d, %d", sport, dport, me.Port(), dst.Port())
	}
	if n := int(binary.BigEndian.Uint16(h[4:])); n != udpHeaderLen+len(payload) {
		t.Errorf("UDP length %d, want %d", n, udpHeaderLen+len(payload))
	}
	if string(h[udpHeaderLen:]) != payload {
		t.Errorf("quotes %.40q, want %.40q", h[udpHeaderLen:], payload)
	}
}

// closedPort is an address at which nobody listens.
func closedPort(t *testing.T, listen string) *server {
	s := newServer(t, listen)
	s.Close()
	return s
}

func TestErrorPortUnreachable(t *testing.T) {
	for _, v := range []struct {
		name, listen string
		me           netip.AddrPort
		typ, code    uint8
	}{{"IPv4", "127.0.0.1:0", me4, 3, 3}, {"IPv6", "[::1]:0", me6, 1, 4}} {
		t.Run(v.name, func(t *testing.T) {
			c, _ := newContainer(t, Config{})
			closed := closedPort(t, v.listen)
			for range 3 {
				c.send(v.me, closed.gateway(), "anybody?")
				e := c.nextError()
				if e.Type != v.typ || e.Code != v.code {
					t.Errorf("type %d code %d", e.Type, e.Code)
				}
				if e.From != closed.gateway().Addr() {
					t.Errorf("from %v: the container knows no such host", e.From)
				}
				checkQuote(t, e, v.me, closed.gateway(), "anybody?")
			}
			c.waitStats("three errors", func(s Stats) bool { return s.UDP.Errors == 3 && s.UDP.Sent == 3 })
		})
	}
}

// An error that waits in the socket for one destination fails no datagram to another.
func TestErrorIsolation(t *testing.T) {
	// Nobody runs the poller: the errors wait until the next datagram is sent.
	f, err := New(Config{Policy: testPolicy(true)})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := &container{t: t, f: f, changed: make(chan struct{})}
	f.Bind(c)
	s, closed := newServer(t, "127.0.0.1:0"), closedPort(t, "127.0.0.1:0")
	for range 10 {
		c.send(me4, closed.gateway(), "anybody?") // on loopback the answer is there at once
		c.send(me4, s.gateway(), "hello")
		s.expect("hello")
	}
	c.f.ServeUDP(trains(numbered(20, 800, 3), me4, closed.gateway())["a train"])
	c.f.ServeUDP(trains(numbered(20, 800, 3), me4, s.gateway())["a train"])
	for _, p := range numbered(20, 800, 3) {
		s.expect(p)
	}
	if st := f.Stats().UDP; st.Sent != 60 || st.Errors < 11 || st.Drops["error"] != 0 {
		t.Errorf("counted %+v", st)
	}
	for range 10 {
		checkQuote(t, c.nextError(), me4, closed.gateway(), "anybody?")
	}
}

// The host's own errno, where no packet left, becomes the same kind of message.
func TestErrorNoRoute(t *testing.T) {
	c, _ := newContainer(t, Config{})
	for _, v := range []struct {
		me, dst   netip.AddrPort
		typ, code uint8
	}{
		{me4, netip.MustParseAddrPort("198.51.100.1:53"), 3, 0},
		{me6, netip.MustParseAddrPort("[2001:db8::1]:53"), 1, 0},
	} {
		c.send(v.me, v.dst, "question")
		e := c.nextError()
		if e.Type != v.typ || e.Code != v.code || e.From.IsValid() {
			t.Errorf("%v: type %d code %d from %v", v.dst, e.Type, e.Code, e.From)
		}
		checkQuote(t, e, v.me, v.dst, "question")
	}
	if n := c.f.Stats().UDP.Drops["error"]; n != 2 {
		t.Errorf("%d errors", n)
	}
}

func TestErrorProhibited(t *testing.T) {
	addHostAddress(t, "192.0.2.7/24", "2001:db8:1::7/64")
	run(t, "ip", "route", "add", "prohibit", "198.51.100.0/24")
	t.Cleanup(func() { run(t, "ip", "route", "del", "prohibit", "198.51.100.0/24") })
	c, _ := newContainer(t, Config{})
	dst := netip.MustParseAddrPort("198.51.100.1:53")
	c.send(me4, dst, strings.Repeat("q", 3000))
	e := c.nextError()
	if e.Type != 3 || e.Code != 13 {
		t.Errorf("type %d code %d", e.Type, e.Code)
	}
	if len(e.Transport) != quoteLen {
		t.Errorf("%d octets are quoted, want %d", len(e.Transport), quoteLen)
	}
}

// Nobody answers to the address on the host's link: the host's kernel says so after its
// neighbour discovery has failed.
func TestErrorHostUnreachable(t *testing.T) {
	addHostAddress(t, "192.0.2.7/24")
	// One try of the default three, which take a second each.
	sysctl(t, "net.ipv4.neigh.world0.mcast_solicit", "1")
	sysctl(t, "net.ipv4.neigh.world0.retrans_time_ms", "10")
	c, _ := newContainer(t, Config{})
	dst := netip.MustParseAddrPort("192.0.2.99:53")
	c.send(me4, dst, "question")
	e := c.nextError()
	if e.Type != 3 || e.Code != 1 {
		t.Errorf("type %d code %d", e.Type, e.Code)
	}
	checkQuote(t, e, me4, dst, "question")
}

// A peer that was forgotten meanwhile is told of no more, and the socket is at rest again.
func TestErrorOfForgottenPeer(t *testing.T) {
	f, err := New(Config{Policy: testPolicy(true), UDP: UDPConfig{MaxPeers: 1}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := &container{t: t, f: f, changed: make(chan struct{})}
	f.Bind(c)
	s, closed := newServer(t, "127.0.0.1:0"), closedPort(t, "127.0.0.1:0")
	c.send(me4, closed.gateway(), "anybody?")
	c.send(me4, s.gateway(), "hello")
	s.expect("hello")
	if st := f.Stats().UDP; st.Sent != 2 || st.Errors != 0 {
		t.Errorf("counted %+v", st)
	}
}

func TestRouterNames(t *testing.T) {
	f := &Forwarder{}
	addr := netip.MustParseAddr
	for _, c := range []struct{ offender, real, used, want string }{
		{"127.0.0.1", "127.0.0.1", "10.0.2.2", "10.0.2.2"},
		{"192.0.2.7", "192.0.2.7", "169.254.1.2", "169.254.1.2"},
		{"192.0.2.1", "198.51.100.1", "198.51.100.1", "192.0.2.1"},
		{"127.0.0.1", "198.51.100.1", "198.51.100.1", ""},
		{"fe80::1", "2001:db8::1", "2001:db8::1", ""},
		{"", "198.51.100.1", "198.51.100.1", ""},
	} {
		var offender, want netip.Addr
		if c.offender != "" {
			offender = addr(c.offender)
		}
		if c.want != "" {
			want = addr(c.want)
		}
		if got := f.router(offender, addr(c.real), addr(c.used)); got != want {
			t.Errorf("%q for %s: from %v, want %v", c.offender, c.real, got, want)
		}
	}
}

// No error queue, however full, holds a sender for ever.
func TestErrorFlood(t *testing.T) {
	f, err := New(Config{Policy: testPolicy(true)})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := &container{t: t, f: f, changed: make(chan struct{})}
	f.Bind(c)
	var closed []netip.AddrPort
	for port := range 200 {
		closed = append(closed, netip.AddrPortFrom(f.cfg.Policy.Gateway4, uint16(1+port)))
	}
	done := make(chan struct{})
	for range 2 {
		go func() {
			for _, to := range closed {
				c.send(me4, to, "anybody?")
			}
			done <- struct{}{}
		}()
	}
	timeout := time.After(patience)
	for range 2 {
		select {
		case <-done:
		case <-timeout:
			t.Fatal("a sender is held")
		}
	}
}
