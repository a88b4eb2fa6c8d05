package stack

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	defaultTTL = 64

	// What fits the 16 bits of IPv4's total length, 65535 − 20 − 8 octets, and of IPv6's payload length.
	maxUDPPayload4 = 65507
	maxUDPPayload6 = 65527
)

func maxUDPPayload(a netip.Addr) int {
	if a.Is4() {
		return maxUDPPayload4
	}
	return maxUDPPayload6
}

// SendUDP sends a datagram, or a train of them, to the container. It is safe for
// concurrent use and keeps nothing of d. A datagram that does not fit the MTU is sent in
// fragments; a train goes as one frame if the device can segment it, else datagram by datagram.
func (s *Stack) SendUDP(d *Datagram) error {
	n := d.Len()
	if !d.Src.IsValid() || d.Src.Addr().Is4() != d.Dst.Addr().Is4() {
		return unix.EAFNOSUPPORT
	}
	if n > maxUDPPayload(d.Src.Addr()) {
		return unix.EMSGSIZE
	}
	s.stats.DatagramsOut.Add(1)
	w := s.link.writes.Get().(*frameWriter)
	defer func() {
		clear(w.vec)
		s.link.writes.Put(w)
	}()
	one := n
	if d.Segment > 0 && d.Segment < n {
		one = d.Segment
	}
	if ipLen(d.Src.Addr(), header.UDPMinimumSize+one) > int(s.link.MTU()) {
		if one < n {
			return s.each(w, d, one)
		}
		return s.sendFragments(d, n)
	}
	if one < n && !s.link.can(OffloadChecksum|OffloadUSO) {
		return s.each(w, d, one)
	}
	return s.sendWhole(w, d, d.Payload, n, one)
}

// each sends a train datagram by datagram.
func (s *Stack) each(w *frameWriter, d *Datagram, size int) error {
	single := *d
	single.Segment = 0
	var pieces [8][]byte
	rest := d.Payload
	offset := 0
	for len(rest) > 0 {
		single.Payload = pieces[:0]
		need := size
		for need > 0 && len(rest) > 0 {
			p := rest[0][offset:]
			if len(p) > need {
				p = p[:need]
				offset += need
			} else {
				rest, offset = rest[1:], 0
			}
			single.Payload = append(single.Payload, p)
			need -= len(p)
		}
		n := size - need
		if ipLen(d.Src.Addr(), header.UDPMinimumSize+n) > int(s.link.MTU()) {
			if err := s.sendFragments(&single, n); err != nil {
				return err
			}
			continue
		}
		if err := s.sendWhole(w, &single, single.Payload, n, n); err != nil {
			return err
		}
	}
	return nil
}

// sendWhole sends one frame: a datagram of n octets, or a train of datagrams of size octets each.
func (s *Stack) sendWhole(w *frameWriter, d *Datagram, payload [][]byte, n, size int) error {
	src, dst := d.Src.Addr(), d.Dst.Addr()
	l4 := s.putIP(w, src, dst, uint8(header.UDPProtocolNumber), d.TTL, d.TOS, header.UDPMinimumSize+n)
	udp := w.header[l4 : l4+header.UDPMinimumSize]
	putUDP(udp, d, n)
	var x sum
	x.pseudo(src, dst, uint8(header.UDPProtocolNumber), header.UDPMinimumSize+n)
	h := vnetHeader{}
	if s.link.can(OffloadChecksum) {
		h.flags = vnetNeedsCsum
		h.csumStart = uint16(l4 - HeaderLen)
		h.csumOffset = 6
		h.hdrLen = uint16(l4 - HeaderLen + header.UDPMinimumSize)
		if size < n {
			h.gsoType, h.gsoSize = vnetGSOUDPL4, uint16(size)
		}
		binary.BigEndian.PutUint16(udp[6:], x.folded())
	} else {
		x.add(udp)
		for _, p := range payload {
			x.add(p)
		}
		binary.BigEndian.PutUint16(udp[6:], x.udp())
	}
	return s.writeFrame(w, h, l4+header.UDPMinimumSize, payload, d)
}

func putUDP(b []byte, d *Datagram, n int) {
	binary.BigEndian.PutUint16(b[0:], d.Src.Port())
	binary.BigEndian.PutUint16(b[2:], d.Dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(header.UDPMinimumSize+n))
	b[6], b[7] = 0, 0
}

// writeFrame sends the first hdr octets of w.header, with h put in front, and payload.
func (s *Stack) writeFrame(w *frameWriter, h vnetHeader, hdr int, payload [][]byte, flow *Datagram) error {
	h.encode(w.header[:HeaderLen])
	w.vec = append(w.vec[:0], w.header[:hdr])
	w.vec = append(w.vec, payload...)
	if err := s.link.dev(uint32(flow.Src.Port())<<16 | uint32(flow.Dst.Port())).Write(w.vec); err != nil {
		s.stats.FramesOutDropped.Add(1)
		return err
	}
	s.stats.FramesOut.Add(1)
	return nil
}

// ipLen is the length of an IP packet with n octets behind its header.
func ipLen(a netip.Addr, n int) int {
	if a.Is4() {
		return header.IPv4MinimumSize + n
	}
	return header.IPv6MinimumSize + n
}

// putIP writes the Ethernet and IP headers for n octets of proto behind the place of the
// virtio header, and returns the offset in w.header at which the transport header begins.
func (s *Stack) putIP(w *frameWriter, src, dst netip.Addr, proto, ttl, tos uint8, n int) int {
	eth := w.header[HeaderLen:]
	mac := s.neighbours.lookup(dst)
	copy(eth[0:6], mac[:])
	copy(eth[6:12], s.mac[:])
	if ttl == 0 {
		ttl = defaultTTL
	}
	ip := eth[ethernetLen:]
	if src.Is4() {
		binary.BigEndian.PutUint16(eth[12:], uint16(header.IPv4ProtocolNumber))
		header.IPv4(ip[:header.IPv4MinimumSize]).Encode(&header.IPv4Fields{
			TOS: tos, TotalLength: uint16(header.IPv4MinimumSize + n),
			// DF stays off and the ID counts: a container may forward into a network with a
			// smaller MTU, and nobody here would hear its "fragmentation needed".
			ID: uint16(s.ipID.Add(1)), TTL: ttl, Protocol: proto,
			SrcAddr: address(src), DstAddr: address(dst),
		})
		header.IPv4(ip).SetChecksum(0)
		var x sum
		x.add(ip[:header.IPv4MinimumSize])
		header.IPv4(ip).SetChecksum(x.final())
		return HeaderLen + ethernetLen + header.IPv4MinimumSize
	}
	binary.BigEndian.PutUint16(eth[12:], uint16(header.IPv6ProtocolNumber))
	header.IPv6(ip[:header.IPv6MinimumSize]).Encode(&header.IPv6Fields{
		TrafficClass: tos, PayloadLength: uint16(n),
		TransportProtocol: protocolNumber(proto), HopLimit: ttl,
		SrcAddr: address(src), DstAddr: address(dst),
	})
	return HeaderLen + ethernetLen + header.IPv6MinimumSize
}

// sendFragments sends one datagram in as many IP fragments as the MTU asks for
// (RFC 791 §3.2, RFC 8200 §4.5).
func (s *Stack) sendFragments(d *Datagram, n int) error {
	src, dst := d.Src.Addr(), d.Dst.Addr()
	whole := make([]byte, header.UDPMinimumSize, header.UDPMinimumSize+n)
	putUDP(whole, d, n)
	for _, p := range d.Payload {
		whole = append(whole, p...)
	}
	var x sum
	x.pseudo(src, dst, uint8(header.UDPProtocolNumber), len(whole))
	x.add(whole)
	binary.BigEndian.PutUint16(whole[6:], x.udp())
	return s.fragment(src, dst, uint8(header.UDPProtocolNumber), d.TTL, d.TOS, whole, d)
}

// fragment sends an IP payload, its transport checksum in place, whole or in fragments.
func (s *Stack) fragment(src, dst netip.Addr, proto, ttl, tos uint8, payload []byte, flow *Datagram) error {
	w := s.link.writes.Get().(*frameWriter)
	defer func() {
		clear(w.vec)
		s.link.writes.Put(w)
	}()
	mtu := int(s.link.MTU())
	if ipLen(src, len(payload)) <= mtu {
		l4 := s.putIP(w, src, dst, proto, ttl, tos, len(payload))
		return s.writeFrame(w, vnetHeader{}, l4, [][]byte{payload}, flow)
	}
	overhead := header.IPv4MinimumSize
	if src.Is6() {
		overhead = header.IPv6MinimumSize + header.IPv6FragmentHeaderSize
	}
	size := (mtu - overhead) &^ 7
	if size <= 0 {
		return unix.EMSGSIZE
	}
	id := s.ipID.Add(1)
	for offset := 0; offset < len(payload); offset += size {
		piece := payload[offset:min(offset+size, len(payload))]
		more := offset+size < len(payload)
		var at int
		if src.Is4() {
			at = s.putIP(w, src, dst, proto, ttl, tos, len(piece))
			ip := header.IPv4(w.header[at-header.IPv4MinimumSize : at])
			flags := uint8(0)
			if more {
				flags = header.IPv4FlagMoreFragments
			}
			ip.SetID(uint16(id))
			ip.SetFlagsFragmentOffset(flags, uint16(offset))
			ip.SetChecksum(0)
			var x sum
			x.add(ip)
			ip.SetChecksum(x.final())
		} else {
			at = s.putIP(w, src, dst, header.IPv6FragmentHeader, ttl, tos, header.IPv6FragmentHeaderSize+len(piece))
			fh := w.header[at : at+header.IPv6FragmentHeaderSize]
			fh[0], fh[1] = proto, 0
			word := uint16(offset)
			if more {
				word |= 1
			}
			binary.BigEndian.PutUint16(fh[2:], word)
			binary.BigEndian.PutUint32(fh[4:], id)
			at += header.IPv6FragmentHeaderSize
		}
		if err := s.writeFrame(w, vnetHeader{}, at, [][]byte{piece}, flow); err != nil {
			return err
		}
	}
	return nil
}
