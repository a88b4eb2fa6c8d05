package forwarder

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"usernet/forwarder/relay"

	"golang.org/x/sys/unix"
)

// A poller waits for the host's sockets of all flows and published ports in one goroutine.
//
// It is level-triggered: a socket with more to read than one batch comes back at the end of
// the kernel's list of ready files, so that they take turns without any bookkeeping
// of ours, and nobody reads a socket once more only to be told that it is empty.
type poller struct {
	epoll *relay.Epoll

	mu      sync.RWMutex
	closed  bool
	sockets map[uint64]*socket // by a number that is never used again, unlike an fd
	last    uint64

	timed  func() bool         // whether anything may be over by itself, so that run has to tick
	asleep atomic.Bool         // wait has no timeout: nothing was timed
	events [64]unix.EpollEvent // run's

	serving sync.Mutex // ready is called for one socket at a time
	polled  [64]unix.EpollEvent
}

// newPoller opens what it needs; close it. Whoever makes something that timed tells of calls stir.
func newPoller(timed func() bool) (*poller, error) {
	epoll, err := relay.NewEpoll()
	if err != nil {
		return nil, err
	}
	return &poller{epoll: epoll, sockets: make(map[uint64]*socket), timed: timed}, nil
}

// add watches s until remove.
func (p *poller) add(s *socket) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return errStopped
	}
	p.last++
	s.id = p.last
	if err := p.epoll.Add(s.fd, s.id, unix.EPOLLIN); err != nil {
		return fmt.Errorf("watch socket: %w", err)
	}
	p.sockets[s.id] = s
	return nil
}

// remove forgets s; the kernel forgets it when it is closed.
func (p *poller) remove(s *socket) {
	p.mu.Lock()
	delete(p.sockets, s.id)
	p.mu.Unlock()
}

// stir makes run tick from now on, if it sleeps without a thought of idle flows.
func (p *poller) stir() {
	if p.asleep.Swap(false) {
		p.wake()
	}
}

// wake makes run call tick. It does nothing after close.
func (p *poller) wake() {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if !p.closed {
		p.epoll.SetDeadline(time.Unix(1, 0))
	}
}

// run calls ready for each socket that has something, with a reference held, and tick about once a second
// while something is timed and whenever wake was called. It returns when ctx has ended.
func (p *poller) run(ctx context.Context, ready func(*socket, uint32), tick func()) error {
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		p.wake()
		close(woken)
	})
	defer func() {
		if !stop() {
			<-woken
		}
	}()
	for p.sleep(); ctx.Err() == nil; {
		n, err := p.epoll.Wait(p.events[:])
		if err != nil {
			return err
		}
		p.serving.Lock()
		p.serve(p.events[:n], ready)
		p.serving.Unlock()
		if n == 0 { // the deadline: a second is over, or wake was called
			tick()
			p.sleep()
		}
	}
	return nil
}

// serve calls ready for each event. serving is held.
func (p *poller) serve(events []unix.EpollEvent, ready func(*socket, uint32)) {
	for i := range events {
		e := &events[i]
		p.mu.RLock()
		s := p.sockets[relay.EventID(e)]
		p.mu.RUnlock()
		if s != nil && s.acquire() {
			ready(s, e.Events)
			s.release()
		}
	}
}

// poll serves what is there, in run's place.
func (p *poller) poll(ready func(*socket, uint32)) {
	p.serving.Lock()
	defer p.serving.Unlock()
	if n, err := p.epoll.Poll(p.polled[:]); err == nil {
		p.serve(p.polled[:n], ready)
	}
}

// settle waits until nobody reads what has been removed.
func (p *poller) settle() {
	p.serving.Lock()
	defer p.serving.Unlock()
}

// sleep sets when run has to tick next: in a second, or not before there is something to end.
func (p *poller) sleep() {
	if !p.timed() {
		p.epoll.SetDeadline(time.Time{})
		p.asleep.Store(true) // behind it: the deadline of whoever stirs from now on stays
		if !p.timed() {
			return
		}
		// A flow began meanwhile, and who made it may have seen us awake.
	}
	p.asleep.Store(false)
	p.epoll.SetDeadline(time.Now().Add(time.Second))
}

func (p *poller) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	_ = p.epoll.Close()
}
