package inside

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

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

	// PrefChanged to PrefKept is where the rule stands: after "local" (0), and before what a VPN in the
	// container adds (wg-quick, Tailscale: 5210 and above). Which of them it is remembers what the sysctls were
	// before us, for whoever finds the rule of a usernet that was killed together with its helper: PrefChanged if they were 0, and one more for each bit of switches that was 1.
	PrefChanged = 30
	PrefKept    = PrefChanged + int(allSwitches)
)

var families = [2]int{unix.AF_INET, unix.AF_INET6}

// A site is what is changed in one namespace.
type site struct {
	mu      sync.Mutex
	turn    *os.File // see takeTurn
	sysctls [len(sysctls)]*os.File
	begun   bool
	changed switches // were 0
}

// setUp makes rule, route and sysctls. The errors, one per family, say why there is none of it.
func (s *site) setUp(ctx context.Context, ipv6 bool) (why [2]error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	none := func(err error) [2]error { return [2]error{err, err} }
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return none(fmt.Errorf("netlink: %w", err))
	}
	defer nl.Close()
	if !s.begun {
		s.begun = true
		s.turn = takeTurn(ctx)
		s.adopt(nl)
	}
	if err := s.openSysctls(); err != nil {
		return none(err)
	}
	off, err := s.off()
	if err != nil {
		return none(err)
	}
	s.changed |= off
	lo, err := loopback(nl)
	if err != nil {
		return none(err)
	}
	if !ipv6 {
		why[1] = errNoIPv6
	}
	// The rule first: it is the note of what the sysctls were.
	for i, family := range families {
		if why[i] == nil {
			why[i] = s.addRouting(nl, lo, family)
		}
	}
	if why[0] != nil && why[1] != nil {
		return why
	}
	if err := s.write(off, "1"); err != nil {
		return none(errors.Join(err, s.removeRouting(nl)))
	}
	return why
}

var errNoIPv6 = errors.New("usernet serves no IPv6 here")

// adopt takes what a killed one left for our own, with what it knew.
func (s *site) adopt(nl *netlink.Handle) {
	for _, family := range families {
		for pref := PrefChanged; pref <= PrefKept; pref++ {
			if nl.RuleDel(rule(family, pref)) == nil {
				s.changed |= allSwitches &^ switches(pref-PrefChanged)
			}
		}
	}
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

func (s *site) addRouting(nl *netlink.Handle, lo, family int) error {
	pref := PrefChanged + int(allSwitches&^s.changed)
	if err := nl.RuleAdd(rule(family, pref)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("rule for mark %#x in the namespace: %w", Mark, explain(family, err))
	}
	if err := nl.RouteReplace(route(family, lo)); err != nil {
		err = fmt.Errorf("route in table %d of the namespace: %w", Table, explain(family, err))
		return errors.Join(err, gone(nl.RuleDel(rule(family, pref))))
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

// takeDown undoes setUp: the sysctls that we changed and that are still so, then routes, then rules, so that
// what a kill in the midst leaves behind still tells about the sysctls. What the container has removed
// itself is no error.
func (s *site) takeDown() (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.begun {
		return nil
	}
	if off, readErr := s.off(); readErr == nil {
		err = s.write(s.changed&^off, "0")
	}
	nl, nlErr := netlink.NewHandle(unix.NETLINK_ROUTE)
	if nlErr == nil {
		nlErr = s.removeRouting(nl)
		nl.Close()
	}
	s.closeSysctls()
	if s.turn != nil {
		s.turn.Close() // others have their turn now
	}
	s.turn, s.begun, s.changed = nil, false, 0
	if err = errors.Join(err, nlErr); err != nil {
		return fmt.Errorf("take the routing back: %w", err)
	}
	return nil
}

func (s *site) removeRouting(nl *netlink.Handle) (err error) {
	if lo, loErr := nl.LinkByName("lo"); loErr == nil {
		for _, family := range families {
			err = errors.Join(err, gone(nl.RouteDel(route(family, lo.Attrs().Index))))
		}
	}
	for _, family := range families {
		for pref := PrefChanged; pref <= PrefKept; pref++ {
			err = errors.Join(err, gone(nl.RuleDel(rule(family, pref))))
		}
	}
	return err
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
