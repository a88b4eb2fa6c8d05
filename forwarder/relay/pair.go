package relay

import (
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The sides of a pair.
const (
	hostSide      = 0
	containerSide = 1
)

const (
	// What is read from a side at once, octets. It begins with firstRead, doubles whenever the other side takes
	// all of so much, and becomes what that takes when it is less: a fast stream is moved in as few system calls
	// and wake-ups of its ends as the kernel's own buffers allow, and a slow one leaves little to keep.
	leastRead = 4 << 10
	firstRead = 256 << 10
	mostRead  = 4 << 20 // what net.ipv4.tcp_wmem lets a socket hold; and as much a direction may move in a turn

	// heldRead is the most that is read at once, octets, while the rests of a Loop together have reached maxHeld.
	heldRead = 64 << 10
)

// pair is a connection of which both ends are sockets of the kernel.
//
//	host ── recv ─▶ the worker's buffer ── send ─▶ container        FIN: shutdown(SHUT_WR), the second: close   RST: close with linger 0
//	host ◀── send ── the worker's buffer ◀── recv ── container
//
// What a side has not taken waits in the other's rest, and until it has gone nothing more is read there. A busy
// direction has a conduit in place of the buffer and the rest.
//
// Its worker alone touches it, but for the atomic fields. Each direction ends by itself; the pair ends
// when both have, or when either side is reset.
type pair struct {
	Joint
	sides    [2]side
	broken   error // what ended one side before its time
	grace    *time.Timer
	expired  atomic.Bool // the grace is over
	finished bool
}

// side is one of a pair's sockets.
type side struct {
	fd       int
	events   uint32 // of epoll, since the last pump
	rest     rest   // was read here; the other side has not taken it yet
	most     int    // to be read here at once
	readable bool   // it may have octets or its end
	writable bool   // it may take octets
	thorough bool   // a short read does not tell that there is no more
	ended    bool   // its FIN was passed on, or nobody is left to pass anything to
	gone     bool   // nothing can be sent to it any more
	urgent   bool   // an urgent octet has come here
	tcp      bool

	pipe *conduit // what is read here goes through it; nil: it is copied
	thin int      // how often in a row little came that way
}

// JoinSockets relays between two connected, non-blocking stream sockets (TCP or AF_UNIX) from now on. Both belong
// to the Loop afterwards, also when it returns an error (they are reset then, and Done is called).
// Where one of them is AF_UNIX, which has no RST, its peer sees the end of the stream in place of one.
func (l *Loop) JoinSockets(host, container int, o Options) (*Joint, error) {
	p := l.newPair(host, container, o)
	if err := p.watch(); err != nil {
		return nil, err
	}
	return &p.Joint, nil
}

func (l *Loop) newPair(host, container int, o Options) *pair {
	p := &pair{}
	p.w, p.job, p.options = l.worker(), p, o
	p.begin()
	for i, fd := range [2]int{host, container} {
		tcp := o.Prepared || Prepare(fd)
		// A read of an AF_UNIX socket is short also where descriptors came with the octets.
		p.sides[i] = side{fd: fd, most: firstRead, tcp: tcp, thorough: !tcp}
	}
	return p
}

// watch has the worker see to the pair from now on.
func (p *pair) watch() error {
	// EPOLLPRI: a read stops before an urgent octet. The first events come with the adding.
	err := p.w.add(&p.entry, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLPRI, p.sides[hostSide].fd, p.sides[containerSide].fd)
	if err != nil {
		p.finish(err)
	}
	return err
}

func (p *pair) mark(i int, events uint32) { p.sides[i].events |= events }

// pump moves what can be moved, within a turn.
func (p *pair) pump() {
	if p.finished {
		return
	}
	if p.aborted.Load() {
		p.finish(ErrAborted)
		return
	}
	for i := range p.sides {
		s := &p.sides[i]
		ev := s.events
		if ev == 0 {
			continue
		}
		s.events = 0
		s.readable = s.readable || ev&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0
		s.writable = s.writable || ev&unix.EPOLLOUT != 0
		s.thorough = s.thorough || ev&(unix.EPOLLPRI|unix.EPOLLRDHUP|unix.EPOLLHUP) != 0
		s.urgent = s.urgent || ev&unix.EPOLLPRI != 0
		if ev&unix.EPOLLERR != 0 {
			p.breakSide(i, socketError(s.fd))
		}
	}
	if p.expired.Load() {
		p.finish(p.broken)
		return
	}
	in, err := p.move(hostSide)
	if err != nil {
		p.finish(err)
		return
	}
	out, err := p.move(containerSide)
	if err != nil {
		p.finish(err)
		return
	}
	switch {
	case !p.sides[hostSide].ended || !p.sides[containerSide].ended:
		if in || out {
			p.enqueue() // behind the others
		}
	case p.broken != nil:
		p.letGo()
	default:
		p.finish(nil)
	}
}

// breakSide notes that a side is no more, but for what there is to read of it.
func (p *pair) breakSide(i int, err error) {
	if err == nil || p.broken != nil {
		return
	}
	p.broken = err
	s, other := &p.sides[i], &p.sides[1-i]
	s.gone, s.readable, s.thorough = true, true, true
	p.w.loop.rests.drop(&other.rest)
	p.unplug(other)
	other.ended = true // what it says interests nobody
}

// letGo resets both sides, as soon as the one that stands has been sent all, or has had the time to take it.
func (p *pair) letGo() {
	if p.grace != nil {
		return
	}
	for i := range p.sides {
		s, other := &p.sides[i], &p.sides[1-i]
		if s.gone {
			continue
		}
		unsent, err := sysUnsent(s.fd)
		arrived := unsent == 0 || !s.tcp // AF_UNIX keeps what was sent
		if err != nil || arrived && other.passed() {
			p.finish(p.broken)
			return
		}
	}
	p.grace = time.AfterFunc(resetGrace, func() {
		p.expired.Store(true)
		p.enqueue()
	})
}

// passed tells that all that has come to a side has been passed on, but for what the other does not take.
func (s *side) passed() bool {
	return s.rest.octets == nil && (s.pipe == nil || s.pipe.held == 0) && (s.ended || !s.readable)
}

// move moves octets from a side to the other; more: there may be some left.
func (p *pair) move(i int) (more bool, err error) {
	from, to := &p.sides[i], &p.sides[1-i]
	if from.pipe != nil {
		return p.pour(i)
	}
	moved := 0
	for range turn {
		if from.ended {
			return false, nil
		}
		if moved >= mostRead {
			break
		}
		if from.rest.octets != nil {
			n, err := p.send(1-i, from.rest.octets)
			if err != nil {
				return false, err
			}
			if p.w.loop.rests.took(&from.rest, n); from.rest.octets != nil {
				p.stuck()
				return false, nil
			}
		}
		if !from.readable {
			return false, nil
		}
		if !to.writable {
			p.stuck()
			return false, nil
		}
		b := p.w.buffer(from.most)
		n, err := sysRecv(from.fd, b)
		switch {
		case err == unix.EAGAIN:
			from.readable = false
			return false, nil
		case err != nil && p.broken != nil:
			return false, p.broken
		case err != nil:
			p.breakSide(i, os.NewSyscallError("recv", err)) // the error is off the socket now: what is left is the end
			continue
		case n == 0:
			if from.ended = true; to.ended {
				return false, nil // both sides are closed now, which tells it as well
			}
			return false, p.passEnd(to)
		}
		moved += n
		if n < len(b) && !from.thorough {
			from.readable = false // what comes later is a new edge
		}
		took, err := p.send(1-i, b[:n])
		if err != nil {
			return false, err
		}
		switch {
		case took < n:
			if from.most = max(took, leastRead); !from.ended {
				p.w.loop.rests.keep(&from.rest, b[took:n])
			}
		case n == from.most:
			from.most = min(2*n, mostRead)
			if n >= busyRead {
				if p.plug(from, to); from.pipe != nil {
					return p.pour(i)
				}
			}
		}
	}
	return from.readable || from.rest.octets != nil, nil
}

// stuck is for a side that does not take what is there for it. Where the other has been reset it is not waited for.
func (p *pair) stuck() {
	if p.broken != nil {
		p.letGo()
	}
}

// send gives a side what it takes of b.
func (p *pair) send(i int, b []byte) (int, error) {
	s := &p.sides[i]
	if !s.writable {
		return 0, nil
	}
	n, err := sysSend(s.fd, b)
	if n, err = p.sent(i, n, err); err == nil && n < len(b) {
		s.writable = false
	}
	return n, err
}

// sent books that a side has taken n octets, or why not.
func (p *pair) sent(i, n int, err error) (int, error) {
	s := &p.sides[i]
	switch {
	case err == unix.EAGAIN:
		s.writable = false // an edge tells when it is again
		return 0, nil
	case err != nil:
		err = os.NewSyscallError("send", err)
		if p.broken != nil {
			return 0, err // both sides
		}
		p.breakSide(i, err)
		return 0, nil
	}
	if i == containerSide {
		p.countIn(n)
	} else {
		p.countOut(n)
	}
	return n, nil
}

// passEnd passes a FIN on to a side; none where a RST will follow.
func (p *pair) passEnd(to *side) error {
	if p.broken != nil {
		return nil
	}
	if err := sysShutdown(to.fd); err != nil && err != unix.ENOTCONN {
		return os.NewSyscallError("shutdown", err)
	}
	return nil
}

// finish closes both sides: in order for a nil err, else with RST.
func (p *pair) finish(err error) {
	if p.finished {
		return
	}
	p.finished = true
	if p.grace != nil {
		p.grace.Stop() // one that fires now finds p finished
	}
	p.w.remove(&p.entry)
	for i := range p.sides {
		s := &p.sides[i]
		p.w.loop.rests.drop(&s.rest)
		p.unplug(s)
		if err == nil {
			sysClose(s.fd)
		} else {
			Reset(s.fd)
		}
	}
	p.over(err)
}
