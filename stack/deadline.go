package stack

import (
	"sync"
	"time"
)

// deadline is a point in time that can be waited for and moved, as net.Conn wants it. The
// zero value never passes.
type deadline struct {
	mu     sync.Mutex
	timer  *time.Timer
	cancel chan struct{} // closed when the time has come; nil until somebody waits or sets
	closed bool
}

func (d *deadline) channelLocked() chan struct{} {
	if d.cancel == nil {
		d.cancel = make(chan struct{})
	}
	return d.cancel
}

func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.channelLocked()
}

func (d *deadline) passed() bool {
	select {
	case <-d.wait():
		return true
	default:
		return false
	}
}

func (d *deadline) isClosed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.closed
}

// close makes the deadline pass for good.
func (d *deadline) close() {
	d.set(time.Unix(1, 0))
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
}

// set moves the deadline; the zero time takes it away.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	if d.timer != nil && !d.timer.Stop() {
		<-d.channelLocked() // the function is running or has run: let it finish
	}
	d.timer = nil
	ch := d.channelLocked()
	select {
	case <-ch: // it had passed
		d.cancel = make(chan struct{})
		ch = d.cancel
	default:
	}
	if t.IsZero() {
		return
	}
	if left := time.Until(t); left > 0 {
		d.timer = time.AfterFunc(left, func() { close(ch) })
		return
	}
	close(ch)
}
