package portdriver

import "net/netip"

// addresses are those of the container's network, as the driver was told.
type addresses struct {
	container4, container6 netip.Addr
	gateway4, gateway6     netip.Addr
	subnets                []netip.Prefix
}

// source is whom a client appears as to a server at dst: itself, if an answer to that address finds its way back
// to us, else the gateway, with any port. The zero AddrPort: there is no gateway, so it is left to the kernel.
//
// A client on the host's loopback would be the container itself in there; a link-local one, or one
// with an address of the container's own network, would be asked for on the TAP; one of the other family cannot
// appear at all, nor can one on a unix socket.
func (a *addresses) source(client netip.AddrPort, dst netip.Addr) netip.AddrPort {
	if a.visible(client.Addr()) && client.Addr().Is4() == dst.Is4() {
		return client
	}
	if gw := a.gateway(dst); gw.IsValid() {
		return netip.AddrPortFrom(gw, 0)
	}
	return netip.AddrPort{}
}

// gateway is that of dst's family.
func (a *addresses) gateway(dst netip.Addr) netip.Addr {
	if dst.Is4() {
		return a.gateway4
	}
	return a.gateway6
}

// visible tells whether the container may see a client under its own address.
func (a *addresses) visible(client netip.Addr) bool {
	if !client.IsValid() || client.IsLoopback() || client.IsLinkLocalUnicast() || client.IsUnspecified() || client.IsMulticast() {
		return false
	}
	if client == a.container4 || client == a.container6 || client == a.gateway4 || client == a.gateway6 {
		return false
	}
	for _, p := range a.subnets {
		if p.Contains(client) {
			return false
		}
	}
	return true
}

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()
)

// sought tells whether targets finds a server at addr that no Spec names.
func (a *addresses) sought(addr netip.Addr) bool {
	return addr.IsUnspecified() || addr == a.container4 || addr == a.container6 || addr == loopback4 || addr == loopback6
}

// targets are where to look for a server, one after the other until one does not refuse. Without an
// address in the Spec: the container's of the client's family, its loopback, and both of the other
// family: many programs listen on IPv4 alone, and a client that came by "localhost" cannot know.
func (a *addresses) targets(spec Spec, v4 bool) []netip.Addr {
	own, other, lo, otherLo := a.container4, a.container6, loopback4, loopback6
	if !v4 {
		own, other, lo, otherLo = other, own, otherLo, lo
	}
	var list []netip.Addr
	add := func(addrs ...netip.Addr) {
		for _, addr := range addrs {
			if addr.IsValid() {
				list = append(list, addr)
			}
		}
	}
	switch to := spec.Container; {
	case !to.IsValid():
		add(own, lo, other, otherLo)
	case to == a.container4:
		add(to, loopback4)
	case to == a.container6:
		add(to, loopback6)
	default:
		add(to)
	}
	return list
}
