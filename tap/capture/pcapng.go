package capture

import (
	"encoding/binary"
	"time"
)

// The blocks of a pcapng file (draft-ietf-opsawg-pcapng) that we write, little-endian, as the section's head tells. They are made here, and
// only read by a library, in the tests: that one's tables of protocols would cost each start of usernet, capturing or not, and each collection
// of garbage 5 MiB to look through.
//
//	┌──────┬────────┬──────┬─────────┬────────┐
//	│ type │ length │ body │ options │ length │   each part padded to a multiple of 4
//	└──────┴────────┴──────┴─────────┴────────┘

const (
	blockSection   = 0x0a0d0d0a // §4.1
	blockInterface = 1          // §4.2
	blockPacket    = 6          // §4.3, the enhanced one

	byteOrder    = 0x1a2b3c4d
	linkEthernet = 1
	nanoseconds  = 9 // if_tsresol: 10^-9 s

	// Options, whose numbers are of their block but for the first two.
	optEnd        = 0
	optComment    = 1
	optSectionOS  = 3
	optSectionApp = 4
	optName       = 2
	optResolution = 9
	optOS         = 12
	optFlags      = 2

	packetHead = 28 // of a packet's block, before the frame
	packetTail = 16 // after it: the flags, the end of options, the length
)

// A direction is an enhanced packet block's flags word (§4.3.1). Inbound is host → container everywhere in usernet.
type direction uint32

const (
	inbound  direction = 1
	outbound direction = 2
)

var le = binary.LittleEndian

// blockSize is how many octets of file a frame of n octets takes.
func blockSize(n int) int64 { return int64(packetHead + (n+3)&^3 + packetTail) }

// appendHead appends what a file begins with: the section and the one interface.
func appendHead(b []byte, name string, snap int) []byte {
	section := le.AppendUint32(nil, byteOrder)
	section = le.AppendUint16(section, 1) // version 1.0
	section = le.AppendUint16(section, 0)
	section = le.AppendUint64(section, 1<<64-1) // its length is not told
	section = appendOption(section, optSectionOS, "linux")
	section = appendOption(section, optSectionApp, "usernet")
	b = appendBlock(b, blockSection, section)

	intf := le.AppendUint16(nil, linkEthernet)
	intf = le.AppendUint16(intf, 0)
	intf = le.AppendUint32(intf, uint32(snap))
	intf = appendOption(intf, optName, name)
	intf = appendOption(intf, optComment, "inbound is towards the container")
	intf = appendOption(intf, optResolution, string([]byte{nanoseconds}))
	intf = appendOption(intf, optOS, "linux")
	return appendBlock(b, blockInterface, intf)
}

// appendBlock appends a block of a body with options, which it ends.
func appendBlock(b []byte, typ uint32, body []byte) []byte {
	length := uint32(4 + 4 + len(body) + 4 + 4)
	b = le.AppendUint32(b, typ)
	b = le.AppendUint32(b, length)
	b = append(b, body...)
	b = le.AppendUint32(b, optEnd)
	return le.AppendUint32(b, length)
}

func appendOption(b []byte, code uint16, value string) []byte {
	b = le.AppendUint16(b, code)
	b = le.AppendUint16(b, uint16(len(value)))
	return pad(append(b, value...))
}

func pad(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// finishPacket makes a packet's block of b, which holds packetHead octets and the frame behind them; the frame had length octets before it
// was cut.
func finishPacket(b []byte, at time.Time, length int, dir direction) []byte {
	kept := len(b) - packetHead
	size := uint32(blockSize(kept))
	ns := uint64(at.UnixNano())
	for i, v := range [...]uint32{blockPacket, size, 0, uint32(ns >> 32), uint32(ns), uint32(kept), uint32(length)} {
		le.PutUint32(b[4*i:], v)
	}
	b = le.AppendUint16(pad(b), optFlags)
	b = le.AppendUint16(b, 4)
	b = le.AppendUint32(b, uint32(dir))
	b = le.AppendUint32(b, optEnd)
	return le.AppendUint32(b, size)
}
