package stack

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"
)

// sent is a Device that notes the acknowledgement numbers of what is written to it.
type sent struct {
	replay
	acks []uint32
}

func (s *sent) Write(vec [][]byte) error {
	_, tcp, _ := tcpOf(vec[0])
	s.acks = append(s.acks, binary.BigEndian.Uint32(vec[0][tcp+8:]))
	return nil
}

// segment is a frame of netstack's: ports, acknowledgement, flags, octets of options and of payload.
func segment(v6 bool, port uint16, ack uint32, flags byte, options, payload int) []byte {
	ip := make([]byte, 20)
	ip[0], ip[9] = 0x45, 6
	if v6 {
		ip = make([]byte, 40)
		ip[0], ip[6] = 0x60, 6
	}
	t := make([]byte, 20+options+payload)
	binary.BigEndian.PutUint16(t[0:], 80)
	binary.BigEndian.PutUint16(t[2:], port)
	binary.BigEndian.PutUint32(t[8:], ack)
	t[12], t[13] = byte((20+options)/4)<<4, flags
	if options == 12 {
		copy(t[20:], []byte{1, 1, 8, 10}) // NOP, NOP, timestamps
	}
	return append(append(make([]byte, HeaderLen+ethernetLen), ip...), t...)
}

// give has a segment sent, by the holder or at once.
func give(h *ackHolder, d *sent, frame []byte) {
	if !h.take(d, frame, len(frame)) {
		d.Write([][]byte{frame})
	}
}

const ackFlag, pshFlag, finFlag = 0x10, 0x08, 0x01

func TestACKsAreHeld(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("IPv6=%v", v6), func(t *testing.T) {
			h, d := new(ackHolder), new(sent)
			h.wake()
			give(h, d, segment(v6, 1, 100, ackFlag, 12, 0))
			want := func(what string, acks ...uint32) {
				t.Helper()
				if fmt.Sprint(d.acks) != fmt.Sprint(acks) {
					t.Errorf("%s: sent %v, want %v", what, d.acks, acks)
				}
				d.acks = nil
			}
			want("an acknowledgement alone")
			give(h, d, segment(v6, 2, 7, ackFlag|pshFlag, 12, 5))
			want("another flow's answer", 7)
			give(h, d, segment(v6, 1, 100, ackFlag|pshFlag, 12, 5))
			want("the flow's answer", 100)
			h.rest()
			want("rest after that")
			h.wake()
			give(h, d, segment(v6, 1, 200, ackFlag, 12, 0))
			give(h, d, segment(v6, 1, 300, ackFlag, 12, 0))
			want("two in a row", 300)
			give(h, d, segment(v6, 1, 400, ackFlag, 12, 0))
			h.rest()
			want("rest", 400)
			give(h, d, segment(v6, 1, 500, ackFlag, 12, 0))
			want("while the reader is parked", 500)
			h.wake()
			give(h, d, segment(v6, 1, 600, ackFlag, 24, 0)) // SACK blocks
			give(h, d, segment(v6, 1, 601, ackFlag|finFlag, 12, 0))
			give(h, d, segment(v6, 1, 602, ackFlag|0x04, 0, 0)) // RST
			give(h, d, segment(v6, 1, 603, ackFlag|0x02, 0, 0)) // SYN
			want("more than an acknowledgement", 600, 601, 602, 603)
			h.check()
			give(h, d, segment(v6, 1, 700, ackFlag, 0, 0))
			h.check()
			want("check at once")
			h.oldest = time.Now().Add(-maxHeld)
			h.check()
			want("check after maxHeld", 700)
			if n := h.n.Load(); n != 0 {
				t.Errorf("%d held at the end", n)
			}
		})
	}
}

// However many flows there are, none's acknowledgement is forgotten.
func TestHeldACKsOfManyFlows(t *testing.T) {
	h, d := new(ackHolder), new(sent)
	h.wake()
	const flows = 1000
	for i := range flows {
		give(h, d, segment(false, uint16(1000+i), uint32(i), ackFlag, 12, 0))
	}
	if len(d.acks) < flows-heldACKs || len(d.acks) == flows {
		t.Errorf("%d of %d sent at once, places for %d", len(d.acks), flows, heldACKs)
	}
	h.rest()
	seen := map[uint32]bool{}
	for _, a := range d.acks {
		seen[a] = true
	}
	if len(d.acks) != flows || len(seen) != flows {
		t.Errorf("%d sent, %d different, want %d", len(d.acks), len(seen), flows)
	}
}

// What is not TCP, or not whole, is none of the holder's business.
func TestHolderLeavesOtherFrames(t *testing.T) {
	h, d := new(ackHolder), new(sent)
	h.wake()
	udp := segment(false, 1, 1, ackFlag, 0, 0)
	udp[HeaderLen+ethernetLen+9] = 17
	for name, frame := range map[string][]byte{
		"UDP": udp, "cut short": segment(false, 1, 1, ackFlag, 0, 0)[:HeaderLen+ethernetLen+30], "empty": nil,
	} {
		if h.take(d, frame, len(frame)) {
			t.Errorf("%s was held", name)
		}
	}
	if _, _, ok := tcpOf(make([]byte, 200)); ok {
		t.Error("zeroes are TCP")
	}
}
