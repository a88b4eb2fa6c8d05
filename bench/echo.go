package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"

	"golang.org/x/sys/unix"
)

// echoParams ask for a server that sends everything back, on these ports of every IPv4 address, and on Who of every address
// of both kinds for one that tells each client its address, by TCP and by UDP.
type echoParams struct {
	TCP, UDP []uint16
	Who      uint16
}

// opEcho serves until it is released or the agent ends: one thread, which every conversation shares, so
// that a thousand idle ones cost the server little and each round trip is one wake-up.
func opEcho(ctx context.Context, p echoParams, ready func(), release <-chan struct{}) (any, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	e := &echo{listeners: map[int]bool{}, datagrams: map[int]bool{}, who: map[int]bool{}, buf: make([]byte, 64<<10)}
	defer e.close()
	var err error
	if e.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, err
	}
	// The wake-up of the end.
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, err
	}
	e.wake = pipe[0]
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	stopped := make(chan struct{})
	told := make(chan struct{})
	go func() {
		defer close(told)
		select {
		case <-ctx.Done():
		case <-release:
		case <-stopped:
		}
		unix.Write(pipe[1], []byte{0}) // an empty pipe takes an octet
	}()
	defer func() { close(stopped); <-told }()
	if err := e.add(e.wake); err != nil {
		return nil, err
	}
	all := netip.IPv4Unspecified()
	for _, port := range p.TCP {
		if err := e.listen(unix.SOCK_STREAM, netip.AddrPortFrom(all, port), e.listeners); err != nil {
			return nil, err
		}
	}
	for _, port := range p.UDP {
		if err := e.listen(unix.SOCK_DGRAM, netip.AddrPortFrom(all, port), e.datagrams); err != nil {
			return nil, err
		}
	}
	if p.Who != 0 {
		at := netip.AddrPortFrom(netip.IPv6Unspecified(), p.Who)
		if err := errors.Join(e.listen(unix.SOCK_STREAM, at, e.who), e.listen(unix.SOCK_DGRAM, at, e.who)); err != nil {
			return nil, err
		}
	}
	ready()
	return struct{}{}, e.loop()
}

type echo struct {
	epoll, wake          int
	listeners, datagrams map[int]bool
	who                  map[int]bool // both kinds
	conns                map[int]bool
	asked                map[int]string // what those connections are answered with that ask who they are
	buf                  []byte
}

func (e *echo) add(fd int) error {
	return unix.EpollCtl(e.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

func (e *echo) listen(kind int, at netip.AddrPort, into map[int]bool) error {
	fd, err := socket(kind|unix.SOCK_NONBLOCK, at.Addr())
	if err != nil {
		return err
	}
	into[fd] = true
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil {
		err = unix.Bind(fd, sockaddr(at))
	}
	if err == nil && kind == unix.SOCK_STREAM {
		err = unix.Listen(fd, 4096)
	}
	if err == nil {
		err = e.add(fd)
	}
	if err != nil {
		return fmt.Errorf("serve %v: %w", at, err)
	}
	return nil
}

func (e *echo) loop() error {
	e.conns, e.asked = map[int]bool{}, map[int]string{}
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(e.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		for _, ev := range events[:max(n, 0)] {
			fd := int(ev.Fd)
			switch {
			case fd == e.wake:
				return nil
			case e.listeners[fd]:
				e.accept(fd)
			case e.datagrams[fd]:
				e.datagram(fd)
			case e.who[fd]:
				e.tellWho(fd)
			default:
				e.stream(fd)
			}
		}
	}
}

func (e *echo) accept(l int) {
	fd, _, err := unix.Accept4(l, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err != nil {
		return // the client is gone already
	}
	e.keep(fd)
}

func (e *echo) keep(fd int) {
	if unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) != nil || e.add(fd) != nil {
		unix.Close(fd)
		return
	}
	e.conns[fd] = true
}

func (e *echo) stream(fd int) {
	n, err := unix.Read(fd, e.buf)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return
	}
	if n > 0 {
		if who, asked := e.asked[fd]; asked {
			unix.Write(fd, []byte(who)) // as below; the client closes
			return
		}
		// A round trip is an octet, for which there is always room.
		if m, err := unix.Write(fd, e.buf[:n]); err == nil && m == n {
			return
		}
	}
	delete(e.conns, fd)
	delete(e.asked, fd)
	unix.Close(fd)
}

func (e *echo) datagram(fd int) {
	n, from, err := unix.Recvfrom(fd, e.buf, 0)
	if err == nil {
		unix.Sendto(fd, e.buf[:n], 0, from) // a datagram may be lost
	}
}

// tellWho answers one client, of whichever kind fd is for.
func (e *echo) tellWho(fd int) {
	if conn, from, err := unix.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC); err == nil {
		e.asked[conn] = addrPort(from).String()
		e.keep(conn)
	} else if _, from, err := unix.Recvfrom(fd, e.buf, 0); err == nil {
		unix.Sendto(fd, []byte(addrPort(from).String()), 0, from) // a datagram may be lost
	}
}

func (e *echo) close() {
	for _, m := range []map[int]bool{e.listeners, e.datagrams, e.who, e.conns} {
		for fd := range m {
			unix.Close(fd)
		}
	}
	if e.epoll > 0 {
		unix.Close(e.epoll)
	}
}
