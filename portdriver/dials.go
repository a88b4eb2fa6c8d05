package portdriver

import (
	"context"
	"sync"

	"golang.org/x/sys/unix"
)

// dialTable holds the dials that wait, by forward. With all places taken, a forward that has fewer than another takes one
// of that other's, so that a container's port where everything hangs stops no other.
type dialTable struct {
	mu      sync.Mutex
	closed  bool
	total   int
	by      map[*forward]map[*conn]struct{}
	running sync.WaitGroup // the goroutines, also of dials that have lost their place
}

// enter has c's dial counted, until leave; false: there is no place for it.
func (t *dialTable) enter(c *conn, max int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	if t.by == nil {
		t.by = make(map[*forward]map[*conn]struct{})
	}
	if t.total >= max {
		var most *forward
		for f, dials := range t.by {
			if most == nil || len(dials) > len(t.by[most]) {
				most = f
			}
		}
		if len(t.by[most]) <= len(t.by[c.f])+1 {
			return false
		}
		for victim := range t.by[most] {
			t.removeLocked(victim)
			victim.cancel(errCrowded)
			break
		}
	}
	dials := t.by[c.f]
	if dials == nil {
		dials = make(map[*conn]struct{})
		t.by[c.f] = dials
	}
	dials[c] = struct{}{}
	t.total++
	t.running.Add(1)
	return true
}

func (t *dialTable) leave(c *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.removeLocked(c)
}

// close lets nobody in any more, and waits for those who are.
func (t *dialTable) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.running.Wait()
}

// removeLocked removes c, if it is there.
func (t *dialTable) removeLocked(c *conn) {
	dials := t.by[c.f]
	if _, ok := dials[c]; !ok {
		return
	}
	delete(dials, c)
	t.total--
	if len(dials) == 0 {
		delete(t.by, c.f)
	}
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
	if reset || ctx.Err() != nil || !d.dials.enter(c, d.limits.Dials) {
		cancel(nil)
		c.refuse(errCrowded)
		return
	}
	go func() {
		defer d.dials.running.Done()
		defer cancel(nil)
		timed, stop := context.WithTimeoutCause(ctx, d.cfg.DialTimeout, unix.ETIMEDOUT)
		defer stop()
		err := c.dial(timed)
		d.dials.leave(c)
		if err != nil {
			c.refuse(err)
		}
	}()
}
