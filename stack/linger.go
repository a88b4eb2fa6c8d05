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
// runnable runs first; what the scheduler alone would notice, a timer or
// another socket, waits for as long where traffic pauses, and under steady traffic until sysmon looks, 10 to 20 ms.
const linger = time.Millisecond

// Before it lets the kernel put the thread to sleep, the lingerer looks again and again for a while, if that has
// paid lately: an idle processor takes tens of microseconds to come back, in a virtual machine most of all, and a round
// trip waits for that twice. It yields between two looks, so that nobody who shares its processor waits for it.
// The price is the time of a processor that would be idle else, while events come less than spinFor apart.
const (
	// spinFor bounds the looking. It is the time of a round trip through a server nearby.
	spinFor = 100 * time.Microsecond

	// spinWorth is how many of 256 of the last waits, roughly, must have ended within spinFor.
	spinWorth = 160

	// A yield that took longer than spinShared has let somebody run. The processor is not idle then, and a thread that
	// sleeps comes back sooner than one that yields. Past spinTaken it was somebody with much to do: no spinning for
	// spinPause.
	spinShared = 10 * time.Microsecond
	spinTaken  = 200 * time.Microsecond
	spinPause  = 250 * time.Millisecond
)

// lingerer waits for a device and for the sources that were given to it.
type lingerer struct {
	sources []Source
	fds     []unix.PollFd // the device's, then the sources'
	short   int           // of 256 of the last waits: those that ended within spinFor
	pause   time.Time     // no spinning until then
	slept   uint          // how often an event was not there yet when it was looked for
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
	for {
		// Whom the last event has made runnable. Twice: every 61st time the scheduler looks first where it has
		// put us, and nobody else has run.
		runtime.Gosched()
		runtime.Gosched()
		n, e := l.event()
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

// event returns how many of fds have events, after linger at the latest.
func (l *lingerer) event() (int, unix.Errno) {
	n, e := l.poll(0)
	if n != 0 || e != 0 {
		l.note(true)
		return n, e
	}
	l.slept++
	begin := time.Now()
	if l.spins(begin) {
		for last := begin; last.Sub(begin) <= spinFor; {
			unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
			n, e = l.poll(0)
			now := time.Now()
			took := now.Sub(last)
			if took > spinTaken {
				l.pause = now.Add(spinPause)
			}
			if n != 0 || e != 0 {
				l.note(true)
				return n, e
			}
			if took > spinShared {
				break
			}
			last = now
		}
	}
	n, e = l.poll(linger)
	l.note(n != 0 && time.Since(begin) <= spinFor)
	return n, e
}

// spins reports whether it is worth while not to sleep.
func (l *lingerer) spins(now time.Time) bool { return l.short >= spinWorth && now.After(l.pause) }

// note remembers whether a wait was a short one.
func (l *lingerer) note(short bool) {
	l.short -= l.short / 8
	if short {
		l.short += 256 / 8
	}
}

func (l *lingerer) poll(timeout time.Duration) (int, unix.Errno) {
	ts := unix.NsecToTimespec(int64(timeout))
	n, _, e := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&l.fds[0])), uintptr(len(l.fds)), uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}
