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
	switch err := sysConnect(fd, to); err {
	case nil:
		return nil
	case unix.EINPROGRESS, unix.EINTR:
	default:
		return os.NewSyscallError("connect", err)
	}
	// On loopback the outcome is there already.
	if done, err := connected(fd); done {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, unix.ETIMEDOUT)
	defer cancel()
	return l.worker().await(ctx, fd)
}

func sysConnect(fd int, to netip.AddrPort) error {
	var e unix.Errno
	port := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, to.Port()))
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
	if err := socketError(fd); err != nil {
		return true, os.NewSyscallError("connect", err)
	}
	var state struct { // the beginning of struct tcp_info
		State uint8
		_     [3]uint8
	}
	if err := sysGetsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, unsafe.Pointer(&state), uint32(unsafe.Sizeof(state))); err != nil {
		return true, err
	}
	const synSent, closed = 2, 7 // include/net/tcp_states.h
	switch state.State {
	case synSent:
		return false, nil
	case closed:
		// The error came between the two questions.
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
		w.nextID++
		id := w.nextID
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
