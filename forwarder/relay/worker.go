package relay

import (
	"context"
	"errors"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxEvents is how many events of the host's sockets are taken at once.
const maxEvents = 128

// worker serves the streams that were given to it, one at a time.
//
//	host's sockets ── epoll ──┐
//	                          ├── queue ── pump ── …
//	container's ends ─ wake ──┘
//
// The epoll descriptor is itself watched by Go's poller, so that a worker without work is a
// parked goroutine and not a thread in a system call that the scheduler has to get back.
type worker struct {
	loop *Loop
	file *os.File // the epoll descriptor, as Go's poller knows it
	raw  syscall.RawConn
	epfd int
	wake int // an eventfd in the epoll set

	events  [maxEvents]unix.EpollEvent
	iov     []unix.Iovec
	cur     *stream // being pumped
	hostErr error   // what the host's socket said during cur's Drain or Fill

	write func([][]byte) (int, error) // cur's writeHost and readHost, made once
	read  func([]byte) (int, error)

	mu      sync.Mutex
	queue   []*stream
	spare   []*stream
	streams map[uint64]*stream
	dials   map[uint64]chan struct{} // see Connect
	nextID  uint64
	asleep  bool
	stopped bool // no further stream or dial
	closed  bool
}

const wakeID = 0 // in an event: not a stream

func newWorker(l *Loop) (*worker, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	_ = unix.SetNonblock(epfd, true) // os.NewFile hands only such to Go's poller
	w := &worker{loop: l, epfd: epfd, file: os.NewFile(uintptr(epfd), "epoll"), streams: make(map[uint64]*stream), dials: make(map[uint64]chan struct{})}
	w.write, w.read = w.writeHost, w.readHost
	if w.raw, err = w.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, w.file.Close())
	}
	if w.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, errors.Join(os.NewSyscallError("eventfd", err), w.file.Close())
	}
	if err := w.watch(w.wake, wakeID, unix.EPOLLIN); err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

func (w *worker) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	w.stopped, w.closed = true, true
	_ = w.file.Close()
	_ = unix.Close(w.wake)
}

func (w *worker) watch(fd int, id uint64, mask uint32) error {
	ev := unix.EpollEvent{Events: mask | unix.EPOLLET&0xffffffff, Fd: int32(id), Pad: int32(id >> 32)}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(w.epfd, unix.EPOLL_CTL_ADD, fd, &ev))
}

// add begins to watch s's socket.
func (w *worker) add(s *stream) error {
	if err := prepare(s.fd); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		return ErrStopped
	}
	w.nextID++
	s.id = w.nextID
	if err := w.watch(s.fd, s.id, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP); err != nil {
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
		w.kick()
	}
}

// kick makes the epoll descriptor readable. The counter is never read: every write is an edge.
func (w *worker) kick() {
	one := [8]byte{1}
	_, _ = unix.Write(w.wake, one[:])
}

// run pumps until ctx ends, then aborts all streams.
func (w *worker) run(ctx context.Context) error {
	kicked := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		w.kick()
		close(kicked)
	})
	defer func() {
		if !stop() {
			<-kicked // the eventfd must not be closed under it
		}
	}()
	err := w.serve(ctx)
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

func (w *worker) serve(ctx context.Context) error {
	for ctx.Err() == nil {
		n, err := w.poll()
		if err != nil {
			return err
		}
		w.mark(n)
		for _, s := range w.take() {
			w.cur = s
			s.pump()
		}
		w.cur = nil
	}
	return nil
}

// take empties the queue. The slice is valid until the next call.
func (w *worker) take() []*stream {
	w.mu.Lock()
	defer w.mu.Unlock()
	batch := w.queue
	clear(w.spare[:cap(w.spare)])
	w.queue, w.spare = w.spare[:0], batch
	return batch
}

// poll returns the number of events in w.events. It blocks if there are none and nothing is queued.
func (w *worker) poll() (int, error) {
	w.mu.Lock()
	block := len(w.queue) == 0
	w.asleep = block
	w.mu.Unlock()
	if !block {
		return w.wait()
	}
	var n int
	var err error
	rerr := w.raw.Read(func(uintptr) bool {
		n, err = w.wait()
		return n != 0 || err != nil
	})
	w.mu.Lock()
	w.asleep = false
	w.mu.Unlock()
	if err == nil {
		err = rerr
	}
	return n, err
}

func (w *worker) wait() (int, error) {
	for {
		n, err := unix.EpollWait(w.epfd, w.events[:], 0)
		if err != unix.EINTR {
			return n, os.NewSyscallError("epoll_wait", err)
		}
	}
}

// mark notes what n events say on their streams and queues these.
func (w *worker) mark(n int) {
	for i := range w.events[:n] {
		ev := &w.events[i]
		id := uint64(uint32(ev.Fd)) | uint64(uint32(ev.Pad))<<32
		w.mu.Lock()
		s := w.streams[id]
		if d := w.dials[id]; d != nil {
			delete(w.dials, id)
			close(d)
		}
		w.mu.Unlock()
		if s == nil {
			continue // wakeID, or a stream that ended meanwhile
		}
		s.hostEvents |= ev.Events
		w.enqueue(s)
	}
}
