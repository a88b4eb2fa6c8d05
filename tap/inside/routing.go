package inside

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What is ours in the container's routing, and how it is known again.
const (
	// Mark is on every segment of a transparent socket, both ways; the rule compares all 32 bits. Bits 12 and 13
	// alone, since others test single bits: kube-proxy 14 and 15, Tailscale 16 to 23, Calico from 16, Cilium 8 to 11, and who
	// writes rules by hand the lowest.
	Mark = 0x3000

	// Table is the routing table in which every address is local.
	Table = 30062

	// PrefChanged and PrefKept are where the rule stands: after "local" (0), and before what a VPN in the
	// container adds (wg-quick, Tailscale: 5210 and above). Which of them it is remembers what the sysctl was
	// before us, for whoever finds the rule of a usernet that was killed together with its helper: 0, or 1 already.
	PrefChanged = 30
	PrefKept    = 31
)

const sysctlPath = "/proc/sys/net/ipv4/tcp_fwmark_accept"

var families = [2]int{unix.AF_INET, unix.AF_INET6}

// setUp makes rule, route and sysctl. The errors, one per family, say why there is none of it.
func setUp(a setupArgs) (c Changed, why [2]error) {
	none := func(err error) (Changed, [2]error) { return c, [2]error{err, err} }
	c = a.Changed
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return none(fmt.Errorf("netlink: %w", err))
	}
	defer nl.Close()
	if !a.Repair { // what a killed one left is taken for our own, with what it knew
		for _, family := range families {
			c.Sysctl = nl.RuleDel(rule(family, PrefChanged)) == nil || c.Sysctl
			nl.RuleDel(rule(family, PrefKept))
		}
	}
	was, err := readSysctl()
	if err != nil {
		return none(err)
	}
	c.Sysctl = c.Sysctl || !was
	lo, err := loopback(nl)
	if err != nil {
		return none(err)
	}
	if !a.IPv6 {
		why[1] = errors.New("usernet serves no IPv6 here")
	}
	// The rule first: it is the note of what the sysctl was.
	for i, family := range families {
		if why[i] == nil {
			why[i] = addRouting(nl, lo, family, c)
		}
	}
	if why[0] != nil && why[1] != nil || was {
		return c, why
	}
	if err := os.WriteFile(sysctlPath, []byte("1"), 0); err != nil {
		err = fmt.Errorf("set the sysctl net.ipv4.tcp_fwmark_accept in the namespace (is /proc/sys writable?): %w", err)
		return none(errors.Join(err, takeDown(c)))
	}
	return c, why
}

// loopback is lo's index. It must be up: the kernel drops the routes of a device that goes down.
func loopback(nl *netlink.Handle) (int, error) {
	lo, err := nl.LinkByName("lo")
	if err != nil {
		return 0, fmt.Errorf("look for lo: %w", err)
	}
	if lo.Attrs().Flags&net.FlagUp == 0 {
		return 0, fmt.Errorf("lo is down in the namespace (\"ip link set lo up\" there): %w", unix.ENETDOWN)
	}
	return lo.Attrs().Index, nil
}

func readSysctl() (bool, error) {
	raw, err := os.ReadFile(sysctlPath)
	if errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("the kernel has no sysctl net.ipv4.tcp_fwmark_accept (or /proc/sys is not here): %w", err)
	}
	if err != nil {
		return false, fmt.Errorf("read the sysctl net.ipv4.tcp_fwmark_accept: %w", err)
	}
	return !bytes.Equal(bytes.TrimSpace(raw), []byte("0")), nil
}

func rule(family, preference int) *netlink.Rule {
	mask := ^uint32(0)
	r := netlink.NewRule()
	r.Family, r.Priority, r.Mark, r.Mask, r.Table = family, preference, Mark, &mask, Table
	return r
}

func route(family, lo int) *netlink.Route {
	r := &netlink.Route{
		LinkIndex: lo, Table: Table, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST,
		Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
	}
	if family == unix.AF_INET6 {
		r.Scope = unix.RT_SCOPE_UNIVERSE
		r.Dst = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return r
}

func preference(c Changed) int {
	if c.Sysctl {
		return PrefChanged
	}
	return PrefKept
}

func addRouting(nl *netlink.Handle, lo, family int, c Changed) error {
	if err := nl.RuleAdd(rule(family, preference(c))); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("rule %d, mark %#x, in the namespace: %w", preference(c), Mark, explain(family, err))
	}
	if err := nl.RouteReplace(route(family, lo)); err != nil {
		err = fmt.Errorf("route in table %d of the namespace: %w", Table, explain(family, err))
		return errors.Join(err, gone(nl.RuleDel(rule(family, preference(c)))))
	}
	return nil
}

func explain(family int, err error) error {
	switch {
	case family == unix.AF_INET6 && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EAFNOSUPPORT)):
		return fmt.Errorf("IPv6 is off there (sysctl net.ipv6.conf.lo.disable_ipv6, or the kernel has none): %w", err)
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("the kernel has no policy routing (CONFIG_IP_MULTIPLE_TABLES): %w", err)
	}
	return err
}

// takeDown undoes setUp: the sysctl if we changed it and it is still so, then routes, then rules, so that
// what a kill in the midst leaves behind still tells about the sysctl. What the container has removed
// itself is no error.
func takeDown(c Changed) (err error) {
	if c.Sysctl {
		if on, readErr := readSysctl(); readErr == nil && on {
			err = os.WriteFile(sysctlPath, []byte("0"), 0)
		}
	}
	nl, nlErr := netlink.NewHandle(unix.NETLINK_ROUTE)
	if nlErr != nil {
		return errors.Join(err, fmt.Errorf("netlink: %w", nlErr))
	}
	defer nl.Close()
	if lo, loErr := nl.LinkByName("lo"); loErr == nil {
		for _, family := range families {
			err = errors.Join(err, gone(nl.RouteDel(route(family, lo.Attrs().Index))))
		}
	}
	for _, family := range families {
		for _, preference := range []int{PrefChanged, PrefKept} {
			err = errors.Join(err, gone(nl.RuleDel(rule(family, preference))))
		}
	}
	if err != nil {
		return fmt.Errorf("take the routing back: %w", err)
	}
	return nil
}

// gone drops the errors that say that there is no such thing.
func gone(err error) error {
	for _, none := range []error{unix.ENOENT, unix.ESRCH, unix.EAFNOSUPPORT, unix.EOPNOTSUPP} {
		if errors.Is(err, none) {
			return nil
		}
	}
	return err
}
