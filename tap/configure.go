package tap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

const opDress = "tap.dress"

// Dress gives an interface in ns that is there, and need not be a TAP, what Open gives to a TAP: MTU, MAC, alias, and with
// cfg.Configure addresses and routes. One that was dressed before keeps what it has.
func Dress(ctx context.Context, ns *netns.NS, cfg Config) error {
	if err := cfg.validate(); err != nil {
		return err
	}
	var is opened
	if _, err := ns.Call(ctx, Ops(), opDress, cfg, &is); err != nil {
		return err
	}
	is.warn(cfg)
	return nil
}

func dressInside(_ context.Context, cfg Config) (r opened, _ []*os.File, err error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return r, nil, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	link, err := nl.LinkByName(cfg.Name)
	if err != nil {
		return r, nil, fmt.Errorf("interface %s: %w", cfg.Name, err)
	}
	return r, nil, r.dress(nl, link, cfg, link.Attrs().Alias != aliasOurs)
}

// warn logs what the inside has to say.
func (r *opened) warn(cfg Config) {
	for _, w := range r.Warnings {
		cfg.Log.Warn("tap: "+w, "interface", cfg.Name)
	}
}

// dress gives the interface what it lacks: everything where it is new or was left unfinished, nothing
// where it has addresses. Each step may be done twice, for a predecessor may have died after any.
func (r *opened) dress(nl *netlink.Handle, link netlink.Link, cfg Config, unfinished bool) error {
	if unfinished {
		if err := nl.LinkSetAlias(link, aliasUnfinished); err != nil {
			return fmt.Errorf("interface %s: name its maker: %w", cfg.Name, err)
		}
		if err := nl.LinkSetMTU(link, cfg.MTU); err != nil {
			return fmt.Errorf("interface %s: MTU %d: %w", cfg.Name, cfg.MTU, err)
		}
		if cfg.MAC != nil {
			if err := nl.LinkSetHardwareAddr(link, cfg.MAC); err != nil {
				return fmt.Errorf("interface %s: MAC %s: %w", cfg.Name, cfg.MAC, err)
			}
		}
	}
	if err := r.look(nl, cfg.Name); err != nil {
		return err
	}
	if cfg.Configure && (unfinished || len(r.Addrs) == 0) {
		if err := r.configure(nl, link, cfg); err != nil {
			return err
		}
		if err := r.look(nl, cfg.Name); err != nil {
			return err
		}
	}
	if unfinished {
		if err := nl.LinkSetAlias(link, aliasOurs); err != nil {
			return fmt.Errorf("interface %s: name its maker: %w", cfg.Name, err)
		}
	}
	return nil
}

// look reads back what the interface has.
func (r *opened) look(nl *netlink.Handle, name string) error {
	link, err := nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	r.MTU, r.MAC, r.Up = link.Attrs().MTU, link.Attrs().HardwareAddr, link.Attrs().Flags&net.FlagUp != 0
	addrs, err := nl.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("interface %s: its addresses: %w", name, err)
	}
	r.Addrs = nil
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		if ip = ip.Unmap(); !ok || ip.IsLinkLocalUnicast() && ip.Is6() {
			continue // every interface that is up has one of those
		}
		ones, _ := a.Mask.Size()
		r.Addrs = append(r.Addrs, netip.PrefixFrom(ip, ones))
	}
	return nil
}

func (r *opened) configure(nl *netlink.Handle, link netlink.Link, cfg Config) error {
	lo, err := nl.LinkByName("lo")
	if err == nil {
		err = nl.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	if cfg.Shared {
		// Whoever still has the address of a predecessor's interface hears of the new one. Without it that lasts until
		// the neighbour's entry is found to be stale.
		os.WriteFile("/proc/sys/net/ipv4/conf/"+cfg.Name+"/arp_notify", []byte("1"), 0)
		os.WriteFile("/proc/sys/net/ipv6/conf/"+cfg.Name+"/ndisc_notify", []byte("1"), 0)
	}
	with6 := cfg.IPv6.IsValid() && r.prepare6(cfg)
	if cfg.IPv4.IsValid() {
		if err := nl.AddrReplace(link, &netlink.Addr{IPNet: ipNet(cfg.IPv4)}); err != nil {
			return fmt.Errorf("interface %s: address %s: %w", cfg.Name, cfg.IPv4, err)
		}
	}
	if with6 {
		// Nobody else is on this link, or the addresses on it are given out by one: the second of duplicate
		// address detection, in which nothing can be sent, would be lost.
		if err := nl.AddrReplace(link, &netlink.Addr{IPNet: ipNet(cfg.IPv6), Flags: unix.IFA_F_NODAD}); err != nil {
			return fmt.Errorf("interface %s: address %s: %w", cfg.Name, cfg.IPv6, err)
		}
	}
	if err := nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("interface %s: bring it up: %w", cfg.Name, err)
	}
	if err := r.defaultRoute(nl, link, cfg.Gateway4, cfg); err != nil {
		return err
	}
	if !with6 {
		return nil
	}
	if cfg.Shared {
		awaitLocal(nl, cfg.IPv6.Addr())
	}
	return r.defaultRoute(nl, link, cfg.Gateway6, cfg)
}

// localPatience bounds a wait for a work queue of the kernel's, which takes some ten milliseconds on a busy machine. Without
// a carrier it does not come to it at all.
const (
	localPatience = time.Second
	localPoll     = 500 * time.Microsecond
)

// awaitLocal waits until what comes for the address is let in. The kernel's route for that (local, of table local) is
// made by a work queue, after the address is there, and nothing tells of it (addrconf_dad_work, net/ipv6/addrconf.c); what comes
// before is dropped, and a SYN is sent again a second later.
func awaitLocal(nl *netlink.Handle, addr netip.Addr) {
	for end := time.Now().Add(localPatience); time.Now().Before(end); time.Sleep(localPoll) {
		routes, err := nl.RouteGet(addr.AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return
		}
	}
}

// defaultRoute makes one by the gateway. A shared link may not be the container's only one: a default route that
// it has, by whatever other interface, stays, and one of another metric is beside it.
func (r *opened) defaultRoute(nl *netlink.Handle, link netlink.Link, gateway netip.Addr, cfg Config) error {
	if !gateway.IsValid() {
		return nil
	}
	all, family := netip.PrefixFrom(netip.IPv4Unspecified(), 0), netlink.FAMILY_V4
	if gateway.Is6() {
		all, family = netip.PrefixFrom(netip.IPv6Unspecified(), 0), netlink.FAMILY_V6
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(all), Gw: gateway.AsSlice(), Priority: cfg.Metric}
	put := nl.RouteReplace
	if cfg.Shared {
		put = nl.RouteAdd
	}
	err := put(route)
	if cfg.Shared && errors.Is(err, unix.EEXIST) {
		var routes []netlink.Route
		if routes, err = nl.RouteList(link, family); err == nil && !slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Gw.Equal(route.Gw) }) {
			r.Warnings = append(r.Warnings, fmt.Sprintf("there is a default route already, and it stays: the one by %s is not made", gateway))
		}
	}
	if err != nil {
		return fmt.Errorf("interface %s: default route by %s: %w", link.Attrs().Name, gateway, err)
	}
	return nil
}

// prepare6 makes the interface ready for a static IPv6 address, and tells whether it can have one: runtimes
// turn IPv6 off in a namespace by a sysctl that we may or may not be able to write.
func (r *opened) prepare6(cfg Config) bool {
	name := cfg.Name
	dir := "/proc/sys/net/ipv6/conf/" + name + "/"
	if off, err := os.ReadFile(dir + "disable_ipv6"); errors.Is(err, fs.ErrNotExist) {
		r.Warnings = append(r.Warnings, "the kernel has no IPv6: the container gets IPv4 only")
		return false
	} else if err == nil && string(off) != "0\n" {
		if cfg.KeepIPv6Off {
			r.Warnings = append(r.Warnings, fmt.Sprintf("IPv6 is off in the namespace, and stays so (sysctl net.ipv6.conf.%s.disable_ipv6)", name))
			return false
		}
		if err := os.WriteFile(dir+"disable_ipv6", []byte("0"), 0); err != nil {
			r.Warnings = append(r.Warnings, fmt.Sprintf("IPv6 is off in the namespace (sysctl net.ipv6.conf.%s.disable_ipv6) and cannot be turned on: %v", name, err))
			return false
		}
	}
	// Our own router advertisements, which are for whoever configures itself, would add a second address and route. Where
	// /proc is read-only that is a matter of taste, not of function.
	os.WriteFile(dir+"accept_ra", []byte("0"), 0)
	return true
}

// noDAD turns duplicate address detection off, before the interface has its carrier by us and so its first address. Nobody else
// is on this link. In that second a route by our router advertisement would be there already and no address to send
// from but ::1: what connects then, as a program that rootlesskit has just started, would wait for minutes. Where /proc is read-only
// it comes to that. undo is for when there will be no carrier.
func noDAD(name string) (undo func()) {
	file := "/proc/sys/net/ipv6/conf/" + name + "/accept_dad"
	before, err := os.ReadFile(file)
	if err != nil { // the kernel has no IPv6
		return func() {}
	}
	os.WriteFile(file, []byte("0"), 0)
	return func() { os.WriteFile(file, before, 0) }
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
