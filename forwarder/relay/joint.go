package relay

import (
	"errors"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Options are what a Joint may be given.
type Options struct {
	// Done, if not nil, is called when both ends have been closed: nil for an orderly end. It must not block.
	Done func(err error)

	Count *Count // the octets are added here too, unless nil

	// Prepared tells of the sockets to be joined that they are of TCP and have what Prepare sets.
	Prepared bool
}

// Count counts the octets of any number of Joints.
type Count struct {
	In, Out atomic.Uint64 // host → container, container → host
}

// ErrAborted is what Options.Done gets after Abort.
var ErrAborted = errors.New("connection was aborted")

// Joint is two ends that a Loop has joined.
type Joint struct {
	entry
	aborted atomic.Bool
	options Options
}

// Abort ends it with RST on both ends soon. Any goroutine may call it, any number of times, also after the end.
func (j *Joint) Abort() {
	if !j.aborted.Swap(true) {
		j.enqueue()
	}
}

func (j *Joint) begin() {
	stats := &j.w.loop.stats
	stats.joined.Add(1)
	stats.active.Add(1)
}

// over tells that both ends are closed.
func (j *Joint) over(err error) {
	stats := &j.w.loop.stats
	if err != nil {
		stats.aborted.Add(1)
	}
	stats.active.Add(-1)
	j.w.loop.pauses.wakeOne()
	if j.options.Done != nil {
		j.options.Done(err)
	}
}

func (j *Joint) countIn(n int) {
	j.w.loop.stats.octetsIn.Add(uint64(n))
	if c := j.options.Count; c != nil {
		c.In.Add(uint64(n))
	}
}

func (j *Joint) countOut(n int) {
	j.w.loop.stats.octetsOut.Add(uint64(n))
	if c := j.options.Count; c != nil {
		c.Out.Add(uint64(n))
	}
}

// Join relays between end and the connected, non-blocking TCP socket fd from now on. Both belong to the Loop
// afterwards, also when it returns an error (they are aborted then, and Done is called).
func (l *Loop) Join(end End, fd int, o Options) (*Joint, error) {
	s := &stream{end: end, fd: fd}
	s.w, s.job, s.options = l.worker(), s, o
	s.begin()
	// Until the socket is watched too, s counts as queued already, so that nobody pumps it.
	s.queued.Store(true)
	end.OnReady(s.onReady)
	if !o.Prepared {
		Prepare(fd)
	}
	// EPOLLPRI: a read stops before an urgent octet.
	if err := s.w.add(&s.entry, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLPRI, fd); err != nil {
		s.finish(err)
		return nil, err
	}
	s.queued.Store(false)
	s.enqueue()
	return &s.Joint, nil
}

// Reset closes a socket with RST, where it is one of TCP.
func Reset(fd int) {
	linger := unix.Linger{Onoff: 1}
	_ = sysSetLinger(fd, &linger)
	sysClose(fd)
}
