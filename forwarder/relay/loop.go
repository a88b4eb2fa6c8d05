package relay

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// End is the container's end of a connection. stack.Conn is one, and says what the methods do.
type End interface {
	Drain(write func(pieces [][]byte) (int, error)) (int, error)
	Fill(n int, read func(p []byte) (int, error)) (int, error)
	OnReady(func(in, out, ended bool))
	Err() error
	CloseWrite() error
	Close() error
	Abort()
}

// maxWorkers: more cores than this are rather needed by netstack and the host's kernel.
const maxWorkers = 4

// Loop relays any number of connections, and accepts them. Make it with NewLoop, then call Run.
type Loop struct {
	workers []*worker
	next    atomic.Uint32
	stats   counters
	rests   rests
	pauses  pauses
	others  int // an epoll set, see Linger; 0: nobody lingers
}

type counters struct {
	active, joined, aborted atomic.Int64
	octetsOut, octetsIn     atomic.Uint64
}

// Stats is a snapshot of what a Loop has counted.
type Stats struct {
	Active, Joined      int64  // connections now, and in all
	Aborted             int64  // of these, ended by RST or an error of either end
	OctetsOut, OctetsIn uint64 // container → host, host → container
}

// Stats may be called by any goroutine.
func (l *Loop) Stats() Stats {
	return Stats{
		Active: l.stats.active.Load(), Joined: l.stats.joined.Load(), Aborted: l.stats.aborted.Load(),
		OctetsOut: l.stats.octetsOut.Load(), OctetsIn: l.stats.octetsIn.Load(),
	}
}

// NewLoop opens what the workers need; nothing runs before Run. Close closes it.
func NewLoop() (*Loop, error) {
	l := &Loop{}
	for range min(runtime.GOMAXPROCS(0), maxWorkers) {
		w, err := newWorker(l)
		if err != nil {
			l.Close()
			return nil, fmt.Errorf("make a relay worker: %w", err)
		}
		l.workers = append(l.workers, w)
	}
	return l, nil
}

// Run relays until ctx ends, then aborts what is left, on both ends. It can be called once.
func (l *Loop) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	errs := make([]error, len(l.workers))
	for i, w := range l.workers {
		wg.Go(func() { errs[i] = w.run(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Close releases what NewLoop opened. Run must have ended, or never been called; it may be called again.
func (l *Loop) Close() {
	for _, w := range l.workers {
		w.close() // and no nil in their place: a Join that comes late must be told
	}
	if l.others != 0 {
		sysClose(l.others)
		l.others = 0
	}
}

// ErrStopped is what Join returns once Run has ended.
var ErrStopped = errors.New("relay has stopped")

// Sources calls each with a descriptor that is readable when sockets of the host have events, and a function
// that serves these, without blocking, in place of the goroutines of Run. Both are valid until Run ends.
func (l *Loop) Sources(each func(fd int, serve func())) {
	for _, w := range l.workers {
		each(w.epoll.FD(), w.poll)
	}
}

// worker picks the worker for another socket.
func (l *Loop) worker() *worker { return l.workers[l.next.Add(1)%uint32(len(l.workers))] }

// Prepare sets on a socket what a relay needs, and tells whether it is one of TCP. TCP_NODELAY: Nagle's delay is
// the sender's business. SO_OOBINLINE: an urgent octet stays in its place. SO_KEEPALIVE, with the host's own times, finds
// peers that vanished. A socket of TCP that was prepared before it listened gives all three to those that it accepts.
func Prepare(fd int) (tcp bool) {
	if sysSetsockopt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) != nil {
		return false // AF_UNIX has none of these
	}
	_ = sysSetsockopt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	_ = sysSetsockopt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	return true
}
