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

// A poller waits for the host's sockets of all flows in one goroutine.
//
// It is level-triggered: a flow with more to read than one batch comes back at the end of
// the kernel's list of ready files, so that the flows take turns without any bookkeeping
// of ours, and nobody reads a socket once more only to be told that it is empty.
type poller struct {
	epoll *relay.Epoll

	mu     sync.RWMutex
	closed bool
	flows  map[uint64]*flow // by a number that is never used again, unlike an fd
	last   uint64

	asleep atomic.Bool         // wait has no timeout: there was no flow
	events [64]unix.EpollEvent // run's

	serving sync.Mutex // ready is called for one flow at a time
	polled  [64]unix.EpollEvent
}

// newPoller opens what it needs; close it.
func newPoller() (*poller, error) {
	epoll, err := relay.NewEpoll()
	if err != nil {
		return nil, err
	}
	return &poller{epoll: epoll, flows: make(map[uint64]*flow)}, nil
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
	if err := p.epoll.Add(fl.fd, fl.id, unix.EPOLLIN); err != nil {
		return fmt.Errorf("watch socket: %w", err)
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
	if !p.closed {
		p.epoll.SetDeadline(time.Unix(1, 0))
	}
}

// run calls ready for each flow that has something, with a reference held, and tick about once a second
// while there are flows and whenever wake was called. It returns when ctx has ended.
func (p *poller) run(ctx context.Context, ready func(*flow, uint32), tick func()) error {
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
func (p *poller) serve(events []unix.EpollEvent, ready func(*flow, uint32)) {
	for i := range events {
		e := &events[i]
		p.mu.RLock()
		fl := p.flows[relay.EventID(e)]
		p.mu.RUnlock()
		if fl != nil && fl.acquire() {
			ready(fl, e.Events)
			fl.release()
		}
	}
}

// poll serves what is there, in run's place.
func (p *poller) poll(ready func(*flow, uint32)) {
	p.serving.Lock()
	defer p.serving.Unlock()
	if n, err := p.epoll.Poll(p.polled[:]); err == nil {
		p.serve(p.polled[:n], ready)
	}
}

// sleep sets when run has to tick next: in a second, or not before there is a flow.
func (p *poller) sleep() {
	p.asleep.Store(true)
	if p.len() == 0 {
		p.epoll.SetDeadline(time.Time{})
		if p.len() == 0 {
			return
		}
		// One was added meanwhile, by somebody who may have seen us awake.
	}
	p.asleep.Store(false)
	p.epoll.SetDeadline(time.Now().Add(time.Second))
}

func (p *poller) len() int {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return len(p.flows)
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
