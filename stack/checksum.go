package stack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// sum is an Internet checksum in the making (RFC 1071) over pieces of any length.
type sum struct {
	acc checksum.Checksumer
}

func (s *sum) add(b []byte) { s.acc.Add(b) }

// pseudo adds the pseudo-header of RFC 9293 §3.1 or RFC 8200 §8.1.
func (s *sum) pseudo(src, dst netip.Addr, proto uint8, length int) {
	var b [40]byte
	if src.Is4() {
		a, d := src.As4(), dst.As4()
		copy(b[0:], a[:])
		copy(b[4:], d[:])
		b[9] = proto
		binary.BigEndian.PutUint16(b[10:], uint16(length))
		s.add(b[:12])
		return
	}
	a, d := src.As16(), dst.As16()
	copy(b[0:], a[:])
	copy(b[16:], d[:])
	binary.BigEndian.PutUint32(b[32:], uint32(length))
	b[39] = proto
	s.add(b[:40])
}

// folded is the sum so far, as NEEDS_CSUM wants it in the checksum field.
func (s *sum) folded() uint16 { return s.acc.Checksum() }

// final is the checksum to send.
func (s *sum) final() uint16 { return ^s.acc.Checksum() }

// udp is final for UDP, where 0 means "none" and is sent as all ones (RFC 768).
func (s *sum) udp() uint16 {
	if c := s.final(); c != 0 {
		return c
	}
	return 0xffff
}
