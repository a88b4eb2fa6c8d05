package stack

import (
	"net/netip"
	"sync"
	"sync/atomic"
)

// hardwareAddr is an Ethernet address that can be compared and copied.
type hardwareAddr [6]byte

var broadcastMAC = hardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// maxNeighbours bounds the table of hardware addresses. In a container's namespace there
// are one or two; the shared mode's bridge has one per member. A container that spoofs
// sources only makes the table forget, and a forgotten address costs one frame to lastSeen.
const maxNeighbours = 1024

// neighbours remembers behind which hardware address each of the container's addresses was
// seen, for the frames that we build ourselves (datagrams, ICMP). netstack resolves on its own.
type neighbours struct {
	mu   sync.RWMutex
	byIP map[netip.Addr]hardwareAddr
	last atomic.Pointer[hardwareAddr]
}

func (n *neighbours) init() { n.byIP = make(map[netip.Addr]hardwareAddr) }

// learn notes where src was seen. A reader calls it once per change, not per frame.
func (n *neighbours) learn(src netip.Addr, mac hardwareAddr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if old, ok := n.byIP[src]; !ok || old != mac {
		if len(n.byIP) >= maxNeighbours {
			clear(n.byIP)
		}
		n.byIP[src] = mac
	}
	n.last.Store(&mac)
}

// Know tells behind which hardware address an address is before anything was seen of it, where several containers share the
// link: what goes to one that has said nothing yet would go to the one seen last.
func (s *Stack) Know(addr netip.Addr, mac [6]byte) { s.neighbours.learnBefore(addr, mac) }

// learnBefore is learn of what nobody has sent: who was seen last stays.
func (n *neighbours) learnBefore(addr netip.Addr, mac hardwareAddr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.byIP) < maxNeighbours {
		n.byIP[addr] = mac
	}
}

// lookup returns the hardware address for dst: the one where it was seen, else the one
// seen last, else broadcast, which a kernel takes for its own address too.
func (n *neighbours) lookup(dst netip.Addr) hardwareAddr {
	switch {
	case dst.Is6() && dst.IsMulticast(): // RFC 2464 §7
		b := dst.As16()
		return hardwareAddr{0x33, 0x33, b[12], b[13], b[14], b[15]}
	case dst == broadcast4:
		return broadcastMAC
	}
	n.mu.RLock()
	mac, ok := n.byIP[dst]
	n.mu.RUnlock()
	if ok {
		return mac
	}
	if last := n.last.Load(); last != nil {
		return *last
	}
	return broadcastMAC
}
