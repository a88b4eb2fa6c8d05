package stack

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// segments brings TCP segments to connections that stand, past netstack's network layer: the reader has
// checked already what that would check (lengths, checksums, addresses), and what else it does for a packet of the
// container's, two walks through empty tables of rules and a look at each of its own addresses, comes to nothing here.
// It was a quarter of netstack's work for a request and its answer.
//
// Everything else takes the long way: the first segments of a connection, fragments, IPv4 options, IPv6
// extension headers, and segments for which there is no connection.
type segments struct {
	ns    *stack.Stack
	queue queuer
	last  *tcp.Endpoint // of id, the connection of the last segment; nil: none
	id    stack.TransportEndpointID
}

// queuer is netstack's TCP. It takes over a segment for an endpoint; TestAssumeTCPQueues says that it has the method.
type queuer interface {
	QueuePacket(stack.TransportEndpoint, stack.TransportEndpointID, *stack.PacketBuffer)
}

func newSegments(ns *stack.Stack) segments {
	q, _ := ns.TransportProtocolInstance(tcp.ProtocolNumber).(queuer)
	return segments{ns: ns, queue: q}
}

// find returns the connection that f belongs to, and the length of its TCP header in octets; nil when f
// is to take the long way.
func (s *segments) find(f *frame) (*tcp.Endpoint, int) {
	if s.queue == nil || f.fragment || f.proto != uint8(header.TCPProtocolNumber) {
		return nil, 0
	}
	h := f.transport()
	ip := header.IPv4MinimumSize
	if f.ethertype == uint16(header.IPv6ProtocolNumber) {
		ip = header.IPv6MinimumSize
	}
	if f.l4 != ethernetLen+ip || len(h) < header.TCPMinimumSize {
		return nil, 0
	}
	length := int(h[header.TCPDataOffset]>>4) * 4
	if length < header.TCPMinimumSize || length > len(h) {
		return nil, 0
	}
	id := stack.TransportEndpointID{
		LocalAddress: address(f.dst), LocalPort: binary.BigEndian.Uint16(h[2:]),
		RemoteAddress: address(f.src), RemotePort: binary.BigEndian.Uint16(h[0:]),
	}
	// One that stands is in netstack's table; one that has ended may have a successor there.
	if s.last == nil || id != s.id || !stands(s.last) {
		s.last, _ = s.ns.FindTransportEndpoint(tcpip.NetworkProtocolNumber(f.ethertype), tcp.ProtocolNumber, id, nicID).(*tcp.Endpoint)
		s.id = id
		if s.last == nil || !stands(s.last) {
			s.last = nil
			return nil, 0
		}
	}
	return s.last, length
}

func stands(ep *tcp.Endpoint) bool { return tcp.EndpointState(ep.State()) == tcp.StateEstablished }

// deliver gives pkt, which holds f from its IP header on, to a connection that find has found. The length is the TCP header's.
func (s *segments) deliver(f *frame, pkt *stack.PacketBuffer, ep *tcp.Endpoint, length int) bool {
	if _, ok := pkt.NetworkHeader().Consume(f.l4 - ethernetLen); !ok {
		return false
	}
	if _, ok := pkt.TransportHeader().Consume(length); !ok {
		return false
	}
	pkt.Data().CapLength(f.ipPayloadLen() - length) // less the padding of a short frame
	pkt.TransportProtocolNumber = tcp.ProtocolNumber
	pkt.RXChecksumValidated = true
	pkt.NICID, pkt.InputNICID = nicID, nicID
	s.queue.QueuePacket(ep, s.id, pkt)
	return true
}
