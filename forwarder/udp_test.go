package forwarder

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"usernet/stack"

	"golang.org/x/sys/unix"
)

func TestUDPBothWays(t *testing.T) {
	for _, v := range []struct {
		name, listen string
		me           netip.AddrPort
	}{{"IPv4", "127.0.0.1:0", me4}, {"IPv6", "[::1]:0", me6}} {
		t.Run(v.name, func(t *testing.T) {
			c, _ := newContainer(t, Config{})
			s := newServer(t, v.listen)
			for i, payload := range []string{"question", "", "x", strings.Repeat("long", 65507/4) + "end", ""} {
				c.send(v.me, s.gateway(), payload)
				from := s.expect(payload)
				if from != netip.AddrPortFrom(s.addr.Addr(), v.me.Port()) {
					t.Errorf("server sees %v, want the container's port", from)
				}
				s.send(from, payload)
				got := c.receive(1)[0]
				if !bytes.Equal(got.Payload[0], []byte(payload)) || got.Src != s.gateway() || got.Dst != v.me || got.Segment != 0 {
					t.Errorf("datagram %d: got %d octets from %v to %v", i, got.Len(), got.Src, got.Dst)
				}
			}
			st := c.f.Stats().UDP
			if st.Flows != 1 || st.Opened != 1 || st.Sent != 5 || st.Received != 5 || st.SentOctets != st.ReceivedOctets {
				t.Errorf("counted %+v", st)
			}
		})
	}
}

// One mapping for all destinations (RFC 4787 §4.1), each answering under the name that the container used.
func TestUDPEndpointIndependentMapping(t *testing.T) {
	c, _ := newContainer(t, Config{})
	a, b := newServer(t, "127.0.0.1:0"), newServer(t, "127.0.0.1:0")
	c.send(me4, a.gateway(), "a")
	c.send(me4, b.gateway(), "b")
	fromA, fromB := a.expect("a"), b.expect("b")
	if fromA != fromB {
		t.Errorf("a sees %v, b sees %v", fromA, fromB)
	}
	a.send(fromA, "from a")
	if got := c.receive(1)[0]; got.Src != a.gateway() {
		t.Errorf("answer from %v, want %v", got.Src, a.gateway())
	}
	b.send(fromB, "from b")
	if got := c.receive(1)[0]; got.Src != b.gateway() {
		t.Errorf("answer from %v, want %v", got.Src, b.gateway())
	}
}

func TestUDPFiltering(t *testing.T) {
	for _, fullCone := range []bool{false, true} {
		t.Run(fmt.Sprint("full cone ", fullCone), func(t *testing.T) {
			addHostAddress(t, "192.0.2.7/24")
			c, _ := newContainer(t, Config{UDP: UDPConfig{FullCone: fullCone}})
			known := newServer(t, "192.0.2.7:0")
			c.send(me4, known.addr, "hello")
			from := known.expect("hello")

			samePort := newServer(t, fmt.Sprintf("127.0.0.1:%d", known.addr.Port()))
			otherPort := newServer(t, "192.0.2.7:0")
			samePort.send(netip.AddrPortFrom(samePort.addr.Addr(), from.Port()), "stranger")
			otherPort.send(from, "stranger")
			known.send(from, "answer")
			want := []string{"answer"}
			if fullCone {
				want = []string{"stranger", "answer"} // but never one from the host's loopback
			}
			var got []string
			for _, d := range c.receive(len(want)) {
				got = append(got, string(d.Payload[0]))
			}
			if !slices.Equal(got, want) {
				t.Errorf("container got %q, want %q", got, want)
			}
			if n := c.f.Stats().UDP.Drops["filtered"]; n != uint64(3-len(want)) {
				t.Errorf("%d filtered", n)
			}
		})
	}
}

func TestUDPPortTaken(t *testing.T) {
	c, _ := newContainer(t, Config{})
	s := newServer(t, "127.0.0.1:0")
	taken := newServer(t, "0.0.0.0:0")
	for _, me := range []netip.AddrPort{
		netip.AddrPortFrom(me4.Addr(), taken.addr.Port()),
		netip.AddrPortFrom(me4.Addr(), 53), // would be free to us, who are root here
	} {
		c.send(me, s.gateway(), "hello")
		from := s.expect("hello")
		if from.Port() == me.Port() {
			t.Errorf("port %d was not to be had", me.Port())
		}
		s.send(from, "answer")
		if got := c.receive(1)[0]; got.Dst != me {
			t.Errorf("answer for %v, want %v", got.Dst, me)
		}
	}
}

func TestUDPAlias(t *testing.T) {
	addHostAddress(t, "192.0.2.7/24")
	c, _ := newContainer(t, Config{Policy: testPolicy(false)})
	s := newServer(t, "192.0.2.7:0")
	loopback := newServer(t, "127.0.0.1:0")
	alias := netip.MustParseAddr("169.254.1.2")

	c.send(me4, netip.AddrPortFrom(alias, s.addr.Port()), "by alias")
	from := s.expect("by alias")
	s.send(from, "answer")
	if got := c.receive(1)[0]; got.Src.Addr() != alias {
		t.Errorf("answer from %v", got.Src)
	}
	// The name last used is the one that answers bear.
	c.send(me4, s.addr, "by address")
	s.expect("by address")
	s.send(from, "answer")
	if got := c.receive(1)[0]; got.Src != s.addr {
		t.Errorf("answer from %v", got.Src)
	}

	c.send(me4, netip.AddrPortFrom(alias, loopback.addr.Port()), "to a loopback-only service")
	if e := c.nextError(); e.Type != 3 || e.Code != 3 || e.From != alias || e.Dst != alias {
		t.Errorf("loopback-only service by the alias: %+v", e)
	}
	c.send(me4, loopback.gateway(), "to the gateway")
	if e := c.nextError(); e.Type != 3 || e.Code != 3 || e.From != loopback.gateway().Addr() {
		t.Errorf("gateway without HostLoopback: %+v", e)
	}
	if n := c.f.Stats().UDP.Drops["refused"]; n != 1 {
		t.Errorf("%d refused", n)
	}
}

// numbered are n datagrams' payloads of size octets each, all different, and a shorter last one.
func numbered(n, size, last int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = strings.Repeat(fmt.Sprintf("%04d", i), (size+3)/4)[:size]
	}
	all[n-1] = all[n-1][:last]
	return all
}

// trains are the ways in which the same datagrams may come from the stack.
func trains(payloads []string, src, dst netip.AddrPort) map[string][]stack.Datagram {
	var single []stack.Datagram
	for _, p := range payloads {
		half := len(p) / 2
		single = append(single, stack.Datagram{Src: src, Dst: dst, Payload: [][]byte{[]byte(p[:half]), []byte(p[half:])}})
	}
	whole := []byte(strings.Join(payloads, ""))
	odd := [][]byte{whole[:100], {}, whole[100 : len(whole)/2], whole[len(whole)/2:]}
	split := len(payloads) / 3 * len(payloads[0])
	return map[string][]stack.Datagram{
		"datagrams":      single,
		"a train":        {{Src: src, Dst: dst, Payload: odd, Segment: len(payloads[0])}},
		"several trains": {{Src: src, Dst: dst, Payload: [][]byte{whole[:split]}, Segment: len(payloads[0])}, {Src: src, Dst: dst, Payload: [][]byte{whole[split:]}, Segment: len(payloads[0])}},
	}
}

func TestUDPTrainsUp(t *testing.T) {
	for name, payloads := range map[string][]string{
		"MTU 1500": numbered(40, 1400, 300),
		"small":    numbered(64, 64, 64),
		"64 KiB":   numbered(46, 1424, 1424),
	} {
		for how, batch := range trains(payloads, me4, netip.AddrPort{}) {
			t.Run(name+" as "+how, func(t *testing.T) {
				c, _ := newContainer(t, Config{})
				s := newServer(t, "127.0.0.1:0")
				s.SetReadBuffer(1 << 20)
				for i := range batch {
					batch[i].Dst = s.gateway()
				}
				c.f.ServeUDP(batch)
				for _, p := range payloads {
					s.expect(p)
				}
				if n := c.f.Stats().UDP.Sent; n != uint64(len(payloads)) {
					t.Errorf("%d sent", n)
				}
			})
		}
	}
}

// Segments longer than the path's MTU cannot go as a train: each goes for itself, in fragments.
func TestUDPTrainLongerThanMTU(t *testing.T) {
	linkMTU(t, "lo", 1500)
	c, _ := newContainer(t, Config{})
	s := newServer(t, "127.0.0.1:0")
	payloads := numbered(8, 4000, 17)
	for _, how := range []string{"datagrams", "a train", "datagrams"} {
		c.f.ServeUDP(trains(payloads, me4, s.gateway())[how])
		for _, p := range payloads {
			s.expect(p)
		}
	}
	if st := c.f.Stats().UDP; st.Sent != 24 || st.Errors != 0 {
		t.Errorf("counted %+v", st)
	}
	fl := c.f.udp.table.get(flowKey{proto: protoUDP, src: me4})
	if fl == nil {
		t.Fatal("no flow")
	}
	defer fl.release()
	if fl.joins(4000) || !fl.joins(1400) {
		t.Errorf("the kernel would be asked in vain again, or never again: %d", fl.train.Load())
	}
}

// What the kernel coalesced reaches the stack as trains of at most 64, in order.
func TestUDPTrainsDown(t *testing.T) {
	c, _ := newContainer(t, Config{})
	s := newServer(t, "127.0.0.1:0")
	c.send(me4, s.gateway(), "hello")
	from := s.expect("hello")
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	payloads := numbered(45, 1200, 7)
	var e error
	raw.Control(func(fd uintptr) { e = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, 1200) })
	if e != nil {
		t.Fatal(e)
	}
	s.send(from, strings.Join(payloads, ""))
	c.wait("the train", func() bool { return len(c.got) > 0 })
	c.mu.Lock()
	if d := c.got[0]; d.Segment != 1200 || d.Len() != 44*1200+7 {
		t.Errorf("got %d octets in segments of %d: not a train", d.Len(), d.Segment)
	}
	c.mu.Unlock()
	for i, d := range c.receive(len(payloads)) {
		if string(d.Payload[0]) != payloads[i] {
			t.Fatalf("datagram %d is %.20q", i, d.Payload[0])
		}
	}
}

// A train of the kernel may be longer than the 64 datagrams that the stack takes (Linux 6.9).
func TestUDPReadUDPSplitsLongTrains(t *testing.T) {
	c, _ := newContainer(t, Config{})
	s := newServer(t, "127.0.0.1:0")
	c.send(me4, s.gateway(), "hello")
	from := s.expect("hello")
	raw, _ := s.SyscallConn()
	var e error
	raw.Control(func(fd uintptr) { e = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, 100) })
	if e != nil {
		t.Fatal(e)
	}
	payloads := numbered(120, 100, 100)
	if _, err := s.WriteToUDPAddrPort([]byte(strings.Join(payloads, "")), from); err != nil {
		t.Skipf("the kernel has no trains of 120 datagrams (Linux 6.9): %v", err)
	}
	c.wait("the trains", func() bool {
		n := 0
		for _, d := range c.got {
			n += d.Len()
		}
		return n == 120*100
	})
	c.mu.Lock()
	for _, d := range c.got {
		if n := len(apart(d)); n > maxSegments {
			t.Errorf("a train of %d", n)
		}
	}
	c.mu.Unlock()
	for i, d := range c.datagrams() {
		if string(d.Payload[0]) != payloads[i] {
			t.Fatalf("datagram %d is %.20q", i, d.Payload[0])
		}
	}
}

// TTL, DSCP and ECN pass as they are.
func TestUDPTTLAndTOS(t *testing.T) {
	for _, v := range []struct {
		name, listen string
		me           netip.AddrPort
	}{{"IPv4", "127.0.0.1:0", me4}, {"IPv6", "[::1]:0", me6}} {
		t.Run(v.name, func(t *testing.T) {
			c, _ := newContainer(t, Config{})
			// Another flow's socket is the server: it reads TTL and TOS as we do.
			s := newServer(t, v.listen)
			raw, _ := s.SyscallConn()
			raw.Control(func(fd uintptr) {
				receiveErrors(int(fd), v.me.Addr().Is6())
				unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVTTL, 1)
				unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVHOPLIMIT, 1)
			})
			for _, want := range []stack.Datagram{{TTL: 64}, {TTL: 3, TOS: 0x2}, {TTL: 255, TOS: 0xb9}, {TOS: 1}} {
				d := want
				d.Src, d.Dst, d.Payload = v.me, s.gateway(), [][]byte{[]byte("hello")}
				c.f.ServeUDP([]stack.Datagram{d})
				s.SetReadDeadline(time.Now().Add(patience))
				var ctl control
				_, n, _, from, err := s.ReadMsgUDPAddrPort(s.buf, ctl.bytes())
				if err != nil {
					t.Fatal(err)
				}
				var a ancillary
				a.parse(ctl.bytes()[:n])
				if want.TTL == 0 {
					want.TTL = 64
				}
				if a.ttl != want.TTL || a.tos != want.TOS {
					t.Errorf("TTL %d, TOS %#x arrived; sent %d, %#x", a.ttl, a.tos, want.TTL, want.TOS)
				}
				raw.Control(func(fd uintptr) {
					unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TOS, int(want.TOS))
					unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TCLASS, int(want.TOS))
				})
				s.send(from, "answer")
				if got := c.receive(1)[0]; got.TOS != want.TOS {
					t.Errorf("answer with TOS %#x, want %#x", got.TOS, want.TOS)
				}
			}
		})
	}
}

// Several goroutines of the stack at once, the same flow and others.
func TestUDPConcurrent(t *testing.T) {
	c, _ := newContainer(t, Config{UDP: UDPConfig{MaxFlows: 20}})
	s := newServer(t, "127.0.0.1:0")
	s.SetReadBuffer(1 << 20)
	const workers, rounds = 4, 50
	done := make(chan struct{})
	for w := range workers {
		go func() {
			defer func() { done <- struct{}{} }()
			for i := range rounds {
				c.send(me4, s.gateway(), "shared")
				c.send(netip.AddrPortFrom(me4.Addr(), uint16(20000+100*w+i)), s.gateway(), "own")
			}
		}()
	}
	for range workers {
		<-done
	}
	for range 2 * workers * rounds {
		s.receive()
	}
	if st := c.f.Stats().UDP; st.Flows > 20 || st.Opened-st.Evicted != uint64(st.Flows) {
		t.Errorf("counted %+v", st)
	}
}

func TestUDPIdle(t *testing.T) {
	c, now := newContainer(t, Config{})
	s := newServer(t, "127.0.0.1:0")
	flows := func(n int) func(Stats) bool { return func(st Stats) bool { return st.UDP.Flows == n } }

	answered := netip.AddrPortFrom(me4.Addr(), 40002)
	c.send(me4, s.gateway(), "no answer")
	s.expect("no answer")
	c.send(answered, s.gateway(), "question")
	s.send(s.expect("question"), "answer")
	c.receive(1)
	dns := netip.AddrPortFrom(me4.Addr(), 40003)
	c.send(dns, netip.MustParseAddrPort("127.9.9.9:53"), "refused")
	c.send(dns, netip.AddrPortFrom(s.gateway().Addr(), 53), "nobody answers")
	c.waitStats("three flows", flows(3))

	now.advance(12 * time.Second)
	c.waitStats("the end of the DNS flow", flows(2))
	now.advance(20 * time.Second)
	c.waitStats("the end of the unanswered flow", flows(1))
	now.advance(60 * time.Second)
	c.send(answered, s.gateway(), "again")
	from := s.expect("again")
	now.advance(119 * time.Second)
	s.send(from, "late")
	c.receive(1)
	now.advance(119 * time.Second)
	c.f.poller.wake()
	s.send(from, "later")
	c.receive(1)
	if n := c.f.Stats().UDP.Opened; n != 3 {
		t.Errorf("%d flows opened: one did not last", n)
	}
	now.advance(122 * time.Second)
	c.waitStats("the end of the answered flow", flows(0))
}

// Once a flow is there nothing is allocated, up or down.
func TestUDPAllocs(t *testing.T) {
	f, err := New(Config{Policy: testPolicy(true)})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.Bind(sink{})
	s := newServer(t, "127.0.0.1:0")
	batch := trains(numbered(32, 512, 100), me4, s.gateway())["datagrams"]
	refused := []stack.Datagram{{Src: me4, Dst: netip.MustParseAddrPort("10.0.2.77:5"), Payload: [][]byte{[]byte("hello")}}}
	buf := make([]byte, 512)
	f.ServeUDP(batch)
	_, from := s.receive()
	fl := f.udp.table.get(flowKey{proto: protoUDP, src: me4})
	if fl == nil {
		t.Fatal("no flow")
	}
	defer fl.release()
	if n := testing.AllocsPerRun(100, func() {
		f.ServeUDP(batch)
		f.ServeUDP(refused)
	}); n != 0 {
		t.Errorf("%v allocations per batch up", n)
	}
	if n := testing.AllocsPerRun(100, func() {
		for range 4 {
			s.WriteToUDPAddrPort(buf, from)
		}
		f.ready(fl.sock, unix.EPOLLIN)
	}); n != 0 {
		t.Errorf("%v allocations per batch down", n)
	}
	if st := f.Stats().UDP; st.Received == 0 || st.Drops["refused"] == 0 {
		t.Errorf("counted %+v", st)
	}
}

// A sink is a Stack that forgets.
type sink struct{}

func (sink) SendUDP(*stack.Datagram) error   { return nil }
func (sink) SendEchoReply(stack.Echo) error  { return nil }
func (sink) SendICMP(*stack.ICMPError) error { return nil }

// Before Bind and after Run nothing is forwarded and nothing breaks.
func TestUDPOutsideOfLife(t *testing.T) {
	f, err := New(Config{Policy: testPolicy(true)})
	if err != nil {
		t.Fatal(err)
	}
	refused := []stack.Datagram{{Src: me4, Dst: netip.MustParseAddrPort("10.0.2.77:5"), Payload: [][]byte{[]byte("hello")}}}
	f.ServeUDP(refused)
	f.Close()
	f.Close()
	s := newServer(t, "127.0.0.1:0")
	f.ServeUDP([]stack.Datagram{{Src: me4, Dst: s.gateway(), Payload: [][]byte{[]byte("hello")}}})
	f.ServeEcho(stack.Echo{Src: me4.Addr(), Dst: netip.MustParseAddr("198.51.100.1"), ID: 1})
	if st := f.Stats(); st.UDP.Drops["stopped"] != 1 || st.Echo.Drops["stopped"] != 1 || st.UDP.Flows != 0 {
		t.Errorf("counted %+v", st)
	}
}
