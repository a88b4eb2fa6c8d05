package portdriver

import (
	"context"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// dialTable holds the dials that wait, by forward. With all places taken, a forward that has fewer than another takes one
// of that other's, so that a container's port where everything hangs stops no other. Who cannot, waits for a place: a crowd
// that comes at once is served one after the other.
type dialTable struct {
	mu      sync.Mutex
	closed  bool
	total   int
	by      map[*forward]map[*conn]struct{}
	queues  map[*forward][]*turn // who waits for a place; no queue is empty
	running sync.WaitGroup       // the goroutines, also of dials that have lost their place
}

// A turn is a place in the queue.
type turn struct {
	c   *conn
	has chan struct{} // closed when c is in the table
}

// placePatience is how long a place is waited for. A dial takes a millisecond, so that a crowd is through by then; and of
// those who come to a port where everything hangs no more gather than come in this time.
const placePatience = 3 * time.Second

// begin counts a goroutine, which calls running.Done at its end; false: it must not be started.
func (t *dialTable) begin() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.running.Add(1)
	}
	return !t.closed
}

// enter has c's dial counted, until leave; false: there is no place for it, or ctx has ended.
func (t *dialTable) enter(ctx context.Context, c *conn, max int) bool {
	t.mu.Lock()
	if t.room(c.f, max) {
		t.addLocked(c)
		t.mu.Unlock()
		return true
	}
	if t.queues == nil {
		t.queues = make(map[*forward][]*turn)
	}
	w := &turn{c, make(chan struct{})}
	t.queues[c.f] = append(t.queues[c.f], w)
	t.mu.Unlock()

	timer := time.NewTimer(placePatience)
	defer timer.Stop()
	select {
	case <-w.has:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	i := slices.Index(t.queues[c.f], w)
	if i < 0 {
		return true // it came at the last moment
	}
	t.setQueue(c.f, slices.Delete(t.queues[c.f], i, i+1))
	return false
}

// room tells whether there is a place for a dial of f's, and makes one at another's cost if need be.
func (t *dialTable) room(f *forward, max int) bool {
	if t.total < max {
		return true
	}
	var most *forward
	for f, dials := range t.by {
		if most == nil || len(dials) > len(t.by[most]) {
			most = f
		}
	}
	if len(t.by[most]) <= len(t.by[f])+1 {
		return false
	}
	for victim := range t.by[most] {
		t.removeLocked(victim)
		victim.cancel(errCrowded)
		break
	}
	return true
}

func (t *dialTable) addLocked(c *conn) {
	if t.by == nil {
		t.by = make(map[*forward]map[*conn]struct{})
	}
	dials := t.by[c.f]
	if dials == nil {
		dials = make(map[*conn]struct{})
		t.by[c.f] = dials
	}
	dials[c] = struct{}{}
	t.total++
}

// leave gives c's place, if it still has one, to whoever waits longest of the forward that has fewest.
func (t *dialTable) leave(c *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.removeLocked(c) {
		return
	}
	var next *forward
	for f := range t.queues {
		if next == nil || len(t.by[f]) < len(t.by[next]) {
			next = f
		}
	}
	if next == nil {
		return
	}
	w := t.queues[next][0]
	t.setQueue(next, t.queues[next][1:])
	t.addLocked(w.c)
	close(w.has)
}

func (t *dialTable) setQueue(f *forward, queue []*turn) {
	if len(queue) == 0 {
		delete(t.queues, f)
		return
	}
	t.queues[f] = queue
}

// close lets nobody in any more, and waits for those who are.
func (t *dialTable) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.running.Wait()
}

// removeLocked removes c, and tells whether it was there.
func (t *dialTable) removeLocked(c *conn) bool {
	dials := t.by[c.f]
	if _, ok := dials[c]; !ok {
		return false
	}
	delete(dials, c)
	t.total--
	if len(dials) == 0 {
		delete(t.by, c.f)
	}
	return true
}

func (t *dialTable) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.total
}

// dialLater goes on with c's dial in a goroutine.
func (d *Driver) dialLater(c *conn) {
	ctx, cancel := context.WithCancelCause(d.dialCtx)
	c.f.mu.Lock()
	reset := c.f.reset
	c.cancel = cancel
	c.f.mu.Unlock()
	if reset || ctx.Err() != nil || !d.dials.begin() {
		cancel(nil)
		c.refuse(errReset)
		return
	}
	go func() {
		defer d.dials.running.Done()
		defer cancel(nil)
		if !d.dials.enter(ctx, c, d.limits.Dials) {
			c.refuse(errCrowded)
			return
		}
		timed, stop := context.WithTimeoutCause(ctx, d.cfg.DialTimeout, unix.ETIMEDOUT)
		defer stop()
		err := c.dial(timed)
		d.dials.leave(c)
		if err != nil {
			c.refuse(err)
		}
	}()
}
