package forwarder

import (
	"container/heap"
	"net/netip"
	"sync"
	"time"
)

// A table holds the flows of one kind, at most limit of them.
//
// Who makes room: the owner with most flows gives up its own longest idle one, first among
// those that nobody has answered. So a source that opens flow after flow, or a published port
// to which client after client speaks, evicts its own once it has more than the others.
//
// "Longest idle" is by second chance, so that a packet costs no lock of the table: lists
// are in the order in which flows were opened or last looked at, and a flow found at the
// end but used since goes to the front.
//
// When flows end: each is in the bucket of a wheel for the second at which it may have
// been idle for long enough; it is looked at then, and put further on if it was used.
//
// mu is taken for a look-up, or to link and unlink one flow; never while a flow's mu
// is held by the same goroutine except in this order: Forwarder.taking, flow.mu, table.mu.
type table struct {
	mu     sync.RWMutex
	limit  int
	share  int // the most flows of one owner; 0: as many as there may be
	closed bool
	flows  map[flowKey]*flow
	byReal map[clientKey]*flow // those of clients of published ports
	owners map[ownerKey]*owner
	busy   owners // those with most flows first
	wheel  [wheelSize]link
	tick   int64 // the last second whose bucket has been looked at
}

const (
	wheelStep = int64(time.Second)

	// wheelSize is in steps; what is further away than that is looked at early and put on again.
	wheelSize = 128
)

// An owner is a source address of the container, or a published port of the host.
type owner struct {
	key                  ownerKey
	flows                int
	at                   int  // in table.busy
	unanswered, answered link // oldest last
}

type ownerKey struct {
	addr    netip.Addr
	forward *PublishedUDP
}

func (fl *flow) ownerKey() ownerKey {
	if fl.client != nil {
		return ownerKey{forward: fl.client.forward}
	}
	return ownerKey{addr: fl.key.src.Addr()}
}

// A link is a place in a ring of flows, or the ring's root.
type link struct {
	prev, next *link
	fl         *flow // nil in a root
}

func (l *link) init() { l.prev, l.next = l, l }

func (l *link) pushFront(e *link) {
	e.prev, e.next = l, l.next
	e.prev.next, e.next.prev = e, e
}

func (l *link) unlink() {
	if l.next != nil {
		l.prev.next, l.next.prev = l.next, l.prev
		l.prev, l.next = nil, nil
	}
}

func newTable(limit int, now int64) *table {
	t := &table{
		limit: limit, tick: now / wheelStep,
		flows: make(map[flowKey]*flow), byReal: make(map[clientKey]*flow), owners: make(map[ownerKey]*owner),
	}
	for i := range t.wheel {
		t.wheel[i].init()
	}
	return t
}

// get returns the flow of key with a reference for the caller, or nil.
func (t *table) get(key flowKey) *flow {
	t.mu.RLock()
	fl := t.flows[key]
	t.mu.RUnlock()
	if fl == nil || !fl.acquire() {
		return nil
	}
	return fl
}

// clientOf is get by what the host knows of a client.
func (t *table) clientOf(key clientKey) *flow {
	t.mu.RLock()
	fl := t.byReal[key]
	t.mu.RUnlock()
	if fl == nil || !fl.acquire() {
		return nil
	}
	return fl
}

// insert adds fl unless its key is there already: then it returns that flow, with a
// reference for the caller. evicted, if any, had to make room: the caller releases it. ok is false after close.
func (t *table) insert(fl *flow, now int64) (existing, evicted *flow, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, nil, false
	}
	if other := t.flows[fl.key]; other != nil && other.acquire() {
		return other, nil, true
	}
	key := fl.ownerKey()
	o := t.owners[key]
	full := o != nil && t.share > 0 && o.flows >= t.share
	if full || len(t.flows) >= t.limit {
		victim := t.busy[0]
		if o != nil && o.flows+1 > victim.flows {
			victim = o // with the new flow it has most
		}
		evicted = victim.oldest(nil)
		t.unlinkLocked(evicted)
		o = t.owners[key] // may just have lost its last flow
	}
	if o == nil {
		o = &owner{key: key}
		o.unanswered.init()
		o.answered.init()
		t.owners[key] = o
		heap.Push(&t.busy, o)
	}
	o.flows++
	heap.Fix(&t.busy, o.at)
	t.flows[fl.key] = fl
	if fl.client != nil {
		t.byReal[fl.client.key()] = fl
	}
	fl.owner, fl.seen = o, now
	fl.age.fl, fl.due.fl = fl, fl
	o.unanswered.pushFront(&fl.age)
	return nil, evicted, true
}

// oldest is the flow that o can spare best, but for keep; nil when o has no other.
func (o *owner) oldest(keep *flow) *flow {
	lists := [...]*link{&o.unanswered, &o.answered}
	for _, l := range lists {
		// Each flow is looked at once, even if all are in use.
		var first *flow
		for {
			fl := l.prev.fl
			if fl == nil || fl == first {
				break
			}
			last := fl.last.Load()
			if l == &o.unanswered && fl.answered.Load() {
				fl.age.unlink()
				o.answered.pushFront(&fl.age)
				continue
			}
			if last <= fl.seen && fl != keep {
				return fl
			}
			fl.age.unlink()
			l.pushFront(&fl.age)
			fl.seen = last
			if first == nil {
				first = fl
			}
		}
	}
	// All are in use: whoever was looked at first.
	for _, l := range lists {
		for e := l.prev; e.fl != nil; e = e.prev {
			if e.fl != keep {
				return e.fl
			}
		}
	}
	return nil
}

// evict takes out the flow that can be spared best for the sake of keep, for lack of something
// else than places in the table. The caller releases it. nil when there is none.
func (t *table) evict(keep *flow) *flow {
	t.mu.Lock()
	defer t.mu.Unlock()
	// The second owner has a flow, and keep is none of it if it was all that the first has.
	for _, o := range t.busy[:min(2, len(t.busy))] {
		if fl := o.oldest(keep); fl != nil {
			t.unlinkLocked(fl)
			return fl
		}
	}
	return nil
}

// remove takes fl out and tells whether it was in; then the caller releases it.
func (t *table) remove(fl *flow) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.unlinkLocked(fl)
}

func (t *table) unlinkLocked(fl *flow) bool {
	if t.flows[fl.key] != fl {
		return false
	}
	delete(t.flows, fl.key)
	if fl.client != nil {
		delete(t.byReal, fl.client.key())
	}
	fl.age.unlink()
	fl.due.unlink()
	o := fl.owner
	if o.flows--; o.flows == 0 {
		delete(t.owners, o.key)
		heap.Remove(&t.busy, o.at)
	} else {
		heap.Fix(&t.busy, o.at)
	}
	return true
}

// schedule has fl looked at when at has come, if it is (still) in the table.
func (t *table) schedule(fl *flow, at int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.flows[fl.key] != fl {
		return
	}
	step := at/wheelStep + 1 // the first whole step after at
	step = min(max(step, t.tick+1), t.tick+wheelSize-1)
	fl.due.unlink()
	t.wheel[step%wheelSize].pushFront(&fl.due)
}

// expired takes the flows whose time to be looked at has come off the wheel and appends
// them to list, with a reference for the caller; each is to be removed or scheduled again.
func (t *table) expired(now int64, list []*flow) []*flow {
	t.mu.Lock()
	defer t.mu.Unlock()
	step := now / wheelStep
	for n := min(step-t.tick, wheelSize); n > 0; n-- {
		bucket := &t.wheel[(step-n+1)%wheelSize]
		for bucket.next != bucket {
			fl := bucket.next.fl
			fl.due.unlink()
			if fl.acquire() {
				list = append(list, fl)
			}
		}
	}
	t.tick = max(t.tick, step)
	return list
}

// close takes everything out for the caller to release; nothing comes in any more.
func (t *table) close() []*flow {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	all := make([]*flow, 0, len(t.flows))
	for _, fl := range t.flows {
		all = append(all, fl)
		t.unlinkLocked(fl)
	}
	return all
}

// forget takes out what an owner has, for the caller to release.
func (t *table) forget(key ownerKey) []*flow {
	t.mu.Lock()
	defer t.mu.Unlock()
	o := t.owners[key]
	if o == nil {
		return nil
	}
	all := make([]*flow, 0, o.flows)
	for _, l := range [...]*link{&o.unanswered, &o.answered} {
		for l.next != l {
			all = append(all, l.next.fl)
			t.unlinkLocked(l.next.fl)
		}
	}
	return all
}

// of returns what an owner has, with a reference each for the caller.
func (t *table) of(key ownerKey) []*flow {
	t.mu.RLock()
	defer t.mu.RUnlock()
	o := t.owners[key]
	if o == nil {
		return nil
	}
	list := make([]*flow, 0, o.flows)
	for _, l := range [...]*link{&o.unanswered, &o.answered} {
		for e := l.next; e != l; e = e.next {
			if e.fl.acquire() {
				list = append(list, e.fl)
			}
		}
	}
	return list
}

// all returns all flows there are, with a reference each for the caller.
func (t *table) all() []*flow {
	t.mu.RLock()
	defer t.mu.RUnlock()
	list := make([]*flow, 0, len(t.flows))
	for _, fl := range t.flows {
		if fl.acquire() {
			list = append(list, fl)
		}
	}
	return list
}

func (t *table) len() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.flows)
}

// owners is a heap (container/heap), most flows first.
type owners []*owner

func (h owners) Len() int           { return len(h) }
func (h owners) Less(i, j int) bool { return h[i].flows > h[j].flows }
func (h owners) Swap(i, j int)      { h[i], h[j] = h[j], h[i]; h[i].at, h[j].at = i, j }
func (h *owners) Push(x any)        { o := x.(*owner); o.at = len(*h); *h = append(*h, o) }
func (h *owners) Pop() any {
	last := len(*h) - 1
	o := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return o
}
