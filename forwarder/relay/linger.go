package relay

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lingering is how long a worker without an event waits in the kernel for the next one before it parks.
	lingering = time.Millisecond

	// maxLinger is how many events in a row it takes so. What Go's poller alone would notice, the control socket say,
	// waits for that long at most: about a millisecond in the middle of one connection's round trips.
	maxLinger = 64

	otherID = 0 // of others in the epoll set; no job has it
)

// Linger has a worker that has just had an event wait in the kernel for the next, on the scheduler's one processor, where
// there is but one: a round trip costs a fifth less so. It ends as soon as one of others is readable,
// which are descriptors that somebody else serves by means of Go's poller, and which stay his.
// Linger may be called again, with further ones, but not while Run is at work. Without it nobody lingers.
func (l *Loop) Linger(others ...int) error {
	if runtime.GOMAXPROCS(0) > 1 {
		return nil // goroutines on another processor would have to steal those that an event makes runnable
	}
	if l.others == 0 {
		set, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC) // which Go's poller need not know
		if err != nil {
			return os.NewSyscallError("epoll_create1", err)
		}
		l.others = set
		for _, w := range l.workers {
			// Without events: it is armed for one at a time, when lingering begins. Else whoever serves Sources
			// would hear of each.
			if err := w.epoll.Add(set, otherID, unix.EPOLLONESHOT); err != nil {
				return err
			}
		}
	}
	for _, fd := range others {
		if err := l.Heed(fd); err != nil {
			return err
		}
	}
	return nil
}

// Heed adds one to the others, until it is closed, if somebody lingers; one that is among them stays. It may be called while Run
// is at work, but not beside Linger or Close.
func (l *Loop) Heed(fd int) error {
	if l.others == 0 {
		return nil
	}
	err := sysEpollCtl(l.others, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("linger beside descriptor %d: %w", fd, err)
	}
	return nil
}

// lookFor is what linger waits by.
func (w *worker) lookFor(timeout time.Duration) (int, error) {
	return sysEpollWait(w.epoll.fd, w.events[:], int(timeout/time.Millisecond))
}

// linger pumps for events for as long as they come one soon after another.
func (w *worker) linger() error {
	if w.loop.others == 0 {
		return nil
	}
	if err := w.epoll.rearm(w.loop.others, otherID, unix.EPOLLIN|unix.EPOLLONESHOT); err != nil {
		return err
	}
	for range maxLinger {
		// Whom the last events have made runnable. Twice: every 61st time the scheduler looks first where it has
		// put us, and nobody else has run.
		runtime.Gosched()
		runtime.Gosched()
		n, err := w.waiter.Wait(lingering, w.look)
		if n == 0 || err != nil {
			return nil // Wait says what is wrong
		}
		other := false
		for i := range w.events[:n] {
			other = other || EventID(&w.events[i]) == otherID
		}
		if w.take(w.events[:n]); other {
			return nil
		}
	}
	return nil
}
