package stack

import (
	"errors"
	"net/netip"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// headLen is how much of a frame goes to a buffer of its own. A datagram of an
	// ordinary Ethernet fits whole, so that a batch of them needs no copies.
	headLen = 2048

	// tailLen holds the rest of the longest frame: 65535 octets of IP packet behind
	// the Ethernet header, less the head.
	tailLen = 65536

	// batchLen is how many datagrams are handed on at once: as many as one UDP_SEGMENT
	// train to the host may have.
	batchLen = 64

	// copyLimit: a frame up to this length, in octets, is copied into a buffer of its own size for
	// netstack. Above it netstack keeps the tail buffer itself and the reader takes
	// another one. A segment that waits for a slow host would pin 64 KiB otherwise.
	copyLimit = 16 << 10
)

// reader takes frames from one device, in this order:
//
//	device ─ read ─ verify ─┬─ UDP, whole ────────── batch ── Handler.ServeUDP
//	                        ├─ echo request, whole ────────── Handler.ServeEcho
//	                        ├─ router solicitation, DHCP ──── answered here
//	                        ├─ TCP of a standing connection ─ its endpoint (fastpath.go)
//	                        └─ the rest (TCP, ARP, ND, fragments, own addresses) ── netstack
//
// What netstack reassembles comes back through its transport handlers (transport.go).
type reader struct {
	s    *Stack
	dev  Device
	vec  [3][]byte
	hdr  [HeaderLen]byte
	tail *buffer.View
	near *lingerer  // nil: it parks at once
	acks *ackHolder // nil without near
	tcp  segments

	frames uint // read
	single bool // the last frames came one by one: see drain
	heads  [batchLen][]byte
	batch  []Datagram
	pieces [batchLen][2][]byte

	lastSrc netip.Addr // the neighbour that was learnt last, so that a flow asks the table once
	lastMAC hardwareAddr
}

func newReader(s *Stack, dev Device) *reader {
	r := &reader{s: s, dev: dev, batch: make([]Datagram, 0, batchLen)}
	slab := make([]byte, batchLen*headLen)
	for i := range r.heads {
		r.heads[i] = slab[i*headLen : (i+1)*headLen : (i+1)*headLen]
	}
	r.tail = buffer.NewViewSize(tailLen)
	r.tcp = newSegments(s.ns)
	r.vec[0] = r.hdr[:]
	return r
}

// run reads until the device is closed.
func (r *reader) run() error {
	defer func() { r.tail.Release() }()
	for {
		r.acks.wake()
		for {
			if err := r.drain(); err != nil {
				return closedIsNil(err)
			}
			if r.near == nil {
				break
			}
			at := r.near.waiter.Slept()
			if !r.near.wait(r.acks.check) {
				break
			}
			r.single = r.single && r.near.waiter.Slept() != at
		}
		r.acks.rest()
		r.tcp.rest()
		if err := r.dev.Wait(); err != nil {
			return closedIsNil(err)
		}
	}
}

// drain reads until no frame is left. When frames come one by one, as in a conversation of requests and answers, it
// leaves it to the lingerer's poll to say so: that has to look anyway.
func (r *reader) drain() error {
	for n := 0; ; n++ {
		r.vec[1], r.vec[2] = r.heads[len(r.batch)], r.tail.AsSlice()
		size, err := r.dev.Read(r.vec[:])
		switch {
		case err == nil:
			r.frame(size)
			if len(r.batch) == batchLen {
				r.flush()
			}
			if r.frames++; r.frames%batchLen == 0 {
				r.tcp.flush()
				r.acks.check()
				runtime.Gosched() // the others have had enough to do put before them
			}
			if n == 0 && r.single {
				r.tcp.flush()
				r.flush()
				return nil
			}
		case errors.Is(err, unix.EAGAIN):
			r.single = n == 1 && r.near != nil
			r.tcp.flush()
			r.flush()
			return nil
		case errors.Is(err, unix.EINTR):
		default:
			r.tcp.flush()
			return err
		}
	}
}

func closedIsNil(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// flush hands the batch on. Payloads are ours again afterwards.
func (r *reader) flush() {
	if len(r.batch) == 0 {
		return
	}
	r.s.handler.ServeUDP(r.batch)
	r.batch = r.batch[:0]
}

// frame takes one frame of n octets, header included, that lies in vec.
func (r *reader) frame(n int) {
	c := &r.s.stats
	c.FramesIn.Add(1)
	n -= HeaderLen
	if n < ethernetLen || n > headLen+tailLen {
		c.Malformed.Add(1)
		return
	}
	c.OctetsIn.Add(uint64(n))
	f := frame{vnet: decodeVnetHeader(r.hdr[:]), head: r.vec[1][:min(n, headLen)]}
	if n > headLen {
		f.tail = r.vec[2][:n-headLen]
	}
	dst := hardwareAddr(f.head[0:6])
	if dst[0]&1 == 0 && dst != r.s.mac {
		c.NotForUs.Add(1)
		return
	}
	if !f.parse() {
		c.Malformed.Add(1)
		return
	}
	if f.ethertype == 0 {
		c.NotForUs.Add(1)
		return
	}
	if f.ethertype == uint16(header.ARPProtocolNumber) && !r.s.arp(f.head[ethernetLen:]) {
		c.NotForUs.Add(1)
		return
	}
	if f.src.IsValid() {
		if !r.learn(f.src, hardwareAddr(f.head[6:12])) {
			c.Malformed.Add(1)
			return
		}
		if !f.verify() {
			c.BadChecksum.Add(1)
			return
		}
		if r.dispatch(&f) {
			return
		}
	}
	r.toNetstack(&f, n)
}

// learn notes the sender's hardware address, and refuses senders that cannot be anybody:
// an answer to them would go astray or come back to us (RFC 1122 §3.2.1.3).
func (r *reader) learn(src netip.Addr, mac hardwareAddr) bool {
	if src == r.lastSrc && mac == r.lastMAC {
		return true
	}
	if mac[0]&1 != 0 || src.IsLoopback() || src.IsMulticast() || r.s.own[src] || src == broadcast4 {
		return false
	}
	if !src.IsUnspecified() {
		r.s.neighbours.learn(src, mac)
		r.lastSrc, r.lastMAC = src, mac
	}
	return true
}

// dispatch handles what does not need netstack, and reports whether it did.
func (r *reader) dispatch(f *frame) bool {
	if f.fragment {
		return false
	}
	switch f.proto {
	case uint8(header.UDPProtocolNumber):
		return r.datagram(f)
	case uint8(header.ICMPv4ProtocolNumber):
		return r.echo4(f)
	case uint8(header.ICMPv6ProtocolNumber):
		return r.icmp6(f)
	case uint8(header.TCPProtocolNumber):
	default:
		if f.src.Is6() && f.hidesDiscovery() {
			r.s.stats.NotForUs.Add(1)
			return true
		}
	}
	return false
}

// datagram appends f to the batch. Ports that somebody listens on at our own addresses are netstack's.
func (r *reader) datagram(f *frame) bool {
	h := f.transport()
	if len(h) < header.UDPMinimumSize {
		r.s.stats.Malformed.Add(1)
		return true
	}
	udp := header.UDP(h)
	d := Datagram{
		Src: netip.AddrPortFrom(f.src, udp.SourcePort()),
		Dst: netip.AddrPortFrom(f.dst, udp.DestinationPort()),
		TTL: f.ttl, TOS: f.tos,
	}
	if r.s.own[f.dst] && r.s.listens(d.Dst) {
		return false
	}
	length := f.ipPayloadLen() - header.UDPMinimumSize
	segment := 0
	if f.vnet.gsoType&^vnetGSOECN == vnetGSOUDPL4 {
		// A train: the kernel leaves the whole super-datagram's length in the UDP header.
		if segment = int(f.vnet.gsoSize); segment == 0 || length == 0 {
			r.s.stats.Malformed.Add(1)
			return true
		}
	} else {
		l := int(udp.Length()) - header.UDPMinimumSize
		if l < 0 || l > length {
			r.s.stats.Malformed.Add(1)
			return true
		}
		length = l // octets behind it are padding of a short Ethernet frame
	}
	first := h[header.UDPMinimumSize:]
	if segment == 0 || length <= segment*batchLen {
		if length > segment {
			d.Segment = segment
		}
		r.append(d, first, f.tail, 0, length)
	} else {
		// Kernels since Linux 6.9 make trains of up to 128, which is more than a Datagram may be.
		for from := 0; from < length; from += segment * batchLen {
			n := min(segment*batchLen, length-from)
			d.Segment = 0
			if n > segment {
				d.Segment = segment
			}
			r.append(d, first, f.tail, from, n)
		}
	}
	if len(f.tail) > 0 {
		r.flush() // the one tail is needed for the next frame
	}
	return true
}

// append puts n octets, from on, of the payload that lies in first and tail, into the batch.
func (r *reader) append(d Datagram, first, tail []byte, from, n int) {
	if len(r.batch) == batchLen {
		r.flush()
	}
	p := &r.pieces[len(r.batch)]
	switch {
	case from+n <= len(first):
		p[0] = first[from : from+n]
		d.Payload = p[:1]
	case from >= len(first):
		p[0] = tail[from-len(first) : from-len(first)+n]
		d.Payload = p[:1]
	default:
		p[0], p[1] = first[from:], tail[:n-(len(first)-from)]
		d.Payload = p[:2]
	}
	r.s.stats.DatagramsIn.Add(1)
	if !r.s.gatewayUDP(&d) {
		r.batch = append(r.batch, d)
	}
}

// toNetstack gives f to netstack as a packet of its own.
func (r *reader) toNetstack(f *frame, n int) {
	dispatcher := r.s.link.dispatcher.Load()
	if dispatcher == nil {
		return
	}
	var payload buffer.Buffer
	if n <= copyLimit {
		v := buffer.NewView(n)
		v.Write(f.head)
		v.Write(f.tail)
		payload = buffer.MakeWithView(v)
	} else {
		payload = buffer.MakeWithData(f.head)
		r.tail.CapLength(len(f.tail))
		if err := payload.Append(r.tail); err != nil {
			panic(err) // the view is ours and not part of another buffer
		}
		r.tail = buffer.NewViewSize(tailLen)
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: payload})
	defer pkt.DecRef()
	if _, ok := pkt.LinkHeader().Consume(ethernetLen); !ok {
		return
	}
	pkt.NetworkProtocolNumber = tcpip.NetworkProtocolNumber(f.ethertype)
	if place, length := r.tcp.find(f); place >= 0 && r.tcp.deliver(f, pkt, place, length) {
		return
	}
	(*dispatcher).DeliverNetworkPacket(pkt.NetworkProtocolNumber, pkt)
}
