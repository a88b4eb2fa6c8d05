package stack

import (
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Source is something else than a device that has events: a set of the host's sockets.
type Source struct {
	FD    int    // readable when there are events
	Serve func() // takes those that are there and returns; it does not block
}

// linger is how long a reader without a frame waits in the kernel for the next event before it parks. A
// round trip within it costs no hand-over between threads: Go's scheduler would put its processor to rest, wake sysmon
// when it takes it up again, and so run two threads for each event. Every goroutine that a frame or event has made
// runnable runs first; what the scheduler alone would notice, a timer or another socket, waits for as long at most.
const linger = time.Millisecond

// lingerer waits for a device and for the sources that were given to it.
type lingerer struct {
	sources []Source
	fds     []unix.PollFd // the device's, then the sources'
}

// pollable is a Device that has a file descriptor which is readable when there are frames.
type pollable interface{ FD() int }

// newLingerer returns nil where lingering makes no sense: the device has no descriptor, or there are more
// processors, so that others serve the sources meanwhile.
func newLingerer(dev Device, sources []Source) *lingerer {
	p, ok := dev.(pollable)
	if !ok || len(sources) == 0 || runtime.GOMAXPROCS(0) > 1 {
		return nil
	}
	l := &lingerer{sources: sources, fds: []unix.PollFd{{Fd: int32(p.FD()), Events: unix.POLLIN}}}
	for _, s := range sources {
		l.fds = append(l.fds, unix.PollFd{Fd: int32(s.FD), Events: unix.POLLIN})
	}
	return l
}

// wait serves the sources until the device has something, and returns false when nothing has happened
// for a while. It calls check after each event.
func (l *lingerer) wait(check func()) bool {
	timeout := unix.NsecToTimespec(int64(linger))
	for {
		// Whom the last event has made runnable. Twice: every 61st time the scheduler looks first where it has
		// put us, and nobody else has run.
		runtime.Gosched()
		runtime.Gosched()
		ts := timeout
		n, _, e := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&l.fds[0])), uintptr(len(l.fds)), uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 || n == 0 {
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
	}
}
