package inside

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

// This file, routing.go and turn.go run inside the namespace: in the helper, or on a visiting thread.

const (
	opSetup = "inside.setup"
	opMake  = "inside.sockets"
	opUndo  = "inside.undo"
)

// Ops are what this package does inside; a program adds them to the table of its helper, once. One such table
// serves one namespace, as it remembers what it has changed there.
func Ops() netns.Ops {
	s := new(site)
	return netns.Ops{
		opSetup: netns.Handle(s.setup),
		opMake:  netns.Handle(makeSockets),
		opUndo:  netns.Handle(s.undo),
	}
}

// setupArgs and setupReply are what Open and a repair ask and hear.
type setupArgs struct {
	IPv6  bool
	First bool // Open asks: send a socket for sock_diag, and what is told once
}

type setupReply struct {
	Why       [2]string     // per family: why a client's address cannot be kept; "" where it can
	Errno     [2]unix.Errno // of these, where there is one
	Ephemeral [2]uint16     // the first time
}

// setup may be done again: it puts back what is missing.
func (s *site) setup(ctx context.Context, a setupArgs) (r setupReply, files []*os.File, err error) {
	if a.First {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		if err != nil {
			return r, nil, fmt.Errorf("socket for sock_diag: %w", err)
		}
		files = append(files, os.NewFile(uintptr(fd), "sock_diag"))
		r.Ephemeral = ephemeral() // a sandbox may close /proc later
	}
	netns.AtEnd(ctx, opUndo, func() { s.takeDown() })
	for i, err := range s.setUp(ctx, a.IPv6) {
		if err != nil {
			r.Why[i] = err.Error()
			errors.As(err, &r.Errno[i])
		}
	}
	return r, files, nil
}

func (s *site) undo(ctx context.Context, _ struct{}) (struct{}, []*os.File, error) {
	netns.AtEnd(ctx, opUndo, nil)
	return struct{}{}, nil, s.takeDown()
}

// makeArgs ask for a batch.
type makeArgs struct {
	Kind  Kind
	Count int
}

func makeSockets(_ context.Context, a makeArgs) (_ struct{}, files []*os.File, err error) {
	for range a.Count {
		f, err := makeSocket(a.Kind)
		if err != nil {
			if len(files) > 0 { // some are better than none, and the next batch will tell
				break
			}
			return struct{}{}, nil, fmt.Errorf("socket in the namespace: %w", err)
		}
		files = append(files, f)
	}
	return struct{}{}, files, nil
}

type option struct {
	level, name int
	what        string
	value       int
}

var (
	plainOptions = []option{ // of TCP: what relay.Prepare sets
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, "TCP_NODELAY", 1}, // what comes has waited where it was sent, if it had to
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, "SO_OOBINLINE", 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, "SO_KEEPALIVE", 1},
	}
	transparent4 = append([]option{{unix.IPPROTO_IP, unix.IP_TRANSPARENT, "IP_TRANSPARENT", 1}}, transparentOptions...)
	transparent6 = append([]option{{unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, "IPV6_TRANSPARENT", 1}}, transparentOptions...)

	transparentOptions = []option{
		{unix.SOL_SOCKET, unix.SO_MARK, "SO_MARK", Mark},
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, "SO_REUSEADDR", 1},
		{unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, "IP_BIND_ADDRESS_NO_PORT", 1}, // of IPv6 as well
	}
)

func makeSocket(k Kind) (*os.File, error) {
	family, typ, proto := unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP
	options := [][]option{plainOptions}
	if k.UDP {
		typ, proto, options = unix.SOCK_DGRAM, unix.IPPROTO_UDP, nil
	}
	if k.V6 {
		family = unix.AF_INET6
	}
	switch {
	case k.Transparent && k.V6:
		options = append(options, transparent6)
	case k.Transparent:
		options = append(options, transparent4)
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return nil, err
	}
	// Made blocking and changed behind the File's back: one that knew would be given to the poller, and would make
	// the socket blocking again where its number is asked for.
	f := os.NewFile(uintptr(fd), "socket")
	for _, some := range options {
		for _, o := range some {
			if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
				f.Close()
				return nil, fmt.Errorf("%s: %w", o.what, err)
			}
		}
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ephemeral is the range of ports that the namespace's kernel picks from; where it does not tell, Linux's own.
func ephemeral() [2]uint16 {
	raw, _ := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if f := strings.Fields(string(raw)); len(f) == 2 {
		low, err1 := strconv.ParseUint(f[0], 10, 16)
		high, err2 := strconv.ParseUint(f[1], 10, 16)
		if err1 == nil && err2 == nil {
			return [2]uint16{uint16(low), uint16(high)}
		}
	}
	return [2]uint16{32768, 60999}
}
