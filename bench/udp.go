package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// opUDPRR makes round trips of one octet, which counts up so that a late answer is not taken for another's.
func opUDPRR(ctx context.Context, p rrParams, _ func(), _ <-chan struct{}) (any, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := dial(unix.SOCK_DGRAM, netip.AddrPortFrom(p.Addr, p.Ports[0]))
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	lost := unix.NsecToTimeval((200 * time.Millisecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &lost); err != nil {
		return nil, err
	}
	ask, answer := make([]byte, 1), make([]byte, 1)
	return trips(ctx, p.Duration, func(i int) error {
		ask[0] = byte(i)
		if _, err := write(fd, ask); err != nil {
			return err
		}
		for {
			if _, err := read(fd, answer); err != nil {
				return err
			}
			if answer[0] == ask[0] {
				return nil
			}
		}
	})
}

// A flood is datagrams of one size from one socket to one other. Each begins with the number of the
// run, so that what is left of an earlier one is not counted. The client of the network process (the container, or of a
// published port whoever speaks to it) sends the first datagram, a hello, so that the flow is known in both directions.

// floodParams are one side of a flood: of the client To is the address to say hello to, of the other Listen is the port.
type floodParams struct {
	To       netip.AddrPort
	Listen   uint16
	Run      uint64
	Size     int // octets of payload, at least 8
	Duration time.Duration
	Rate     int // datagrams a second; 0: as fast as the sender can
}

// sent and received are the two sides' accounts. Seconds of received lie between the first and the last arrival.
type sent struct {
	Count   int
	Failed  int // refused by the sender's own kernel
	Seconds float64
}

type received struct {
	Count   int
	Octets  int64
	Seconds float64
	Buffer  int // octets of SO_RCVBUF that the receiver got
}

const (
	sendBatch = 32 // datagrams of a sendmmsg
	recvBatch = 64 // of a recvmmsg
	// quiet is how long the receiver waits for stragglers: more than any queue on the way holds.
	quiet = 300 * time.Millisecond
	// recvBuffer is asked of the receiver's socket, so that the receiver's own scheduling loses little.
	recvBuffer = 8 << 20
	helloSize  = 8
)

// mmsghdr is the kernel's struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// open makes the socket of this side, connected once the other side is known.
func (p floodParams) open() (int, error) {
	if p.Size < helloSize || p.Size > 65507 {
		return -1, fmt.Errorf("a datagram of %d octets", p.Size)
	}
	if p.To.IsValid() {
		return dial(unix.SOCK_DGRAM, p.To)
	}
	fd, err := socket(unix.SOCK_DGRAM, netip.IPv4Unspecified())
	if err == nil {
		if err = unix.Bind(fd, sockaddr(netip.AddrPortFrom(netip.IPv4Unspecified(), p.Listen))); err != nil {
			unix.Close(fd)
			err = fmt.Errorf("listen on UDP port %d: %w", p.Listen, err)
		}
	}
	return fd, err
}

func (p floodParams) hello() []byte { return binary.BigEndian.AppendUint64(nil, p.Run) }

// awaitHello connects a listening socket to the one that says hello.
func (p floodParams) awaitHello(ctx context.Context, fd int) error {
	tv := unix.NsecToTimeval((100 * time.Millisecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	buf := make([]byte, helloSize)
	for end := time.Now().Add(giveUp); time.Now().Before(end) && ctx.Err() == nil; {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err == nil && n == helloSize && binary.BigEndian.Uint64(buf) == p.Run {
			return unix.Connect(fd, from)
		}
	}
	return fmt.Errorf("no datagram came from the client within %v", giveUp)
}

func opUDPSend(ctx context.Context, p floodParams, ready func(), _ <-chan struct{}) (any, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := p.open()
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	ready()
	if !p.To.IsValid() {
		if err := p.awaitHello(ctx, fd); err != nil {
			return nil, err
		}
	}
	payload := make([]byte, p.Size)
	copy(payload, p.hello())
	iov := unix.Iovec{Base: &payload[0]}
	iov.SetLen(len(payload))
	batch := make([]mmsghdr, sendBatch)
	for i := range batch {
		batch[i].hdr.Iov = &iov
		batch[i].hdr.SetIovlen(1)
	}
	var s sent
	begin := time.Now()
	for ctx.Err() == nil {
		since := time.Since(begin)
		if since >= p.Duration {
			break
		}
		n := sendBatch
		if p.Rate > 0 {
			// What is due by now; a sender that was not run catches up by at most a batch at a time.
			due := int(since.Seconds() * float64(p.Rate))
			n = min(due-s.Count-s.Failed, sendBatch)
			if n < p.Rate/2000 || n <= 0 {
				time.Sleep(200 * time.Microsecond)
				continue
			}
		}
		m, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&batch[0])), uintptr(n), 0, 0, 0)
		if errno != 0 {
			if errno != unix.EINTR {
				s.Failed++ // ENOBUFS, or an ICMP error of an earlier one
			}
			continue
		}
		s.Count += int(m)
	}
	s.Seconds = time.Since(begin).Seconds()
	runtime.KeepAlive(&iov)
	return s, nil
}

func opUDPRecv(ctx context.Context, p floodParams, ready func(), _ <-chan struct{}) (any, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := p.open()
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, recvBuffer) != nil {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, recvBuffer); err != nil {
			return nil, err
		}
	}
	var r received
	if r.Buffer, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil {
		return nil, err
	}
	tick := unix.NsecToTimeval((50 * time.Millisecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tick); err != nil {
		return nil, err
	}
	buf := make([]byte, recvBatch*p.Size)
	iovs, batch := make([]unix.Iovec, recvBatch), make([]mmsghdr, recvBatch)
	for i := range batch {
		iovs[i].Base = &buf[i*p.Size]
		iovs[i].SetLen(p.Size)
		batch[i].hdr.Iov = &iovs[i]
		batch[i].hdr.SetIovlen(1)
	}
	ready()
	begin := time.Now()
	var first, latest time.Time
	for ctx.Err() == nil {
		now := time.Now()
		if first.IsZero() {
			if now.Sub(begin) > p.Duration+giveUp {
				break
			}
			if p.To.IsValid() {
				unix.Write(fd, p.hello()) // again each tick, since it may be lost
			}
		} else if now.Sub(first) > p.Duration && now.Sub(latest) > quiet {
			break
		}
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&batch[0])), recvBatch, unix.MSG_WAITFORONE, 0, 0)
		if errno != 0 {
			if errno != unix.EAGAIN && errno != unix.EINTR && errno != unix.ECONNREFUSED {
				return nil, errno
			}
			continue
		}
		now = time.Now()
		for i := range int(n) {
			size := int(batch[i].n)
			if size != p.Size || binary.BigEndian.Uint64(buf[i*p.Size:]) != p.Run {
				continue
			}
			if first.IsZero() {
				first = now
			}
			latest = now
			r.Count++
			r.Octets += int64(size)
		}
	}
	if r.Count == 0 {
		return nil, errors.New("no datagram arrived")
	}
	r.Seconds = latest.Sub(first).Seconds()
	runtime.KeepAlive(iovs)
	return r, nil
}
