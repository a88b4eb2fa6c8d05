package inside_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"usernet/tap/inside"
	"usernet/tap/netns"
	"usernet/tap/taptest"
)

// testOps are what the tests do inside, as the container might.
var testOps = netns.Ops{
	"furnish": netns.Handle(furnish),
	"listen":  netns.Handle(listen),
	"look":    netns.Handle(look),
	"spoil":   netns.Handle(spoil),
	"talk":    netns.Handle(talk),
	"many":    netns.Handle(many),
	"pid": netns.Handle(func(context.Context, struct{}) (int, []*os.File, error) {
		return os.Getpid(), nil, nil
	}),
	"range": netns.Handle(func(_ context.Context, value string) (struct{}, []*os.File, error) {
		return struct{}{}, nil, os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte(value), 0)
	}),
	"set": netns.Handle(set),
	"squat": netns.Handle(func(context.Context, struct{}) (struct{}, []*os.File, error) {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return struct{}{}, nil, err
		}
		f := os.NewFile(uintptr(fd), "squatter")
		return struct{}{}, []*os.File{f}, unix.Bind(fd, &unix.SockaddrUnix{Name: "@usernet-inside"})
	}),
}

var sysctls = []string{
	"/proc/sys/net/ipv4/tcp_fwmark_accept", "/proc/sys/net/ipv4/fwmark_reflect", "/proc/sys/net/ipv6/fwmark_reflect",
}

// set gives them values, the first that of the lowest bit.
func set(_ context.Context, bits int) (_ struct{}, _ []*os.File, err error) {
	for i, name := range sysctls {
		err = errors.Join(err, os.WriteFile(name, []byte{'0' + byte(bits>>i&1)}, 0))
	}
	return struct{}{}, nil, err
}

func TestMain(m *testing.M) {
	ops := inside.Ops()
	for name, op := range testOps {
		ops[name] = op
	}
	if pid := os.Getenv(victimEnv); pid != "" {
		os.Exit(victim(pid))
	}
	// The goroutine behind os/signal never ends. Fuzzing would start it and leave it to be taken for a leak of ours.
	c := make(chan os.Signal, 1)
	signal.Notify(c, os.Interrupt)
	signal.Stop(c)
	taptest.MainHere(m, ops)
}

var (
	container4 = netip.MustParsePrefix("10.0.2.100/24")
	container6 = netip.MustParsePrefix("fd00::100/64")
	gateway4   = netip.MustParseAddr("10.0.2.2")
	gateway6   = netip.MustParseAddr("fd00::2")
)

// furnish makes the network of a container: its address is on an interface that is not lo, with default
// routes by it, and there are rules of its own.
func furnish(context.Context, struct{}) (struct{}, []*os.File, error) {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return struct{}{}, nil, err
	}
	eth := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: "far"}
	eth.Name = "near"
	if err := netlink.LinkAdd(eth); err != nil {
		return struct{}{}, nil, fmt.Errorf("veth: %w", err)
	}
	far, err := netlink.LinkByName("far")
	if err != nil {
		return struct{}{}, nil, err
	}
	own := netlink.NewRule()
	own.Priority, own.Table, own.Mark = 29, 4242, 7
	same := netlink.NewRule() // where ours will stand
	same.Priority, same.Table, same.Src = inside.PrefChanged, 4242, ipNet(netip.MustParsePrefix("192.0.2.0/24"))
	all4, all6 := netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")
	return struct{}{}, nil, errors.Join(
		netlink.LinkSetUp(eth), netlink.LinkSetUp(far),
		netlink.AddrAdd(eth, &netlink.Addr{IPNet: ipNet(container4)}),
		netlink.AddrAdd(eth, &netlink.Addr{IPNet: ipNet(container6), Flags: unix.IFA_F_NODAD}),
		netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Index, Dst: ipNet(all4), Gw: gateway4.AsSlice()}),
		netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Index, Dst: ipNet(all6), Gw: gateway6.AsSlice()}),
		netlink.RuleAdd(own), netlink.RuleAdd(same),
		// A route of the container's in our table.
		netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Index, Dst: ipNet(netip.MustParsePrefix("198.51.100.0/24")), Table: inside.Table}),
	)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// listen makes a server's socket; network is as of net.Listen, and "tcp6only" and "udp6only" say so.
type server struct{ Network, Addr string }

func listen(ctx context.Context, s server) (string, []*os.File, error) {
	var lc net.ListenConfig
	type filer interface{ File() (*os.File, error) }
	var f filer
	if strings.HasPrefix(s.Network, "udp") {
		c, err := lc.ListenPacket(ctx, s.Network, s.Addr)
		if err != nil {
			return "", nil, err
		}
		defer c.Close()
		s.Addr, f = c.LocalAddr().String(), c.(*net.UDPConn)
	} else {
		l, err := lc.Listen(ctx, s.Network, s.Addr)
		if err != nil {
			return "", nil, err
		}
		defer l.Close()
		s.Addr, f = l.Addr().String(), l.(*net.TCPListener)
	}
	file, err := f.File()
	return s.Addr, []*os.File{file}, err
}

// look says all that a Kit might change, line by line.
func look(context.Context, struct{}) (out []string, _ []*os.File, _ error) {
	for _, name := range sysctls {
		value, err := os.ReadFile(name)
		if err != nil {
			return nil, nil, err
		}
		out = append(out, name+" "+strings.TrimSpace(string(value)))
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := netlink.RuleList(family)
		if err != nil {
			return nil, nil, err
		}
		for _, r := range rules {
			out = append(out, fmt.Sprintf("rule %d mark %#x %s", family, r.Mark, r))
		}
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, nil, err
		}
		for _, r := range routes {
			if family == unix.AF_INET6 && r.Table == unix.RT_TABLE_LOCAL || r.Dst != nil && r.Dst.IP.IsLinkLocalUnicast() {
				continue // those of addresses come and go on their own
			}
			out = append(out, fmt.Sprintf("route %d %s type %d", family, r, r.Type))
		}
	}
	slices.Sort(out)
	return out, nil, nil
}

// spoil removes all that is ours.
func spoil(ctx context.Context, _ struct{}) (struct{}, []*os.File, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return struct{}{}, nil, err
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, _ := netlink.RuleList(family)
		for _, r := range rules {
			if r.Mark == inside.Mark {
				err = errors.Join(err, netlink.RuleDel(&r))
			}
		}
	}
	if err := errors.Join(err, netlink.LinkSetDown(lo), netlink.LinkSetUp(lo)); err != nil { // which loses the routes
		return struct{}{}, nil, err
	}
	return set(ctx, 0)
}

// A box is a container's namespace with a Kit in it.
type box struct {
	*inside.Kit
	ns     *netns.NS // the Kit's
	within *netns.NS // the tests' own
}

func newBox(t *testing.T, owner taptest.Owner) *box {
	t.Helper()
	return boxOf(t, taptest.NewNS(t, owner).PID)
}

func boxOf(t *testing.T, pid int) *box {
	t.Helper()
	b := &box{ns: openNS(t, pid), within: openNS(t, pid)}
	b.do(t, "furnish", struct{}{}, nil)
	return b
}

func openNS(t testing.TB, pid int) *netns.NS {
	t.Helper()
	ns, err := netns.Open(netns.Config{PID: pid, Helper: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ns.Close(); err != nil {
			t.Errorf("close %s: %v", ns, err)
		}
	})
	return ns
}

// open opens a Kit that runs until the test ends, or until close.
func (b *box) open(t testing.TB, cfg inside.Config) (close func()) {
	t.Helper()
	var err error
	if b.Kit, err = inside.Open(t.Context(), b.ns, cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	done := false
	close = func() {
		if done {
			return
		}
		done = true
		cancel()
		if err := <-ended; err != nil {
			t.Error("Run:", err)
		}
		if err := b.Close(); err != nil {
			t.Error("Close:", err)
		}
	}
	t.Cleanup(close)
	return close
}

func (b *box) do(t testing.TB, name string, args, reply any) []*os.File {
	t.Helper()
	files, err := b.within.Call(t.Context(), testOps, name, args, reply)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func (b *box) set(t *testing.T, bits int) {
	t.Helper()
	b.do(t, "set", bits, nil)
}

func (b *box) look(t *testing.T) (lines []string) {
	t.Helper()
	b.do(t, "look", struct{}{}, &lines)
	return lines
}

func (b *box) same(t *testing.T, was []string, when string) {
	t.Helper()
	if is := b.look(t); !slices.Equal(is, was) {
		t.Errorf("%s the namespace has\n%s\nand not what it had before:\n%s", when, strings.Join(is, "\n"), strings.Join(was, "\n"))
	}
}
