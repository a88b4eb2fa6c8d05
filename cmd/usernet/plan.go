package main

import (
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"slices"
)

const (
	defaultCIDR  = "10.0.2.0/24"
	defaultCIDR6 = "fd00::/64"
)

// A plan says who has which address in the namespace. It is slirp4netns's, so that the
// runtimes which know that one agree.
//
//	       IPv4            IPv6
//	+2     gateway         ::2
//	+3     DNS             ::3
//	       169.254.1.2     ::4     the host at its own addresses
//	+100   container       ::100
//
// The zero Prefix or Addr of IPv6 means that IPv6 is off.
type plan struct {
	net4, net6         netip.Prefix
	gateway4, gateway6 netip.Addr
	dns4, dns6         netip.Addr
	host4, host6       netip.Addr
	container4         netip.Addr
	container6         netip.Addr
	linkLocal          netip.Addr // the gateway's, RFC 4861 §4.2 wants advertisements from it
}

// hostAlias4 is podman's: a link-local address, so that it collides with nobody's network.
var hostAlias4 = netip.AddrFrom4([4]byte{169, 254, 1, 2})

// newPlan computes the plan from the two prefixes. It refuses a prefix that is too long for
// container and DNS to fit, that has host bits, or whose addresses mean something else.
func newPlan(cidr, cidr6 string, ipv6 bool) (plan, error) {
	var net4, net6 netip.Prefix
	var err error
	if net4, err = parsePrefix("--cidr", cidr, 4, 8, 25); err == nil && ipv6 {
		net6, err = parsePrefix("--cidr6", cidr6, 6, 16, 112)
	}
	if err != nil {
		return plan{}, err
	}
	return planOf(net4, net6), nil
}

// planOf gives each its address in networks that have been looked at. net6 may be the zero Prefix.
func planOf(net4, net6 netip.Prefix) plan {
	p := plan{net4: net4, net6: net6}
	p.gateway4, p.dns4, p.container4 = offset(p.net4, 2), offset(p.net4, 3), offset(p.net4, 100)
	p.host4 = hostAlias4
	if !net6.IsValid() {
		return p
	}
	p.gateway6, p.dns6 = offset(p.net6, 2), offset(p.net6, 3)
	p.host6, p.container6 = offset(p.net6, 4), offset(p.net6, 0x100)
	p.linkLocal = netip.MustParseAddr("fe80::2")
	return p
}

// gatewayMAC is derived from the plan, so that a container's neighbour table stays right when
// usernet is restarted. 52:55 is locally administered, unicast.
func (p plan) gatewayMAC() net.HardwareAddr {
	a := p.gateway4.As4()
	return net.HardwareAddr{0x52, 0x55, a[0], a[1], a[2], a[3]}
}

// extra lists the stack's addresses beside the gateway's.
func (p plan) extra() []netip.Addr {
	return slices.DeleteFunc(valid(p.dns4, p.dns6, p.host6), func(a netip.Addr) bool { return a == p.gateway4 || a == p.gateway6 })
}

// dns lists the resolver's addresses, as far as the families are on.
func (p plan) dns() []netip.Addr { return valid(p.dns4, p.dns6) }

// host lists the addresses at which the container meets the host.
func (p plan) host() []netip.Addr { return valid(p.host4, p.host6) }

func valid(addrs ...netip.Addr) []netip.Addr {
	var v []netip.Addr
	for _, a := range addrs {
		if a.IsValid() {
			v = append(v, a)
		}
	}
	return v
}

// withLen is addr with the length of its network, the zero Prefix for the zero Addr.
func withLen(addr netip.Addr, network netip.Prefix) netip.Prefix {
	if !addr.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(addr, network.Bits())
}

func parsePrefix(flag, s string, family, shortest, longest int) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4() != (family == 4) || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%s %s: must be an IPv%d network such as %s", flag, s, family,
			map[int]string{4: defaultCIDR, 6: defaultCIDR6}[family])
	}
	if p.Bits() < shortest || p.Bits() > longest {
		return netip.Prefix{}, fmt.Errorf("%s %s: the prefix must be /%d to /%d, so that the container's address fits", flag, s, shortest, longest)
	}
	if m := p.Masked(); m != p {
		return netip.Prefix{}, fmt.Errorf("%s %s: has host bits; did you mean %s?", flag, s, m)
	}
	return p, checkReserved(flag, p)
}

// checkReserved refuses a network whose addresses mean something else.
func checkReserved(flag string, p netip.Prefix) error {
	for _, bad := range []struct{ prefix, is string }{
		{"0.0.0.0/8", "this network"}, {"127.0.0.0/8", "loopback"}, {"169.254.0.0/16", "link-local"},
		{"224.0.0.0/3", "multicast or reserved"},
		{"::/16", "unspecified, loopback or IPv4-mapped"}, {"fe80::/10", "link-local"}, {"ff00::/8", "multicast"},
	} {
		if p.Overlaps(netip.MustParsePrefix(bad.prefix)) {
			return fmt.Errorf("%s %s: overlaps %s, which is %s", flag, p, bad.prefix, bad.is)
		}
	}
	return nil
}

// offset is the n-th address of a network.
func offset(p netip.Prefix, n int64) netip.Addr {
	i := new(big.Int).SetBytes(p.Addr().AsSlice())
	octets := i.Add(i, big.NewInt(n)).FillBytes(make([]byte, p.Addr().BitLen()/8))
	a, _ := netip.AddrFromSlice(octets)
	return a
}
