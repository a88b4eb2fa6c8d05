package relay

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxEvents is how many events of the host's sockets are taken at once.
const maxEvents = 128

// worker serves the streams that were given to it, one at a time.
//
//	host's sockets ── epoll ── watch ── mark ──┐
//	                                           ├── queue ── pump ── …
//	container's ends ───── onReady ── serve ───┘
//
// Two goroutines pump: watch, which has an event of the host's at hand already, and serve, which is woken for
// what happens at a container's end, under whose locks nothing may be pumped. pumping keeps them apart.
type worker struct {
	loop   *Loop
	epoll  *Epoll
	events [maxEvents]unix.EpollEvent // watch's

	pumping sync.Mutex // held while a stream is pumped; guards the following
	polled  [maxEvents]unix.EpollEvent
	iov     []unix.Iovec
	cur     *stream                     // being pumped
	hostErr error                       // what the host's socket said during cur's Drain or Fill
	write   func([][]byte) (int, error) // cur's writeHost and readHost, made once
	read    func([]byte) (int, error)

	wake chan struct{} // tells serve that the queue is not empty

	mu      sync.Mutex
	queue   []*stream
	spare   []*stream
	streams map[uint64]*stream
	dials   map[uint64]chan struct{} // see Connect
	nextID  uint64
	asleep  bool // serve waits for wake
	stopped bool
	closed  bool
}

func newWorker(l *Loop) (*worker, error) {
	epoll, err := NewEpoll()
	if err != nil {
		return nil, err
	}
	w := &worker{
		loop: l, epoll: epoll, wake: make(chan struct{}, 1),
		streams: make(map[uint64]*stream), dials: make(map[uint64]chan struct{}),
	}
	w.write, w.read = w.writeHost, w.readHost
	return w, nil
}

func (w *worker) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	w.stopped, w.closed = true, true
	_ = w.epoll.Close()
}

func (w *worker) watchLocked(fd int, id uint64, mask uint32) error {
	return w.epoll.Add(fd, id, mask|unix.EPOLLET&0xffffffff)
}

// add begins to watch s's socket.
func (w *worker) add(s *stream) error {
	prepare(s.fd)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		return ErrStopped
	}
	w.nextID++
	s.id = w.nextID
	if err := w.watchLocked(s.fd, s.id, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP); err != nil {
		return err
	}
	w.streams[s.id] = s
	return nil
}

// remove forgets s; its socket leaves the epoll set when it is closed.
func (w *worker) remove(s *stream) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.streams, s.id)
}

// enqueue has s pumped soon. Any goroutine may call it, with any lock held but w.mu.
func (w *worker) enqueue(s *stream) {
	if s.queued.Swap(true) {
		return
	}
	w.mu.Lock()
	w.queue = append(w.queue, s)
	wake := w.asleep
	w.asleep = false
	w.mu.Unlock()
	if wake {
		w.wake <- struct{}{} // has room: asleep was true once since serve took the last one
	}
}

// run pumps until ctx ends, then aborts all streams.
func (w *worker) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { w.epoll.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	watched := make(chan error, 1)
	go func() {
		defer cancel()
		watched <- w.watch(ctx)
	}()
	w.serve(ctx)
	err := <-watched
	w.mu.Lock()
	w.stopped = true
	for id, d := range w.dials {
		delete(w.dials, id)
		close(d)
	}
	left := make([]*stream, 0, len(w.streams))
	for _, s := range w.streams {
		left = append(left, s)
	}
	w.mu.Unlock()
	for _, s := range left {
		s.finish(ErrStopped)
	}
	return err
}

// watch pumps for the host's events.
func (w *worker) watch(ctx context.Context) error {
	for ctx.Err() == nil {
		n, err := w.epoll.Wait(w.events[:])
		if err != nil {
			return err
		}
		w.pumping.Lock()
		w.mark(w.events[:n])
		w.pump()
		w.pumping.Unlock()
	}
	return nil
}

// poll pumps for the host's events that are there, in watch's place.
func (w *worker) poll() {
	w.pumping.Lock()
	defer w.pumping.Unlock()
	if n, err := w.epoll.Poll(w.polled[:]); err == nil {
		w.mark(w.polled[:n])
	}
	w.pump()
}

// serve pumps for the container's ends.
func (w *worker) serve(ctx context.Context) {
	for {
		w.pumping.Lock()
		w.pump()
		w.pumping.Unlock()
		w.mu.Lock()
		w.asleep = len(w.queue) == 0
		asleep := w.asleep
		w.mu.Unlock()
		if !asleep {
			continue
		}
		select {
		case <-w.wake:
		case <-ctx.Done():
			return
		}
	}
}

// pump pumps what was queued when it was called; pumping is held.
func (w *worker) pump() {
	w.mu.Lock()
	batch := w.queue
	w.queue, w.spare = w.spare[:0], batch
	w.mu.Unlock()
	for _, s := range batch {
		w.cur = s
		s.pump()
	}
	w.cur = nil
	clear(batch) // streams that have ended are not held until the slice is used again
}

// mark notes what events say on their streams and queues these.
func (w *worker) mark(events []unix.EpollEvent) {
	for i := range events {
		ev := &events[i]
		id := EventID(ev)
		w.mu.Lock()
		s := w.streams[id]
		if d := w.dials[id]; d != nil {
			delete(w.dials, id)
			close(d)
		}
		w.mu.Unlock()
		if s == nil {
			continue // a dial, or a stream that ended meanwhile
		}
		s.hostEvents |= ev.Events
		w.enqueueHere(s)
	}
}

// enqueueHere is enqueue by whoever will pump right away.
func (w *worker) enqueueHere(s *stream) {
	if s.queued.Swap(true) {
		return
	}
	w.mu.Lock()
	w.queue = append(w.queue, s)
	w.mu.Unlock()
}
