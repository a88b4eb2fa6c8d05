package relay

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
)

// Connect connects the non-blocking socket fd and waits for the outcome, at most until ctx
// ends. The error is what the kernel says, an errno; fd stays the caller's. Nothing but
// an entry in a table is held by a dial that hangs.
func (l *Loop) Connect(ctx context.Context, fd int, to unix.Sockaddr) error {
	switch err := unix.Connect(fd, to); err {
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
	return l.worker().await(ctx, fd)
}

// connected reports whether the outcome of a connect is there.
func connected(fd int) (bool, error) {
	if err := socketError(fd); err != nil {
		return true, os.NewSyscallError("connect", err)
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return true, os.NewSyscallError("getsockopt TCP_INFO", err)
	}
	const synSent, closed = 2, 7 // include/net/tcp_states.h
	switch info.State {
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
