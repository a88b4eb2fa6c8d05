package tap

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// headerLen is the length in octets of struct virtio_net_hdr without num_buffers, which precedes
// every frame of a Queue.
const headerLen = 10

// stackVec is how many pieces of a frame are described on the stack. A frame of 64 KiB has a header, the
// protocols' headers and a few pieces of payload; more than this costs an allocation.
const stackVec = 32

// maxVec is the kernel's limit for one call (UIO_MAXIOV).
const maxVec = 1024

// A Queue is one queue of a TAP: a stack.Device. Every frame goes in one system call,
// without copies of ours.
//
// Read and Write use raw system calls, which never block here. Wait is Go's poller, so that whoever waits is
// a parked goroutine: a thread in ppoll keeps the scheduler's processor until sysmon takes it away. The
// poller is edge-triggered, and an edge between the Read that found nothing and the Wait would be lost
// unless Wait looked once more.
type Queue struct {
	fd       int
	header   bool // the kernel reads and writes the header; else we make and drop it
	offloads uint32
	file     *os.File // owns fd
	raw      syscall.RawConn
	gate     gate

	waits   func(uintptr) bool // Wait's, made once
	polls   [1]unix.PollFd     // Wait's: one goroutine waits
	pollErr error
}

func newQueue(fd int, header bool, offloads uint32) (*Queue, error) {
	if err := unix.SetNonblock(fd, true); err != nil { // os.NewFile hands only such to Go's poller
		unix.Close(fd)
		return nil, fmt.Errorf("set non-blocking: %w", err)
	}
	q := &Queue{fd: fd, header: header, offloads: offloads, file: os.NewFile(uintptr(fd), "tap")}
	q.waits = q.readable
	var err error
	if q.raw, err = q.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, q.file.Close())
	}
	q.gate.empty = make(chan struct{})
	return q, nil
}

// Read is stack.Device's.
func (q *Queue) Read(vec [][]byte) (int, error) {
	if !q.gate.enter() {
		return 0, os.ErrClosed
	}
	defer q.gate.leave()
	skip := 0
	if !q.header {
		clear(vec[0][:headerLen])
		skip = headerLen
	}
	n, err := transfer(unix.SYS_READV, q.fd, vec, skip)
	switch {
	case err == nil:
		return n + skip, nil
	case err == unix.EBADFD:
		return 0, errDeleted
	}
	return 0, err
}

// errDeleted is what is left to say of a queue whose interface is gone, be it alone or with its namespace.
var errDeleted = fmt.Errorf("the TAP was deleted: %w", unix.ENODEV)

// Write is stack.Device's.
func (q *Queue) Write(vec [][]byte) error {
	if !q.gate.enter() {
		return os.ErrClosed
	}
	defer q.gate.leave()
	skip := headerLen
	if q.header {
		skip = 0
	}
	_, err := transfer(unix.SYS_WRITEV, q.fd, vec, skip)
	return err
}

// transfer does one readv or writev of vec behind its first skip octets.
func transfer(trap uintptr, fd int, vec [][]byte, skip int) (int, error) {
	var few [stackVec]unix.Iovec
	iov := few[:]
	if len(vec) > stackVec {
		if len(vec) > maxVec {
			return 0, unix.EMSGSIZE
		}
		iov = make([]unix.Iovec, len(vec))
	}
	n := 0
	for _, b := range vec {
		if skip > 0 {
			cut := min(skip, len(b))
			b, skip = b[cut:], skip-cut
		}
		if len(b) > 0 {
			iov[n].Base = &b[0]
			iov[n].SetLen(len(b))
			n++
		}
	}
	for {
		r, _, errno := syscall.RawSyscall(trap, uintptr(fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(n))
		switch errno {
		case 0:
			return int(r), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// Wait is stack.Device's. It also fails when the interface has been deleted.
func (q *Queue) Wait() error {
	if !q.gate.enter() {
		return os.ErrClosed
	}
	defer q.gate.leave()
	q.pollErr = nil
	err := q.raw.Read(q.waits)
	switch {
	case q.pollErr != nil:
		return q.pollErr
	case errors.Is(err, os.ErrDeadlineExceeded): // Close
		return os.ErrClosed
	case err != nil:
		return fmt.Errorf("wait for frames: %w", err)
	}
	return nil
}

// readable tells whether there is a frame, or no sense in waiting for one.
func (q *Queue) readable(uintptr) bool {
	q.polls[0] = unix.PollFd{Fd: int32(q.fd), Events: unix.POLLIN}
	n, err := unix.Ppoll(q.polls[:], &unix.Timespec{}, nil)
	switch {
	case errors.Is(err, unix.EINTR):
		return true // Read will tell
	case err != nil:
		q.pollErr = fmt.Errorf("wait for frames: %w", err)
	case n == 0:
		return false
	case q.polls[0].Revents&unix.POLLIN == 0:
		q.pollErr = errDeleted
	}
	return true
}

// FD is the queue's descriptor, readable when there is a frame, until Close.
func (q *Queue) FD() int { return q.fd }

// Offloads is stack.Device's.
func (q *Queue) Offloads() uint32 { return q.offloads }

// Close is stack.Device's. It returns when no call is in the queue any more. A second call does nothing.
func (q *Queue) Close() error {
	if !q.gate.close() {
		return nil
	}
	err := q.file.SetReadDeadline(time.Unix(1, 0)) // ends Wait
	<-q.gate.empty
	return errors.Join(err, q.file.Close())
}

// A gate counts who is inside, so that descriptors are closed when nobody is: a number that
// was closed too early may be somebody else's by the time it is used. One atomic add each way.
type gate struct {
	n     atomic.Int64 // inside; shut is added to it by close
	once  sync.Once
	empty chan struct{} // closed when shut and nobody is inside
}

const shut = -1 << 62

func (g *gate) enter() bool {
	if g.n.Add(1) < 0 {
		g.leave()
		return false
	}
	return true
}

func (g *gate) leave() {
	if g.n.Add(-1) == shut {
		g.once.Do(func() { close(g.empty) })
	}
}

// close tells whether it was the first.
func (g *gate) close() bool {
	for {
		n := g.n.Load()
		if n < 0 {
			return false
		}
		if g.n.CompareAndSwap(n, n+shut) {
			if n == 0 {
				g.once.Do(func() { close(g.empty) })
			}
			return true
		}
	}
}
