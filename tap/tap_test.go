package tap_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"usernet/tap"
	"usernet/tap/netns"
	"usernet/tap/taptest"
)

// inside are the operations of the tests, beside the package's own.
var inside = netns.Ops{
	"state":   netns.Handle(state),
	"udp":     netns.Handle(udp),
	"foreign": netns.Handle(foreign),
	"change":  netns.Handle(change),
	"adopt":   netns.Handle(adopt),
	"sysctl": netns.Handle(func(_ context.Context, set [2]string) (struct{}, []*os.File, error) {
		return struct{}{}, nil, os.WriteFile("/proc/sys/net/"+set[0], []byte(set[1]), 0)
	}),
}

func ops() netns.Ops {
	all := maps.Clone(inside)
	maps.Copy(all, tap.Ops())
	return all
}

func TestMain(m *testing.M) { taptest.MainHere(m, ops()) }

// A linkState is an interface as the container sees it.
type linkState struct {
	Found      bool
	Up, LoUp   bool
	MTU        int
	MAC, Alias string
	Addrs      []string // all of them; tentative ones say so
	Routes     []string
	Persist    bool
	AcceptRA   string
	AcceptDAD  string
}

func state(_ context.Context, name string) (s linkState, _ []*os.File, err error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return s, nil, err
	}
	defer nl.Close()
	lo, err := nl.LinkByName("lo")
	if err != nil {
		return s, nil, err
	}
	s.LoUp = lo.Attrs().Flags&net.FlagUp != 0
	link, err := nl.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return s, nil, nil
	}
	if err != nil {
		return s, nil, err
	}
	a := link.Attrs()
	s.Found, s.Up, s.MTU, s.MAC, s.Alias = true, a.Flags&net.FlagUp != 0, a.MTU, a.HardwareAddr.String(), a.Alias
	if tun, ok := link.(*netlink.Tuntap); ok {
		s.Persist = !tun.NonPersist
	}
	addrs, err := nl.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return s, nil, err
	}
	for _, a := range addrs {
		text := a.IPNet.String()
		if a.Flags&unix.IFA_F_TENTATIVE != 0 {
			text += " tentative"
		}
		s.Addrs = append(s.Addrs, text)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := nl.RouteList(link, family)
		if err != nil {
			return s, nil, err
		}
		for _, r := range routes {
			if r.Gw != nil {
				s.Routes = append(s.Routes, fmt.Sprintf("%s via %s", r.Dst, r.Gw))
			}
		}
	}
	conf := "/proc/sys/net/ipv6/conf/" + name
	ra, _ := os.ReadFile(conf + "/accept_ra")
	dad, _ := os.ReadFile(conf + "/accept_dad")
	s.AcceptRA, s.AcceptDAD = strings.TrimSpace(string(ra)), strings.TrimSpace(string(dad))
	return s, nil, nil
}

// udp passes out a socket of the container that may broadcast.
func udp(_ context.Context, addr string) (struct{}, []*os.File, error) {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return struct{}{}, nil, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return struct{}{}, nil, err
	}
	f := os.NewFile(uintptr(fd), "udp")
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}))
	if err != nil {
		f.Close()
		return struct{}{}, nil, err
	}
	return struct{}{}, []*os.File{f}, nil
}

// A foreigner is an interface that another program made.
type foreigner struct {
	Name  string
	Flags uint16 // of TUNSETIFF; 0 means a dummy interface
	Hold  bool   // it stays attached: the descriptor comes out
}

func foreign(_ context.Context, f foreigner) (_ struct{}, files []*os.File, err error) {
	if f.Flags == 0 {
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return struct{}{}, nil, err
		}
		defer nl.Close()
		return struct{}{}, nil, nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: f.Name}})
	}
	fd, err := attach(f.Name, f.Flags)
	if err != nil {
		return struct{}{}, nil, err
	}
	file := os.NewFile(uintptr(fd), f.Name)
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil || !f.Hold {
		file.Close()
		return struct{}{}, nil, err
	}
	return struct{}{}, []*os.File{file}, nil
}

func attach(name string, flags uint16) (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// A wish is something that a user of the container does with the interface.
type wish struct {
	Name, Addr, Alias string
	MTU               int
	Delete, DropRoute bool
	Up                bool
}

func change(_ context.Context, w wish) (struct{}, []*os.File, error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return struct{}{}, nil, err
	}
	defer nl.Close()
	link, err := nl.LinkByName(w.Name)
	if err == nil && w.Addr != "" {
		var a *netlink.Addr
		if a, err = netlink.ParseAddr(w.Addr); err == nil {
			err = nl.AddrAdd(link, a)
		}
	}
	if err == nil && w.MTU != 0 {
		err = nl.LinkSetMTU(link, w.MTU)
	}
	if err == nil && w.Up {
		err = nl.LinkSetUp(link)
	}
	if err == nil && w.Alias != "" {
		err = nl.LinkSetAlias(link, w.Alias)
	}
	if err == nil && w.DropRoute {
		err = nl.RouteDel(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}})
	}
	if err == nil && w.Delete {
		err = nl.LinkDel(link)
	}
	return struct{}{}, nil, err
}

// config is the plan of a container as usernet has it by default.
func config() tap.Config {
	return tap.Config{
		Name: "tap0", MTU: 1500, Configure: true,
		IPv4: netip.MustParsePrefix("10.0.2.100/24"), Gateway4: netip.MustParseAddr("10.0.2.2"),
		IPv6: netip.MustParsePrefix("fd00::100/64"), Gateway6: netip.MustParseAddr("fd00::2"),
	}
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

func see(t testing.TB, n *netns.NS) (s linkState) {
	t.Helper()
	call(t, n, "state", "tap0", &s)
	return s
}

// open opens a device that is closed with the test.
func open(t testing.TB, n *netns.NS, cfg tap.Config) *tap.Device {
	t.Helper()
	d, err := tap.Open(t.Context(), n, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return d
}

// newNS makes a namespace in which a TAP can be made.
func newNS(t testing.TB) *netns.NS {
	t.Helper()
	taptest.NeedTUN(t)
	return taptest.NewNS(t, taptest.OwnerRoot).Open(t)
}

var configured = []string{"10.0.2.100/24", "fd00::100/64"}

func TestOpenConfigures(t *testing.T) {
	taptest.NeedTUN(t)
	for _, owner := range taptest.Owners {
		n := taptest.NewNS(t, owner).Open(t)
		cfg := config()
		cfg.MAC = net.HardwareAddr{2, 0, 0, 0, 0, 9}
		d := open(t, n, cfg)
		s := see(t, n)
		if !s.Found || !s.Up || !s.LoUp || s.MTU != 1500 || s.MAC != "02:00:00:00:00:09" || s.Alias != tap.AliasOurs || !s.Persist || s.AcceptRA != "0" {
			t.Errorf("%s: %+v", owner, s)
		}
		for _, want := range configured {
			if !slices.Contains(s.Addrs, want) { // and not tentative
				t.Errorf("%s: addresses %q lack %s", owner, s.Addrs, want)
			}
		}
		if want := []string{"0.0.0.0/0 via 10.0.2.2", "::/0 via fd00::2"}; !slices.Equal(s.Routes, want) {
			t.Errorf("%s: routes %q, want %q", owner, s.Routes, want)
		}
		if got := fmt.Sprint(d.Addrs()); got != "[10.0.2.100/24 fd00::100/64]" {
			t.Errorf("%s: Addrs are %s", owner, got)
		}
		if d.Adopted() || d.MTU() != 1500 || d.MAC().String() != s.MAC || d.Name() != "tap0" || len(d.Queues()) != 1 {
			t.Errorf("%s: adopted %v, MTU %d, MAC %s, name %s, %d queues", owner, d.Adopted(), d.MTU(), d.MAC(), d.Name(), len(d.Queues()))
		}
		for range 2 {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
		if s := see(t, n); s.Found {
			t.Errorf("%s: after Close: %+v", owner, s)
		}
	}
}

func TestOpenWithoutConfigure(t *testing.T) {
	n := newNS(t)
	cfg := config()
	cfg.Configure = false
	d := open(t, n, cfg)
	if s := see(t, n); !s.Found || s.Up || s.LoUp || s.MTU != 1500 || len(s.Addrs) != 0 || len(s.Routes) != 0 {
		t.Errorf("%+v", s)
	}
	if len(d.Addrs()) != 0 {
		t.Errorf("addresses %v", d.Addrs())
	}
}

func TestOneFamily(t *testing.T) {
	for _, six := range []bool{false, true} {
		n := newNS(t)
		cfg := config()
		want := "[10.0.2.100/24]"
		if six {
			cfg.IPv4, cfg.Gateway4, want = netip.Prefix{}, netip.Addr{}, "[fd00::100/64]"
		} else {
			cfg.IPv6, cfg.Gateway6 = netip.Prefix{}, netip.Addr{}
		}
		d := open(t, n, cfg)
		if got := fmt.Sprint(d.Addrs()); got != want {
			t.Errorf("%s, want %s", got, want)
		}
		if s := see(t, n); len(s.Routes) != 1 {
			t.Errorf("routes %q", s.Routes)
		}
	}
}

// Runtimes turn IPv6 off by default where their own network has none.
func TestIPv6IsTurnedOn(t *testing.T) {
	n := newNS(t)
	call(t, n, "sysctl", [2]string{"ipv6/conf/default/disable_ipv6", "1"}, nil)
	d := open(t, n, config())
	if got := fmt.Sprint(d.Addrs()); got != "[10.0.2.100/24 fd00::100/64]" {
		t.Error(got)
	}
}

// "podman run --userns=keep-id --sysctl net.ipv6.conf.all.disable_ipv6=1" had an IPv6 network all the same.
func TestIPv6ThatIsOffStaysOff(t *testing.T) {
	for _, off := range []bool{false, true} {
		n := newNS(t)
		want := "[10.0.2.100/24 fd00::100/64]"
		if off {
			call(t, n, "sysctl", [2]string{"ipv6/conf/default/disable_ipv6", "1"}, nil)
			want = "[10.0.2.100/24]"
		}
		cfg := config()
		cfg.KeepIPv6Off = true
		d := open(t, n, cfg)
		if got := fmt.Sprint(d.Addrs()); got != want {
			t.Errorf("off %v: %s, want %s", off, got, want)
		}
	}
}

// As after kill -9: the descriptors are gone, the interface is not.
func TestAdoptKeepsConfiguration(t *testing.T) {
	n := newNS(t)
	first := open(t, n, config())
	mac := first.MAC().String()
	if err := first.Detach(); err != nil {
		t.Fatal(err)
	}
	call(t, n, "change", wish{Name: "tap0", Addr: "192.168.9.1/24", MTU: 1400, DropRoute: true}, nil)
	before := see(t, n)
	cfg := config()
	cfg.MTU, cfg.MAC, cfg.IPv4, cfg.Gateway4 = 9000, net.HardwareAddr{2, 0, 0, 0, 0, 9}, netip.MustParsePrefix("10.9.9.9/24"), netip.MustParseAddr("10.9.9.1")
	second := open(t, n, cfg)
	if after := see(t, n); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("the interface was\n%+v and is\n%+v", before, after)
	}
	if !second.Adopted() || second.MTU() != 1400 || second.MAC().String() != mac || len(second.Addrs()) != 3 {
		t.Errorf("adopted %v, MTU %d, MAC %s, addresses %v", second.Adopted(), second.MTU(), second.MAC(), second.Addrs())
	}
	if second.Queues()[0].Offloads() != first.Queues()[0].Offloads() {
		t.Errorf("offloads %#x, were %#x", second.Queues()[0].Offloads(), first.Queues()[0].Offloads())
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if s := see(t, n); s.Found {
		t.Error("a TAP that usernet made outlived a clean end:", s)
	}
}

// Killed in the midst of configuring.
func TestAdoptUnfinished(t *testing.T) {
	n := newNS(t)
	if err := open(t, n, config()).Detach(); err != nil {
		t.Fatal(err)
	}
	call(t, n, "change", wish{Name: "tap0", Alias: tap.AliasUnfinished, DropRoute: true}, nil)
	open(t, n, config())
	if s := see(t, n); len(s.Routes) != 2 || s.Alias != tap.AliasOurs {
		t.Errorf("%+v", s)
	}
}

// rootlesskit makes the TAP itself, for one queue.
func TestForeignTAP(t *testing.T) {
	for _, addr := range []string{"", "10.7.7.7/24"} {
		n := newNS(t)
		call(t, n, "foreign", foreigner{Name: "tap0", Flags: unix.IFF_TAP | unix.IFF_NO_PI}, nil)
		if addr != "" {
			call(t, n, "change", wish{Name: "tap0", Addr: addr}, nil)
		}
		cfg := config()
		cfg.Queues = 2 // more than it has
		d := open(t, n, cfg)
		want := "[10.0.2.100/24 fd00::100/64]"
		if addr != "" {
			want = "[" + addr + "]"
		}
		if got := fmt.Sprint(d.Addrs()); got != want || !d.Adopted() || len(d.Queues()) != 1 {
			t.Errorf("addresses %s, want %s; adopted %v, %d queues", got, want, d.Adopted(), len(d.Queues()))
		}
		if d.Queues()[0].Offloads()&unix.TUN_F_CSUM == 0 {
			t.Error("no offloads on a foreign TAP")
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if s := see(t, n); !s.Found || !s.Persist || s.Alias != "" {
			t.Errorf("after Close: %+v, want it to stay as it was", s)
		}
	}
}

// Who configures a TAP by our router advertisements, as rootlesskit does, can use the address at once; and where we bring no
// IPv6 the link is not ours to change.
func TestUnconfiguredAddressIsUsableAtOnce(t *testing.T) {
	for _, six := range []bool{true, false} {
		n := newNS(t)
		call(t, n, "foreign", foreigner{Name: "tap0", Flags: unix.IFF_TAP | unix.IFF_NO_PI}, nil)
		call(t, n, "change", wish{Name: "tap0", Up: true}, nil)
		before := see(t, n).AcceptDAD
		cfg := config()
		cfg.Configure = false
		if !six {
			cfg.IPv6, cfg.Gateway6 = netip.Prefix{}, netip.Addr{}
		}
		open(t, n, cfg)
		s := see(t, n)
		if want := map[bool]string{true: "0", false: before}[six]; s.AcceptDAD != want || before == "0" {
			t.Errorf("IPv6 %v: accept_dad was %s and is %s, want %s", six, before, s.AcceptDAD, want)
		}
		if s.AcceptRA == "0" || !s.Up {
			t.Errorf("IPv6 %v: up %v, accept_ra %s", six, s.Up, s.AcceptRA)
		}
	}
}

func TestOpenRefusesInterfaces(t *testing.T) {
	for name, c := range map[string]struct {
		f    foreigner
		want string
		err  error
	}{
		"bridge":             {foreigner{Name: "tap0"}, "no TAP but of type bridge", unix.EEXIST},
		"tun":                {foreigner{Name: "tap0", Flags: unix.IFF_TUN | unix.IFF_NO_PI}, "TUN and no TAP", unix.EEXIST},
		"in use":             {foreigner{Name: "tap0", Flags: unix.IFF_TAP | unix.IFF_NO_PI, Hold: true}, "busy", unix.EBUSY},
		"in use, multiqueue": {foreigner{Name: "tap0", Flags: unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_MULTI_QUEUE, Hold: true}, "busy", unix.EBUSY},
	} {
		n := newNS(t)
		call(t, n, "foreign", c.f, nil)
		before := see(t, n)
		_, err := tap.Open(t.Context(), n, config())
		if !errors.Is(err, c.err) || !strings.Contains(fmt.Sprint(err), c.want) {
			t.Errorf("%s: %v; want %q and %v", name, err, c.want, c.err)
		}
		if after := see(t, n); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("%s: it was %+v and is %+v", name, before, after)
		}
	}
}

func TestSecondOpenIsBusy(t *testing.T) {
	taptest.NeedTUN(t)
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	a, b := ns.Open(t), ns.Open(t)
	d := open(t, a, config())
	cfg := config()
	cfg.Name = "tap1" // the lock is the namespace's
	if _, err := tap.Open(t.Context(), b, cfg); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a second usernet in one namespace: %v, want EBUSY", err)
	}
	if _, err := tap.Open(t.Context(), a, config()); !errors.Is(err, unix.EBUSY) {
		t.Errorf("the same TAP twice: %v, want EBUSY", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, b, cfg)
}

// A failure after the interface was made takes it back.
func TestFailedOpenLeavesNothing(t *testing.T) {
	n := newNS(t)
	call(t, n, "foreign", foreigner{Name: "x"}, nil)
	cfg := config()
	cfg.IPv4, cfg.Gateway4 = netip.MustParsePrefix("224.0.0.1/24"), netip.Addr{} // the kernel refuses it
	cfg.MAC = net.HardwareAddr{2, 0, 0, 0, 0, 9}
	cfg.IPv6 = netip.MustParsePrefix("ff02::1/64")
	cfg.Gateway6 = netip.Addr{}
	if _, err := tap.Open(t.Context(), n, cfg); err == nil {
		t.Fatal("a multicast address was accepted")
	}
	if s := see(t, n); s.Found {
		t.Errorf("left behind: %+v", s)
	}
	open(t, n, config()) // and the lock is free
}

func TestConfigRefused(t *testing.T) {
	for want, edit := range map[string]func(*tap.Config){
		"needs a name":       func(c *tap.Config) { c.Name = "" },
		"has 16 octets":      func(c *tap.Config) { c.Name = "sixteen-octets-x" },
		"reserved":           func(c *tap.Config) { c.Name = ".." },
		"no slash":           func(c *tap.Config) { c.Name = "a/b" },
		"percent":            func(c *tap.Config) { c.Name = "tap%d" },
		"octet 0xa0":         func(c *tap.Config) { c.Name = "tap-à" },
		"no space":           func(c *tap.Config) { c.Name = "a b" },
		"68 to 65521":        func(c *tap.Config) { c.MTU = 65522 },
		"IPv6 needs":         func(c *tap.Config) { c.MTU = 1279 },
		"1 to 256":           func(c *tap.Config) { c.Queues = 257 },
		"first one even":     func(c *tap.Config) { c.MAC = net.HardwareAddr{1, 0, 0, 0, 0, 1} },
		"not all zero":       func(c *tap.Config) { c.MAC = make(net.HardwareAddr, 6) },
		"6 octets":           func(c *tap.Config) { c.MAC = make(net.HardwareAddr, 8) },
		"without an IPv4":    func(c *tap.Config) { c.IPv4 = netip.Prefix{} },
		"no IPv6 address":    func(c *tap.Config) { c.IPv6 = c.IPv4 },
		"no IPv4 address":    func(c *tap.Config) { c.IPv4 = c.IPv6 },
		"is not in":          func(c *tap.Config) { c.Gateway4 = netip.MustParseAddr("10.0.3.1") },
		"container are both": func(c *tap.Config) { c.Gateway6 = c.IPv6.Addr() },
	} {
		cfg := config()
		edit(&cfg)
		if _, err := tap.Open(t.Context(), nil, cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	for _, name := range []string{"tap0", "fifteen-octets.", "ünïcode", "@"} {
		if err := tap.CheckName(name); err != nil {
			t.Error(err)
		}
	}
}

func TestDeviceErrorsCarryTheRemedy(t *testing.T) {
	for errno, want := range map[unix.Errno]string{
		unix.ENOENT: "modprobe tun", unix.ENODEV: "modprobe tun", unix.EACCES: "chmod 0666 /dev/net/tun", unix.EPERM: "--device /dev/net/tun",
	} {
		if err := tap.ExplainTUN(errno); !errors.Is(err, errno) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v; want %q", errno, err, want)
		}
	}
}

// What a plain user gets where nobody ran udev.
func TestOpenWithoutDevice(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
	if err := unix.Mount("none", "/dev", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	_, err := tap.Open(t.Context(), n, config())
	if !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "modprobe tun") {
		t.Error(err)
	}
}
