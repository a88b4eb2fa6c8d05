package stack

import (
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"usernet/stack/spin"
)

// A Source is something else than a device that has events: a set of the host's sockets.
type Source struct {
	FD    int    // readable when there are events
	Serve func() // takes those that are there and returns; it does not block
}

// linger is how long a reader without a frame waits in the kernel for the next event before it parks. A
// round trip within it costs no hand-over between threads: Go's scheduler would put its processor to rest, wake sysmon
// when it takes it up again, and so run two threads for each event. Every goroutine that a frame or event has made
// runnable runs first; what the scheduler alone would notice, a timer or
// another socket, waits for as long where traffic pauses, and under steady traffic until sysmon looks, 10 to 20 ms.
const linger = time.Millisecond

// maxLinger is how many events in a row a reader takes so where there are others, whose timers and sockets wait for as
// long: some milliseconds.
const maxLinger = 64

// lingerer waits for a device and for the sources that were given to it.
type lingerer struct {
	sources []Source
	fds     []unix.PollFd // the device's, the sources', then those of others
	waiter  spin.Waiter
	look    func(time.Duration) (int, error) // poll, made once
}

// pollable is a Device that has a file descriptor which is readable when there are frames.
type pollable interface{ FD() int }

// newLingerer returns nil where lingering makes no sense: the device has no descriptor, or there are more
// processors, so that others serve the sources meanwhile.
func newLingerer(dev Device, sources []Source, others []int) *lingerer {
	p, ok := dev.(pollable)
	if !ok || len(sources) == 0 || runtime.GOMAXPROCS(0) > 1 {
		return nil
	}
	l := &lingerer{sources: sources, fds: []unix.PollFd{{Fd: int32(p.FD()), Events: unix.POLLIN}}}
	for _, s := range sources {
		l.fds = append(l.fds, unix.PollFd{Fd: int32(s.FD), Events: unix.POLLIN})
	}
	for _, fd := range others {
		l.fds = append(l.fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	l.look = l.poll
	return l
}

// wait serves the sources until the device has something, and returns false when nothing has happened
// for a while or somebody else has something to do. It calls check after each event.
func (l *lingerer) wait(check func()) bool {
	others := l.fds[1+len(l.sources):]
	for n := 0; n < maxLinger || len(others) == 0; n++ {
		// Whom the last event has made runnable. Twice: every 61st time the scheduler looks first where it has
		// put us, and nobody else has run.
		runtime.Gosched()
		runtime.Gosched()
		ready, err := l.waiter.Wait(linger, l.look)
		if err == unix.EINTR {
			continue
		}
		if err != nil || ready == 0 {
			return false
		}
		for i := range l.sources {
			if l.fds[i+1].Revents != 0 {
				l.sources[i].Serve()
			}
		}
		check()
		if l.fds[0].Revents != 0 {
			return true
		}
		for i := range others {
			if others[i].Revents != 0 {
				return false
			}
		}
	}
	return false
}

// poll returns how many of fds have events.
func (l *lingerer) poll(timeout time.Duration) (int, error) {
	ts := unix.NsecToTimespec(int64(timeout))
	n, _, e := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&l.fds[0])), uintptr(len(l.fds)), uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}
