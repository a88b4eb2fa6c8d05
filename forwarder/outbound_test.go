package forwarder

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseOutbound(t *testing.T) {
	a4, a6 := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")
	for _, c := range []struct {
		v4, v6 string
		want   Outbound
		err    string
	}{
		{"", "", Outbound{}, ""},
		{"192.0.2.7", "", Outbound{Addr4: a4}, ""},
		{"::ffff:192.0.2.7", "2001:db8::7", Outbound{Addr4: a4, Addr6: a6}, ""},
		{"eth0", "wg0.1", Outbound{Interface4: "eth0", Interface6: "wg0.1"}, ""},
		{"2001:db8::7", "", Outbound{}, "not an IPv4 address"},
		{"", "192.0.2.7", Outbound{}, "not an IPv6 address"},
		{"", "::ffff:192.0.2.7", Outbound{}, "not an IPv6 address"},
		{"0.0.0.0", "", Outbound{}, "not an IPv4 address"},
		{"", "ff02::1", Outbound{}, "not an IPv6 address"},
		{"", "fe80::1%eth0", Outbound{}, "not an IPv6 address"},
		{"127.0.0.1", "", Outbound{}, "nothing leaves the host"},
		{"::ffff:127.0.0.1", "", Outbound{}, "nothing leaves the host"},
		{"", "::1", Outbound{}, "nothing leaves the host"},
		{"lo", "", Outbound{}, "nothing leaves the host"},
		{"", "lo", Outbound{}, "nothing leaves the host"},
		{"192.0.2.7:80", "", Outbound{}, "neither"},
		{"an-interface-too-long", "", Outbound{}, "1 to 15 octets"},
		{"../eth0", "a b", Outbound{}, "neither"},
	} {
		got, err := ParseOutbound(c.v4, c.v6)
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("ParseOutbound(%q, %q) = %+v, %v", c.v4, c.v6, got, err)
		}
	}
}

func TestOutboundCheck(t *testing.T) {
	addHostAddress(t, "192.0.2.7/24")
	for _, c := range []struct {
		v4, v6 string
		want   error
		says   string
	}{
		{"", "", nil, ""},
		{"192.0.2.7", "", nil, ""},
		{"world0", "world0", nil, ""},
		{"192.0.2.8", "", unix.EADDRNOTAVAIL, "ip address"},
		{"", "2001:db8::7", unix.EADDRNOTAVAIL, "ip address"},
		{"none0", "", unix.ENODEV, "ip link"},
	} {
		o, err := ParseOutbound(c.v4, c.v6)
		if err != nil {
			t.Fatal(err)
		}
		if err = o.Check(); !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q, %q: %v", c.v4, c.v6, err)
		}
		if f, err := New(Config{Outbound: o}); !errors.Is(err, c.want) {
			t.Errorf("New with %q, %q: %v", c.v4, c.v6, err)
		} else if err == nil {
			f.Close()
		}
	}
}

func TestOutboundPrepare(t *testing.T) {
	addHostAddress(t, "192.0.2.7/24", "2001:db8:1::7/64")
	addr, _ := ParseOutbound("192.0.2.7", "2001:db8:1::7")
	dev, _ := ParseOutbound("world0", "world0")
	toLoopback, devToLoopback := addr, dev
	toLoopback.ToLoopback, devToLoopback.ToLoopback = true, true
	for _, c := range []struct {
		o         Outbound
		dst       string
		addr, dev string
	}{
		{Outbound{}, "198.51.100.1", "0.0.0.0", ""},
		{addr, "198.51.100.1", "192.0.2.7", ""},
		{addr, "2001:db8::1", "2001:db8:1::7", ""},
		{addr, "127.0.0.1", "0.0.0.0", ""},
		{addr, "::1", "::", ""},
		{toLoopback, "127.0.0.1", "192.0.2.7", ""},
		{toLoopback, "::1", "2001:db8:1::7", ""},
		{toLoopback, "198.51.100.1", "192.0.2.7", ""},
		{devToLoopback, "127.0.0.1", "0.0.0.0", ""},
		{dev, "198.51.100.1", "0.0.0.0", "world0"},
		{dev, "2001:db8::1", "::", "world0"},
		{dev, "127.0.0.1", "0.0.0.0", ""},
		{dev, "192.0.2.7", "0.0.0.0", ""}, // its answers come by lo
		{dev, "2001:db8:1::7", "::", ""},
	} {
		dst := netip.MustParseAddr(c.dst)
		fd, err := unix.Socket(family(dst), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.o.Prepare(fd, family(dst), dst); err != nil {
			t.Errorf("%+v to %s: %v", c.o, c.dst, err)
		}
		var bound name
		sa, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			bound.set(netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)))
		case *unix.SockaddrInet6:
			bound.set(netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)))
		}
		if got := addrPort(bound[:]); got.Addr().String() != c.addr || got.Port() != 0 {
			t.Errorf("%+v to %s: bound to %v, want %s and no port yet", c.o, c.dst, got, c.addr)
		}
		if got, _ := unix.GetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE); got != c.dev {
			t.Errorf("%+v to %s: bound to %q, want %q", c.o, c.dst, got, c.dev)
		}
		unix.Close(fd)
	}
}

// Flows leave from the outbound address or by the outbound interface; what is the host's own
// is reached all the same.
func TestOutboundFlows(t *testing.T) {
	w := newWorld(t)
	allowPing(t)
	run(t, "ip", "address", "add", "10.1.0.5/24", "dev", "h0")
	// A second, worse way to the outside.
	run(t, "ip", "link", "add", "h1", "type", "veth", "peer", "name", "o1", "netns", fmt.Sprint(w.outside.tid))
	run(t, "ip", "link", "set", "h1", "up")
	run(t, "ip", "address", "add", "10.3.0.1/24", "dev", "h1")
	w.outside.run("ip", "link", "set", "o1", "up")
	w.outside.run("ip", "address", "add", "10.3.0.2/24", "dev", "o1")
	run(t, "ip", "route", "add", "default", "via", "10.3.0.2", "metric", "100")

	outside := w.outside.listen("10.2.0.1:0")
	loopback, own := newServer(t, "127.0.0.1:0"), newServer(t, "10.1.0.1:0")
	for _, c := range []struct {
		outbound, outside, own, loopback string
		toLoopback                       bool
	}{
		{"", "10.1.0.1", "10.1.0.1", "127.0.0.1", false},
		{"10.1.0.5", "10.1.0.5", "10.1.0.5", "127.0.0.1", false},
		{"10.1.0.5", "10.1.0.5", "10.1.0.5", "10.1.0.5", true},
		{"h1", "10.3.0.1", "10.1.0.1", "127.0.0.1", false},
		{"h1", "10.3.0.1", "10.1.0.1", "127.0.0.1", true},
	} {
		o, err := ParseOutbound(c.outbound, "")
		if err != nil {
			t.Fatal(err)
		}
		o.ToLoopback = c.toLoopback
		ct, _ := newContainer(t, Config{Outbound: o})
		for _, v := range []struct {
			s    *server
			dst  netip.AddrPort
			from string
		}{{outside, outside.addr, c.outside}, {loopback, loopback.gateway(), c.loopback}, {own, own.addr, c.own}} {
			ct.send(me4, v.dst, "hello")
			from := v.s.expect("hello")
			if from.Addr().String() != v.from {
				t.Errorf("outbound %q: %v sees %v, want %s", c.outbound, v.dst, from, v.from)
			}
			v.s.send(from, "answer")
			if got := ct.receive(1)[0]; got.Src != v.dst {
				t.Errorf("outbound %q: answer from %v, want %v", c.outbound, got.Src, v.dst)
			}
		}
		for _, dst := range []string{"10.2.0.1", "10.1.0.1"} {
			ct.f.ServeEcho(echo(dst, 1, 1, "payload"))
			if got := ct.nextEcho(); got.Src.String() != dst {
				t.Errorf("outbound %q: echo from %v, want %s", c.outbound, got.Src, dst)
			}
		}
	}
}

// From a loopback address nothing leaves the host, and who tries is told so.
func TestOutboundLoopback(t *testing.T) {
	w := newWorld(t)
	allowPing(t)
	outside, loopback := w.outside.listen("10.2.0.1:0"), newServer(t, "127.0.0.1:0")
	o := Outbound{Addr4: netip.MustParseAddr("127.0.0.1"), ToLoopback: true}
	ct, _ := newContainer(t, Config{Outbound: o})
	ct.send(me4, loopback.gateway(), "hello")
	if from := loopback.expect("hello"); from.Addr() != o.Addr4 {
		t.Errorf("the loopback sees %v", from)
	}
	for _, proto := range []uint8{protoTCP, protoUDP, protoICMP} {
		if _, v := ct.f.resolve(Flow{proto, me4, outside.addr}); v != (Verdict{Refuse, unix.ENETUNREACH}) {
			t.Errorf("protocol %d: %v", proto, v)
		}
	}
}

// A plain user may bind a socket to an interface once; that the source's port is taken must
// not make it twice.
func TestOutboundInterfaceAndPortTaken(t *testing.T) {
	w := newWorld(t)
	run(t, "ip", "address", "add", "10.1.0.5/24", "dev", "h0")
	outside, taken := w.outside.listen("10.2.0.1:0"), newServer(t, "0.0.0.0:0")
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	check(t, unix.Capget(&hdr, &caps[0]))
	caps[0].Effective &^= 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_ADMIN
	without, with := caps, caps
	with[0].Effective = with[0].Permitted
	check(t, unix.Capset(&hdr, &without[0])) // of this thread, which makes the sockets
	defer unix.Capset(&hdr, &with[0])

	c, _ := newContainer(t, Config{Outbound: Outbound{Interface4: "h0"}})
	c.send(netip.AddrPortFrom(me4.Addr(), taken.addr.Port()), outside.addr, "hello")
	if from := outside.expect("hello"); from.Port() == taken.addr.Port() || from.Addr().String() != "10.1.0.1" {
		t.Errorf("outside sees %v", from)
	}
}

// The outbound interface goes away while we run: that is said once, and the container told.
func TestOutboundGone(t *testing.T) {
	newNetNS(t)
	run(t, "ip", "link", "add", "g0", "type", "veth", "peer", "name", "g1")
	var log bytes.Buffer
	c, _ := newContainer(t, Config{Outbound: Outbound{Interface4: "g0"}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	run(t, "ip", "link", "del", "g0")
	dst := netip.MustParseAddrPort("198.51.100.1:53")
	for range 3 {
		c.send(me4, dst, "question")
		e := c.nextError()
		if e.Type != 3 || e.Code != 0 {
			t.Errorf("%+v", e)
		}
		checkQuote(t, e, me4, dst, "question")
	}
	if n := strings.Count(log.String(), "g0"); n != 1 || !strings.Contains(log.String(), "level=WARN") {
		t.Errorf("said %d times: %s", n, log.String())
	}
}

func TestHostAddresses(t *testing.T) {
	newNetNS(t)
	fresh := func() HostAddrs { return new(HostAddresses).Now() }
	if got := fresh(); got != (HostAddrs{}) {
		t.Errorf("without a network: %+v", got)
	}
	var h HostAddresses
	if h.Local(netip.MustParseAddr("192.0.2.7")) || !h.Local(netip.MustParseAddr("127.1.2.3")) || !h.Local(netip.IPv6Loopback()) {
		t.Error("Local is wrong about a host without a network")
	}
	run(t, "ip", "link", "add", "n0", "type", "veth", "peer", "name", "n1")
	run(t, "ip", "link", "set", "n1", "up")
	run(t, "ip", "link", "set", "n0", "up")
	run(t, "ip", "address", "add", "192.0.2.7/24", "dev", "n0")
	run(t, "ip", "-6", "address", "add", "2001:db8:1::7/64", "dev", "n1", "nodad")
	want := HostAddrs{V4: netip.MustParseAddr("192.0.2.7"), V6: netip.MustParseAddr("2001:db8:1::7")}
	if got := fresh(); got != want {
		t.Errorf("without a default route: %+v, want %+v", got, want)
	}
	run(t, "ip", "address", "add", "203.0.113.7/24", "dev", "n1")
	run(t, "ip", "route", "add", "default", "dev", "n1")
	want.V4 = netip.MustParseAddr("203.0.113.7")
	if got := fresh(); got != want {
		t.Errorf("with a default route: %+v, want %+v", got, want)
	}
	// The answer of a moment ago holds for a while, and no longer.
	if got := h.Now(); got != (HostAddrs{}) {
		t.Errorf("asked again at once: %+v", got)
	}
	h.asked = h.asked.Add(-2 * time.Second)
	if !h.Local(netip.MustParseAddr("192.0.2.7")) || h.Local(netip.MustParseAddr("192.0.2.8")) {
		t.Error("Local has not followed the network")
	}
	if got := h.Now(); got != want {
		t.Errorf("after a while: %+v, want %+v", got, want)
	}
}
