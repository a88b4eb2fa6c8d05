package tap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

// A Device is an attached TAP. Its queues may be closed before it.
type Device struct {
	ns     *netns.NS // nil: it came by its descriptor
	found  found     // as it came then
	locked bool      // ns, by us
	name   string
	is     opened
	queues []*Queue

	// control is a second descriptor of the first queue, for what is to be said to the device when
	// the queues have been closed by who reads them.
	control int

	once sync.Once
	err  error
}

// Open makes or adopts the TAP in ns, attaches to it, and holds ns's lock until Close or
// Detach, unless cfg.Unlocked. ns must stay open as long. EBUSY means that someone else is attached.
func Open(ctx context.Context, ns *netns.NS, cfg Config) (*Device, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	d := &Device{ns: ns, name: cfg.Name, control: -1}
	if !cfg.Unlocked {
		if err := ns.Lock(ctx); err != nil {
			return nil, err
		}
		d.locked = true
	}
	files, err := ns.Call(ctx, Ops(), opOpen, cfg, &d.is)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open tap %s: %w", cfg.Name, err), d.Detach())
	}
	for _, f := range files {
		// A descriptor of our own instead of the file's, which the garbage collector would close.
		fd, e := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		f.Close()
		if e != nil {
			err = errors.Join(err, e)
			continue
		}
		q, e := newQueue(fd, d.is.Header, d.is.Offloads)
		if e != nil {
			err = errors.Join(err, e)
			continue
		}
		d.queues = append(d.queues, q)
	}
	if err == nil {
		d.control, err = unix.FcntlInt(uintptr(d.queues[0].fd), unix.F_DUPFD_CLOEXEC, 0)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open tap %s: %w", cfg.Name, err), d.Detach())
	}
	d.is.warn(cfg)
	cfg.Log.Info("tap attached", "interface", cfg.Name, "namespace", ns.String(), "adopted", d.is.Adopted,
		"mtu", d.is.MTU, "queues", len(d.queues), "offloads", fmt.Sprintf("%#x", d.is.Offloads))
	return d, nil
}

// Queues are the device's queues, at least one.
func (d *Device) Queues() []*Queue { return d.queues }

// Adopted tells whether the interface was there before.
func (d *Device) Adopted() bool { return d.is.Adopted }

// Name is the interface's name.
func (d *Device) Name() string { return d.name }

// MTU is the interface's IP MTU in octets, as it was found or set.
func (d *Device) MTU() int { return d.is.MTU }

// MAC is the address of the container's side.
func (d *Device) MAC() net.HardwareAddr { return d.is.MAC }

// Addrs are the interface's addresses, except IPv6 link-local ones, as they were found or set.
func (d *Device) Addrs() []netip.Prefix { return d.is.Addrs }

// Close is the clean end: the queues are closed, and the interface is removed, except one that X
func (d *Device) Close() error { return d.end(true) }

// Detach closes the queues and leaves the interface to whoever comes after, with addresses and routes.
func (d *Device) Detach() error { return d.end(false) }

func (d *Device) end(clean bool) error {
	d.once.Do(func() {
		switch {
		case d.control < 0 || !clean:
		case d.ns == nil:
			d.err = d.giveBack()
		default:
			d.err = d.say(unix.TUNSETOFFLOAD)
			if d.is.Ours {
				d.err = errors.Join(d.err, d.say(unix.TUNSETPERSIST))
			}
		}
		for _, q := range d.queues {
			d.err = errors.Join(d.err, q.Close())
		}
		if d.control >= 0 {
			if d.found.blocking { // the mode is shared with whoever passed the descriptor on
				d.err = errors.Join(d.err, unix.SetNonblock(d.control, false))
			}
			unix.Close(d.control)
		}
		if d.locked {
			d.err = errors.Join(d.err, d.ns.Unlock())
		}
	})
	return d.err
}

// say takes something away from the device. One that somebody deleted meanwhile has nothing left.
func (d *Device) say(what uint) error {
	err := unix.IoctlSetInt(d.control, what, 0)
	if err != nil && !errors.Is(err, unix.EBADFD) {
		return fmt.Errorf("close tap %s: ioctl %#x: %w", d.name, what, err)
	}
	return nil
}
