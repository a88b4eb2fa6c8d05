package forwarder

import (
	"fmt"
	"net/netip"
	"syscall"
)

// IP protocol numbers, as in stack.ICMPError.
const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

// A Policy says which of the host's and the world's addresses stand behind the addresses
// that the container uses. Zero addresses stand for nothing.
type Policy struct {
	Subnet4, Subnet6   netip.Prefix // the container's own networks
	Gateway4, Gateway6 netip.Addr
	DNS4, DNS6         netip.Addr

	// HostAlias4 and HostAlias6 are the host at the address that it uses toward the world
	// (see HostAddrs); what listens on its loopback only is not reached.
	HostAlias4, HostAlias6 netip.Addr

	// Internal leaves the container nothing but its own network and what the stack itself listens at.
	Internal bool

	// HostLoopback makes the gateway's ports those of the host's 127.0.0.1 and ::1.
	HostLoopback bool
}

// A Flow is what a Policy judges: a protocol number (6, 17, 1 or 58) and the two ends as the
// container wrote them. The ports of an echo do not matter.
type Flow struct {
	Proto    uint8
	Src, Dst netip.AddrPort
}

// An Action is what is done with a packet of the container.
type Action uint8

const (
	Drop    Action = iota // nothing, and no word about it
	Forward               // it goes to the address that Resolve returned
	Refuse                // the container is told Verdict.Reason by RST or ICMP
)

// A Verdict is an action and, for Refuse, the errno that the container's application gets.
type Verdict struct {
	Action Action
	Reason syscall.Errno
}

func (v Verdict) String() string {
	switch v.Action {
	case Drop:
		return "drop"
	case Forward:
		return "forward"
	}
	return fmt.Sprintf("refuse (%v)", v.Reason)
}

func refuse(reason syscall.Errno) (netip.AddrPort, Verdict) {
	return netip.AddrPort{}, Verdict{Refuse, reason}
}

var (
	thisNetwork = netip.MustParsePrefix("0.0.0.0/8")
	classE      = netip.MustParsePrefix("240.0.0.0/4") // with 255.255.255.255
	v4InV6      = netip.MustParsePrefix("::/96")       // "IPv4-compatible", RFC 4291 §2.5.5.1; with :: and ::1
	v4Mapped    = netip.MustParsePrefix("::ffff:0:0/96")
)

// Resolve is the whole decision about what the container may reach, and where that is.
// It depends on nothing but its arguments. dst is valid with Forward only; it is never
// unspecified, and a loopback address only for the gateway with HostLoopback.
func (p *Policy) Resolve(f Flow, host HostAddrs) (dst netip.AddrPort, verdict Verdict) {
	src, to := f.Src.Addr(), f.Dst.Addr()
	if !src.IsValid() || !to.IsValid() || src.Is4() != to.Is4() || src.Zone() != "" || to.Zone() != "" {
		return netip.AddrPort{}, Verdict{}
	}
	// RFC 1122 §3.2.2: no ICMP error answers a multicast or broadcast, nor a source
	// that is not one host.
	if p.martian(src) || p.group(to) {
		return netip.AddrPort{}, Verdict{}
	}
	echo := f.Proto == protoICMP || f.Proto == protoICMPv6
	if !echo {
		if f.Src.Port() == 0 {
			return netip.AddrPort{}, Verdict{} // nobody could be answered (RFC 768)
		}
		if f.Dst.Port() == 0 {
			return refuse(syscall.ECONNREFUSED) // nobody can listen there
		}
	}
	switch to {
	case p.Gateway4, p.Gateway6, p.DNS4, p.DNS6:
		return p.own(f, echo)
	}
	if p.Internal {
		return refuse(syscall.ENETUNREACH)
	}
	switch to {
	case p.HostAlias4, p.HostAlias6:
		return forwardTo(host.of(to), f)
	}
	switch {
	case to.IsLoopback(), v4InV6.Contains(to), v4Mapped.Contains(to):
		return refuse(syscall.ENETUNREACH)
	case p.Subnet4.Contains(to), p.Subnet6.Contains(to), to.Is6() && to.IsLinkLocalUnicast():
		// On the link, where nobody answers to that address.
		return refuse(syscall.EHOSTUNREACH)
	}
	return f.Dst, Verdict{Action: Forward}
}

// own judges what is for the stack's own addresses and has not been taken by a listener
// of the stack.
func (p *Policy) own(f Flow, echo bool) (netip.AddrPort, Verdict) {
	if echo {
		return netip.AddrPort{}, Verdict{} // the stack answers for its addresses itself
	}
	to := f.Dst.Addr()
	if !p.HostLoopback || to != p.Gateway4 && to != p.Gateway6 {
		return refuse(syscall.ECONNREFUSED)
	}
	if to.Is4() {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), f.Dst.Port()), Verdict{Action: Forward}
	}
	return netip.AddrPortFrom(netip.IPv6Loopback(), f.Dst.Port()), Verdict{Action: Forward}
}

// forwardTo sends f to the host's own address, which a host may lack.
func forwardTo(host netip.Addr, f Flow) (netip.AddrPort, Verdict) {
	if !host.IsGlobalUnicast() || host.Is4() != f.Dst.Addr().Is4() ||
		thisNetwork.Contains(host) || classE.Contains(host) || v4InV6.Contains(host) || v4Mapped.Contains(host) {
		return refuse(syscall.EHOSTUNREACH)
	}
	return netip.AddrPortFrom(host, f.Dst.Port()), Verdict{Action: Forward}
}

// group tells whether a packet for a is for more than one host, or for none.
func (p *Policy) group(a netip.Addr) bool {
	return a.IsUnspecified() || a.IsMulticast() || a.Is4() && (thisNetwork.Contains(a) || classE.Contains(a) ||
		p.Subnet4.Contains(a) && (a == p.Subnet4.Masked().Addr() || a == lastAddr(p.Subnet4)) && p.Subnet4.Bits() < 31)
}

// martian tells whether no container can rightly send from a.
func (p *Policy) martian(a netip.Addr) bool {
	switch a {
	case p.Gateway4, p.Gateway6, p.DNS4, p.DNS6, p.HostAlias4, p.HostAlias6:
		return true
	}
	return p.group(a) || a.IsLoopback() || v4InV6.Contains(a) || v4Mapped.Contains(a)
}

// lastAddr is the broadcast address of an IPv4 prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	for i := range a {
		if ones := p.Bits() - 8*i; ones < 8 {
			a[i] |= 0xff >> max(ones, 0)
		}
	}
	return netip.AddrFrom4(a)
}

// alias tells whether a stands for the host at its own address.
func (p *Policy) alias(a netip.Addr) bool {
	return a == p.HostAlias4 || a == p.HostAlias6
}
