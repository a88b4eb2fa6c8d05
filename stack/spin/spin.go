// Package spin decides when a thread that waits for events of the kernel's should look for them again and again
// before it lets itself be put to sleep.
//
// An idle processor takes tens of microseconds to come back, in a virtual machine most of all, and a round
// trip waits for that twice. The price of looking is the time of a processor that would be idle else, or a yield where it
// would not.
package spin

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	// longest bounds the looking. It is the time of a round trip through a server nearby.
	longest = 100 * time.Microsecond

	// worth is how many of 256 of the last waits, roughly, must have ended within longest.
	worth = 160

	// A yield that took longer than taken has let somebody run who has much to do, and a thread that sleeps comes back
	// sooner than one that yields: no looking for a rest, which lasts twice as long each time, and half as long
	// for each look that found something before. Shorter yields are no reason to sleep. A thread that is woken is put beside its waker,
	// and so the two ends of a conversation and who stands between would share one processor for ever with another one
	// idle; one that stays runnable is moved there, and stays (kernel/sched/fair.c, wake_affine and sched_balance_rq).
	taken       = 200 * time.Microsecond
	leastRest   = time.Millisecond
	longestRest = 256 * time.Millisecond
)

// A Waiter is one thread's. The zero Waiter is ready; it begins to look once waits have been short.
type Waiter struct {
	short int           // of 256 of the last waits: those that ended within longest
	pause time.Time     // no looking until then
	rest  time.Duration // half of the next one
	slept uint
}

// Slept is how often an event was not there yet when Wait was called. It wraps.
func (w *Waiter) Slept() uint { return w.slept }

// Wait returns what poll returns: a count of events, or an error. Poll is given how long it may sleep; that is 0 at first,
// and the timeout when looking is over or would not pay. Between two looks the thread yields, so
// that nobody who shares its processor waits for it.
func (w *Waiter) Wait(timeout time.Duration, poll func(time.Duration) (int, error)) (int, error) {
	n, err := poll(0)
	if n != 0 || err != nil {
		w.note(true)
		return n, err
	}
	w.slept++
	begin := time.Now()
	if w.pays(begin) {
		for last := begin; last.Sub(begin) <= longest; {
			unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
			n, err = poll(0)
			now := time.Now()
			switch {
			case now.Sub(last) > taken:
				w.rest = min(max(2*w.rest, leastRest), longestRest)
				w.pause = now.Add(w.rest)
			case n != 0:
				w.rest /= 2
			}
			if n != 0 || err != nil {
				w.note(true)
				return n, err
			}
			last = now
		}
	}
	n, err = poll(timeout)
	w.note(n != 0 && time.Since(begin) <= longest)
	return n, err
}

// pays reports whether it is worth while not to sleep.
func (w *Waiter) pays(now time.Time) bool { return w.short >= worth && now.After(w.pause) }

// note remembers whether a wait was a short one.
func (w *Waiter) note(short bool) {
	w.short -= w.short / 8
	if short {
		w.short += 256 / 8
	}
}
