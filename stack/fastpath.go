package stack

import (
	"encoding/binary"
	"math/bits"

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
//
// In a download the container's bare acknowledgements lie in the device by dozens, and each says what those before it
// did. Of those that are read at one go, netstack gets the last of each connection: it need not look for what it may
// send, and send it, for each of them. Lost acknowledgements are nothing new to TCP.
type segments struct {
	ns     *stack.Stack
	queue  queuer
	recent [recentConns]recentConn
	held   uint32 // a bit for each of recent that holds an acknowledgement
}

// recentConns is how many connections are remembered, by their ports: one bit of held each.
const recentConns = 32

// recentConn is a connection that has had a segment lately.
type recentConn struct {
	ep       *tcp.Endpoint // nil: none
	id       stack.TransportEndpointID
	pkt      *stack.PacketBuffer // a bare acknowledgement that waits for a later one; nil: none
	seq, ack uint32              // of pkt
}

// queuer is netstack's TCP. It takes over a segment for an endpoint; TestAssumeTCPQueues says that it has the method.
type queuer interface {
	QueuePacket(stack.TransportEndpoint, stack.TransportEndpointID, *stack.PacketBuffer)
}

func newSegments(ns *stack.Stack) segments {
	q, _ := ns.TransportProtocolInstance(tcp.ProtocolNumber).(queuer)
	return segments{ns: ns, queue: q}
}

// find returns the connection that f belongs to, by its place in recent, and the length of its TCP header in octets;
// a place below 0 when f is to take the long way.
func (s *segments) find(f *frame) (place, length int) {
	if s.queue == nil || f.fragment || f.proto != uint8(header.TCPProtocolNumber) {
		return -1, 0
	}
	h := f.transport()
	ip := header.IPv4MinimumSize
	if f.ethertype == uint16(header.IPv6ProtocolNumber) {
		ip = header.IPv6MinimumSize
	}
	if f.l4 != ethernetLen+ip || len(h) < header.TCPMinimumSize {
		return -1, 0
	}
	length = int(h[header.TCPDataOffset]>>4) * 4
	if length < header.TCPMinimumSize || length > len(h) {
		return -1, 0
	}
	id := stack.TransportEndpointID{
		LocalAddress: address(f.dst), LocalPort: binary.BigEndian.Uint16(h[2:]),
		RemoteAddress: address(f.src), RemotePort: binary.BigEndian.Uint16(h[0:]),
	}
	place = int(binary.BigEndian.Uint32(h) * 0x9e3779b1 >> 27)
	c := &s.recent[place]
	// One that stands is in netstack's table; one that has ended may have a successor there.
	if c.ep == nil || id != c.id || !stands(c.ep) {
		s.release(place)
		ep, _ := s.ns.FindTransportEndpoint(tcpip.NetworkProtocolNumber(f.ethertype), tcp.ProtocolNumber, id, nicID).(*tcp.Endpoint)
		if ep == nil || !stands(ep) {
			c.ep = nil
			return -1, 0
		}
		c.ep, c.id = ep, id
	}
	return place, length
}

func stands(ep *tcp.Endpoint) bool { return tcp.EndpointState(ep.State()) == tcp.StateEstablished }

// deliver gives pkt, which holds f from its IP header on, to the connection that find has found. length is the TCP header's.
func (s *segments) deliver(f *frame, pkt *stack.PacketBuffer, place, length int) bool {
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

	c := &s.recent[place]
	h := header.TCP(f.transport())
	seq, ack := h.SequenceNumber(), h.AckNumber()
	// Nothing but ACK, no payload, and no SACK blocks, which tell of a loss.
	bare := h.Flags() == header.TCPFlagAck && f.ipPayloadLen() == length && onlyTimestamps(h[header.TCPMinimumSize:length])
	if c.pkt != nil && bare && seq == c.seq && int32(ack-c.ack) > 0 {
		c.pkt.DecRef()
		c.pkt = nil
	}
	s.release(place)
	if bare {
		c.pkt, c.seq, c.ack = pkt.IncRef(), seq, ack
		s.held |= 1 << place
		return true
	}
	s.queue.QueuePacket(c.ep, c.id, pkt)
	return true
}

// release queues what a connection holds.
func (s *segments) release(place int) {
	c := &s.recent[place]
	if c.pkt != nil {
		s.queue.QueuePacket(c.ep, c.id, c.pkt)
		c.pkt.DecRef()
		c.pkt = nil
	}
	s.held &^= 1 << place
}

// flush queues all that is held.
func (s *segments) flush() {
	for s.held != 0 {
		s.release(bits.TrailingZeros32(s.held))
	}
}

// rest keeps no connection from being forgotten while nothing happens.
func (s *segments) rest() {
	s.flush()
	clear(s.recent[:])
}

// onlyTimestamps tells that a TCP header's options are none, or timestamps as everybody sends them: NOP, NOP, timestamps.
// One SACK block would be as long.
func onlyTimestamps(options []byte) bool {
	return len(options) == 0 || len(options) == 12 && options[2] == header.TCPOptionTS
}
