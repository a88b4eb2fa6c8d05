package bridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

// An Event tells that an interface has changed, or has come, or is gone.
type Event struct {
	Link Link // Bridge is not filled in
	Gone bool

	// Missed means that events were lost, because they came faster than they were read: List tells how things
	// are. The rest is zero then.
	Missed bool
}

// Watch calls f with each change of an interface in ns from the moment on in which it calls ready, until ctx ends; it
// returns ctx's error then. A veth whose other end's namespace has come to its end is gone: that is when nobody
// has it open any more, no descriptor of ours either. f is called by one goroutine, Watch's own.
func Watch(ctx context.Context, ns *netns.NS, ready func(), f func(Event)) error {
	fds, err := ns.CallFDs(ctx, Ops(), opListen, struct{}{}, nil)
	if err != nil {
		return fmt.Errorf("watch interfaces of %s: %w", ns, err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil { // for Go's poller
		closeFDs(fds)
		return err
	}
	file := os.NewFile(uintptr(fds[0]), "netlink")
	defer file.Close()
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	ready()
	buf := make([]byte, 64<<10) // the kernel's messages have at most 32 KiB
	for {
		var n int
		var from unix.Sockaddr
		var failed error
		err := conn.Read(func(fd uintptr) bool {
			n, from, failed = unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
			return !errors.Is(failed, unix.EAGAIN)
		})
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(failed, unix.ENOBUFS):
			f(Event{Missed: true})
			continue
		case errors.Is(failed, unix.EINTR):
			continue
		case err != nil || failed != nil:
			return fmt.Errorf("watch interfaces of %s: %w", ns, errors.Join(err, failed))
		}
		if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 {
			continue // not the kernel's, but of somebody inside
		}
		messages, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return fmt.Errorf("watch interfaces of %s: %w", ns, err)
		}
		for _, m := range messages {
			if e, ok := event(m); ok {
				f(e)
			}
		}
	}
}

func event(m syscall.NetlinkMessage) (Event, bool) {
	if m.Header.Type != unix.RTM_NEWLINK && m.Header.Type != unix.RTM_DELLINK {
		return Event{}, false
	}
	// A bridge tells in the same group, as a family of its own, of an interface that is no port of it any more.
	if len(m.Data) < unix.SizeofIfInfomsg || m.Data[0] != unix.AF_UNSPEC {
		return Event{}, false
	}
	link, err := netlink.LinkDeserialize((*unix.NlMsghdr)(&m.Header), m.Data)
	if err != nil {
		return Event{Missed: true}, true
	}
	return Event{Link: describe(link, ""), Gone: m.Header.Type == unix.RTM_DELLINK}, true
}

// listen makes a socket that hears of the namespace's interfaces.
func listen(context.Context, struct{}) (_ struct{}, files []*os.File, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return struct{}{}, nil, fmt.Errorf("netlink: %w", err)
	}
	file := os.NewFile(uintptr(fd), "netlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK}); err != nil {
		file.Close()
		return struct{}{}, nil, fmt.Errorf("netlink: %w", err)
	}
	return struct{}{}, []*os.File{file}, nil
}
