package bridge_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"usernet/tap"
	"usernet/tap/bridge"
	"usernet/tap/taptest"
)

// patience bounds a wait for what takes milliseconds.
const patience = 20 * time.Second

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); {
		if time.Now().After(end) {
			t.Fatalf("in %s not: %s", patience, what)
		}
		unix.Poll(nil, 1)
	}
}

// An owner is killed, and another comes: connections live on.
func TestAdopt(t *testing.T) {
	s := newSite(t, 1500)
	var all []*member
	for kind := range kinds {
		all = append(all, s.join(t, kind+1, kind))
	}
	var conns [][2]net.Conn
	for i, m := range all {
		x, y := connection(t, m, all[(i+1)%len(all)], i%2 == 1)
		echo(t, x, y)
		conns = append(conns, [2]net.Conn{x, y})
	}
	for _, m := range all { // descriptors are closed, and nothing else is done
		if err := m.cable.Detach(); err != nil {
			t.Fatal(err)
		}
	}
	echo(t, conns[0][0], conns[0][1]) // on veths
	before := fmt.Sprint(see(t, s.ns))

	s = s.again(t)
	for i, m := range all {
		inside := fmt.Sprint(see(t, m.ns))
		m.cfg.Adopt = true
		m.connect(t, s)
		if !m.cable.Adopted() || m.cable.MAC().String() != m.cfg.MAC.String() {
			t.Errorf("%s: adopted %v, MAC %s", kinds[i].name, m.cable.Adopted(), m.cable.MAC())
		}
		if after := fmt.Sprint(see(t, m.ns)); after != inside {
			t.Errorf("%s: the member had\n%s and has\n%s", kinds[i].name, inside, after)
		}
	}
	if after := fmt.Sprint(see(t, s.ns)); after != before {
		t.Errorf("the shared namespace had\n%s and has\n%s", before, after)
	}
	for _, c := range conns {
		echo(t, c[0], c[1])
	}
}

// The shared namespace is gone, too. A veth is made anew with all that it had; a TAP is still there.
func TestAdoptWithoutSharedNamespace(t *testing.T) {
	old := newSite(t, 1500)
	var all []*member
	for kind := range kinds {
		all = append(all, old.join(t, kind+1, kind))
	}
	x, y := connection(t, all[2], all[3], false)
	for _, m := range all {
		if err := m.cable.Detach(); err != nil {
			t.Fatal(err)
		}
	}
	if err := old.ns.Close(); err != nil {
		t.Fatal(err)
	}
	old.End()
	for _, m := range all[:2] {
		eventually(t, "the veth's end in the member is gone", func() bool { return see(t, m.ns)["eth0"].Name == "" })
	}
	s := newSite(t, 1500)
	// Owned by the new user namespace they are not, so that the new cable need not be a veth.
	for i, m := range all {
		m.cfg.Adopt = true
		m.connect(t, s)
		if kept := i >= 2; m.cable.Adopted() != kept || m.cable.MAC().String() != m.cfg.MAC.String() {
			t.Errorf("%s: adopted %v, want %v; MAC %s", kinds[i].name, m.cable.Adopted(), kept, m.cable.MAC())
		}
	}
	echo(t, x, y)
	x, y = connection(t, all[0], all[2], true)
	echo(t, x, y)
}

// The owner is killed in the midst of it.
func TestAdoptUnfinished(t *testing.T) {
	s := newSite(t, 1500)
	for kind, k := range kinds {
		m := s.join(t, kind+1, kind)
		if err := m.cable.Detach(); err != nil {
			t.Fatal(err)
		}
		call(t, m.ns, "change", deed{Name: "eth0", Alias: "usernet (unfinished)", Bare: true}, nil)
		call(t, s.ns, "change", deed{Name: m.cfg.Port, Free: true, Down: true}, nil)
		m.cfg.Adopt = true
		m.connect(t, s)
		i := see(t, m.ns)["eth0"]
		if !slices.Contains(i.Addrs, m.cfg.IPv4.String()) || !slices.Contains(i.Addrs, m.cfg.IPv6.String()) || len(i.Routes) != 2 {
			t.Errorf("%s: %+v", k.name, i)
		}
		if port := see(t, s.ns)[m.cfg.Port]; port.Master != "b1" || !port.Up {
			t.Errorf("%s: %+v", k.name, port)
		}
	}
}

// The port is there and its other end is not what it was.
func TestAdoptStalePort(t *testing.T) {
	s := newSite(t, 1500)
	for kind, k := range kinds {
		for _, stale := range []string{"tap", "bridge", "veth"} {
			m := &member{Namespace: k.space(t, s), cfg: config(kind+1, k.kind)}
			m.ns = m.Open(t)
			call(t, s.ns, "change", deed{Name: m.cfg.Port, Make: stale}, nil)
			m.cfg.Adopt = true
			m.connect(t, s)
			if m.cable.Adopted() || see(t, s.ns)[m.cfg.Port].Master != "b1" {
				t.Errorf("%s, a %s there: adopted %v, port %+v", k.name, stale, m.cable.Adopted(), see(t, s.ns)[m.cfg.Port])
			}
			if err := m.cable.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// Watch tells of a member's death, and of that of a TAP its owner.
func TestMemberDies(t *testing.T) {
	s := newSite(t, 1500)
	gone := make(chan string, 100)
	ready, ended := make(chan struct{}), make(chan error)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		ended <- bridge.Watch(ctx, s.ns, func() { close(ready) }, func(e bridge.Event) {
			if e.Gone {
				gone <- e.Link.Name
			}
		})
	}()
	<-ready
	stay := []*member{s.join(t, 101, 0), s.join(t, 102, 2)}
	x, y := connection(t, stay[0], stay[1], false)
	for kind, k := range kinds {
		m := s.join(t, kind+1, kind)
		m.End() // the process; we have the namespace open
		if err := m.ns.Close(); err != nil {
			t.Fatal(err)
		}
		if m.cable.Kind() == bridge.TAPs {
			if err := m.cable.Close(); err != nil {
				t.Error(err)
			}
		}
		select {
		case name := <-gone:
			if name != m.cfg.Port {
				t.Errorf("%s: %s is gone, want %s", k.name, name, m.cfg.Port)
			}
		case <-time.After(patience):
			t.Fatalf("%s: nobody tells", k.name)
		}
		if all := see(t, s.ns); len(all) != 4 { // lo, the bridge, and those who stay
			t.Errorf("%s: left: %+v", k.name, all)
		}
		echo(t, x, y)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// More than a socket holds, while nobody reads.
func TestWatchMissed(t *testing.T) {
	s := newSite(t, 1500)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	missed := false
	err := bridge.Watch(ctx, s.ns, func() {
		call(t, s.ns, "change", deed{Name: "b1", Toggle: 1000}, nil)
	}, func(e bridge.Event) {
		if e.Missed {
			missed = true
			cancel()
		}
	})
	if !missed || !errors.Is(err, context.Canceled) {
		t.Errorf("missed %v, %v", missed, err)
	}
}

// A member removes its own end.
func TestMemberDeletesInterface(t *testing.T) {
	s := newSite(t, 1500)
	for kind, k := range kinds {
		m := &member{Namespace: k.space(t, s), cfg: config(kind+1, k.kind)}
		m.ns = m.Open(t)
		c, err := s.b.Attach(t.Context(), m.ns, m.cfg)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error)
		go func() { ended <- c.Run(context.Background()) }()
		call(t, m.ns, "change", deed{Name: "eth0", Delete: true}, nil)
		if c.Kind() == bridge.TAPs {
			if err := <-ended; !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "eth0") {
				t.Errorf("%s: %v", k.name, err)
			}
		}
		if err := c.Close(); err != nil {
			t.Errorf("%s: %v", k.name, err)
		}
		if c.Kind() == bridge.Veth {
			if err := <-ended; err != nil {
				t.Errorf("%s: %v", k.name, err)
			}
		}
	}
	if all := see(t, s.ns); len(all) != 2 {
		t.Errorf("left: %+v", all)
	}
}

// A member takes its own end down, and what is sent to it meanwhile is lost, without anybody spinning or ending.
func TestMemberDown(t *testing.T) {
	s := newSite(t, 1500)
	a := s.join(t, 1, 2)
	b := s.join(t, 2, 2)
	x, y := connection(t, a, b, false)
	call(t, b.ns, "change", deed{Name: "eth0", Down: true}, nil)
	c := a.dial(t, "udp", a.addr, b.addr)
	for range 10 {
		if _, err := c.Write([]byte("lost")); err != nil && !errors.Is(err, unix.EHOSTUNREACH) {
			t.Fatal(err)
		}
	}
	call(t, b.ns, "change", deed{Name: "eth0", Up: true}, nil)
	echo(t, x, y)
}

// Run ends with its context, and the cable is closed or left after that.
func TestRunEnds(t *testing.T) {
	s := newSite(t, 1500)
	for kind, k := range kinds {
		n := k.space(t, s).Open(t)
		c, err := s.b.Attach(t.Context(), n, config(kind+1, k.kind))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- c.Run(ctx) }()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("%s: %v", k.name, err)
		}
		if see(t, n)["eth0"].Name == "" {
			t.Errorf("%s: the interface is gone before Close", k.name)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if see(t, n)["eth0"].Name != "" {
			t.Errorf("%s: the interface is there after Close", k.name)
		}
	}
}

// Others come and go, with the lowest MAC as well, and of a stream between two not one datagram is lost.
func TestJoinsAndLeaves(t *testing.T) {
	s := newSite(t, 1500)
	a, b := s.join(t, 1, 0), s.join(t, 2, 2)
	server := b.receiver(t)
	client := a.dial(t, "udp", a.addr, b.addr)

	// One datagram at a time, each answered for: the next goes when the one before has come.
	var stop atomic.Bool
	streamed := make(chan error)
	go func() {
		var err error
		buf := make([]byte, 8)
		for i := 0; err == nil && !stop.Load(); i++ {
			want := fmt.Sprintf("%08d", i)
			if _, err = client.Write([]byte(want)); err != nil {
				break
			}
			var n int
			if err = server.SetReadDeadline(time.Now().Add(patience)); err != nil {
				break
			}
			if n, _, err = server.ReadFrom(buf); err == nil && string(buf[:n]) != want {
				err = fmt.Errorf("datagram %q, want %q", buf[:n], want)
			}
		}
		streamed <- err
	}()

	spaces := []*taptest.Namespace{taptest.NewNSIn(t, &s.Namespace, false), taptest.NewNS(t, taptest.OwnerRoot)}
	links, files := len(see(t, s.ns)), openFiles(t)
	for i := range 50 {
		kind := i % 2 * 2
		m := spaces[i%2].Open(t)
		cfg := config(3, kinds[kind].kind)
		cfg.MAC = net.HardwareAddr{2, 0, 0, 0, 0, 1} // lower than any
		c, err := s.b.Attach(t.Context(), m, cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- c.Run(ctx) }()
		if got := see(t, s.ns)["b1"].MAC; got != bridgeMAC.String() {
			t.Fatalf("the bridge's MAC is %s", got)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		if left := see(t, m); len(left) != 1 {
			t.Fatalf("left in the member: %+v", left)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	if err := <-streamed; err != nil {
		t.Errorf("the others' stream: %v", err)
	}
	if got := see(t, s.ns); len(got) != links || got["b1"].MAC != bridgeMAC.String() {
		t.Errorf("%d interfaces, were %d: %+v", len(got), links, got)
	}
	if got := openFiles(t); got != files {
		t.Errorf("%d open files, were %d", got, files)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// An address that goes to another MAC is known to the others at once.
func TestAddressMoves(t *testing.T) {
	s := newSite(t, 1500)
	a := s.join(t, 1, 0)
	for kind, k := range kinds {
		old := s.join(t, 2, kind)
		for _, six := range []bool{false, true} {
			x, y := connection(t, a, old, six)
			echo(t, x, y)
		}
		if err := old.cable.Close(); err != nil {
			t.Fatal(err)
		}
		m := &member{Namespace: k.space(t, s), cfg: config(2, k.kind)}
		m.ns = m.Open(t)
		m.cfg.MAC = net.HardwareAddr{2, 0, 0, 0, 1, byte(kind)}
		m.connect(t, s)
		for _, addr := range []netip.Addr{m.cfg.IPv4.Addr(), m.cfg.IPv6.Addr()} {
			eventually(t, fmt.Sprintf("%s: %s is at %s", k.name, addr, m.cfg.MAC), func() bool {
				var mac string
				call(t, a.ns, "neighbour", addr, &mac)
				return mac == m.cfg.MAC.String()
			})
		}
		if err := m.cable.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Two networks in one namespace; each uplink is left, and taken up.
func TestUplink(t *testing.T) {
	s := newSite(t, 1500)
	other, err := bridge.Open(t.Context(), s.ns, bridge.Config{Name: "b2", MAC: net.HardwareAddr{0x52, 0x55, 10, 89, 2, 0}, MTU: 9000, Log: silent})
	if err != nil {
		t.Fatal(err)
	}
	var macs [2]string
	for round := range 3 {
		for i, b := range []*bridge.Bridge{s.b, other} {
			name := fmt.Sprint("u", i+1)
			d, err := b.Uplink(t.Context(), tap.Config{Name: name, Log: silent})
			if err != nil {
				t.Fatal(err)
			}
			port := see(t, s.ns)[name]
			if d.Adopted() != (round > 0) || port.Master != b.Name() || !port.Up || port.MTU != b.MTU() || d.MTU() != b.MTU() || len(port.Addrs) > 0 {
				t.Errorf("adopted %v, MTU %d, %+v", d.Adopted(), d.MTU(), port)
			}
			if round > 0 && port.MAC != macs[i] {
				t.Errorf("its MAC was %s and is %s", macs[i], port.MAC)
			}
			macs[i] = port.MAC
			if _, err := b.Uplink(t.Context(), tap.Config{Name: name, Log: silent}); !errors.Is(err, unix.EBUSY) {
				t.Errorf("the same uplink twice: %v", err)
			}
			end := d.Detach
			if round == 2 {
				end = d.Close
			}
			if err := end(); err != nil {
				t.Fatal(err)
			}
		}
	}
	links, err := bridge.List(t.Context(), s.ns)
	if err != nil {
		t.Fatal(err)
	}
	if len(links) != 2 || links[0].Type != "bridge" || links[1].Name != "b2" || links[1].MTU != 9000 || !links[1].Up {
		t.Errorf("%+v", links)
	}
	for range 2 {
		if err := other.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if all := see(t, s.ns); len(all) != 2 {
		t.Errorf("%+v", all)
	}
}

// Members and the gateway find each other, also after the gateway's death.
func TestUplinkCarriesFrames(t *testing.T) {
	s := newSite(t, 1500)
	members := []*member{s.join(t, 1, 0), s.join(t, 2, 2)}
	gateway := net.HardwareAddr{0x52, 0x55, 10, 89, 1, 254}
	for range 2 {
		d, err := s.b.Uplink(t.Context(), tap.Config{Name: "u1", Log: silent})
		if err != nil {
			t.Fatal(err)
		}
		q := d.Queues()[0]
		for _, m := range members {
			call(t, m.ns, "change", deed{Name: "eth0", Forget: true}, nil)
			c := m.dial(t, "udp", m.addr, m.cfg.Gateway4)
			if _, err := c.Write([]byte("anybody?")); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 70000)
			for answered := false; ; {
				n, err := q.Read([][]byte{buf})
				if errors.Is(err, unix.EAGAIN) {
					if err = q.Wait(); err == nil {
						continue
					}
				}
				if err != nil {
					t.Fatal(err)
				}
				frame := buf[10:n]
				sender := net.HardwareAddr(slices.Clone(frame[6:12]))
				if sender.String() != m.cfg.MAC.String() {
					continue
				}
				if bytes.HasSuffix(frame, []byte("anybody?")) && answered {
					if got := net.HardwareAddr(frame[:6]).String(); got != gateway.String() {
						t.Errorf("the datagram is for %s", got)
					}
					break
				}
				// RFC 826: a request for the gateway's address
				ip := m.cfg.Gateway4.As4()
				if frame[12] != 8 || frame[13] != 6 || frame[21] != 1 || !bytes.Equal(frame[38:42], ip[:]) {
					continue
				}
				reply := append(slices.Concat(make([]byte, 10), sender, gateway, frame[12:20], []byte{0, 2}, gateway, ip[:], sender), frame[28:32]...)
				if err := q.Write([][]byte{reply}); err != nil {
					t.Fatal(err)
				}
				answered = true
			}
		}
		if err := d.Detach(); err != nil {
			t.Fatal(err)
		}
		s = s.again(t)
	}
}

// The second network leaves the default routes of the first alone.
func TestMemberOfTwoNetworks(t *testing.T) {
	s := newSite(t, 1500)
	other, err := bridge.Open(t.Context(), s.ns, bridge.Config{Name: "b2", MAC: net.HardwareAddr{0x52, 0x55, 10, 89, 2, 0}, MTU: 1500, Log: silent})
	if err != nil {
		t.Fatal(err)
	}
	two := &site{Namespace: s.Namespace, ns: s.ns, b: other}
	for kind, k := range kinds {
		m := s.join(t, 10+kind, kind)
		cfg := config(20+kind, k.kind)
		cfg.Name = "eth1"
		cfg.IPv4, cfg.Gateway4 = netip.MustParsePrefix(fmt.Sprintf("10.89.2.%d/24", 20+kind)), netip.MustParseAddr("10.89.2.254")
		cfg.IPv6, cfg.Gateway6 = netip.MustParsePrefix(fmt.Sprintf("fd00:0:0:2::%d/64", 20+kind)), netip.MustParseAddr("fd00:0:0:2::fffe")
		second := &member{Namespace: m.Namespace, ns: m.ns, cfg: cfg, addr: cfg.IPv4.Addr(), addr6: cfg.IPv6.Addr()}
		second.connect(t, two)
		all := see(t, m.ns)
		if len(all["eth0"].Routes) != 2 || len(all["eth1"].Routes) != 0 {
			t.Errorf("%s: %+v", k.name, all)
		}
		// It is on both, by either interface.
		a, b := s.join(t, 30+kind, 0), &member{Namespace: taptest.NewNSIn(t, &s.Namespace, false), cfg: cfg}
		b.ns, b.cfg.Name, b.cfg.Port, b.cfg.MAC = b.Open(t), "eth0", fmt.Sprint("n", kind), nil
		b.cfg.IPv4, b.cfg.IPv6 = netip.MustParsePrefix("10.89.2.99/24"), netip.MustParsePrefix("fd00:0:0:2::99/64")
		b.addr, b.addr6 = b.cfg.IPv4.Addr(), b.cfg.IPv6.Addr()
		b.connect(t, two)
		for _, six := range []bool{false, true} {
			x, y := connection(t, a, m, six)
			echo(t, x, y)
			x, y = connection(t, b, second, six)
			echo(t, x, y)
		}
		if err := b.cable.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestList(t *testing.T) {
	s := newSite(t, 1500)
	veth, taps := s.join(t, 1, 0), s.join(t, 2, 2)
	links, err := bridge.List(t.Context(), s.ns)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bridge.Link{}
	for _, l := range links {
		found[l.Name] = l
	}
	v, p := found[veth.cfg.Port], found[taps.cfg.Port]
	if len(links) != 3 || v.Type != "veth" || v.Bridge != "b1" || v.Peer != see(t, veth.ns)["eth0"].Index ||
		p.Type != "tuntap" || p.Bridge != "b1" || !p.Ours || !p.Up {
		t.Errorf("%+v", links)
	}
	if err := taps.cable.Detach(); err != nil {
		t.Fatal(err)
	}
	if links, _ := bridge.List(t.Context(), s.ns); len(links) != 3 {
		t.Errorf("after Detach: %+v", links)
	}
	for _, m := range []*member{veth, taps} {
		if err := bridge.Remove(t.Context(), s.ns, m.cfg.Port); err != nil {
			t.Error(err)
		}
	}
	if all := see(t, s.ns); len(all) != 2 {
		t.Errorf("%+v", all)
	}
}

// A member that sends from ever new addresses does not fill the kernel's memory, nor does it stop others.
func TestLearningIsBounded(t *testing.T) {
	s := newSite(t, 1500)
	a, b := s.join(t, 1, 0), s.join(t, 2, 2)
	var limits []string
	call(t, s.ns, "learned", "b1", &limits)
	if len(limits) == 2 && limits[1] != fmt.Sprint(16*(bridge.MaxPorts+1)) { // since Linux 6.7
		t.Errorf("learned, and at most: %q", limits)
	}
	call(t, a.ns, "forge", forgery{Name: "eth0", Frames: 20000}, nil)
	call(t, s.ns, "learned", "b1", &limits)
	if len(limits) == 2 && limits[0] != limits[1] {
		t.Errorf("learned %s of %s", limits[0], limits[1])
	}
	x, y := connection(t, a, b, false)
	echo(t, x, y)
	x, y = connection(t, b, a, true)
	echo(t, x, y)
}

// What a cable of TAPs carries is super-segments, not the packets that they stand for.
func TestSuperSegmentsPassWhole(t *testing.T) {
	s := newSite(t, 1500)
	a, b := s.join(t, 1, 2), s.join(t, 2, 2)
	const size = 16 << 20
	x, y := connection(t, a, b, false)
	transfer(t, x, y, size)
	var received uint64
	call(t, b.ns, "received", "eth0", &received)
	if most := uint64(size / 1460 / 4); received > most {
		t.Errorf("%d octets came in %d frames, want at most %d", size, received, most)
	}
}

func TestPumpAllocatesNothing(t *testing.T) {
	s := newSite(t, 1500)
	a, b := s.join(t, 1, 0), s.join(t, 2, 2)
	var ends []net.Conn
	for _, way := range [][2]netip.Addr{{a.addr, b.addr}, {b.addr, a.addr}} {
		m := a
		if way[0] == b.addr {
			m = b
		}
		f := call(t, m.ns, "socket", wanted{Network: "udp", Addr: netip.AddrPortFrom(way[0], 80), To: netip.AddrPortFrom(way[1], 80)}, nil)[0]
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		ends = append(ends, c)
	}
	// Both ends are there before the first datagram: a port where nobody is would answer with an error.
	x, y := ends[0], ends[1]
	buf := make([]byte, 1000)
	if n := testing.AllocsPerRun(200, func() {
		for _, way := range [][2]net.Conn{{x, y}, {y, x}} {
			if _, err := way[0].Write(buf); err != nil {
				t.Fatal(err)
			}
			if _, err := way[1].Read(buf); err != nil {
				t.Fatal(err)
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations for a frame each way", n)
	}
}

// Without the virtio-net header, slowly.
func TestNoOffload(t *testing.T) {
	s := newSite(t, 1500)
	a := s.join(t, 1, 0)
	b := &member{Namespace: taptest.NewNS(t, taptest.OwnerRoot), cfg: config(2, bridge.TAPs)}
	b.ns, b.addr, b.addr6 = b.Open(t), b.cfg.IPv4.Addr(), b.cfg.IPv6.Addr()
	b.cfg.NoOffload = true
	b.connect(t, s)
	x, y := connection(t, a, b, true)
	transfer(t, x, y, 1<<20)
	transfer(t, y, x, 1<<20)
}
