package main

import (
	"net/netip"
	"slices"
)

// A contender is somebody's turn in an axis: traffic from client to server by addr.
type contender struct {
	name           string
	client, server *agent
	addr           netip.Addr // at which client reaches server,
	shift          uint16     // by ports that are so much higher
	account        account
	instance       *instance // nil of a limit
	manage         func(socket string) portAPI
}

// A route is where the two ends of an axis are.
type route int

const (
	outbound   route = iota // from the container to outside
	fromHost                // from the host's loopback to a published port
	fromAround              // from outside to a published port
	among                   // from one member of a network to another
)

// published tells whether it leads to a published port.
func (r route) published() bool { return r == fromHost || r == fromAround }

// The limits are the same loads without a container, over lo or over the cable between host and outside, and between
// two on a bridge that nobody manages. The latter is made and unmade as peers are.
const (
	limitLoopback = "loopback"
	limitVeth     = "veth"
	limitBridge   = "bridge"
)

var limits = []string{limitLoopback, limitVeth}

func contenderNames() []string {
	var names []string
	for _, p := range peers {
		names = append(names, p.name)
	}
	return append(names, limits...)
}

func known(name string) bool { return slices.Contains(contenderNames(), name) }

func isLimit(name string) bool { return name == limitBridge || slices.Contains(limits, name) }

var (
	hostIP     = netip.MustParseAddr(hostAddr)
	outsideIP  = netip.MustParseAddr(outsideAddr)
	loopbackIP = netip.MustParseAddr("127.0.0.1")
)

// limit is the contender of that name.
func (l *lab) limit(name string, r route) *contender {
	switch {
	case name == limitLoopback:
		return &contender{name: name, client: l.host, server: l.host, addr: loopbackIP}
	case r == outbound:
		return &contender{name: name, client: l.host, server: l.outside, addr: outsideIP}
	default:
		return &contender{name: name, client: l.outside, server: l.host, addr: hostIP}
	}
}

// port is the one by which client reaches a port of server.
func (c *contender) port(p uint16) uint16 { return p + c.shift }

// contender is a peer's turn.
func (in *instance) contender(l *lab, p *peer, r route) *contender {
	c := &contender{name: p.name, account: in.account, instance: in, manage: p.manage}
	if r.published() {
		c.shift = p.shift
	}
	switch r {
	case outbound:
		c.client, c.server, c.addr = in.container, l.outside, outsideIP
	case among:
		c.client, c.server, c.addr = in.container, in.server, in.addr
	case fromHost:
		c.client, c.server, c.addr = l.host, in.container, loopbackIP
	default:
		c.client, c.server, c.addr = l.outside, in.container, hostIP
	}
	return c
}
