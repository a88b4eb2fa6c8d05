package relay

import (
	"sync"
	"sync/atomic"
)

// maxHeld is how many octets of rests a Loop holds before all of its pairs read heldRead at once at most. What a stuck
// connection has in the kernel's own buffers is more than its rest.
const maxHeld = 64 << 20

// restSizes are the buffers that rests come in, octets.
var restSizes = [...]int{leastRead, 16 << 10, heldRead, firstRead, 1 << 20, mostRead}

// rests lends buffers for what one end has given and the other does not take yet.
type rests struct {
	held  atomic.Int64 // octets lent
	pools [len(restSizes)]sync.Pool
}

// rest is octets that wait in a lent buffer.
type rest struct {
	octets []byte // the part that waits
	buffer *[]byte
}

// keep copies b, at most mostRead octets, into r, which is empty.
func (rs *rests) keep(r *rest, b []byte) {
	i := 0
	for restSizes[i] < len(b) {
		i++
	}
	p, _ := rs.pools[i].Get().(*[]byte)
	if p == nil {
		s := make([]byte, restSizes[i])
		p = &s
	}
	rs.held.Add(int64(len(*p)))
	r.buffer, r.octets = p, (*p)[:copy(*p, b)]
}

// took notes that n octets of r wait no more.
func (rs *rests) took(r *rest, n int) {
	if r.octets = r.octets[n:]; len(r.octets) == 0 {
		rs.drop(r)
	}
}

// drop gives r's buffer back, if it has one.
func (rs *rests) drop(r *rest) {
	if r.buffer == nil {
		return
	}
	rs.held.Add(-int64(len(*r.buffer)))
	for i, size := range restSizes {
		if size == len(*r.buffer) {
			rs.pools[i].Put(r.buffer)
		}
	}
	*r = rest{}
}

// full tells that maxHeld is reached.
func (rs *rests) full() bool { return rs.held.Load() >= maxHeld }
