package relay

import (
	"context"
	"encoding/binary"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Connect connects the non-blocking TCP socket fd and waits for the outcome, at most for as long as timeout and
// until ctx ends. The error is what the kernel says, an errno; unix.ETIMEDOUT after timeout. fd stays the
// caller's. Nothing but an entry in a table is held by a dial that hangs.
func (l *Loop) Connect(ctx context.Context, fd int, to netip.AddrPort, timeout time.Duration) error {
	if done, err := l.StartConnect(fd, to); done {
		return err
	}
	return l.AwaitConnect(ctx, fd, timeout)
}

// StartConnect is Connect without waiting: done tells that the outcome is there, which is err. On loopback, and so between
// an address of a namespace and itself, it always is, unless the listener's queue is full. Else AwaitConnect tells it.
func (l *Loop) StartConnect(fd int, to netip.AddrPort) (done bool, err error) {
	switch err := sysConnect(fd, to); err {
	case nil:
		return true, nil
	case unix.EINPROGRESS, unix.EINTR:
	default:
		return true, os.NewSyscallError("connect", err)
	}
	return connected(fd)
}

// AwaitConnect waits for the outcome of a StartConnect, as Connect does.
func (l *Loop) AwaitConnect(ctx context.Context, fd int, timeout time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, unix.ETIMEDOUT)
	defer cancel()
	return l.worker().await(ctx, fd)
}

// swapped turns a port of a sockaddr, which is big-endian, into a number, and back.
func swapped(port uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], port)
	return binary.NativeEndian.Uint16(b[:])
}

func sysConnect(fd int, to netip.AddrPort) error {
	var e unix.Errno
	port := swapped(to.Port())
	if to.Addr().Is4() {
		sa := unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: to.Addr().As4()}
		_, _, e = unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unix.SizeofSockaddrInet4)
	} else {
		sa := unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: to.Addr().As16()}
		_, _, e = unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unix.SizeofSockaddrInet6)
	}
	if e != 0 {
		return e
	}
	return nil
}

// connected reports whether the outcome of a connect is there.
func connected(fd int) (bool, error) {
	var state struct { // the beginning of struct tcp_info
		State uint8
		_     [3]uint8
	}
	if err := sysGetsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, unsafe.Pointer(&state), uint32(unsafe.Sizeof(state))); err != nil {
		return true, err
	}
	// An error counts only where it has ended the connection, so that the state is asked for first.
	const synSent, closed = 2, 7 // include/net/tcp_states.h
	switch state.State {
	case synSent:
		return false, nil
	case closed:
		if err := socketError(fd); err != nil {
			return true, os.NewSyscallError("connect", err)
		}
		return true, os.NewSyscallError("connect", unix.ECONNABORTED)
	}
	return true, nil
}

// await waits for fd's connect in w's epoll set, which fd has left when it returns.
func (w *worker) await(ctx context.Context, fd int) error {
	for {
		ready := make(chan struct{})
		w.mu.Lock()
		if w.stopped {
			w.mu.Unlock()
			return ErrStopped
		}
		id := w.idLocked()
		w.dials[id] = ready
		err := w.watchLocked(fd, id, unix.EPOLLOUT)
		if err != nil {
			delete(w.dials, id)
		}
		w.mu.Unlock()
		if err != nil {
			return err
		}
		select {
		case <-ready:
		case <-ctx.Done():
		}
		w.mu.Lock()
		delete(w.dials, id)
		stopped := w.stopped
		if !stopped {
			w.epoll.Remove(fd)
		}
		w.mu.Unlock()
		switch done, err := connected(fd); {
		case done:
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case stopped:
			return ErrStopped
		}
	}
}
