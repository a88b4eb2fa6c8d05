package stack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// What the link layer asks (ARP, RFC 826; neighbour discovery, RFC 4861) is answered by netstack, which, being
// promiscuous, would answer for every address, and believes every hardware address that it is told. So the
// reader looks first.

// linkAnswers reports whether netstack may answer for an address: for ours, and for the world's, so that
// a route without a gateway works (169.254.1.2 on the link). An address of the subnet that is not ours is
// the container's or its neighbour's to answer for; who asks whether it is free must hear nothing.
func (s *Stack) linkAnswers(target netip.Addr, probe bool) bool {
	if s.own[target] {
		return true
	}
	if probe || target.IsLinkLocalUnicast() && target.Is6() {
		return false
	}
	return !s.cfg.Gateway4.Contains(target) && !s.cfg.Gateway6.Contains(target)
}

// arp reports whether an ARP message may go to netstack.
func (s *Stack) arp(msg []byte) bool {
	if len(msg) < header.ARPSize {
		return false
	}
	a := header.ARP(msg[:header.ARPSize])
	if !a.IsValid() || !unicast(a.HardwareAddressSender()) {
		return false
	}
	if a.Op() != header.ARPRequest {
		return true
	}
	sender := netip.AddrFrom4([4]byte(a.ProtocolAddressSender()))
	return s.linkAnswers(netip.AddrFrom4([4]byte(a.ProtocolAddressTarget())), sender.IsUnspecified())
}

// discovery reports whether an ICMPv6 message may go to netstack. A hardware address in it that is no
// station's would be kept for ever: what is sent to a group is received, so that it seems to be confirmed.
func (s *Stack) discovery(f *frame, msg []byte) bool {
	fixed := 0
	switch header.ICMPv6(msg).Type() {
	case header.ICMPv6RouterAdvert:
		return false // nobody is our router
	case header.ICMPv6NeighborSolicit, header.ICMPv6NeighborAdvert:
		fixed = header.ICMPv6HeaderSize + header.IPv6AddressSize + 4
	case header.ICMPv6RedirectMsg:
		return false
	default:
		return true
	}
	if f.ttl != 255 || len(msg) < fixed || f.ipPayloadLen() != len(msg) {
		return false
	}
	for options := msg[fixed:]; len(options) >= 8; {
		n := int(options[1]) * 8
		if n == 0 || n > len(options) {
			return false
		}
		// Source and target link-layer address, RFC 4861 §4.6.1.
		if (options[0] == 1 || options[0] == 2) && !unicast(options[2:8]) {
			return false
		}
		options = options[n:]
	}
	if header.ICMPv6(msg).Type() == header.ICMPv6NeighborSolicit {
		return s.linkAnswers(netip.AddrFrom16([16]byte(msg[8:24])), f.src.IsUnspecified())
	}
	return true
}

// hidesDiscovery reports whether an IPv6 packet carries neighbour discovery behind extension headers, where
// discovery cannot see it. No kernel sends that; RFC 6980 forbids it in fragments.
func (f *frame) hidesDiscovery() bool {
	proto, rest := f.proto, f.transport()
	for len(rest) >= 8 {
		switch proto {
		case uint8(header.ICMPv6ProtocolNumber):
			return rest[0] >= byte(header.ICMPv6RouterSolicit) && rest[0] <= byte(header.ICMPv6RedirectMsg)
		case uint8(header.IPv6HopByHopOptionsExtHdrIdentifier), uint8(header.IPv6RoutingExtHdrIdentifier), uint8(header.IPv6DestinationOptionsExtHdrIdentifier):
			n := (int(rest[1]) + 1) * 8
			if n > len(rest) {
				return false
			}
			proto, rest = rest[0], rest[n:]
		case uint8(header.IPv6FragmentExtHdrIdentifier):
			if binary.BigEndian.Uint16(rest[2:])&^7 != 0 {
				return false // no header follows but the middle of something
			}
			proto, rest = rest[0], rest[8:]
		default:
			return false
		}
	}
	return false
}

// unicast reports whether a hardware address can be one station's.
func unicast(mac []byte) bool {
	return mac[0]&1 == 0 && (binary.BigEndian.Uint32(mac) != 0 || mac[4]|mac[5] != 0)
}
