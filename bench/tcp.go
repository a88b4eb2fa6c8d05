package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// The loads make raw, blocking system calls on a thread of their own: Go's poller would add its own wake-ups to each round trip.

// Every request and every answer is one octet, as netperf's are.

// maxLatencies bounds the round trips of one sample: 8 MiB.
const maxLatencies = 1 << 20

// giveUp bounds a system call that waits for the network.
const giveUp = 3 * time.Second

// rrParams ask for round trips to the first of Ports, or, of connections, to each in turn, so that a
// second's connections do not run out of source ports while old ones are in TIME-WAIT.
type rrParams struct {
	Addr     netip.Addr
	Ports    []uint16
	Duration time.Duration
}

// rrResult is a number of round trips, the time they took, and their latencies. Failed ones are among
// neither, but their time counts.
type rrResult struct {
	Count, Failed int
	Seconds       float64
	P50, P99      time.Duration
}

// trips calls one again and again for a duration.
func trips(ctx context.Context, d time.Duration, one func(i int) error) (rrResult, error) {
	lat := make([]time.Duration, 0, 1<<16)
	var r rrResult
	var lastErr error
	begin := time.Now()
	now := begin
	for i := 0; now.Sub(begin) < d && len(lat) < maxLatencies && ctx.Err() == nil; i++ {
		err := one(i)
		end := time.Now()
		if err != nil {
			lastErr = err
			if r.Failed++; r.Failed > 1000 {
				break
			}
		} else {
			lat = append(lat, end.Sub(now))
		}
		now = end
	}
	r.Count, r.Seconds = len(lat), now.Sub(begin).Seconds()
	if r.Count == 0 {
		return r, fmt.Errorf("not one round trip: %w", lastErr)
	}
	slices.Sort(lat)
	r.P50, r.P99 = lat[len(lat)/2], lat[len(lat)*99/100]
	return r, nil
}

func opTCPRR(ctx context.Context, p rrParams, _ func(), _ <-chan struct{}) (any, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := dial(unix.SOCK_STREAM, netip.AddrPortFrom(p.Addr, p.Ports[0]))
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 1)
	return trips(ctx, p.Duration, func(int) error { return roundTrip(fd, buf) })
}

func opTCPCRR(ctx context.Context, p rrParams, _ func(), _ <-chan struct{}) (any, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	buf := make([]byte, 1)
	return trips(ctx, p.Duration, func(i int) error {
		fd, err := dial(unix.SOCK_STREAM, netip.AddrPortFrom(p.Addr, p.Ports[i%len(p.Ports)]))
		if err != nil {
			return err
		}
		return errors.Join(roundTrip(fd, buf), unix.Close(fd))
	})
}

// holdParams ask for Count conversations that have had one round trip and are idle then.
type holdParams struct {
	To    netip.AddrPort
	Count int
}

func opTCPHold(ctx context.Context, p holdParams, ready func(), release <-chan struct{}) (any, error) {
	return hold(ctx, unix.SOCK_STREAM, 1, p, ready, release)
}

func opUDPHold(ctx context.Context, p holdParams, ready func(), release <-chan struct{}) (any, error) {
	return hold(ctx, unix.SOCK_DGRAM, 3, p, ready, release)
}

// hold opens the conversations, each with as many tries, and keeps them until release.
func hold(ctx context.Context, kind, tries int, p holdParams, ready func(), release <-chan struct{}) (any, error) {
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	buf := make([]byte, 1)
	for len(fds) < p.Count && ctx.Err() == nil {
		fd, err := dial(kind, p.To)
		if err != nil {
			return nil, fmt.Errorf("conversation %d of %d: %w", len(fds)+1, p.Count, err)
		}
		fds = append(fds, fd)
		for i := 0; ; i++ {
			if err = roundTrip(fd, buf); err == nil {
				break
			}
			if i+1 >= tries {
				return nil, fmt.Errorf("conversation %d of %d: %w", len(fds), p.Count, err)
			}
		}
	}
	ready()
	select {
	case <-release:
	case <-ctx.Done():
	}
	return struct{}{}, nil
}

// dial makes a connected socket whose calls give up after a while.
func dial(kind int, to netip.AddrPort) (int, error) { return dialWithin(kind, to, giveUp) }

func dialWithin(kind int, to netip.AddrPort, d time.Duration) (int, error) {
	fd, err := socket(kind, to.Addr())
	if err != nil {
		return -1, err
	}
	tv := unix.NsecToTimeval(d.Nanoseconds())
	err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv))
	if err == nil {
		err = unix.Connect(fd, sockaddr(to))
		if errors.Is(err, unix.EINTR) {
			err = connected(fd)
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect %v: %w", to, err)
	}
	return fd, nil
}

// connected waits for a connect that one of Go's own signals has interrupted: a socket that gives up is not
// restarted by the kernel.
func connected(fd int) error {
	for end := time.Now().Add(giveUp); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(time.Until(end).Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR) && time.Now().Before(end):
			continue
		case err != nil:
			return err
		case n == 0:
			return unix.ETIMEDOUT
		}
		code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = unix.Errno(code)
		}
		return err
	}
}

// read and write are the system calls, again when interrupted.
func read(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Read(fd, buf)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func write(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Write(fd, buf)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func socket(kind int, addr netip.Addr) (int, error) {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	if kind == unix.SOCK_STREAM {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// roundTrip sends an octet and receives one.
func roundTrip(fd int, buf []byte) error {
	if _, err := write(fd, buf); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	n, err := read(fd, buf)
	if err == nil && n != 1 {
		err = errors.New("the connection has ended")
	}
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	return nil
}
