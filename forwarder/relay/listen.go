package relay

import (
	"net/netip"
	"strconv"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// acceptTurn is how many connections a listener may accept before the other jobs have their turn.
	acceptTurn = 64

	// A listener that gets no descriptor or memory for another connection tries again after leastPause, then
	// after twice that, and so on up to maxPause; or when a connection has ended.
	leastPause = 10 * time.Millisecond
	maxPause   = time.Second
)

// Listener accepts connections. Nothing but Close, or the end of Run, ends it.
type Listener struct {
	entry
	fd       int
	accepted func(fd int, from netip.AddrPort)

	// Under pumping:
	from   unix.RawSockaddrAny
	pause  time.Duration // the next one
	retry  *time.Timer   // made with the first one
	rests  bool          // it is one of the Loop's pauses, or was a moment ago
	closed bool
}

// Listen accepts from fd: a bound, listening, non-blocking stream socket (TCP or AF_UNIX), which belongs to the
// Listener from now on, also when it returns an error (it is closed then). accepted is given a non-blocking, close-on-exec
// socket that it owns, and its peer's address: an IPv4 one never mapped to IPv6, and none for AF_UNIX. A worker
// calls it, so it must not block, nor call Close.
//
// Where descriptors or memory are short (EMFILE, ENFILE, ENOBUFS, ENOMEM) accepting pauses, for a second at most.
func (l *Loop) Listen(fd int, accepted func(fd int, from netip.AddrPort)) (*Listener, error) {
	ln := &Listener{fd: fd, accepted: accepted}
	ln.w, ln.job = l.worker(), ln
	if err := ln.w.add(&ln.entry, unix.EPOLLIN, fd); err != nil {
		sysClose(fd)
		return nil, err
	}
	return ln, nil
}

// Close closes the socket. When it returns accepted is not called any more.
func (ln *Listener) Close() error {
	ln.w.pumping.Lock()
	defer ln.w.pumping.Unlock()
	ln.finish(nil)
	return nil
}

func (ln *Listener) finish(error) {
	if ln.closed {
		return
	}
	ln.closed = true
	if ln.retry != nil {
		ln.retry.Stop()
	}
	ln.w.loop.pauses.remove(ln)
	ln.w.remove(&ln.entry)
	sysClose(ln.fd)
}

func (ln *Listener) mark(int, uint32) {}

// pump accepts whom it finds, within a turn.
func (ln *Listener) pump() {
	if ln.rests {
		ln.rests = false
		ln.w.loop.pauses.remove(ln)
	}
	for range acceptTurn {
		if ln.closed {
			return
		}
		size := uint32(unsafe.Sizeof(ln.from))
		fd, err := sysAccept(ln.fd, &ln.from, &size)
		switch err {
		case nil:
			ln.pause = 0
			ln.accepted(fd, peerOf(&ln.from, size))
		case unix.EAGAIN:
			return
		case unix.EINTR, unix.ECONNABORTED, unix.EPERM, unix.EPROTO, unix.ENOPROTOOPT, unix.EOPNOTSUPP,
			unix.ENETDOWN, unix.ENETUNREACH, unix.ENONET, unix.EHOSTDOWN, unix.EHOSTUNREACH, unix.ETIMEDOUT, unix.ECONNRESET:
			// The one connection's own error, which is no longer in the queue (accept(2)).
		default:
			ln.rest()
			return
		}
	}
	ln.enqueue() // behind the others
}

// rest has accepting go on later. An error that is not known waits too: at worst it costs an attempt a second.
func (ln *Listener) rest() {
	ln.pause = min(max(2*ln.pause, leastPause), maxPause)
	ln.rests = true
	ln.w.loop.pauses.add(ln)
	if ln.retry == nil {
		ln.retry = time.AfterFunc(ln.pause, ln.enqueue)
	} else {
		ln.retry.Reset(ln.pause)
	}
}

// peerOf reads an address of size octets. One of AF_UNIX gives none.
func peerOf(sa *unix.RawSockaddrAny, size uint32) netip.AddrPort {
	if size < uint32(unsafe.Sizeof(sa.Addr.Family)) {
		return netip.AddrPort{}
	}
	switch sa.Addr.Family {
	case unix.AF_INET:
		in := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(in.Addr), swapped(in.Port))
	case unix.AF_INET6:
		in := (*unix.RawSockaddrInet6)(unsafe.Pointer(sa))
		addr := netip.AddrFrom16(in.Addr).Unmap()
		if in.Scope_id != 0 {
			addr = addr.WithZone(strconv.FormatUint(uint64(in.Scope_id), 10))
		}
		return netip.AddrPortFrom(addr, swapped(in.Port))
	}
	return netip.AddrPort{}
}

// pauses are the listeners that wait for a descriptor.
type pauses struct {
	mu      sync.Mutex
	waiting map[*Listener]struct{}
}

func (p *pauses) add(ln *Listener) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting == nil {
		p.waiting = make(map[*Listener]struct{})
	}
	p.waiting[ln] = struct{}{}
}

func (p *pauses) remove(ln *Listener) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.waiting, ln)
}

// wakeOne has one of them try again: a connection has ended.
func (p *pauses) wakeOne() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ln := range p.waiting {
		delete(p.waiting, ln)
		ln.enqueue()
		return
	}
}
