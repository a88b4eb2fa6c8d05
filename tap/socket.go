package tap

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"usernet/portdriver/sockfile"
)

// etherLen is the length of an Ethernet header, octets.
const etherLen = 14

// clientBuffer is what may lie ready for a client that is not reading, in octets. With more a burst of one connection
// fits; the kernel grants at most net.core.wmem_max.
const clientBuffer = 4 << 20

// A Socket is a stack.Device at whose other end is a program with an Ethernet card of its own: User-Mode Linux with
// transport=bess, an emulator. It listens at a unix socket of type SOCK_SEQPACKET for one client. Each message is
// one frame without anything in front. What does not fit the MTU is dropped.
//
//	Wait ─ until the client connects ─▶ the socket's file is removed, Connected is closed
//	Wait, Read, Write ─ a Queue over the connection ─▶ ENODEV when the client hangs up
type Socket struct {
	file      *sockfile.File
	limit     int // of a frame, octets
	listener  *os.File
	raw       syscall.RawConn
	connected chan struct{}
	client    atomic.Pointer[Queue]
	left      error // of the file's removal
	gate      gate  // for accept: whoever waits there, and Close
}

// ListenSocket makes the socket's file, which only its owner may connect to, and takes what is left of a predecessor
// away. mtu is the IP MTU in octets.
func ListenSocket(path string, mtu int) (*Socket, error) {
	if mtu < minMTU || mtu > maxMTU {
		return nil, fmt.Errorf("MTU %d: a frame takes %d to %d octets", mtu, minMTU, maxMTU)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	file, fd, err := sockfile.ListenSeqpacket(path)
	if err != nil {
		return nil, err
	}
	s := &Socket{file: file, limit: mtu + etherLen, listener: os.NewFile(uintptr(fd), path), connected: make(chan struct{})}
	s.gate.empty = make(chan struct{})
	if s.raw, err = s.listener.SyscallConn(); err != nil {
		return nil, errors.Join(err, file.Remove(), s.listener.Close())
	}
	return s, nil
}

// Connected is closed once there is a client.
func (s *Socket) Connected() <-chan struct{} { return s.connected }

// Dir is the directory of the socket's file, in which that must be removable.
func (s *Socket) Dir() *os.File { return s.file.Dir() }

// Read is stack.Device's. Of a message that is no frame it returns less than an Ethernet header, which is how a stack
// hears of broken frames.
func (s *Socket) Read(vec [][]byte) (int, error) {
	q := s.client.Load()
	if q == nil {
		if !s.gate.enter() {
			return 0, os.ErrClosed
		}
		s.gate.leave()
		return 0, unix.EAGAIN
	}
	n, err := q.Read(vec)
	switch {
	case errors.Is(err, unix.ECONNRESET), err == nil && n == headerLen && hungUp(q.FD()):
		return 0, fmt.Errorf("the client of %s has hung up: %w", s.file.Path(), unix.ENODEV)
	case n > s.limit+headerLen:
		return headerLen, nil
	}
	return n, err
}

// hungUp tells an end from an empty message.
func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := unix.Ppoll(p, &unix.Timespec{}, nil)
	return err == nil && n > 0
}

// Write is stack.Device's. Before there is a client, and while that one does not read, frames are lost.
func (s *Socket) Write(vec [][]byte) error {
	if q := s.client.Load(); q != nil {
		return q.Write(vec)
	}
	return unix.ENOTCONN
}

// Wait is stack.Device's.
func (s *Socket) Wait() error {
	if q := s.client.Load(); q != nil {
		return q.Wait()
	}
	return s.accept()
}

// accept waits for the client. Whoever comes after it finds nothing to connect to.
func (s *Socket) accept() error {
	if !s.gate.enter() {
		return os.ErrClosed
	}
	defer s.gate.leave()
	fd, failed := -1, error(nil)
	err := s.raw.Read(func(listener uintptr) bool {
		fd, _, failed = unix.Accept4(int(listener), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		return !errors.Is(failed, unix.EAGAIN)
	})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded): // Close
		return os.ErrClosed
	case errors.Is(failed, unix.EINTR), errors.Is(failed, unix.ECONNABORTED):
		return nil // the reader comes again
	case err != nil || failed != nil:
		return fmt.Errorf("wait for a client at %s: %w", s.file.Path(), errors.Join(err, failed))
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, clientBuffer) // a wish
	q, err := newQueue(fd, false, 0)
	if err != nil {
		return err
	}
	s.left = errors.Join(s.file.Remove(), s.listener.Close())
	s.client.Store(q)
	close(s.connected)
	return nil
}

// Offloads is stack.Device's.
func (*Socket) Offloads() uint32 { return 0 }

// Close is stack.Device's. It removes the socket's file if no client has come. A second call does nothing.
func (s *Socket) Close() error {
	if !s.gate.close() {
		return nil
	}
	_ = s.listener.SetReadDeadline(time.Unix(1, 0)) // ends accept, unless that has closed it
	<-s.gate.empty
	if q := s.client.Load(); q != nil {
		return errors.Join(q.Close(), s.left)
	}
	return errors.Join(s.file.Remove(), s.listener.Close())
}
