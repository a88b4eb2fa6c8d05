package stack_test

import (
	"encoding/binary"
	"net/netip"
)

// The frames of a container, built by hand: what netstack would not send.

func onesum(parts ...[]byte) uint16 {
	var sum uint32
	odd := false
	for _, p := range parts {
		for _, b := range p {
			if odd {
				sum += uint32(b)
			} else {
				sum += uint32(b) << 8
			}
			odd = !odd
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

func pseudo(src, dst netip.Addr, proto byte, n int) []byte {
	b := append(src.AsSlice(), dst.AsSlice()...)
	return append(b, 0, 0, byte(n>>8), byte(n), 0, proto) // the same sum for both families
}

// ipFrame is an Ethernet frame from the container to the gateway with one IP packet.
func ipFrame(src, dst netip.Addr, proto byte, payload []byte) []byte {
	f := append(append([]byte(nil), gatewayMAC...), containerMAC...)
	if src.Is4() {
		f = append(f, 0x08, 0x00)
		h := make([]byte, 20)
		h[0], h[8], h[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
		copy(h[12:], src.AsSlice())
		copy(h[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(h[10:], onesum(h))
		return append(append(f, h...), payload...)
	}
	f = append(f, 0x86, 0xdd)
	h := make([]byte, 40)
	h[0], h[6], h[7] = 0x60, proto, 64
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	return append(append(f, h...), payload...)
}

func tcpFrame(src, dst netip.AddrPort, seq, ack uint32, flags byte) []byte {
	t := make([]byte, 20)
	binary.BigEndian.PutUint16(t[0:], src.Port())
	binary.BigEndian.PutUint16(t[2:], dst.Port())
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], ack)
	t[12], t[13] = 5<<4, flags
	binary.BigEndian.PutUint16(t[14:], 0xffff)
	binary.BigEndian.PutUint16(t[16:], onesum(pseudo(src.Addr(), dst.Addr(), 6, len(t)), t))
	return ipFrame(src.Addr(), dst.Addr(), 6, t)
}

func udpSegment(src, dst netip.AddrPort, payload []byte) []byte {
	u := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(u[0:], src.Port())
	binary.BigEndian.PutUint16(u[2:], dst.Port())
	binary.BigEndian.PutUint16(u[4:], uint16(8+len(payload)))
	u = append(u, payload...)
	binary.BigEndian.PutUint16(u[6:], onesum(pseudo(src.Addr(), dst.Addr(), 17, len(u)), u))
	return u
}

func udpFrame(src, dst netip.AddrPort, payload []byte) []byte {
	return ipFrame(src.Addr(), dst.Addr(), 17, udpSegment(src, dst, payload))
}
