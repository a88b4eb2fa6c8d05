package relay

import (
	"errors"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Epoll is an epoll set that is itself watched by Go's poller: whoever waits in it is a parked goroutine.
// A thread in epoll_wait would keep the scheduler's processor until sysmon takes it away, up to
// 10 ms later, and its wake-up is a switch of threads where this is one of goroutines.
type Epoll struct {
	fd   int
	file *os.File
	raw  syscall.RawConn

	// Of the Wait that is under way, and what it calls, made once.
	events []unix.EpollEvent
	n      int
	err    error
	try    func(uintptr) bool
}

// NewEpoll opens one; Close it.
func NewEpoll() (*Epoll, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	_ = unix.SetNonblock(fd, true) // os.NewFile hands only such to Go's poller
	e := &Epoll{fd: fd, file: os.NewFile(uintptr(fd), "epoll")}
	e.try = func(uintptr) bool {
		e.n, e.err = sysEpollWait(e.fd, e.events, 0)
		return e.n != 0 || e.err != nil
	}
	if e.raw, err = e.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, e.file.Close())
	}
	return e, nil
}

// Add watches fd for events (EPOLLIN …); what happens to it comes with id. Closing fd ends it.
func (e *Epoll) Add(fd int, id uint64, events uint32) error {
	ev := unix.EpollEvent{Events: events, Fd: int32(uint32(id)), Pad: int32(uint32(id >> 32))}
	return sysEpollCtl(e.fd, unix.EPOLL_CTL_ADD, fd, &ev)
}

// rearm watches an fd that was added for other events from now on.
func (e *Epoll) rearm(fd int, id uint64, events uint32) error {
	ev := unix.EpollEvent{Events: events, Fd: int32(uint32(id)), Pad: int32(uint32(id >> 32))}
	return sysEpollCtl(e.fd, unix.EPOLL_CTL_MOD, fd, &ev)
}

// Remove ends the watching of an fd that stays open.
func (e *Epoll) Remove(fd int) { _ = sysEpollCtl(e.fd, unix.EPOLL_CTL_DEL, fd, nil) }

// EventID is the id that Add was given.
func EventID(ev *unix.EpollEvent) uint64 {
	return uint64(uint32(ev.Fd)) | uint64(uint32(ev.Pad))<<32
}

// Wait returns how many of events it has filled: at least one, or 0 when the deadline has passed.
// One goroutine at a time may wait.
func (e *Epoll) Wait(events []unix.EpollEvent) (int, error) {
	e.events, e.n, e.err = events, 0, nil
	err := e.raw.Read(e.try)
	switch {
	case e.err != nil:
		return 0, os.NewSyscallError("epoll_wait", e.err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, nil
	}
	return e.n, err
}

// Poll is Wait without waiting.
func (e *Epoll) Poll(events []unix.EpollEvent) (int, error) { return sysEpollWait(e.fd, events, 0) }

// FD is readable when there are events.
func (e *Epoll) FD() int { return e.fd }

// SetDeadline makes Wait return at t at the latest, the one that is under way too; the zero time takes
// the deadline away. Any goroutine may call it.
func (e *Epoll) SetDeadline(t time.Time) { _ = e.file.SetReadDeadline(t) }

// Close closes the set. Nobody may be waiting.
func (e *Epoll) Close() error { return e.file.Close() }
