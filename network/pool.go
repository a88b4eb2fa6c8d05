package network

import (
	"fmt"
	"net/netip"
	"slices"
)

// Addresses are those of one member; IPv6 is zero in a network without.
type Addresses struct {
	IPv4 netip.Addr `json:"ipv4"`
	IPv6 netip.Addr `json:"ipv6,omitzero"`
}

func (a *Addresses) of(f family) netip.Addr {
	if f.name == ipv6.name {
		return a.IPv6
	}
	return a.IPv4
}

// A Lease remembers the addresses of a member that has left: a name that comes back has them again, as long as nobody needed
// them. As addresses never held are given first, a neighbour's stale ARP entry seldom leads to somebody else, too.
type Lease struct {
	Name string `json:"name"`
	Addresses
}

// maxFormer is how many names a network remembers: all that a /24 has room for. Names that never come back, as those that a
// machine has made up, are forgotten in turn.
const maxFormer = 256

// subnet is that of the family; the zero Prefix where it is off.
func (n *network) subnet(f family) netip.Prefix {
	if f.name == ipv6.name {
		return n.Subnet6
	}
	return n.Subnet
}

// reserves says what an address of a network is, if it is no member's.
func (n *network) reserves(a netip.Addr) string {
	switch a {
	case n.Gateway, n.Gateway6:
		return "the gateway's"
	case n.Subnet.Addr(), n.Subnet6.Addr():
		return "the network's own"
	case last(n.Subnet):
		return "the broadcast address"
	case n.Host6:
		return "the host's"
	}
	return ""
}

// choose finds a member's address in one family: the one that it asks for, the one that its name had,
// the lowest that nobody has had, or the one whose owner has left longest ago.
func (n *network) choose(f family, name string, want netip.Addr) (netip.Addr, error) {
	subnet := n.subnet(f)
	if want.IsValid() {
		return want, n.checkStatic(subnet, want)
	}
	if !subnet.IsValid() {
		return netip.Addr{}, nil
	}
	members, former := make(map[netip.Addr]bool), make(map[netip.Addr]bool)
	for _, m := range n.members {
		members[m.of(f)] = true
	}
	for i := range n.former {
		if l := &n.former[i]; l.Name == name {
			return l.of(f), nil
		}
		former[n.former[i].of(f)] = true
	}
	// It ends after as many steps as there are members and former ones, or with the subnet.
	for a := subnet.Addr().Next(); subnet.Contains(a); a = a.Next() {
		if !members[a] && !former[a] && n.reserves(a) == "" {
			return a, nil
		}
	}
	if len(n.former) > 0 {
		return n.former[0].of(f), nil
	}
	return netip.Addr{}, exhaustedf("network %q: all addresses of %s are taken: detach a member, or make a network with a larger %s", n.Name, subnet, f.flag)
}

// checkStatic looks at an address that a member asks for.
func (n *network) checkStatic(subnet netip.Prefix, a netip.Addr) error {
	if !subnet.IsValid() {
		return invalidf("address %s: network %q has no IPv6: make it with --ipv6", a, n.Name)
	}
	if !subnet.Contains(a) || a.Zone() != "" {
		return invalidf("address %s: is not in %s of network %q", a, subnet, n.Name)
	}
	if what := n.reserves(a); what != "" {
		return conflictf("address %s: is %s in network %q: choose another, or none to get a free one", a, what, n.Name)
	}
	for _, m := range n.members {
		if m.IPv4 == a || m.IPv6 == a {
			return conflictf("address %s: member %q of network %q has it: choose another, or none to get a free one", a, m.Name, n.Name)
		}
	}
	return nil
}

// forget drops what is remembered of a name, and of whoever had one of the addresses.
func (n *network) forget(name string, a Addresses) {
	n.former = slices.DeleteFunc(n.former, func(l Lease) bool {
		return l.Name == name || l.IPv4 == a.IPv4 || l.IPv6.IsValid() && l.IPv6 == a.IPv6
	})
}

// remember keeps the addresses of one who leaves; the last of former is the latest.
func (n *network) remember(l Lease) {
	n.former = append(n.former, l)
	if over := len(n.former) - maxFormer; over > 0 {
		n.former = slices.Delete(n.former, 0, over)
	}
}

// checkLease looks at one that was read from a file.
func (n *network) checkLease(l Lease) error {
	if err := checkName("former member", l.Name); err != nil {
		return err
	}
	if n.member(l.Name) != nil || slices.ContainsFunc(n.former, func(o Lease) bool {
		return o.Name == l.Name || o.IPv4 == l.IPv4 || l.IPv6.IsValid() && o.IPv6 == l.IPv6
	}) {
		return conflictf("former member %q: is there twice", l.Name)
	}
	if l.IPv6.IsValid() != n.Subnet6.IsValid() {
		return invalidf("former member %q: IPv6 address %s where the network has %s", l.Name, l.IPv6, n.Subnet6)
	}
	for _, f := range []family{ipv4, ipv6} {
		if a := l.of(f); a.IsValid() || f.name == ipv4.name {
			if err := n.checkStatic(n.subnet(f), a); err != nil {
				return fmt.Errorf("former member %q: %w", l.Name, err)
			}
		}
	}
	return nil
}
