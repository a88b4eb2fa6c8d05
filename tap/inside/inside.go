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

// This file, routing.go and the names of operations run inside the namespace: in the helper, or on a visiting thread.

const (
	opSetup = "inside.setup"
	opMake  = "inside.sockets"
	opUndo  = "inside.undo"
)

// Ops are what this package does inside; a program adds them to the table of its helper.
func Ops() netns.Ops {
	return netns.Ops{
		opSetup: netns.Handle(setup),
		opMake:  netns.Handle(makeSockets),
		opUndo:  netns.Handle(undo),
	}
}

// setupArgs and setupReply are what Open and Repair ask and hear.
type setupArgs struct {
	IPv6   bool
	Diag   bool // send the sock_diag socket as well
	Repair bool // this very routing was set up before: Changed says what it found then
	Changed
}

type setupReply struct {
	Why       [2]string     // per family: why a source address cannot be kept; "" where it can
	Errno     [2]unix.Errno // of these, where there is one
	Ephemeral [2]uint16
	Changed
}

// Changed is what undo must know.
type Changed struct {
	Sysctl bool // tcp_fwmark_accept was 0
}

func setup(ctx context.Context, a setupArgs) (r setupReply, files []*os.File, err error) {
	if a.Diag {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		if err != nil {
			return r, nil, fmt.Errorf("socket for sock_diag: %w", err)
		}
		files = append(files, os.NewFile(uintptr(fd), "sock_diag"))
	}
	r.Ephemeral = ephemeral()
	routing, why := setUp(a)
	for i, err := range why {
		if err != nil {
			r.Why[i] = err.Error()
			errors.As(err, &r.Errno[i])
		}
	}
	r.Changed = routing
	netns.AtEnd(ctx, opUndo, func() { takeDown(routing) })
	return r, files, nil
}

func undo(ctx context.Context, c Changed) (struct{}, []*os.File, error) {
	netns.AtEnd(ctx, opUndo, nil)
	return struct{}{}, nil, takeDown(c)
}

// makeArgs ask for a batch.
type makeArgs struct {
	Kind  Kind
	Count int
}

func makeSockets(_ context.Context, a makeArgs) (_ struct{}, files []*os.File, err error) {
	for range a.Count {
		fd, err := makeSocket(a.Kind)
		if err != nil {
			if len(files) > 0 { // some are better than none, and the next batch will tell
				break
			}
			return struct{}{}, nil, err
		}
		files = append(files, os.NewFile(uintptr(fd), "socket"))
		// Only now: a File that knows it to be non-blocking would give it to the poller, and make it block
		// when asked for the number.
		if err := unix.SetNonblock(fd, true); err != nil {
			for _, f := range files {
				f.Close()
			}
			return struct{}{}, nil, err
		}
	}
	return struct{}{}, files, nil
}

type option struct {
	level, name, value int
	what               string
}

var (
	always = []option{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1, "TCP_NODELAY"}, // what comes was sent as it should go
	}
	transparent = []option{
		{unix.SOL_SOCKET, unix.SO_MARK, Mark, "SO_MARK"},
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1, "SO_REUSEADDR"},
		{unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1, "IP_BIND_ADDRESS_NO_PORT"},
	}
	transparent4 = option{unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1, "IP_TRANSPARENT"}
	transparent6 = option{unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, 1, "IPV6_TRANSPARENT"}
)

func makeSocket(k Kind) (int, error) {
	family, own := unix.AF_INET, transparent4
	if k.V6 {
		family, own = unix.AF_INET6, transparent6
	}
	options := always
	if k.Transparent {
		options = append(append(options[:len(options):len(options)], transparent...), own)
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, fmt.Errorf("socket in the namespace: %w", err)
	}
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("socket in the namespace: %s: %w", o.what, err)
		}
	}
	return fd, nil
}

// ephemeral is the range of ports that the namespace's kernel picks from; where it does not tell, Linux's own.
func ephemeral() [2]uint16 {
	if raw, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		if f := strings.Fields(string(raw)); len(f) == 2 {
			low, err1 := strconv.ParseUint(f[0], 10, 16)
			high, err2 := strconv.ParseUint(f[1], 10, 16)
			if err1 == nil && err2 == nil {
				return [2]uint16{uint16(low), uint16(high)}
			}
		}
	}
	return [2]uint16{32768, 60999}
}
