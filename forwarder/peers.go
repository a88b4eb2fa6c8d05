package forwarder

import (
	"net/netip"
	"time"
)

// A peer is a destination that a flow has sent to.
type peer struct {
	real     netip.AddrPort // where the host's socket sends, and the answers come from
	used     netip.AddrPort // what the container calls it
	last     int64          // when something passed, either way (Forwarder.now)
	answered bool
}

// Peers are a flow's destinations by real address. Nearly all flows have one or two: a slice
// is searched, and only a flow with many gets an index.
type peers struct {
	list  []peer
	index map[netip.AddrPort]int32 // of list, once that is longer than indexFrom
	hand  int                      // where the next search for a victim begins
}

const (
	indexFrom = 8

	// victimSample is how many are looked at for the least recently used to replace:
	// enough to find an idle one, few enough for every packet to bring a new destination.
	victimSample = 16
)

// find returns the peer at real, or nil. It is valid until the next add or expire.
func (p *peers) find(real netip.AddrPort) *peer {
	if p.index != nil {
		if i, ok := p.index[real]; ok {
			return &p.list[i]
		}
		return nil
	}
	for i := range p.list {
		if p.list[i].real == real {
			return &p.list[i]
		}
	}
	return nil
}

// add makes a peer of real, which is not one yet. When there are limit of them the one
// longest idle among a few makes room.
func (p *peers) add(real netip.AddrPort, limit int) *peer {
	i := len(p.list)
	if i >= limit {
		i = p.victim()
		if p.index != nil {
			delete(p.index, p.list[i].real)
		}
		p.list[i] = peer{}
	} else {
		p.list = append(p.list, peer{})
	}
	p.list[i].real = real
	if p.index != nil {
		p.index[real] = int32(i)
	} else if len(p.list) > indexFrom {
		p.reindex()
	}
	return &p.list[i]
}

func (p *peers) victim() int {
	best := p.hand % len(p.list)
	for range min(victimSample, len(p.list)) {
		p.hand = (p.hand + 1) % len(p.list)
		if p.list[p.hand].last < p.list[best].last {
			best = p.hand
		}
	}
	return best
}

func (p *peers) reindex() {
	p.index = nil
	if len(p.list) <= indexFrom {
		return
	}
	p.index = make(map[netip.AddrPort]int32, len(p.list))
	for i := range p.list {
		p.index[p.list[i].real] = int32(i)
	}
}

// expire forgets the peers that have been idle for longer than idle allows them, and
// returns the earliest time at which another may be; 0 when none is left.
func (p *peers) expire(now int64, idle func(*peer) time.Duration) (next int64) {
	kept := 0
	for i := range p.list {
		at := p.list[i].last + int64(idle(&p.list[i]))
		if at <= now {
			continue
		}
		if next == 0 || at < next {
			next = at
		}
		p.list[kept] = p.list[i]
		kept++
	}
	if kept < len(p.list) {
		clear(p.list[kept:])
		p.list = p.list[:kept]
		if kept < cap(p.list)/4 {
			p.list = append([]peer(nil), p.list...) // a burst is not remembered
		}
		p.reindex()
	}
	return next
}
