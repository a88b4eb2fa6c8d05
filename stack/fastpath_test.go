package stack

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// The reader hands segments to netstack's TCP itself, past IP. For that the protocol must have a QueuePacket,
// and the endpoints must be the exported type, whose State tells whether they stand.
func TestAssumeTCPQueues(t *testing.T) {
	s, r, _, _ := replaying(t, 0)
	if r.tcp.queue == nil {
		t.Error("netstack's TCP has no QueuePacket any more: every segment takes the long way")
	}
	var wq waiter.Queue
	ep, err := s.ns.NewEndpoint(tcp.ProtocolNumber, header.IPv4ProtocolNumber, &wq)
	if err != nil {
		t.Fatal(err)
	}
	defer ep.Abort()
	if e, ok := ep.(*tcp.Endpoint); !ok {
		t.Errorf("an endpoint is %T", ep)
	} else if stands(e) {
		t.Error("an endpoint that has never been connected stands")
	}
}

// tcpFrame is a frame of the container's with a TCP header of hlen octets, by IP with extra octets of options or extension header.
func tcpFrame(t *testing.T, src, dst string, extra, hlen, payload int) *frame {
	t.Helper()
	a, b := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	ip, ethertype := header.IPv4MinimumSize, uint16(header.IPv4ProtocolNumber)
	if a.Addr().Is6() {
		ip, ethertype = header.IPv6MinimumSize, uint16(header.IPv6ProtocolNumber)
	}
	h := make([]byte, ethernetLen+ip+extra+20+payload)
	binary.BigEndian.PutUint16(h[12:], ethertype)
	n := h[ethernetLen:]
	if a.Addr().Is4() {
		n[0], n[9] = 0x40|byte((ip+extra)/4), 6
		binary.BigEndian.PutUint16(n[2:], uint16(len(n)))
		copy(n[12:], a.Addr().AsSlice())
		copy(n[16:], b.Addr().AsSlice())
	} else {
		n[0], n[6] = 0x60, 6
		if extra > 0 {
			n[6], n[ip] = 60, 6 // destination options, then TCP
		}
		binary.BigEndian.PutUint16(n[4:], uint16(len(n)-ip))
		copy(n[8:], a.Addr().AsSlice())
		copy(n[24:], b.Addr().AsSlice())
	}
	l4 := n[ip+extra:]
	binary.BigEndian.PutUint16(l4[0:], a.Port())
	binary.BigEndian.PutUint16(l4[2:], b.Port())
	l4[12] = byte(hlen / 4 << 4)
	if hlen == 32 {
		copy(l4[20:], []byte{1, 1, header.TCPOptionTS, 10})
	}
	f := &frame{head: h}
	if !f.parse() {
		t.Fatal("a frame of the test's is malformed")
	}
	return f
}

// What find takes is for a connection that stands, and has nothing that netstack's IP would have to look at.
func TestSegmentsThatGoPastIP(t *testing.T) {
	const container, world = "10.0.2.100:4000", "203.0.113.7:80"
	_, r, _, _ := replaying(t, 0)
	fragment := tcpFrame(t, container, world, 0, 20, 8)
	fragment.fragment = true
	for name, f := range map[string]*frame{
		"another connection":   tcpFrame(t, "10.0.2.100:4001", world, 0, 20, 8),
		"IPv4 options":         tcpFrame(t, container, world, 4, 20, 8),
		"an extension header":  tcpFrame(t, "[fd00::100]:4000", "[2001:db8::7]:80", 8, 20, 8),
		"a fragment":           fragment,
		"a short TCP header":   tcpFrame(t, container, world, 0, 16, 8),
		"a TCP header too far": tcpFrame(t, container, world, 0, 60, 8),
		"one that has ended":   tcpFrame(t, container, world, 0, 20, 8),
	} {
		for i := range r.tcp.recent {
			r.tcp.recent[i] = recentConn{ep: new(tcp.Endpoint), id: testID} // its state is not StateEstablished
		}
		if place, _ := r.tcp.find(f); place >= 0 {
			t.Errorf("%s goes past IP", name)
		}
	}
}

var testID = stack.TransportEndpointID{
	LocalAddress: address(netip.MustParseAddr("203.0.113.7")), LocalPort: 80,
	RemoteAddress: address(netip.MustParseAddr("10.0.2.100")), RemotePort: 4000,
}

// queued notes what would go to netstack.
type queued struct{ acks []uint32 }

func (q *queued) QueuePacket(_ stack.TransportEndpoint, _ stack.TransportEndpointID, pkt *stack.PacketBuffer) {
	q.acks = append(q.acks, header.TCP(pkt.TransportHeader().Slice()).AckNumber())
}

// Of bare acknowledgements in a row the last is delivered; whatever else says something keeps its place, and so does what
// is before it.
func TestAcknowledgementsAreMerged(t *testing.T) {
	type segment struct {
		ack   uint32
		flags byte
		hlen  int
		size  int // of the payload, octets
		port  byte
	}
	ack := func(n uint32) segment { return segment{n, 0x10, 32, 0, 0} }
	for _, test := range []struct {
		name string
		in   []segment
		want []uint32
	}{
		{"in a row", []segment{ack(1), ack(2), ack(9)}, []uint32{9}},
		{"over the end of the numbers", []segment{ack(1<<32 - 5), ack(3)}, []uint32{3}},
		{"the same again, which tells of a loss", []segment{ack(1), ack(1), ack(1)}, []uint32{1, 1, 1}},
		{"an older one", []segment{ack(2), ack(1)}, []uint32{2, 1}},
		{"SACK blocks", []segment{ack(1), {2, 0x10, 44, 0, 0}, ack(3)}, []uint32{1, 2, 3}},
		{"payload", []segment{ack(1), ack(2), {3, 0x10, 32, 7, 0}, ack(4), ack(5)}, []uint32{2, 3, 5}},
		{"FIN", []segment{ack(1), {2, 0x11, 32, 0, 0}, ack(3)}, []uint32{1, 2, 3}},
		{"ECE", []segment{ack(1), {2, 0x50, 32, 0, 0}}, []uint32{1, 2}},
		{"two connections", []segment{ack(1), {10, 0x10, 32, 0, 1}, ack(2), {20, 0x10, 32, 0, 1}}, []uint32{2, 20}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var q queued
			s := segments{queue: &q}
			for _, in := range test.in {
				f := tcpFrame(t, "10.0.2.100:4000", "203.0.113.7:80", 0, in.hlen, in.hlen-20+in.size)
				h := header.TCP(f.head[f.l4:])
				h.SetAckNumber(in.ack)
				h.SetFlags(in.flags)
				pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(f.head[ethernetLen:])})
				if !s.deliver(f, pkt, int(in.port), in.hlen) {
					t.Fatal("not delivered")
				}
				pkt.DecRef()
			}
			s.rest()
			if !slices.Equal(q.acks, test.want) || s.held != 0 {
				t.Errorf("netstack got %v, want %v", q.acks, test.want)
			}
		})
	}
}

func TestOnlyTimestamps(t *testing.T) {
	for _, c := range []struct {
		options []byte
		want    bool
	}{
		{nil, true},
		{[]byte{1, 1, header.TCPOptionTS, 10, 0, 0, 0, 1, 0, 0, 0, 2}, true},
		{[]byte{1, 1, header.TCPOptionSACK, 10, 0, 0, 0, 1, 0, 0, 0, 2}, false}, // as a peer without timestamps reports a loss
		{[]byte{1, 1, 1, 1}, false},
		{make([]byte, 36), false},
	} {
		if got := onlyTimestamps(c.options); got != c.want {
			t.Errorf("%v: %v", c.options, got)
		}
	}
}
