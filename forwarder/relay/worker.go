package relay

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"usernet/stack/spin"
)

// maxEvents is how many events of the host's sockets are taken at once.
const maxEvents = 128

// job is what a worker serves: a stream, a pair or a listener. Both methods are called with pumping held.
type job interface {
	mark(socket int, events uint32) // notes what epoll says of one of its sockets, by number
	pump()                          // does what can be done, within a turn; again for each enqueue
	finish(err error)               // ends it with an error; called once Run has ended, and does nothing after the end
}

// entry is what a worker knows of a job.
type entry struct {
	w      *worker
	id     uint64
	job    job
	queued atomic.Bool
}

// enqueue has the job pumped soon. Any goroutine may call it, with any lock held but w.mu.
func (e *entry) enqueue() { e.w.enqueue(e) }

// worker serves the jobs that were given to it, one at a time.
//
//	sockets ──────── epoll ── watch ── mark ──┐
//	                                          ├── queue ── pump ── …
//	container's ends ──── onReady ── serve ───┘
//
// Two goroutines pump: watch, which has an event of a socket at hand already, and serve, which is woken for
// what happens at a container's end, under whose locks nothing may be pumped. pumping keeps them apart.
type worker struct {
	loop   *Loop
	epoll  *Epoll
	events [maxEvents]unix.EpollEvent // watch's, and the next two
	waiter spin.Waiter
	look   func(time.Duration) (int, error) // lookFor, made once

	pumping sync.Mutex // held while a job is pumped; guards the following
	shared  []byte     // see buffer
	polled  [maxEvents]unix.EpollEvent
	iov     []unix.Iovec

	conduits conduits
	cur      *stream                     // being pumped, where it is one
	hostErr  error                       // what the host's socket said during cur's Drain or Fill
	write    func([][]byte) (int, error) // cur's writeHost and readHost, made once
	read     func([]byte) (int, error)
	little   []byte                    // what give gives
	give     func([]byte) (int, error) // giveLittle, made once

	wake chan struct{} // tells serve that the queue is not empty

	mu      sync.Mutex
	queue   []*entry
	spare   []*entry
	jobs    map[uint64]*entry
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
		jobs: make(map[uint64]*entry), dials: make(map[uint64]chan struct{}),
		conduits: newConduits(),
	}
	w.write, w.read, w.give, w.look = w.writeHost, w.readHost, w.giveLittle, w.lookFor
	return w, nil
}

func (w *worker) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	w.stopped, w.closed = true, true
	w.conduits.close()
	_ = w.epoll.Close()
}

func (w *worker) watchLocked(fd int, id uint64, mask uint32) error {
	return w.epoll.Add(fd, id, mask|unix.EPOLLET&0xffffffff)
}

// socketBits are the lowest bits of an id, which number the sockets of one job.
const socketBits = 1

func (w *worker) idLocked() uint64 {
	w.nextID += 1 << socketBits
	return w.nextID
}

// add begins to watch e's sockets, all of them before anybody hears of one.
func (w *worker) add(e *entry, mask uint32, fds ...int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		return ErrStopped
	}
	e.id = w.idLocked()
	for i, fd := range fds {
		if err := w.watchLocked(fd, e.id+uint64(i), mask); err != nil {
			return err // the one before leaves the set as it is closed
		}
	}
	w.jobs[e.id] = e
	return nil
}

// remove forgets e; its sockets leave the epoll set when they are closed.
func (w *worker) remove(e *entry) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.jobs, e.id)
}

func (w *worker) enqueue(e *entry) {
	if e.queued.Swap(true) {
		return
	}
	w.mu.Lock()
	if w.stopped {
		w.mu.Unlock()
		return
	}
	w.queue = append(w.queue, e)
	wake := w.asleep
	w.asleep = false
	w.mu.Unlock()
	if wake {
		w.wake <- struct{}{} // has room: asleep was true once since serve took the last one
	}
}

// buffer is what pairs copy through, one at a time: n octets, or fewer where too many are held back already.
func (w *worker) buffer(n int) []byte {
	if w.loop.rests.full() {
		n = min(n, heldRead)
	}
	if len(w.shared) < n {
		w.shared = make([]byte, n)
	}
	return w.shared[:n]
}

// run pumps until ctx ends, then aborts all jobs.
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
	left := make([]*entry, 0, len(w.jobs))
	for _, e := range w.jobs {
		left = append(left, e)
	}
	w.mu.Unlock()
	w.pumping.Lock() // whoever serves the Sources may still be at work
	defer w.pumping.Unlock()
	for _, e := range left {
		e.job.finish(ErrStopped)
	}
	return err
}

// watch pumps for the sockets' events.
func (w *worker) watch(ctx context.Context) error {
	for ctx.Err() == nil {
		n, err := w.epoll.Wait(w.events[:])
		if err != nil {
			return err
		}
		w.take(w.events[:n])
		if err := w.linger(); err != nil {
			return err
		}
	}
	return nil
}

// take pumps for events.
func (w *worker) take(events []unix.EpollEvent) {
	w.pumping.Lock()
	defer w.pumping.Unlock()
	w.mark(events)
	w.pump()
}

// poll pumps for the sockets' events that are there, in watch's place.
func (w *worker) poll() {
	w.pumping.Lock()
	defer w.pumping.Unlock()
	if n, err := w.epoll.Poll(w.polled[:]); err == nil {
		w.mark(w.polled[:n])
	}
	w.pump()
}

// serve pumps for the container's ends, and what is not through after its turn.
func (w *worker) serve(ctx context.Context) {
	for {
		w.pumping.Lock()
		w.pump()
		w.pumping.Unlock()
		for !w.sleep() {
			if ctx.Err() != nil {
				return
			}
			// Streams that always have more must neither keep the others' events nor other goroutines waiting.
			runtime.Gosched()
			w.poll()
		}
		select {
		case <-w.wake:
		case <-ctx.Done():
			return
		}
	}
}

// sleep tells that the queue is empty, and that wake is needed from now on.
func (w *worker) sleep() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asleep = len(w.queue) == 0
	return w.asleep
}

// pump pumps what was queued when it was called; pumping is held.
func (w *worker) pump() {
	w.mu.Lock()
	batch := w.queue
	w.queue, w.spare = w.spare[:0], batch
	w.mu.Unlock()
	for _, e := range batch {
		e.queued.Store(false)
		w.cur, _ = e.job.(*stream)
		e.job.pump()
	}
	w.cur = nil
	clear(batch) // jobs that have ended are not held until the slice is used again
}

// mark notes what events say on their jobs and queues these.
func (w *worker) mark(events []unix.EpollEvent) {
	for i := range events {
		ev := &events[i]
		id := EventID(ev)
		w.mu.Lock()
		e := w.jobs[id&^(1<<socketBits-1)]
		if d := w.dials[id]; d != nil {
			delete(w.dials, id)
			close(d)
		}
		w.mu.Unlock()
		if e == nil {
			continue // a dial, or a job that ended meanwhile
		}
		e.job.mark(int(id&(1<<socketBits-1)), ev.Events)
		w.enqueueHere(e)
	}
}

// enqueueHere is enqueue by whoever will pump right away.
func (w *worker) enqueueHere(e *entry) {
	if e.queued.Swap(true) {
		return
	}
	w.mu.Lock()
	w.queue = append(w.queue, e)
	w.mu.Unlock()
}
