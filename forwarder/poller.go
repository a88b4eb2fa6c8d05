package forwarder

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A poller waits for the host's sockets of all flows in one goroutine.
//
// It is level-triggered: a flow with more to read than one batch comes back at the end of
// the kernel's list of ready files, so that the flows take turns without any bookkeeping
// of ours, and nobody reads a socket once more only to be told that it is empty.
type poller struct {
	fd, wakeFD int

	mu     sync.RWMutex
	closed bool
	flows  map[uint64]*flow // by a number that is never used again, unlike an fd
	last   uint64

	asleep atomic.Bool // wait has no timeout: there was no flow
	events [64]unix.EpollEvent
}

// newPoller opens what it needs; close it.
func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("eventfd", err)
	}
	p := &poller{fd: fd, wakeFD: wake, flows: make(map[uint64]*flow)}
	if err := p.ctl(unix.EPOLL_CTL_ADD, wake, 0); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// ctl adds or changes the interest in fd, whose events carry id.
func (p *poller) ctl(op, fd int, id uint64) error {
	e := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(uint32(id)), Pad: int32(uint32(id >> 32))}
	if err := unix.EpollCtl(p.fd, op, fd, &e); err != nil {
		return fmt.Errorf("watch socket: %w", os.NewSyscallError("epoll_ctl", err))
	}
	return nil
}

// add watches fl's socket until remove.
func (p *poller) add(fl *flow) error {
	if err := p.addFD(fl); err != nil {
		return err
	}
	if p.asleep.Swap(false) {
		p.wake() // it sleeps without a thought of idle flows
	}
	return nil
}

func (p *poller) addFD(fl *flow) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return errStopped
	}
	p.last++
	fl.id = p.last
	if err := p.ctl(unix.EPOLL_CTL_ADD, fl.fd, fl.id); err != nil {
		return err
	}
	p.flows[fl.id] = fl
	return nil
}

// remove forgets fl; the kernel forgets its socket when that is closed.
func (p *poller) remove(fl *flow) {
	p.mu.Lock()
	delete(p.flows, fl.id)
	p.mu.Unlock()
}

// wake makes run call tick. It does nothing after close.
func (p *poller) wake() {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.closed {
		return
	}
	one := [8]byte{1}
	_, _ = unix.Write(p.wakeFD, one[:]) // EAGAIN: it is awake enough
}

// run calls ready for each flow that has something, with a reference held, and tick about once a second
// while there are flows and whenever wake was called. It returns when ctx has ended.
func (p *poller) run(ctx context.Context, ready func(*flow, uint32), tick func()) error {
	stop := context.AfterFunc(ctx, p.wake)
	defer stop()
	const step = int(time.Second / time.Millisecond)
	lastTick := time.Now()
	for ctx.Err() == nil {
		timeout := step
		p.asleep.Store(true)
		if p.len() == 0 {
			timeout = -1
		} else {
			p.asleep.Store(false)
		}
		n, err := unix.EpollWait(p.fd, p.events[:], timeout)
		p.asleep.Store(false)
		if err == unix.EINTR {
			continue
		} else if err != nil {
			return os.NewSyscallError("epoll_wait", err)
		}
		woken := false
		for _, e := range p.events[:n] {
			id := uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32
			if id == 0 {
				var b [8]byte
				_, _ = unix.Read(p.wakeFD, b[:])
				woken = true
				continue
			}
			p.mu.RLock()
			fl := p.flows[id]
			p.mu.RUnlock()
			if fl != nil && fl.acquire() {
				ready(fl, e.Events)
				fl.release()
			}
		}
		if woken || time.Since(lastTick) >= time.Second {
			lastTick = time.Now()
			tick()
		}
	}
	return nil
}

func (p *poller) len() int {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return len(p.flows)
}

func (p *poller) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	unix.Close(p.wakeFD)
	unix.Close(p.fd)
}
