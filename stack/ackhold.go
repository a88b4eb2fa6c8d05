package stack

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// ackHolder keeps back acknowledgements that carry nothing else, until the next segment of their flow takes
// them along: the answer to a request, say, a moment later. A write to the TAP is a walk through the
// container's TCP, and two in six of a short connection were for such segments. A second one of the flow sends the
// newer of the two, so that a bulk transfer has an acknowledgement for every other segment (RFC 9293
// §3.8.6.3).
//
// The lingering reader sends what is left, after maxHeld or when it has nothing to do. While it is parked nobody
// would, and nothing is held.
type ackHolder struct {
	mu     sync.Mutex
	awake  bool // the reader is
	held   [heldACKs]heldACK
	n      atomic.Int32 // how many are held
	oldest time.Time    // no later than when the first of them came
}

// maxHeld is far below what a kernel waits for an acknowledgement (RTO_MIN: 200 ms), and far above a round trip.
const maxHeld = linger

// heldACKs is how many flows may have one held; a flow that finds its place taken sends the other's.
const heldACKs = 64

type heldACK struct {
	dev   Device
	len   int // 0: none
	frame [HeaderLen + ethernetLen + 40 + 32]byte
	// The bounds of what tells one flow from another in frame: addresses, then ports.
	from, to int
}

// tcpOf returns the offsets of the addresses, and of the TCP header, of a frame of netstack's, virtio header
// included, that has its headers in one piece; ok is false for another protocol or an IPv4 header with options.
func tcpOf(frame []byte) (addrs, tcp int, ok bool) {
	const ip = HeaderLen + ethernetLen
	switch {
	case len(frame) >= ip+header.IPv4MinimumSize+header.TCPMinimumSize && frame[ip] == 0x45 && frame[ip+9] == uint8(header.TCPProtocolNumber):
		return ip + 12, ip + header.IPv4MinimumSize, true
	case len(frame) >= ip+header.IPv6MinimumSize+header.TCPMinimumSize && frame[ip]>>4 == 6 && frame[ip+6] == uint8(header.TCPProtocolNumber):
		return ip + 8, ip + header.IPv6MinimumSize, true
	}
	return 0, 0, false
}

// take looks at a frame that is to be sent: headers is its first piece, virtio header included, size the length
// of all. It returns true when it holds the frame; else the frame is to be sent, and what was held of its flow
// is no longer needed.
func (h *ackHolder) take(dev Device, headers []byte, size int) bool {
	addrs, tcp, ok := tcpOf(headers)
	if !ok {
		return false
	}
	ports := headers[tcp : tcp+4]
	slot := &h.held[binary.BigEndian.Uint32(ports)*0x9e3779b1>>26]
	// Nothing but ACK, no payload, and no SACK blocks, which report a loss.
	end := tcp + int(headers[tcp+12]>>4)*4
	pure := headers[tcp+13] == uint8(header.TCPFlagAck) && size == end && len(headers) == end && end <= len(slot.frame) &&
		onlyTimestamps(headers[tcp+header.TCPMinimumSize:end])

	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.awake {
		return false
	}
	same := slot.len > 0 && string(slot.frame[slot.from:slot.to]) == string(headers[addrs:tcp+4])
	switch {
	case same:
		slot.len = 0
		h.n.Add(-1)
		return false // this one says what the held one did, and more
	case !pure:
		return false
	}
	if slot.len > 0 {
		h.sendLocked(slot)
	}
	slot.dev, slot.len = dev, copy(slot.frame[:], headers)
	slot.from, slot.to = addrs, tcp+4
	if h.n.Add(1) == 1 {
		h.oldest = time.Now()
	}
	return true
}

// wake is called by the reader when it has something to do, rest when it has not and will park, and
// check now and then between the two. All do nothing for a nil holder.
func (h *ackHolder) wake() {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.awake = true
}

func (h *ackHolder) rest() {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.awake = false
	h.flushLocked()
}

func (h *ackHolder) check() {
	if h == nil || h.n.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Since(h.oldest) >= maxHeld {
		h.flushLocked()
	}
}

func (h *ackHolder) flushLocked() {
	for i := 0; h.n.Load() > 0 && i < len(h.held); i++ {
		if h.held[i].len > 0 {
			h.sendLocked(&h.held[i])
		}
	}
}

// sendLocked sends what a slot holds. If the device does not take it, it is as lost as any frame would be.
func (h *ackHolder) sendLocked(s *heldACK) {
	_ = s.dev.Write([][]byte{s.frame[:s.len]})
	s.dev, s.len = nil, 0
	h.n.Add(-1)
}
