package relay

import (
	"errors"
	"io"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// turn is how many reads or writes a stream may do before the others have theirs.
	turn = 4

	// maxFill is how much is read from a socket at once, octets: what fills four of netstack's largest frames (TestAssumeLargestFrame of
	// package stack). A rest would be a frame of its own, which costs as much as a full one.
	maxFill = 4 * 65274
)

// smallRead is how much is read at once, octets, where little has come lately: requests and answers. It saves to ask
// first how much there is.
const smallRead = 4 << 10

// resetGrace is how long the container's end of a connection that the host has reset still sends what
// came before the RST: an early answer, say, to a request that nobody will read to its end. A kernel
// delivers what it had received by then, and netstack drops what it has not sent when it is aborted.
const resetGrace = 50 * time.Millisecond

// stream is one connection. Its worker alone touches it, but for the atomic fields.
//
// Each direction ends by itself (outDone, inDone); the stream ends when both have, or at
// once when either end is reset.
type stream struct {
	Joint
	end End
	fd  int

	hostEvents uint32 // of epoll, since the last pump
	readable   bool   // the socket may have octets or its end
	writable   bool   // the socket may take octets
	thorough   bool   // a short read does not tell that there is no more: FIN or an urgent octet has come
	outDone    bool   // container → host: FIN passed on
	inDone     bool   // host → container: FIN passed on
	small      bool   // the last read found less than smallRead octets
	passed     bool   // the container has been sent something
	rest       rest   // read from the host, and not taken by the container yet
	broken     error  // what ended the host's end before its time
	grace      *time.Timer
	finished   bool

	expired   atomic.Bool // the grace is over
	endFailed atomic.Bool // the container's end is over, in order or not
	wantRoom  atomic.Bool // Fill found no room
}

// onReady is called under netstack's locks.
func (s *stream) onReady(in, _, ended bool) {
	if ended {
		s.endFailed.Store(true)
	}
	if !in && !ended && !s.wantRoom.Load() {
		return // an acknowledgement; nobody waits for room
	}
	s.enqueue()
}

func (s *stream) mark(_ int, events uint32) { s.hostEvents |= events }

// pump moves what can be moved, within a turn.
func (s *stream) pump() {
	if s.finished {
		return
	}
	if s.aborted.Load() {
		s.finish(ErrAborted)
		return
	}
	if ev := s.hostEvents; ev != 0 {
		s.hostEvents = 0
		s.readable = s.readable || ev&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0
		s.writable = s.writable || ev&unix.EPOLLOUT != 0
		s.thorough = s.thorough || ev&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLPRI) != 0
		if ev&unix.EPOLLERR != 0 {
			s.breakHost(socketError(s.fd))
		}
	}
	if s.expired.Load() {
		s.finish(s.broken)
		return
	}
	if s.endFailed.Swap(false) {
		if err := s.end.Err(); err != nil {
			s.finish(err)
			return
		}
	}
	moreOut, err := s.outbound()
	if err != nil {
		s.finish(err)
		return
	}
	moreIn, err := s.inbound()
	if err != nil {
		s.finish(err)
		return
	}
	switch {
	case s.outDone && s.inDone && s.broken != nil:
		s.letGo()
	case s.outDone && s.inDone:
		s.finish(nil)
	case moreOut || moreIn:
		s.enqueue() // behind the others
	}
}

// breakHost notes that the host's end is no more, but for what there is to read of it.
func (s *stream) breakHost(err error) {
	if err != nil && s.broken == nil {
		s.broken, s.outDone, s.readable, s.thorough = err, true, true, true
	}
}

// letGo resets the container's end, as soon as what it was sent has had the time to get there.
func (s *stream) letGo() {
	if !s.passed {
		s.finish(s.broken)
	} else if s.grace == nil {
		s.grace = time.AfterFunc(resetGrace, func() {
			s.expired.Store(true)
			s.enqueue()
		})
	}
}

// outbound moves octets from the container to the host; more: there may be some left.
func (s *stream) outbound() (more bool, err error) {
	for range turn {
		if s.outDone || !s.writable {
			return false, nil
		}
		s.w.hostErr = nil
		n, err := s.end.Drain(s.w.write)
		s.countOut(n)
		switch {
		case s.w.hostErr != nil:
			s.breakHost(s.w.hostErr)
			return false, nil
		case err == nil:
		case err == unix.EAGAIN:
			return false, nil
		case err == io.EOF:
			s.outDone = true
			if err := sysShutdown(s.fd); err != nil && err != unix.ENOTCONN {
				return false, os.NewSyscallError("shutdown", err)
			}
			return false, nil
		default:
			return false, err
		}
	}
	return true, nil
}

// inbound moves octets from the host to the container.
func (s *stream) inbound() (more bool, err error) {
	for range turn {
		if len(s.rest.octets) > 0 {
			s.w.little = s.rest.octets
			took, err := s.fill(len(s.rest.octets), s.w.give)
			if err != nil || took == 0 {
				return false, err
			}
			s.w.loop.rests.took(&s.rest, took)
			continue
		}
		if s.inDone || !s.readable {
			return false, nil
		}
		if s.small {
			if err := s.readSmall(); err != nil {
				return false, err
			}
			continue
		}
		n, err := sysQueued(s.fd)
		if err != nil {
			return false, err
		}
		if n == 0 {
			if err := s.emptyOrEnd(); err != nil {
				return false, err
			}
			continue
		}
		s.small = n < smallRead
		took, err := s.fill(min(n, maxFill), s.w.read)
		if err != nil || took == 0 {
			return false, err
		}
		if took == n && !s.thorough {
			s.readable = false // what comes later is a new edge
		}
	}
	return s.readable || len(s.rest.octets) > 0, nil
}

// fill sends up to n octets that read provides to the container. It took none where there is no room.
func (s *stream) fill(n int, read func([]byte) (int, error)) (took int, err error) {
	s.w.hostErr = nil
	s.wantRoom.Store(true)
	took, err = s.end.Fill(n, read)
	s.countIn(took)
	switch {
	case s.w.hostErr != nil:
		return 0, s.w.hostErr
	case err == unix.EAGAIN:
		if s.broken != nil {
			s.letGo() // a container that does not read is not waited for
		}
		return 0, nil
	case err != nil:
		return 0, err
	}
	s.passed = true
	s.wantRoom.Store(false)
	return took, nil
}

// readSmall is one read of what there is, if it is little. What the container has no room for waits in rest.
func (s *stream) readSmall() error {
	b := s.w.buffer(smallRead)
	n, err := sysRead(s.fd, b)
	switch {
	case err == unix.EAGAIN:
		s.readable = false
		return nil
	case err != nil || n == 0:
		s.small = false
		return s.ended(n, err)
	}
	if n == len(b) {
		s.small = false
	} else if !s.thorough {
		s.readable = false
	}
	s.w.little = b[:n]
	took, err := s.fill(n, s.w.give)
	if err == nil && took < n {
		s.w.loop.rests.keep(&s.rest, b[took:n])
	}
	return err
}

// emptyOrEnd tells a socket with nothing to read from one whose peer has sent FIN.
func (s *stream) emptyOrEnd() error {
	n, err := sysPeek(s.fd)
	if err == unix.EAGAIN {
		s.readable = false
		return nil
	}
	return s.ended(n, err)
}

// ended takes what a socket with nothing to read any more has said: 0 octets or an error.
func (s *stream) ended(n int, err error) error {
	switch {
	case err != nil:
		s.breakHost(os.NewSyscallError("recv", err)) // which takes the error off the socket: what is left is the end
	case n == 0 && s.broken != nil:
		s.inDone = true // no FIN: a RST follows
	case n == 0:
		s.inDone = true
		if err := s.end.CloseWrite(); err != nil && !errors.Is(err, unix.ENOTCONN) {
			return err
		}
	}
	return nil
}

// finish closes both ends: in order for a nil err, else with RST.
func (s *stream) finish(err error) {
	if s.finished {
		return
	}
	s.finished = true
	if s.grace != nil {
		s.grace.Stop() // one that fires now finds s finished
	}
	s.w.remove(&s.entry)
	s.w.loop.rests.drop(&s.rest)
	if err == nil {
		_ = s.end.Close()
		sysClose(s.fd)
	} else {
		s.end.Abort()
		Reset(s.fd)
	}
	s.over(err)
}

// socketError takes the error that is pending on a socket.
func socketError(fd int) error {
	var v int32
	if err := sysGetsockopt(fd, unix.SOL_SOCKET, unix.SO_ERROR, unsafe.Pointer(&v), uint32(unsafe.Sizeof(v))); err != nil {
		return err
	}
	if v != 0 {
		return unix.Errno(v)
	}
	return nil
}

// writeHost is the write of cur's Drain: one writev.
func (w *worker) writeHost(pieces [][]byte) (int, error) {
	w.iov = w.iov[:0]
	for _, p := range pieces {
		v := unix.Iovec{Base: unsafe.SliceData(p)}
		v.SetLen(len(p))
		w.iov = append(w.iov, v)
	}
	n, err := sysWritev(w.cur.fd, w.iov)
	clear(w.iov)
	switch err {
	case nil:
		return n, nil
	case unix.EAGAIN:
		w.cur.writable = false // an edge tells when it is again
		return 0, err
	}
	w.hostErr = os.NewSyscallError("writev", err)
	return 0, w.hostErr
}

// readHost is the read of cur's Fill: SIOCINQ has promised len(p) octets.
func (w *worker) readHost(p []byte) (int, error) {
	n, err := sysRead(w.cur.fd, p)
	switch {
	case err != nil:
		w.hostErr = os.NewSyscallError("read", err)
		return 0, w.hostErr
	case n == 0:
		w.hostErr = io.ErrUnexpectedEOF
		return 0, w.hostErr
	}
	return n, nil
}

// giveLittle is the read of a Fill from little.
func (w *worker) giveLittle(p []byte) (int, error) {
	n := copy(p, w.little)
	w.little = w.little[n:]
	return n, nil
}
