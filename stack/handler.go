package stack

import (
	"context"
	"net/netip"
)

// A Handler decides what becomes of what the container sends to the world. Addresses
// are as the container wrote them: the gateway's own, the host's alias and the world's
// all arrive here, except the ports that Listen or ListenPacket took.
type Handler interface {
	// ServeTCP is called for a SYN, in a goroutine of its own, and must end with
	// r.Accept or r.Reject. ctx ends when nobody waits for the answer any more
	// (see TCPRequest) and when the stack stops.
	ServeTCP(ctx context.Context, r *TCPRequest)

	// ServeUDP gets the datagrams that were read in one go, in order. It is called by the
	// goroutine that reads frames (several at once where a stack has several devices)
	// and must not block. The batch and its payloads are valid during the call only.
	ServeUDP(batch []Datagram)

	// ServeEcho gets an ICMP or ICMPv6 echo request that is not for the gateway. Same rules as ServeUDP.
	ServeEcho(e Echo)
}

// A Datagram is one UDP datagram, or a train of them with the same two ends.
type Datagram struct {
	Src, Dst netip.AddrPort

	// Payload is the UDP payload, in order, in one or more pieces.
	Payload [][]byte

	// Segment is 0 for one datagram. Else Payload is a train: each datagram in it has
	// Segment octets, the last one 1 to Segment. At most 64 of them (UDP_MAX_SEGMENTS
	// was 64 before Linux 6.9).
	Segment int

	// TTL is the IP TTL or hop limit; 0 when sending means 64. TOS is the IP TOS octet or
	// traffic class, with ECN in its lower two bits.
	TTL, TOS uint8
}

// Len is the length of the payload in octets.
func (d *Datagram) Len() int {
	n := 0
	for _, p := range d.Payload {
		n += len(p)
	}
	return n
}

// An Echo is an ICMP or ICMPv6 echo request (from the container) or reply (to it),
// by the family of its addresses.
type Echo struct {
	Src, Dst netip.Addr
	ID, Seq  uint16
	Payload  []byte
	TTL, TOS uint8 // as in Datagram
}

// An ICMPError tells the container what became of a packet that it sent: the packet
// is described by its protocol, its addresses and the first octets behind the IP header.
type ICMPError struct {
	// From is the router or host that says so; the gateway when it is the zero Addr
	// or of the other family.
	From netip.Addr

	// Type and Code are those of the family's ICMP. Unreachable finds them for an errno.
	Type, Code uint8

	// Info is the second 32-bit word of the ICMP header: the next hop's MTU for
	// "fragmentation needed" (RFC 1191 §4) and "packet too big" (RFC 4443 §3.2), the pointer for "parameter problem".
	Info uint32

	Protocol  uint8 // of the packet: 6, 17, 1 or 58
	Src, Dst  netip.Addr
	TTL, TOS  uint8
	Transport []byte // the transport header and what followed; as much of it is sent back as fits
}
