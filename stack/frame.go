package stack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

var broadcast4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// frame is one Ethernet frame as it was read, and what parse found in it. The head has
// at least the headers of every frame that a kernel makes.
type frame struct {
	vnet       vnetHeader
	head, tail []byte // the frame; tail continues where head ends

	ethertype uint16 // 0: not ours to read
	src, dst  netip.Addr
	proto     uint8 // of what follows the IP header; an IPv6 extension header is one too
	ttl, tos  uint8
	fragment  bool
	l4        int // offset of the transport header in head, octets
	end       int // offset of the end of the IP packet in the frame
}

// transport is the part of the transport header and payload that lies in head.
func (f *frame) transport() []byte { return f.head[f.l4:min(len(f.head), f.end)] }

// ipPayloadLen is the length in octets of what follows the IP header.
func (f *frame) ipPayloadLen() int { return f.end - f.l4 }

// parse reads the Ethernet and IP headers and checks every length once. Checksums and
// options are verify's and netstack's.
func (f *frame) parse() bool {
	total := len(f.head) + len(f.tail)
	ip := f.head[ethernetLen:]
	switch t := binary.BigEndian.Uint16(f.head[12:]); t {
	case uint16(header.ARPProtocolNumber):
		f.ethertype = t
	case uint16(header.IPv4ProtocolNumber):
		f.ethertype = t
		if len(ip) < header.IPv4MinimumSize || ip[0]>>4 != 4 {
			return false
		}
		ihl := int(ip[0]&0xf) * 4
		length := int(binary.BigEndian.Uint16(ip[2:]))
		if ihl < header.IPv4MinimumSize || ihl > len(ip) || length < ihl || ethernetLen+length > total {
			return false
		}
		f.src = netip.AddrFrom4([4]byte(ip[12:16]))
		f.dst = netip.AddrFrom4([4]byte(ip[16:20]))
		f.proto, f.ttl, f.tos = ip[9], ip[8], ip[1]
		f.fragment = binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 // MF or an offset
		f.l4, f.end = ethernetLen+ihl, ethernetLen+length
	case uint16(header.IPv6ProtocolNumber):
		f.ethertype = t
		if len(ip) < header.IPv6MinimumSize || ip[0]>>4 != 6 {
			return false
		}
		length := header.IPv6MinimumSize + int(binary.BigEndian.Uint16(ip[4:]))
		if ethernetLen+length > total {
			return false
		}
		f.src = netip.AddrFrom16([16]byte(ip[8:24]))
		f.dst = netip.AddrFrom16([16]byte(ip[24:40]))
		f.proto, f.ttl, f.tos = ip[6], ip[7], ip[0]<<4|ip[1]>>4
		f.l4, f.end = ethernetLen+header.IPv6MinimumSize, ethernetLen+length
	}
	return true
}

// verify checks the checksums of a packet for which the kernel does not vouch, because
// netstack has been told that all are verified. A fragment's transport checksum can only be
// checked when it is whole: transport.go does that for what goes to the handler. TCP in fragments, and datagrams
// in fragments for a port of our own, are taken as they are: a container that bends them harms itself.
func (f *frame) verify() bool {
	if f.ethertype == uint16(header.IPv4ProtocolNumber) {
		var s sum
		s.add(f.head[ethernetLen:f.l4])
		if s.final() != 0 {
			return false
		}
	}
	if f.fragment {
		return true
	}
	if f.vnet.flags&vnetNeedsCsum != 0 {
		return f.complete()
	}
	if f.vnet.flags&vnetDataValid != 0 {
		return true
	}
	switch f.proto {
	case uint8(header.TCPProtocolNumber), uint8(header.ICMPv6ProtocolNumber):
	case uint8(header.UDPProtocolNumber):
		if h := f.transport(); len(h) >= header.UDPMinimumSize && binary.BigEndian.Uint16(h[6:]) == 0 {
			return f.src.Is4() // RFC 8200 §8.1: not optional in IPv6
		}
	case uint8(header.ICMPv4ProtocolNumber):
		var s sum
		f.addPayload(&s)
		return s.final() == 0
	default:
		return true
	}
	var s sum
	s.pseudo(f.src, f.dst, f.proto, f.udpLen())
	f.addPayload(&s)
	return s.final() == 0
}

// udpLen is the length that the pseudo-header has: UDP's own if it is shorter than IP's.
func (f *frame) udpLen() int {
	n := f.ipPayloadLen()
	if h := f.transport(); f.proto == uint8(header.UDPProtocolNumber) && len(h) >= header.UDPMinimumSize {
		return min(n, int(binary.BigEndian.Uint16(h[4:])))
	}
	return n
}

func (f *frame) addPayload(s *sum) {
	n := f.udpLen()
	h := f.head[f.l4:min(len(f.head), f.l4+n)]
	s.add(h)
	if n > len(h) {
		s.add(f.tail[:n-len(h)])
	}
}

// complete checks that a NEEDS_CSUM header points into the packet, and writes the checksum
// where netstack will have to read on behind an IPv6 extension header: what comes
// out of there at transport.go is verified like a reassembled packet.
func (f *frame) complete() bool {
	start, off := int(f.vnet.csumStart), int(f.vnet.csumOffset)
	if start < f.l4 || start+off+2 > f.end || start+off+2 > len(f.head) {
		return false
	}
	switch f.proto {
	case uint8(header.TCPProtocolNumber), uint8(header.UDPProtocolNumber):
		return true
	}
	var s sum
	s.add(f.head[start:min(len(f.head), f.end)])
	if f.end > len(f.head) {
		s.add(f.tail[:f.end-len(f.head)])
	}
	binary.BigEndian.PutUint16(f.head[start+off:], s.udp())
	return true
}
