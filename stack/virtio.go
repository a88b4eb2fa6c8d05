package stack

import "encoding/binary"

// Values of struct virtio_net_hdr (include/uapi/linux/virtio_net.h).
const (
	vnetNeedsCsum = 1 // flags: the checksum covers only the pseudo-header so far
	vnetDataValid = 2 // flags: whoever sent it has verified the checksum

	vnetGSONone  = 0
	vnetGSOTCPv4 = 1
	vnetGSOTCPv6 = 4
	vnetGSOUDPL4 = 5
	vnetGSOECN   = 0x80 // or'ed in: the first segment has CWR set
)

// vnetHeader is the header in front of a frame; see HeaderLen.
type vnetHeader struct {
	flags, gsoType                         uint8
	hdrLen, gsoSize, csumStart, csumOffset uint16
}

func (h *vnetHeader) encode(b []byte) {
	_ = b[HeaderLen-1]
	b[0], b[1] = h.flags, h.gsoType
	binary.LittleEndian.PutUint16(b[2:], h.hdrLen)
	binary.LittleEndian.PutUint16(b[4:], h.gsoSize)
	binary.LittleEndian.PutUint16(b[6:], h.csumStart)
	binary.LittleEndian.PutUint16(b[8:], h.csumOffset)
}

func decodeVnetHeader(b []byte) vnetHeader {
	_ = b[HeaderLen-1]
	return vnetHeader{
		flags: b[0], gsoType: b[1],
		hdrLen:     binary.LittleEndian.Uint16(b[2:]),
		gsoSize:    binary.LittleEndian.Uint16(b[4:]),
		csumStart:  binary.LittleEndian.Uint16(b[6:]),
		csumOffset: binary.LittleEndian.Uint16(b[8:]),
	}
}
