package bridge_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap/bridge"
	"usernet/tap/taptest"
)

func (m *member) listen(t testing.TB, a netip.Addr) net.Listener {
	t.Helper()
	f := call(t, m.ns, "socket", wanted{Network: "tcp", Addr: netip.AddrPortFrom(a, 80)}, nil)[0]
	l, err := net.FileListener(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// dial connects a socket of the member's.
func (m *member) dial(t testing.TB, network string, from, to netip.Addr) net.Conn {
	t.Helper()
	f := call(t, m.ns, "socket", wanted{Network: network, Addr: netip.AddrPortFrom(from, 0), To: netip.AddrPortFrom(to, 80)}, nil)[0]
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// receiver takes datagrams, at port 80.
func (m *member) receiver(t testing.TB) net.PacketConn {
	t.Helper()
	f := call(t, m.ns, "socket", wanted{Network: "udp", Addr: netip.AddrPortFrom(m.addr, 80)}, nil)[0]
	c, err := net.FilePacketConn(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// connection is a TCP connection from one member to another, both ends.
func connection(t testing.TB, from, to *member, six bool) (client, server net.Conn) {
	t.Helper()
	a, b := from.addr, to.addr
	if six {
		a, b = from.addr6, to.addr6
	}
	l := to.listen(t, b)
	client = from.dial(t, "tcp", a, b)
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	t.Cleanup(func() { server.Close() })
	if got := server.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); got != a {
		t.Errorf("the server sees %s, want %s", got, a)
	}
	return client, server
}

// echo sends a line each way.
func echo(t testing.TB, a, b net.Conn) {
	t.Helper()
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		if _, err := way[0].Write([]byte("hello\n")); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 6)
		if _, err := io.ReadFull(way[1], got); err != nil || string(got) != "hello\n" {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

// transfer sends size octets from a to b and checks each.
func transfer(t testing.TB, a, b net.Conn, size int) {
	t.Helper()
	block := make([]byte, 1<<20)
	for i := range block {
		block[i] = byte(i * 7 >> 3)
	}
	sent := make(chan error)
	go func() {
		var err error
		for left := size; left > 0 && err == nil; left -= len(block) {
			_, err = a.Write(block[:min(left, len(block))])
		}
		sent <- err
	}()
	got := make([]byte, len(block))
	var failed error
	for left := size; left > 0 && failed == nil; left -= len(block) {
		want := block[:min(left, len(block))]
		if _, failed = io.ReadFull(b, got[:len(want)]); failed == nil && !bytes.Equal(got[:len(want)], want) {
			failed = errors.New("other octets than were sent")
		}
	}
	if failed != nil {
		a.Close()
	}
	if err := errors.Join(failed, <-sent); err != nil {
		t.Fatal(err)
	}
}

// Every pair of cables, both families, both transports.
func TestMembersTalk(t *testing.T) {
	for _, mtu := range []int{1500, 65520} {
		s := newSite(t, mtu)
		var all []*member
		for kind := range kinds {
			all = append(all, s.join(t, kind+1, kind))
		}
		for i, a := range all {
			b := all[(i+1)%len(all)]
			for _, six := range []bool{false, true} {
				x, y := connection(t, a, b, six)
				transfer(t, x, y, 8<<20) // super-segments, as soon as there is some window
				transfer(t, y, x, 1<<20)
			}
			server := b.receiver(t)
			c := a.dial(t, "udp", a.addr, b.addr)
			if _, err := c.Write([]byte("hi")); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 10)
			if n, _, err := server.ReadFrom(got); err != nil || string(got[:n]) != "hi" {
				t.Errorf("%s to %s: %q, %v", kinds[i].name, kinds[(i+1)%len(kinds)].name, got[:n], err)
			}
		}
	}
}

func TestAttachConfigures(t *testing.T) {
	s := newSite(t, 1400)
	for kind, k := range kinds {
		m := s.join(t, kind+1, kind)
		all := see(t, m.ns)
		i := all["eth0"]
		if len(all) != 2 || !all["lo"].Up || !i.Up || i.MTU != 1400 || i.MAC != m.cfg.MAC.String() || m.cable.MAC().String() != i.MAC || m.cable.Adopted() {
			t.Errorf("%s: %+v", k.name, all)
		}
		for _, want := range []netip.Prefix{m.cfg.IPv4, m.cfg.IPv6} {
			if !slices.Contains(i.Addrs, want.String()) { // and not tentative
				t.Errorf("%s: addresses %q lack %s", k.name, i.Addrs, want)
			}
		}
		if want := []string{"0.0.0.0/0 via 10.89.1.254", "::/0 via fd00:0:0:1::fffe"}; !slices.Equal(i.Routes, want) {
			t.Errorf("%s: routes %q, want %q", k.name, i.Routes, want)
		}
		port := see(t, s.ns)[m.cfg.Port]
		if port.Master != "b1" || !port.Up || port.MTU != 1400 {
			t.Errorf("%s: port %+v", k.name, port)
		}
		for range 2 {
			if err := m.cable.Close(); err != nil {
				t.Error(err)
			}
		}
		if left := see(t, m.ns); len(left) != 1 {
			t.Errorf("%s: left in the member: %+v", k.name, left)
		}
	}
	left := see(t, s.ns)
	if len(left) != 2 || left["b1"].Name == "" {
		t.Errorf("left in the shared namespace: %+v", left)
	}
	for _, i := range left {
		if len(i.Addrs) > 0 && i.Name != "lo" {
			t.Errorf("the shared namespace has addresses: %+v", i)
		}
	}
}

// A sibling gets no veth, which the kernel refuses, but two TAPs.
func TestSiblingGetsTAPs(t *testing.T) {
	if !taptest.AsUser(t) { // root may everywhere
		return
	}
	s := newSite(t, 1500)
	m := &member{Namespace: taptest.NewNS(t, taptest.OwnerRoot), cfg: config(1, bridge.Veth)}
	m.ns = m.Open(t)
	if c, err := s.b.Attach(t.Context(), m.ns, m.cfg); err == nil {
		// Kernels before 6.13 ask for the rights over one end only.
		run(t, c)
		t.Log("this kernel gives a veth to siblings")
		return
	} else if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "owned") {
		t.Errorf("%v; want EPERM, and whose the namespace must be", err)
	}
	m.cfg.Kind = bridge.Auto
	m.connect(t, s)
	if m.cable.Kind() != bridge.TAPs {
		t.Errorf("the cable is of kind %s", m.cable.Kind())
	}
}

func TestNameTaken(t *testing.T) {
	s := newSite(t, 1500)
	for kind, k := range kinds {
		for _, what := range []string{"bridge", "veth", "tap"} {
			for _, adopt := range []bool{false, true} {
				space := k.space(t, s)
				n := space.Open(t)
				call(t, n, "change", deed{Name: "eth0", Make: what}, nil)
				before := fmt.Sprint(see(t, n))
				cfg := config(1, k.kind)
				cfg.Adopt = adopt
				_, err := s.b.Attach(t.Context(), n, cfg)
				if !errors.Is(err, unix.EEXIST) || !strings.Contains(fmt.Sprint(err), "eth0") || !strings.Contains(fmt.Sprint(err), "choose another name") {
					t.Errorf("%s, %s there: %v", k.name, what, err)
				}
				if after := fmt.Sprint(see(t, n)); after != before {
					t.Errorf("%s: it had\n%s and has\n%s", k.name, before, after)
				}
			}
		}
		m := s.join(t, 1, kind)
		other := k.space(t, s).Open(t)
		if _, err := s.b.Attach(t.Context(), other, config(1, k.kind)); !errors.Is(err, unix.EEXIST) || !strings.Contains(fmt.Sprint(err), "port m1") {
			t.Errorf("%s: a port that is in use: %v", k.name, err)
		}
		if err := m.cable.Close(); err != nil {
			t.Error(err)
		}
	}
	if left := see(t, s.ns); len(left) != 2 {
		t.Errorf("left behind: %+v", left)
	}
}

// A failure after the interfaces were made takes them back.
func TestFailedAttachLeavesNothing(t *testing.T) {
	s := newSite(t, 1500)
	for _, k := range kinds {
		n := k.space(t, s).Open(t)
		cfg := config(1, k.kind)
		cfg.IPv6, cfg.Gateway6 = netip.MustParsePrefix("ff02::1/64"), netip.Addr{} // the kernel refuses it
		if _, err := s.b.Attach(t.Context(), n, cfg); err == nil {
			t.Fatal("a multicast address was accepted")
		}
		if here, there := see(t, s.ns), see(t, n); len(here) != 2 || len(there) != 1 {
			t.Errorf("%s: left behind: %+v, %+v", k.name, here, there)
		}
	}
}

func TestConfigRefused(t *testing.T) {
	s := newSite(t, 1500)
	n := kinds[0].space(t, s).Open(t)
	for want, edit := range map[string]func(*bridge.CableConfig){
		"needs a name":    func(c *bridge.CableConfig) { c.Port = "" },
		"has 16 octets":   func(c *bridge.CableConfig) { c.Name = "sixteen-octets-x" },
		"first one even":  func(c *bridge.CableConfig) { c.MAC = net.HardwareAddr{1, 0, 0, 0, 0, 1} },
		"is not in":       func(c *bridge.CableConfig) { c.Gateway4 = netip.MustParseAddr("10.0.0.1") },
		"without an IPv4": func(c *bridge.CableConfig) { c.IPv4 = netip.Prefix{} },
	} {
		cfg := config(1, bridge.Auto)
		edit(&cfg)
		if _, err := s.b.Attach(t.Context(), n, cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	for want, cfg := range map[string]bridge.Config{
		"needs a MAC":  {Name: "b2"},
		"no slash":     {Name: "b/2", MAC: bridgeMAC},
		"68 to 65521":  {Name: "b2", MAC: bridgeMAC, MTU: 67},
		"not all zero": {Name: "b2", MAC: make(net.HardwareAddr, 6)},
	} {
		if _, err := bridge.Open(t.Context(), s.ns, cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	call(t, s.ns, "change", deed{Name: "b2", Make: "tap"}, nil)
	if _, err := bridge.Open(t.Context(), s.ns, bridge.Config{Name: "b2", MAC: bridgeMAC}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("a TAP in the place of a bridge: %v", err)
	}
}

// What waits to be carried can be waited for: of two TAPs what the member's end has told when it came up. A veth needs nobody.
func TestFDs(t *testing.T) {
	s := newSite(t, 1500)
	for n, kind := range []int{0, 2} {
		c, err := s.b.Attach(t.Context(), kinds[kind].space(t, s).Open(t), config(n+1, kinds[kind].kind))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fds := c.FDs()
		if c.Kind() == bridge.Veth {
			if len(fds) > 0 {
				t.Errorf("%s: descriptors %v", kinds[kind].name, fds)
			}
			continue
		}
		if len(fds) != 2 {
			t.Fatalf("%s: descriptors %v", kinds[kind].name, fds)
		}
		poll := []unix.PollFd{{Fd: int32(fds[0]), Events: unix.POLLIN}}
		for {
			ready, err := unix.Poll(poll, -1)
			if err == unix.EINTR {
				continue
			}
			if ready != 1 || poll[0].Revents != unix.POLLIN {
				t.Errorf("%s: %+v, %v", kinds[kind].name, poll, err)
			}
			break
		}
	}
}
