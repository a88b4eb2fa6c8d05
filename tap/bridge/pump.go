package bridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"usernet/tap"
)

const (
	// maxFrame is the most that a read from a TAP gives, in octets: the virtio-net header, an Ethernet header with
	// two VLAN tags, and a super-segment's 64 KiB.
	maxFrame = 10 + 22 + 1<<16

	// turn is how many frames go one way before other goroutines have theirs. 16 super-segments are some 300 µs.
	turn = 16
)

// Run carries the frames of a cable of two TAPs, both ways, until ctx ends or the cable is closed: nil then. It
// fails with ENODEV when one of the interfaces was deleted. A TAP's end does not tell of the member's death, for an
// open TAP keeps its namespace: whoever watches the member closes the cable then. Run is called once; for a veth, which
// needs nobody, it only waits.
//
// What an interface cannot take is lost, as on a wire: the sender's TAP holds what we have not read yet, and drops
// when that is full, and a write never waits.
func (c *Cable) Run(ctx context.Context) error {
	if c.kind != TAPs {
		select {
		case <-ctx.Done():
		case <-c.done:
		}
		return nil
	}
	inner, outer := c.inner.Queues()[0], c.outer.Queues()[0]
	ways := make(chan error, 2)
	go func() { ways <- pump(outer, inner, c.cfg.Name, c.cfg.Port) }()
	go func() { ways <- pump(inner, outer, c.cfg.Port, c.cfg.Name) }()
	var first error
	left := 2
	select {
	case <-ctx.Done():
	case first = <-ways:
		left--
	}
	// Closed queues end the pumps; the devices stay for Close or Detach.
	first = errors.Join(first, inner.Close(), outer.Close())
	for range left {
		if err := <-ways; first == nil {
			first = err
		}
	}
	return first
}

// pump carries frames one way, and returns nil when a queue is closed.
func pump(to, from *tap.Queue, fromName, toName string) error {
	buf := make([]byte, maxFrame)
	in, out := [][]byte{buf}, make([][]byte, 1)
	for {
		for range turn {
			n, err := from.Read(in)
			switch {
			case err == nil:
			case errors.Is(err, unix.EAGAIN):
				if err := from.Wait(); err != nil {
					return ended(err, fromName)
				}
				continue
			case passing(err): // that frame is lost
				continue
			default:
				return ended(err, fromName)
			}
			out[0] = buf[:n]
			if err := to.Write(out); err != nil && !passing(err) {
				return ended(err, toName)
			}
		}
		runtime.Gosched()
	}
}

// passing tells errors that concern one frame: it is of a kind that the header cannot describe, the other
// interface is down, memory is short.
func passing(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EIO) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM) ||
		errors.Is(err, unix.EAGAIN)
}

func ended(err error, name string) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	if errors.Is(err, unix.EBADFD) {
		err = unix.ENODEV
	}
	return fmt.Errorf("interface %s: %w", name, err)
}
