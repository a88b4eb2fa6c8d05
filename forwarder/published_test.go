package forwarder

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"usernet/stack"

	"golang.org/x/sys/unix"
)

var (
	web4 = netip.MustParseAddrPort("10.0.2.100:8000")
	web6 = netip.MustParseAddrPort("[fd00::100]:8000")
)

// A port is a published one.
type port struct {
	*PublishedUDP
	num uint16
}

// publish leads addr, with port 0 one that the kernel picks, to the container. "[::]" is for both families.
func (c *container) publish(addr string, to ...netip.AddrPort) port {
	c.t.Helper()
	fd, num := boundSocket(c.t, addr)
	p, err := c.f.PublishUDP(fd, to...)
	check(c.t, err)
	return port{p, num}
}

func boundSocket(t testing.TB, addr string) (fd int, num uint16) {
	t.Helper()
	ap := netip.MustParseAddrPort(addr)
	fd, err := unix.Socket(family(ap.Addr()), unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err == nil && ap.Addr().Is6() {
		err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 0)
	}
	if err == nil {
		err = unix.Bind(fd, sockaddr(ap))
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd, boundPort(t, fd)
}

func boundPort(t testing.TB, fd int) uint16 {
	t.Helper()
	switch sa, err := unix.Getsockname(fd); sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port)
	case *unix.SockaddrInet6:
		return uint16(sa.Port)
	default:
		t.Fatal(err)
	}
	return 0
}

// A visitor is a client whose socket is connected: it hears only the address that it speaks to.
type visitor struct {
	*net.UDPConn
	t    *testing.T
	addr netip.AddrPort
}

func visit(t *testing.T, from, to string) *visitor {
	t.Helper()
	v, err := dialUDP(t, from, to)
	check(t, err)
	return v
}

func dialUDP(t *testing.T, from, to string) (*visitor, error) {
	d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.MustParseAddrPort(from))}
	conn, err := d.Dial("udp", to)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { conn.Close() })
	addr := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	return &visitor{conn.(*net.UDPConn), t, netip.AddrPortFrom(addr.Addr().Unmap().WithZone(""), addr.Port())}, nil
}

func (v *visitor) say(payload string) {
	v.t.Helper()
	if _, err := v.Write([]byte(payload)); err != nil {
		v.t.Fatal(err)
	}
}

func (v *visitor) hear(want string) {
	v.t.Helper()
	v.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 1<<16)
	n, err := v.Read(buf)
	if err != nil {
		v.t.Fatalf("%v waits for %.40q: %v", v.addr, want, err)
	}
	if got := string(buf[:n]); got != want {
		v.t.Fatalf("%v got %d octets %.40q, want %d %.40q", v.addr, n, got, len(want), want)
	}
}

// heard receives one datagram in the container and compares.
func (c *container) heard(to netip.AddrPort, want string) stack.Datagram {
	c.t.Helper()
	d := c.receive(1)[0]
	if got := string(d.Payload[0]); d.Dst != to || got != want || d.Segment != 0 {
		c.t.Fatalf("container got %d octets %.40q at %v, want %d %.40q at %v", len(got), got, d.Dst, len(want), want, to)
	}
	return d
}

// counted waits until p has counted what has already been seen to happen.
func (c *container) counted(p port, what string, ok func(PublishedStats) bool) {
	c.t.Helper()
	deadline := time.Now().Add(patience)
	for !ok(p.Stats()) {
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: counted %+v", what, p.Stats())
		}
		runtime.Gosched()
	}
}

func publishedStats(p port, ok func(PublishedStats) bool) func(Stats) bool {
	return func(Stats) bool { return ok(p.Stats()) }
}

// The container sees the client's own address, and the client hears the very address that it spoke to.
func TestPublishedUDPAddresses(t *testing.T) {
	addHostAddress(t, "192.0.2.7/24", "2001:db8:7::7/64")
	run(t, "ip", "address", "add", "192.0.2.8/24", "dev", "world0")
	run(t, "ip", "-6", "address", "add", "2001:db8:7::8/64", "dev", "world0", "nodad")
	check(t, settled("2001:db8:7::8"))
	c, _ := newContainer(t, Config{Policy: testPolicy(true)})
	gw := testPolicy(true)
	for _, v := range []struct {
		listen, from, to string
		gateway          netip.Addr // what the client appears as, if not as itself
		at               netip.AddrPort
	}{
		{listen: "0.0.0.0:0", from: "192.0.2.7:0", to: "192.0.2.7", at: web4},
		{listen: "0.0.0.0:0", from: "192.0.2.7:0", to: "192.0.2.8", at: web4},
		{listen: "0.0.0.0:0", from: "127.0.0.1:0", to: "127.0.0.9", gateway: gw.Gateway4, at: web4},
		{listen: "127.0.0.5:0", from: "127.0.0.1:0", to: "127.0.0.5", gateway: gw.Gateway4, at: web4},
		{listen: "192.0.2.8:0", from: "192.0.2.7:0", to: "192.0.2.8", at: web4},
		{listen: "[::]:0", from: "192.0.2.7:0", to: "192.0.2.8", at: web4},
		{listen: "[::]:0", from: "127.0.0.1:0", to: "127.0.0.1", gateway: gw.Gateway4, at: web4},
		{listen: "[::]:0", from: "[2001:db8:7::7]:0", to: "2001:db8:7::8", at: web6},
		{listen: "[::]:0", from: "[2001:db8:7::8]:0", to: "2001:db8:7::7", at: web6},
		{listen: "[::1]:0", from: "[::1]:0", to: "::1", gateway: gw.Gateway6, at: web6},
		{listen: "[2001:db8:7::8]:0", from: "[2001:db8:7::7]:0", to: "2001:db8:7::8", at: web6},
	} {
		t.Run(fmt.Sprintf("%s to %s at %s", v.from, v.to, v.listen), func(t *testing.T) {
			p := c.publish(v.listen, web4, web6)
			defer p.Close()
			a := visit(t, v.from, net.JoinHostPort(v.to, fmt.Sprint(p.num)))
			want := a.addr
			if v.gateway.IsValid() {
				want = netip.AddrPortFrom(v.gateway, a.addr.Port())
			}
			for _, payload := range []string{"question", "", "x", strings.Repeat("long", 65507/4) + "end", ""} {
				a.say(payload)
				if d := c.heard(v.at, payload); d.Src != want {
					t.Fatalf("container sees %v, want %v", d.Src, want)
				}
				c.send(v.at, want, payload)
				a.hear(payload)
			}
			c.counted(p, "five each way", func(st PublishedStats) bool {
				return st.Clients == 1 && st.Opened == 1 && st.In == 5 && st.Out == 5 && st.InOctets == st.OutOctets
			})
		})
	}
	if st := c.f.Stats(); st.UDP.Opened != 0 || st.Published.Opened != 11 || st.Published.Received != 55 || st.Published.Sent != 55 {
		t.Errorf("counted %+v", st)
	}
}

// Clients from afar, who come in by an interface, and those on a link.
func TestPublishedUDPFromOutside(t *testing.T) {
	w := newWorld(t)
	c, _ := newContainer(t, Config{})
	p := c.publish("[::]:0", web4, web6)
	linkLocal := func(name string) string {
		i, err := net.InterfaceByName(name)
		check(t, err)
		addrs, err := i.Addrs()
		check(t, err)
		for _, a := range addrs {
			if ip := a.(*net.IPNet).IP; ip.IsLinkLocalUnicast() && ip.To4() == nil {
				return ip.String()
			}
		}
		t.Fatalf("%s has no link-local address", name)
		return ""
	}
	host := linkLocal("h0")
	gw6 := testPolicy(true).Gateway6
	for _, v := range []struct {
		ns       *namespace
		from, to string
		as       netip.Addr
		at       netip.AddrPort
	}{
		{w.outside, "10.2.0.1:0", "10.1.0.1", netip.MustParseAddr("10.2.0.1"), web4},
		{w.outside, "[2001:db8:2::1]:0", "2001:db8:1::1", netip.MustParseAddr("2001:db8:2::1"), web6},
		{w.router, "[::]:0", host + "%r0", gw6, web6},
		{w.router, "[2001:db8:1::fe]:0", host + "%r0", netip.MustParseAddr("2001:db8:1::fe"), web6},
	} {
		var a *visitor
		v.ns.do(func() (err error) {
			a, err = dialUDP(t, v.from, net.JoinHostPort(v.to, fmt.Sprint(p.num)))
			return err
		})
		a.say("hello")
		want := netip.AddrPortFrom(v.as, a.addr.Port())
		if d := c.heard(v.at, "hello"); d.Src != want {
			t.Errorf("container sees %v, want %v", d.Src, want)
		}
		c.send(v.at, want, "answer")
		a.hear("answer")
	}
}

// Clients who would be one to the container get ports of their own, and each its own answers.
func TestPublishedUDPSamePort(t *testing.T) {
	addHostAddress(t, "192.0.2.7/24")
	run(t, "ip", "address", "add", "192.0.2.8/24", "dev", "world0")
	c, _ := newContainer(t, Config{})
	one, two := c.publish("[::]:0", web4), c.publish("0.0.0.0:0", web4)
	at := func(addr string, p port) string { return net.JoinHostPort(addr, fmt.Sprint(p.num)) }

	a := visit(t, "127.0.0.1:0", at("127.0.0.1", one))
	from := fmt.Sprintf(":%d", a.addr.Port())
	gw := testPolicy(true).Gateway4
	seen := map[netip.AddrPort]*visitor{}
	for i, v := range []struct {
		*visitor
		as netip.Addr
	}{
		{a, gw},
		{visit(t, "127.0.0.2"+from, at("127.0.0.1", one)), gw},
		{visit(t, "[::1]"+from, at("::1", one)), gw}, // the container has no IPv6 address
		{visit(t, "192.0.2.7"+from, at("192.0.2.7", one)), netip.MustParseAddr("192.0.2.7")},
	} {
		v.say(fmt.Sprint(i))
		d := c.heard(web4, fmt.Sprint(i))
		if d.Src.Addr() != v.as || (i == 0 || i == 3) != (d.Src.Port() == a.addr.Port()) || d.Src.Port() < 1024 {
			t.Errorf("client %v appears as %v", v.addr, d.Src)
		}
		seen[d.Src] = v.visitor
	}
	// One socket that speaks to two of the host's addresses, and to two ports.
	s := newServer(t, "192.0.2.7:0")
	for i, to := range []string{at("192.0.2.7", one), at("192.0.2.8", one), at("192.0.2.8", two)} {
		for range 2 {
			s.send(netip.MustParseAddrPort(to), to)
			d := c.heard(web4, to)
			if d.Src.Addr() != s.addr.Addr() || (i == 0) != (d.Src.Port() == s.addr.Port()) {
				t.Errorf("client %v at %s appears as %v", s.addr, to, d.Src)
			}
			c.send(web4, d.Src, "answer")
			if got := s.expect("answer"); got.String() != to {
				t.Errorf("answer from %v, want %s", got, to)
			}
		}
	}
	// Those below 1024 are the gateway's own.
	low := visit(t, "127.0.0.1:600", at("127.0.0.1", one))
	low.say("low")
	d := c.heard(web4, "low")
	if d.Src.Addr() != gw || d.Src.Port() < 1024 {
		t.Errorf("client %v appears as %v", low.addr, d.Src)
	}
	seen[d.Src] = low
	if len(seen) != 5 {
		t.Fatalf("%d clients seen", len(seen))
	}
	for src, v := range seen {
		c.send(web4, src, "to "+v.addr.String())
		v.hear("to " + v.addr.String())
	}
	if o, w := one.Stats(), two.Stats(); o.Clients != 7 || w.Clients != 1 {
		t.Errorf("counted %+v, %+v", o, w)
	}
}

// Nor are they mixed up where both are read in one go.
func TestPublishedUDPSameBatch(t *testing.T) {
	f, err := New(Config{Policy: testPolicy(true)})
	check(t, err)
	defer f.Close()
	c := &container{t: t, f: f, changed: make(chan struct{})}
	f.Bind(c)
	p := c.publish("0.0.0.0:0", web4)
	s := newServer(t, "127.0.0.1:0")
	to := func(addr string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(addr), p.num) }
	for _, addr := range []string{"127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.1"} {
		s.send(to(addr), "x")
	}
	f.ready(p.sock, unix.EPOLLIN)
	got := c.receive(4)
	if got[0].Src != got[1].Src || got[1].Src == got[2].Src || got[3].Src != got[0].Src {
		t.Fatalf("sources %v, %v, %v, %v", got[0].Src, got[1].Src, got[2].Src, got[3].Src)
	}
	for i, from := range []string{"127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.1"} {
		c.send(web4, got[i].Src, "answer")
		if at := s.expect("answer"); at != to(from) {
			t.Errorf("answer from %v, want %v", at, to(from))
		}
	}
}

// A published port that nobody speaks to wakes nobody up; its first client does.
func TestPublishedUDPAsleep(t *testing.T) {
	c, _ := newContainer(t, Config{})
	asleep := func(want bool) {
		t.Helper()
		for deadline := time.Now().Add(patience); c.f.poller.asleep.Load() != want; runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatalf("asleep: %v", !want)
			}
		}
	}
	asleep(true)
	p := c.publish("127.0.0.1:0", web4)
	c.f.poller.wake()
	asleep(true)
	visit(t, "127.0.0.1:0", fmt.Sprintf("127.0.0.1:%d", p.num)).say("hello")
	asleep(false)
}

// Whom no client's datagram came from gets nothing from the published port, whatever the container sends;
// its own conversations from that port go their ordinary way.
func TestPublishedUDPForgedAnswer(t *testing.T) {
	addHostAddress(t, "192.0.2.7/24")
	c, _ := newContainer(t, Config{})
	p := c.publish("0.0.0.0:0", web4)
	a := visit(t, "192.0.2.7:0", fmt.Sprintf("192.0.2.7:%d", p.num))
	a.say("hello")
	c.heard(web4, "hello")
	stranger := newServer(t, "192.0.2.7:0")
	c.send(web4, stranger.addr, "unasked")
	if from := stranger.expect("unasked"); from.Port() == p.num {
		t.Error("a stranger got something from the published port")
	}
	// Other ports and addresses of the container are not the client's either.
	c.send(netip.AddrPortFrom(web4.Addr(), web4.Port()+1), a.addr, "other port")
	c.send(netip.MustParseAddrPort("10.0.2.101:8000"), a.addr, "other address")
	c.send(web4, netip.AddrPortFrom(a.addr.Addr(), stranger.addr.Port()), "other client")
	stranger.expect("other client")
	c.send(web4, a.addr, "answer")
	a.hear("answer")
	if st := p.Stats(); st.Out != 1 {
		t.Errorf("counted %+v", st)
	}
	// Nor does the stranger's answer pass for a client's, or open a way in by itself.
	if st := c.f.Stats().UDP; st.Flows != 3 || st.Sent != 4 {
		t.Errorf("counted %+v", st)
	}
}

// What the kernel gives as a train goes on as one, and an answer's as well; ECN and TTL pass.
func TestPublishedUDPTrains(t *testing.T) {
	for _, v := range []struct{ listen, from, to string }{
		{"127.0.0.1:0", "127.0.0.1:0", "127.0.0.1"}, {"[::]:0", "127.0.0.1:0", "127.0.0.1"}, {"[::1]:0", "[::1]:0", "::1"},
	} {
		t.Run(v.listen+" "+v.from, func(t *testing.T) {
			c, _ := newContainer(t, Config{})
			p := c.publish(v.listen, web4, web6)
			a := visit(t, v.from, net.JoinHostPort(v.to, fmt.Sprint(p.num)))
			raw, err := a.SyscallConn()
			check(t, err)
			check(t, raw.Control(func(fd uintptr) {
				if err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, 100); err != nil {
					return
				}
				if a.addr.Addr().Is4() {
					err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TOS, 0x2d)
					_ = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVTOS, 1)
					_ = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVTTL, 1)
				} else {
					err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TCLASS, 0x2d)
					_ = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVTCLASS, 1)
					_ = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVHOPLIMIT, 1)
				}
			}))
			check(t, err)
			payloads := numbered(20, 100, 7)
			a.say(strings.Join(payloads, ""))
			c.wait("a train", func() bool { return len(c.got) > 0 })
			c.mu.Lock()
			train := c.got[0]
			c.mu.Unlock()
			if train.Segment != 100 || train.Len() != 1907 || train.TOS != 0x2d {
				t.Errorf("got %d octets in segments of %d, TOS %#x", train.Len(), train.Segment, train.TOS)
			}
			for i, d := range c.receive(20) {
				if string(d.Payload[0]) != payloads[i] {
					t.Errorf("datagram %d is %.20q", i, d.Payload[0])
				}
			}
			for what, batch := range trains(payloads, train.Dst, train.Src) {
				for i := range batch {
					batch[i].TOS, batch[i].TTL = 0x2e, 33
				}
				c.f.ServeUDP(batch)
				for i, want := range payloads {
					buf, oob := make([]byte, 1<<11), make([]byte, 1<<10)
					a.SetReadDeadline(time.Now().Add(patience))
					n, m, _, _, err := a.ReadMsgUDPAddrPort(buf, oob)
					check(t, err)
					var anc ancillary
					anc.parse(oob[:m])
					if string(buf[:n]) != want || anc.tos != 0x2e || anc.ttl != 33 {
						t.Fatalf("%s: datagram %d is %.20q, TOS %#x, TTL %d", what, i, buf[:n], anc.tos, anc.ttl)
					}
				}
			}
		})
	}
}

// A client that is gone is told to the container, and disturbs no other.
func TestPublishedUDPShutClient(t *testing.T) {
	for _, v := range []struct {
		listen, from, to string
		at               netip.AddrPort
		typ, code        uint8
	}{
		{"127.0.0.1:0", "127.0.0.1:0", "127.0.0.1", web4, 3, 3},
		{"[::]:0", "127.0.0.1:0", "127.0.0.1", web4, 3, 3},
		{"[::]:0", "[::1]:0", "::1", web6, 1, 4},
	} {
		t.Run(v.listen+" "+v.from, func(t *testing.T) {
			c, _ := newContainer(t, Config{})
			p := c.publish(v.listen, web4, web6)
			to := net.JoinHostPort(v.to, fmt.Sprint(p.num))
			stays, goes := visit(t, v.from, to), visit(t, v.from, to)
			stays.say("I stay")
			stay := c.heard(v.at, "I stay")
			goes.say("I go")
			gone := c.heard(v.at, "I go")
			goes.Close()
			for range 3 {
				c.send(v.at, gone.Src, "answer")
				c.send(v.at, stay.Src, "answer")
				stays.hear("answer")
			}
			e := c.nextError()
			if e.Type != v.typ || e.Code != v.code || e.Src != v.at.Addr() || e.Dst != gone.Src.Addr() || e.From != gone.Src.Addr() {
				t.Errorf("container was told %+v", e)
			}
			want := make([]byte, udpHeaderLen)
			putUDPHeader(want, v.at.Port(), gone.Src.Port(), len("answer"))
			if !bytes.Equal(e.Transport, append(want, "answer"...)) {
				t.Errorf("quoted %q", e.Transport)
			}
			stays.say("more")
			c.heard(v.at, "more")
		})
	}
}

// A container of one family only serves the clients of the other as the gateway, and is told none of their ICMP.
func TestPublishedUDPOtherFamily(t *testing.T) {
	c, _ := newContainer(t, Config{})
	p := c.publish("[::]:0", web4)
	a := visit(t, "[::1]:0", fmt.Sprintf("[::1]:%d", p.num))
	a.say("hello")
	d := c.heard(web4, "hello")
	if d.Src != netip.AddrPortFrom(testPolicy(true).Gateway4, a.addr.Port()) {
		t.Errorf("appears as %v", d.Src)
	}
	c.send(web4, d.Src, "answer")
	a.hear("answer")
	a.Close()
	c.send(web4, d.Src, "answer")
	b := visit(t, "[::1]:0", fmt.Sprintf("[::1]:%d", p.num))
	b.say("next") // behind the error
	c.heard(web4, "next")
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.errors) != 0 {
		t.Errorf("container was told %+v", c.errors)
	}
	// Without a gateway there is no name for them.
	policy := testPolicy(true)
	policy.Gateway6 = netip.Addr{}
	n, _ := newContainer(t, Config{Policy: policy})
	q := n.publish("0.0.0.0:0", web6)
	visit(t, "127.0.0.1:0", fmt.Sprintf("127.0.0.1:%d", q.num)).say("hello")
	n.waitStats("a drop", publishedStats(q, func(s PublishedStats) bool { return s.Drops["no name"] == 1 && s.Clients == 0 }))
}

// What is for a group is not for the container, though the host has joined it.
func TestPublishedUDPGroup(t *testing.T) {
	addHostAddress(t, "192.0.2.7/24")
	c, _ := newContainer(t, Config{})
	p := c.publish("0.0.0.0:0", web4)
	world, err := net.InterfaceByName("world0")
	check(t, err)
	member, err := net.ListenMulticastUDP("udp4", world, &net.UDPAddr{IP: net.IPv4(239, 1, 2, 3)})
	check(t, err)
	defer member.Close()
	s := newServer(t, "192.0.2.7:0")
	raw, err := s.SyscallConn()
	check(t, err)
	check(t, raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1) }))
	check(t, err)
	s.send(netip.AddrPortFrom(netip.MustParseAddr("239.1.2.3"), p.num), "group")
	s.send(netip.AddrPortFrom(netip.MustParseAddr("192.0.2.255"), p.num), "broadcast")
	s.send(netip.AddrPortFrom(s.addr.Addr(), p.num), "unicast")
	c.heard(web4, "unicast")
	c.counted(p, "the multicast does not even arrive", func(st PublishedStats) bool { return st.In == 1 && st.Drops["group"] == 1 })
}

// forgers makes 198.18.0.0/15 (RFC 2544) all the host's own, to send from.
func forgers(t *testing.T) func(i int) string {
	run(t, "ip", "route", "add", "local", "198.18.0.0/15", "dev", "lo")
	t.Cleanup(func() { run(t, "ip", "route", "del", "local", "198.18.0.0/15", "dev", "lo") })
	return func(i int) string { return fmt.Sprintf("198.18.%d.%d:4000", i>>8, i&255) }
}

// flood sends one datagram to p from each of n forged addresses.
func flood(t *testing.T, c *container, p port, from func(int) string, first, n int) {
	t.Helper()
	opened := p.Stats().Opened
	for i := range n {
		a := visit(t, from(first+i), fmt.Sprintf("198.18.0.1:%d", p.num))
		a.say("flood")
		a.Close()
		if i%64 == 63 || i == n-1 { // what waits in the socket is bounded
			c.waitStats("the flood", publishedStats(p, func(s PublishedStats) bool { return s.Opened == opened+uint64(i)+1 }))
		}
	}
	c.datagrams()
}

// A flood of clients evicts those of its own port: not another port's, nor what the container began.
func TestPublishedUDPFlood(t *testing.T) {
	from := forgers(t)
	const all, share = 60, 40
	c, _ := newContainer(t, Config{UDP: UDPConfig{MaxClients: all, MaxPortClients: share}})
	flooded, quiet := c.publish("0.0.0.0:0", web4), c.publish("0.0.0.0:0", netip.AddrPortFrom(web4.Addr(), 9000))
	world := newServer(t, "127.0.0.1:0")
	c.send(me4, world.gateway(), "hello")
	mapped := world.expect("hello")

	// Clients of both, and of the flooded one some who have gone on after an answer.
	const each = 10
	talk := func(p port, i int) (*visitor, netip.AddrPort) {
		a := visit(t, fmt.Sprintf("198.19.%d.1:5000", i), fmt.Sprintf("198.18.0.1:%d", p.num))
		a.say("hello")
		d := c.receive(1)[0]
		c.send(d.Dst, d.Src, "answer")
		a.hear("answer")
		a.say("more")
		c.heard(d.Dst, "more")
		return a, d.Dst
	}
	var visitors []*visitor
	var at []netip.AddrPort
	for i := range 2 * each {
		p := quiet
		if i%2 == 0 {
			p = flooded
		}
		a, to := talk(p, i)
		visitors, at = append(visitors, a), append(at, to)
	}
	flood(t, c, flooded, from, 256, 5*all)
	if st := flooded.Stats(); st.Clients != share || st.Evicted != uint64(each+5*all-share) {
		t.Errorf("flooded: %+v", st)
	}
	if st := quiet.Stats(); st.Clients != each || st.Evicted != 0 {
		t.Errorf("quiet: %+v", st)
	}
	for i, a := range visitors {
		c.send(at[i], a.addr, "still there")
		a.hear("still there")
	}
	world.send(mapped, "still there")
	c.heard(me4, "still there")

	// A third port gets its part of what there is.
	third := c.publish("0.0.0.0:0", netip.AddrPortFrom(web4.Addr(), 9001))
	flood(t, c, third, from, 1024, 5*all)
	a, b, q := flooded.Stats(), third.Stats(), quiet.Stats()
	if q.Clients != each || a.Clients+b.Clients != all-each || max(a.Clients, b.Clients)-min(a.Clients, b.Clients) > 1 {
		t.Errorf("shares %d, %d, %d", a.Clients, b.Clients, q.Clients)
	}
	if st := c.f.Stats(); st.UDP.Evicted != 0 || st.Published.Flows != all {
		t.Errorf("counted %+v", st)
	}
}

func TestPublishedUDPIdle(t *testing.T) {
	c, now := newContainer(t, Config{})
	p, dns := c.publish("127.0.0.1:0", web4), c.publish("127.0.0.1:0", netip.AddrPortFrom(web4.Addr(), 53))
	clients := func(n int) func(Stats) bool {
		return func(s Stats) bool { return s.Published.Flows == n && p.Stats().Clients+dns.Stats().Clients == n }
	}
	to := func(p port) string { return fmt.Sprintf("127.0.0.1:%d", p.num) }
	silent, answered, asks := visit(t, "127.0.0.1:0", to(p)), visit(t, "127.0.0.1:0", to(p)), visit(t, "127.0.0.1:0", to(dns))
	for _, a := range []*visitor{silent, asks} {
		a.say("hello")
		c.receive(1)
	}
	answered.say("hello")
	as := c.heard(web4, "hello").Src
	c.send(web4, as, "answer")
	answered.hear("answer")
	c.waitStats("three clients", clients(3))
	now.advance(9 * time.Second)
	c.f.poller.wake()
	c.waitStats("three clients", clients(3))
	now.advance(3 * time.Second)
	c.waitStats("the end of the DNS client", clients(2))
	now.advance(20 * time.Second)
	c.waitStats("the end of the unanswered client", clients(1))
	now.advance(85 * time.Second)
	c.send(web4, as, "news") // keeps it
	answered.hear("news")
	now.advance(119 * time.Second)
	c.f.poller.wake()
	answered.say("more")
	c.heard(web4, "more")
	if n := p.Stats().Opened; n != 2 {
		t.Errorf("%d clients opened: one did not last", n)
	}
	now.advance(122 * time.Second)
	c.waitStats("the end of the answered client", clients(0))
	// Who comes back is a client again.
	silent.say("again")
	c.send(web4, c.heard(web4, "again").Src, "answer")
	silent.hear("answer")
}

// Closing frees the port at once and forgets the clients, also while there is traffic.
func TestPublishedUDPClose(t *testing.T) {
	c, _ := newContainer(t, Config{})
	fd, num := boundSocket(t, "127.0.0.1:0")
	addr := fmt.Sprintf("127.0.0.1:%d", num)
	first, err := c.f.PublishUDP(fd, web4)
	check(t, err)
	p := port{first, num}
	var total PublishedStats
	for range 20 {
		a := visit(t, "127.0.0.1:0", addr)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					a.Write([]byte("hello")) // refused while the port is closed
				}
			}
		})
		as := c.receive(1)[0].Src
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					c.send(web4, as, "answer")
				}
			}
		})
		a.hear("answer")
		check(t, p.Close())
		if st := p.Stats(); st.Clients != 0 || st.Opened == 0 {
			t.Errorf("closed: %+v", st)
		}
		total.Opened += p.Stats().Opened
		again, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		if err := unix.Bind(again, sockaddr(netip.MustParseAddrPort(addr))); err != nil {
			t.Fatalf("the port is not free: %v", err)
		}
		if p.PublishedUDP, err = c.f.PublishUDP(again, web4); err != nil {
			t.Fatal(err)
		}
		close(stop)
		wg.Wait()
		a.Close()
		// What was still under way may have come: it is none of the next round's.
		c.waitStats("quiet", func(Stats) bool {
			var left [1]byte
			_, _, err := unix.Recvfrom(again, left[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
			return err == unix.EAGAIN
		})
		c.f.poller.settle()
		c.datagrams()
	}
	total.Opened += p.Stats().Opened
	if st := c.f.Stats().Published; st.Opened != total.Opened || st.Flows != p.Stats().Clients {
		t.Errorf("counted %+v, want %d opened", st, total.Opened)
	}
	// The next test finds that nothing was left behind, though this one is open.
}

func TestPublishUDPErrors(t *testing.T) {
	f, err := New(Config{Policy: testPolicy(true)})
	check(t, err)
	defer f.Close()
	gone := func(fd int) bool {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		return err == unix.EBADF
	}
	for _, to := range [][]netip.AddrPort{
		{{}}, {web4, web4}, {netip.AddrPortFrom(web4.Addr(), 0)},
		{netip.MustParseAddrPort("[::ffff:10.0.2.100]:80")}, {netip.MustParseAddrPort("[fe80::1%eth0]:80")},
	} {
		fd, _ := boundSocket(t, "127.0.0.1:0")
		if p, err := f.PublishUDP(fd, to...); err == nil || p != nil {
			t.Errorf("published to %v", to)
		}
		if !gone(fd) {
			t.Errorf("to %v: the socket is still open", to)
		}
	}
	if _, err := f.PublishUDP(-1, web4); !errors.Is(err, unix.EBADF) {
		t.Errorf("no socket: %v", err)
	}
	fd, _ := boundSocket(t, "127.0.0.1:0")
	p, err := f.PublishUDP(fd, web4)
	check(t, err)
	f.Close()
	if !gone(fd) {
		t.Error("the Forwarder is closed and the socket open")
	}
	check(t, p.Close())
	fd, _ = boundSocket(t, "127.0.0.1:0")
	if _, err := f.PublishUDP(fd, web4); !errors.Is(err, errStopped) || !gone(fd) {
		t.Errorf("after Close: %v", err)
	}
}

// Everything at once: more clients than places, answers, idle times, ports that come and go.
func TestPublishedUDPConcurrent(t *testing.T) {
	c, now := newContainer(t, Config{UDP: UDPConfig{MaxClients: 8, MaxPortClients: 6}})
	stays := c.publish("127.0.0.1:0", web4)
	// The container answers whatever comes, and writes to whom it has no business with.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	every := func(f func()) {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					f()
				}
			}
		})
	}
	for range 2 {
		every(func() {
			for _, d := range c.datagrams() {
				c.send(d.Dst, d.Src, string(d.Payload[0]))
			}
			runtime.Gosched()
		})
	}
	every(func() {
		now.advance(time.Second)
		c.f.poller.wake()
		runtime.Gosched()
	})
	at := netip.MustParseAddrPort("127.0.0.1:0")
	every(func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Bind(fd, sockaddr(at))
		}
		if err != nil {
			t.Error(err)
			return
		}
		p, err := c.f.PublishUDP(fd, web4)
		if err != nil {
			t.Error(err)
			return
		}
		p.Stats()
		c.f.Stats()
		p.Close()
	})
	var clients sync.WaitGroup
	for i := range 12 {
		a := visit(t, "127.0.0.1:0", fmt.Sprintf("127.0.0.1:%d", stays.num))
		clients.Go(func() {
			buf := make([]byte, 64)
			for n := range 20 {
				want := fmt.Sprintf("%d of %d", n, i)
				for deadline := time.Now().Add(patience); ; {
					// Answers to clients that had to make room are lost.
					a.Write([]byte(want))
					a.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
					got, err := a.Read(buf)
					if err == nil && string(buf[:got]) == want {
						break
					}
					if err == nil && !strings.HasSuffix(string(buf[:got]), fmt.Sprintf(" of %d", i)) {
						t.Errorf("client %d got %q", i, buf[:got])
						return
					}
					if time.Now().After(deadline) {
						t.Errorf("client %d waits for %q", i, want)
						return
					}
				}
			}
		})
	}
	clients.Wait()
	close(stop)
	wg.Wait()
	if st := stays.Stats(); st.Clients > 6 || st.Evicted == 0 {
		t.Errorf("counted %+v", st)
	}
}

// Many published ports are no more work for a packet than one.
func TestPublishedUDPMany(t *testing.T) {
	c, _ := newContainer(t, Config{})
	var r unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &r))
	n := max(min(2000, int(r.Cur)-200), 1)
	ports := make([]port, n)
	for i := range ports {
		ports[i] = c.publish("127.0.0.1:0", netip.AddrPortFrom(web4.Addr(), uint16(10000+i)))
	}
	a := newServer(t, "127.0.0.1:0")
	for i, p := range ports {
		to := netip.AddrPortFrom(a.addr.Addr(), p.num)
		a.send(to, "hello")
		d := c.heard(netip.AddrPortFrom(web4.Addr(), uint16(10000+i)), "hello")
		c.send(d.Dst, d.Src, "answer")
		if from := a.expect("answer"); from != to {
			t.Fatalf("answer from %v, want %v", from, to)
		}
	}
	slices.Reverse(ports)
	for _, p := range ports {
		p.Close()
	}
}
