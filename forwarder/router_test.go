package forwarder

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"usernet/stack"
)

// A world is what the host is connected to:
//
//	host h0 10.1.0.1 ── 10.1.0.254 r0 router r1 10.2.0.254 ── o0 10.2.0.1 outside
//	   2001:db8:1::1 ── 2001:db8:1::fe     2001:db8:2::fe ── 2001:db8:2::1
//
// The test's own goroutine is the host.
type world struct{ router, outside *namespace }

var routerAddr = map[bool]netip.Addr{false: netip.MustParseAddr("10.1.0.254"), true: netip.MustParseAddr("2001:db8:1::fe")}

func newWorld(t *testing.T) world {
	t.Helper()
	newNetNS(t)
	w := world{newNamespace(t), newNamespace(t)}
	// Link-local addresses work at once, without a second for finding duplicates.
	noDAD := map[string]string{"net/ipv6/conf/default/dad_transmits": "0"}
	check(t, setSysctls(noDAD))
	w.router.sysctl(noDAD)
	w.outside.sysctl(noDAD)
	run(t, "ip", "link", "add", "h0", "type", "veth", "peer", "name", "r0", "netns", fmt.Sprint(w.router.tid))
	w.router.run("ip", "link", "add", "r1", "type", "veth", "peer", "name", "o0", "netns", fmt.Sprint(w.outside.tid))
	here := func(name string, args ...string) { run(t, name, args...) }
	for _, l := range []struct {
		run          func(string, ...string)
		link, a4, a6 string
	}{
		{here, "h0", "10.1.0.1/24", "2001:db8:1::1/64"},
		{w.router.run, "r0", "10.1.0.254/24", "2001:db8:1::fe/64"},
		{w.router.run, "r1", "10.2.0.254/24", "2001:db8:2::fe/64"},
		{w.outside.run, "o0", "10.2.0.1/24", "2001:db8:2::1/64"},
	} {
		l.run("ip", "link", "set", l.link, "up")
		l.run("ip", "address", "add", l.a4, "dev", l.link)
		l.run("ip", "-6", "address", "add", l.a6, "dev", l.link, "nodad")
	}
	check(t, settled("2001:db8:1::1"))
	w.router.do(func() error { return settled("2001:db8:1::fe") })
	w.router.do(func() error { return settled("2001:db8:2::fe") })
	w.outside.do(func() error { return settled("2001:db8:2::1") })
	here("ip", "route", "add", "default", "via", "10.1.0.254")
	here("ip", "-6", "route", "add", "default", "via", "2001:db8:1::fe")
	w.outside.run("ip", "route", "add", "default", "via", "10.2.0.254")
	w.outside.run("ip", "-6", "route", "add", "default", "via", "2001:db8:2::fe")
	w.router.sysctl(map[string]string{
		"net/ipv4/ip_forward":          "1",
		"net/ipv6/conf/all/forwarding": "1",
		// The tests ask faster than a real router would answer.
		"net/ipv4/icmp_ratelimit": "0",
		"net/ipv6/icmp/ratelimit": "0",
	})
	return w
}

// traceroute -U: each hop tells who it is, and the destination that the port is shut.
func TestTracerouteUDP(t *testing.T) {
	newWorld(t)
	c, _ := newContainer(t, Config{})
	for _, v := range []struct {
		me, dst                  netip.AddrPort
		exceeded, shut, shutCode uint8
	}{
		{me4, netip.MustParseAddrPort("10.2.0.1:33434"), 11, 3, 3},
		{me6, netip.MustParseAddrPort("[2001:db8:2::1]:33434"), 3, 1, 4},
	} {
		payload := strings.Repeat("@", 32)
		probe := stack.Datagram{Src: v.me, Dst: v.dst, Payload: [][]byte{[]byte(payload)}}
		probe.TTL = 1
		c.f.ServeUDP([]stack.Datagram{probe})
		e := c.nextError()
		if e.Type != v.exceeded || e.Code != 0 || e.From != routerAddr[v.me.Addr().Is6()] {
			t.Errorf("TTL 1: %+v", e)
		}
		checkQuote(t, e, v.me, v.dst, payload)
		probe.TTL = 2
		c.f.ServeUDP([]stack.Datagram{probe})
		e = c.nextError()
		if e.Type != v.shut || e.Code != v.shutCode || e.From != v.dst.Addr() {
			t.Errorf("TTL 2: %+v", e)
		}
		checkQuote(t, e, v.me, v.dst, payload)
	}
}

// traceroute -I, and ping's own TTL.
func TestTracerouteEcho(t *testing.T) {
	newWorld(t)
	allowPing(t)
	c, _ := newContainer(t, Config{})
	for _, v := range []struct {
		dst      string
		exceeded uint8
	}{{"10.2.0.1", 11}, {"2001:db8:2::1", 3}} {
		ask := echo(v.dst, 4711, 1, "payload")
		ask.TTL = 1
		c.f.ServeEcho(ask)
		e := c.nextError()
		if e.Type != v.exceeded || e.Code != 0 || e.From != routerAddr[ask.Dst.Is6()] || e.Src != ask.Src || e.Dst != ask.Dst {
			t.Errorf("TTL 1: %+v", e)
		}
		checkEchoQuote(t, e, 4711, 1, "payload")
		ask.TTL, ask.Seq = 2, 2
		c.f.ServeEcho(ask)
		if got := c.nextEcho(); got.Src != ask.Dst || got.ID != 4711 || got.Seq != 2 || got.TTL != 63 {
			t.Errorf("TTL 2: %+v", got)
		}
	}
}

// A router with a smaller MTU behind it says which.
func TestPathMTU(t *testing.T) {
	w := newWorld(t)
	allowPing(t)
	w.router.run("ip", "link", "set", "r1", "mtu", "1300")
	c, _ := newContainer(t, Config{})
	long := strings.Repeat("x", 1400)
	for _, v := range []struct {
		me, dst   netip.AddrPort
		typ, code uint8
	}{
		{me4, netip.MustParseAddrPort("10.2.0.1:9"), 3, 4},
		{me6, netip.MustParseAddrPort("[2001:db8:2::1]:9"), 2, 0},
	} {
		c.send(v.me, v.dst, long)
		if e := c.nextError(); e.Type != v.typ || e.Code != v.code || e.Info != 1300 || e.From != routerAddr[v.me.Addr().Is6()] {
			t.Errorf("UDP: %+v", e)
		}
	}
	// The kernel now knows the path and sends fragments.
	s := w.outside.listen("10.2.0.1:0")
	c.send(me4, s.addr, long)
	s.expect(long)
}

// Nobody behind the router has the address.
func TestHostUnreachableBehindRouter(t *testing.T) {
	w := newWorld(t)
	allowPing(t)
	// A dead address is found out at once, not after three seconds.
	w.router.sysctl(map[string]string{
		"net/ipv4/neigh/r1/mcast_solicit":   "1",
		"net/ipv4/neigh/r1/retrans_time_ms": "10",
		"net/ipv6/neigh/r1/mcast_solicit":   "1",
		"net/ipv6/neigh/r1/retrans_time_ms": "10",
	})
	c, _ := newContainer(t, Config{})
	dst := netip.MustParseAddrPort("10.2.0.99:9")
	c.send(me4, dst, "anybody?")
	e := c.nextError()
	if e.Type != 3 || e.Code != 1 || e.From != routerAddr[false] {
		t.Errorf("UDP: %+v", e)
	}
	checkQuote(t, e, me4, dst, "anybody?")
	for _, v := range []struct {
		dst       string
		typ, code uint8
	}{{"10.2.0.98", 3, 1}, {"2001:db8:2::98", 1, 3}} {
		c.f.ServeEcho(echo(v.dst, 1, 2, "anybody?"))
		e := c.nextError()
		if e.Type != v.typ || e.Code != v.code || e.From != routerAddr[e.Dst.Is6()] {
			t.Errorf("echo: %+v", e)
		}
		checkEchoQuote(t, e, 1, 2, "anybody?")
	}
}

// Trains cross a network of MTU 1500 as the datagrams that they are.
func TestTrainsOverNetwork(t *testing.T) {
	w := newWorld(t)
	c, _ := newContainer(t, Config{})
	for _, v := range []struct {
		me     netip.AddrPort
		listen string
	}{{me4, "10.2.0.1:0"}, {me6, "[2001:db8:2::1]:0"}} {
		s := w.outside.listen(v.listen)
		s.SetReadBuffer(1 << 20)
		payloads := numbered(44, 1400, 9)
		c.f.ServeUDP(trains(payloads, v.me, s.addr)["a train"])
		var from netip.AddrPort
		for _, p := range payloads {
			from = s.expect(p)
		}
		for _, p := range payloads {
			s.send(from, p)
		}
		for i, d := range c.receive(len(payloads)) {
			if string(d.Payload[0]) != payloads[i] {
				t.Fatalf("answer %d is %.20q", i, d.Payload[0])
			}
		}
	}
}
