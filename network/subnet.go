package network

import (
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
)

// pool4 is where networks without a subnet of their own get theirs, one /24 each. podman's rootless networks are there
// too, but in a namespace of theirs.
var pool4 = netip.MustParsePrefix("10.89.0.0/16")

// A family is what differs between the two.
type family struct {
	name              string
	flag              string
	shortest, longest int // prefix lengths; the longest has room for the gateway and one member
	example           string
}

var (
	ipv4 = family{"IPv4", "--subnet", 8, 30, "10.89.1.0/24"}
	ipv6 = family{"IPv6", "--ipv6", 16, 126, "fd12:3456:789a:1::/64"}
)

// reserved are networks whose addresses mean something else.
var reserved = []struct {
	prefix netip.Prefix
	is     string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "this network"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.MustParsePrefix("224.0.0.0/3"), "multicast or reserved"},
	{netip.MustParsePrefix("::/16"), "unspecified, loopback or IPv4-mapped"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

// check looks at a subnet by itself.
func (f family) check(p netip.Prefix) error {
	switch {
	case !p.IsValid() || p.Addr().Is4() != (f.name == "IPv4") || p.Addr().Is4In6():
		return invalidf("subnet %s: must be an %s network such as %s", p, f.name, f.example)
	case p.Bits() < f.shortest || p.Bits() > f.longest:
		return invalidf("subnet %s: the prefix must be /%d to /%d, so that a gateway and a member fit", p, f.shortest, f.longest)
	case p.Masked() != p:
		return invalidf("subnet %s: has host bits; did you mean %s?", p, p.Masked())
	}
	for _, r := range reserved {
		if p.Overlaps(r.prefix) {
			return invalidf("subnet %s: overlaps %s, which is %s: choose another such as %s", p, r.prefix, r.is, f.example)
		}
	}
	return nil
}

// A host's routes and addresses are in the way of a subnet in two degrees: none may lie in it, as the container would then
// look for the host's neighbours among its own; a wider one, of a VPN for all of 10.0.0.0/8 say, loses a part of
// itself to the container, which a user may want, and which is a default only where there is no better one.

// wide is the length below which a route is a default route in disguise (0.0.0.0/1 and 128.0.0.0/1 are a VPN's), and in nobody's way.
const wide = 8

// meets returns the first of the host's, of that length or longer, that overlaps p.
func meets(p netip.Prefix, host []netip.Prefix, length int) (netip.Prefix, bool) {
	for _, h := range host {
		if h.Bits() >= max(length, wide) && h.Overlaps(p) {
			return h, true
		}
	}
	return netip.Prefix{}, false
}

// free4 is the first /24 of the pool that neither a network nor the host has. Where the pool lies in something wider of the
// host's, that has to give way.
func (s *Set) free4(host []netip.Prefix) (netip.Prefix, error) {
	for _, length := range []int{wide, pool4.Bits()} {
		for i := range 256 {
			base := pool4.Addr().As4()
			base[2] = byte(i)
			p := netip.PrefixFrom(netip.AddrFrom4(base), 24)
			if _, met := meets(p, host, length); !met && s.overlapping(p) == nil {
				return p, nil
			}
		}
	}
	return netip.Prefix{}, exhaustedf("no subnet: networks and the host's own routes take all of %s: remove a network, or choose one with --subnet", pool4)
}

// derive6 is a unique local /64 (RFC 4193 §3.2) that follows from the network's name and IPv4 subnet, so that it is the same
// wherever the network is made again. As it leaves no machine, it need not differ from one to the next.
func (s *Set) derive6(name string, subnet netip.Prefix, host []netip.Prefix) (netip.Prefix, error) {
	for _, length := range []int{wide, 48} { // a site has a /48
		for i := range uint32(64) { // one try is enough, unless somebody has chosen what comes of it
			sum := sha256.Sum256(binary.BigEndian.AppendUint32([]byte("usernet "+name+" "+subnet.String()+" "), i))
			var a [16]byte
			a[0] = 0xfd
			copy(a[1:8], sum[:])
			p := netip.PrefixFrom(netip.AddrFrom16(a), 64)
			if _, met := meets(p, host, length); !met && s.overlapping(p) == nil {
				return p, nil
			}
		}
	}
	return netip.Prefix{}, exhaustedf("network %q: no IPv6 subnet is free of the host's own routes: choose one with --ipv6", name)
}

// overlapping is a network that overlaps p, or nil.
func (s *Set) overlapping(p netip.Prefix) *network {
	for _, n := range s.networks {
		if n.Subnet.Overlaps(p) || n.Subnet6.IsValid() && n.Subnet6.Overlaps(p) {
			return n
		}
	}
	return nil
}

// offset is the n-th address of a network; n fits what is left of the last four octets.
func offset(p netip.Prefix, n uint32) netip.Addr {
	b := p.Addr().AsSlice()
	low := b[len(b)-4:]
	binary.BigEndian.PutUint32(low, binary.BigEndian.Uint32(low)+n)
	a, _ := netip.AddrFromSlice(b)
	return a
}

// last is the highest address of a network.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := range b {
		if host := 8*(i+1) - p.Bits(); host >= 8 {
			b[i] = 0xff
		} else if host > 0 {
			b[i] |= 1<<host - 1
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
