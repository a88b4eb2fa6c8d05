package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap"
	"usernet/tap/bridge"
	"usernet/tap/netns"
	"usernet/tap/taptest"
)

func ops() netns.Ops {
	all := netns.Ops{
		"socket": netns.Handle(socket),
		"state":  netns.Handle(state),
		"change": netns.Handle(change),

		"neighbour": netns.Handle(neighbour),
		"received":  netns.Handle(received),
		"learned":   netns.Handle(learned),
		"forge":     netns.Handle(forge),
	}
	maps.Copy(all, tap.Ops())
	maps.Copy(all, bridge.Ops())
	return all
}

func TestMain(m *testing.M) { taptest.MainHere(m, ops()) }

var (
	bridgeMAC = net.HardwareAddr{0x52, 0x55, 10, 89, 1, 0}
	silent    = slog.New(slog.DiscardHandler)
)

// A site is a shared namespace with a bridge in it.
type site struct {
	taptest.Namespace
	ns *netns.NS
	b  *bridge.Bridge
}

func newSite(t testing.TB, mtu int) *site {
	t.Helper()
	taptest.NeedTUN(t)
	space := taptest.NewNS(t, taptest.OwnerRoot)
	s := &site{Namespace: *space, ns: space.Open(t)}
	s.b = s.open(t, mtu)
	return s
}

func (s *site) open(t testing.TB, mtu int) *bridge.Bridge {
	t.Helper()
	b, err := bridge.Open(t.Context(), s.ns, bridge.Config{Name: "b1", MAC: bridgeMAC, MTU: mtu, Log: silent})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// again opens the shared namespace anew and takes up the bridge, as who comes after a death does.
func (s *site) again(t testing.TB) *site {
	t.Helper()
	next := &site{Namespace: s.Namespace, ns: s.Open(t)}
	next.b = next.open(t, s.b.MTU())
	if !next.b.Adopted() {
		t.Fatal("the bridge was made anew")
	}
	return next
}

// A member is a container on the bridge.
type member struct {
	*taptest.Namespace
	ns    *netns.NS
	cfg   bridge.CableConfig
	cable *bridge.Cable
	addr  netip.Addr
	addr6 netip.Addr
}

// config is the plan of the n-th member.
func config(n int, kind bridge.Kind) bridge.CableConfig {
	a := netip.AddrFrom4([4]byte{10, 89, 1, byte(n)})
	a6 := netip.AddrFrom16([16]byte{0xfd, 0, 0, 0, 0, 0, 0, 1, 14: byte(n >> 8), 15: byte(n)})
	b := a.As4()
	return bridge.CableConfig{
		Port: fmt.Sprint("m", n), Name: "eth0", Kind: kind,
		MAC:  net.HardwareAddr{0x52, 0x56, b[0], b[1], b[2], b[3]},
		IPv4: netip.PrefixFrom(a, 24), Gateway4: netip.MustParseAddr("10.89.1.254"),
		IPv6: netip.PrefixFrom(a6, 64), Gateway6: netip.MustParseAddr("fd00:0:0:1::fffe"),
	}
}

// kinds are the cables, and what namespaces they are between.
var kinds = []struct {
	name  string
	kind  bridge.Kind
	space func(testing.TB, *site) *taptest.Namespace
}{
	{"veth", bridge.Auto, func(t testing.TB, s *site) *taptest.Namespace { return taptest.NewNSIn(t, &s.Namespace, false) }},
	{"veth below", bridge.Auto, func(t testing.TB, s *site) *taptest.Namespace { return taptest.NewNSIn(t, &s.Namespace, true) }},
	{"taps", bridge.TAPs, func(t testing.TB, _ *site) *taptest.Namespace { return taptest.NewNS(t, taptest.OwnerRoot) }},
	{"taps nested", bridge.TAPs, func(t testing.TB, _ *site) *taptest.Namespace { return taptest.NewNS(t, taptest.OwnerNested) }},
}

// join makes a container and connects it; its cable runs until the test's end, when it is closed.
func (s *site) join(t testing.TB, n, kind int) *member {
	t.Helper()
	space := kinds[kind].space(t, s)
	m := &member{Namespace: space, ns: space.Open(t), cfg: config(n, kinds[kind].kind)}
	m.addr, m.addr6 = m.cfg.IPv4.Addr(), m.cfg.IPv6.Addr()
	m.connect(t, s)
	want := bridge.Veth
	if kinds[kind].kind == bridge.TAPs {
		want = bridge.TAPs
	}
	if m.cable.Kind() != want {
		t.Fatalf("%s: the cable is of kind %s, want %s", kinds[kind].name, m.cable.Kind(), want)
	}
	return m
}

func (m *member) connect(t testing.TB, s *site) {
	t.Helper()
	c, err := s.b.Attach(t.Context(), m.ns, m.cfg)
	if err != nil {
		t.Fatal(err)
	}
	m.cable = c
	run(t, c)
}

// run runs the cable, and closes it with the test.
func run(t testing.TB, c *bridge.Cable) {
	ended := make(chan error)
	go func() { ended <- c.Run(context.Background()) }()
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if err := <-ended; err != nil && !errors.Is(err, unix.ENODEV) {
			t.Errorf("run: %v", err)
		}
	})
}

func call(t testing.TB, n *netns.NS, name string, args, reply any) []*os.File {
	t.Helper()
	files, err := n.Call(t.Context(), ops(), name, args, reply)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	t.Cleanup(func() {
		for _, f := range files {
			f.Close()
		}
	})
	return files
}
