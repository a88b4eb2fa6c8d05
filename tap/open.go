package tap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

// This file runs inside the namespace: on a visiting thread or in the helper.

const opOpen = "tap.open"

// Ops are what this package does inside; a program adds them to the table of its helper.
func Ops() netns.Ops {
	return netns.Ops{opOpen: netns.Handle(openInside), opLook: netns.Handle(lookInside), opDress: netns.Handle(dressInside)}
}

// An interface's alias tells whose it is ("ip link" shows it), for no flag of a TAP does: one that
// usernet made goes when usernet ends, one of another's stays. The first value means that
// whoever made it was killed before the addresses were complete.
const (
	aliasUnfinished = "usernet (unfinished)"
	aliasOurs       = "usernet"
)

// tunPath is a constant of the kernel's documentation (Documentation/networking/tuntap.rst), and of water's.
const tunPath = "/dev/net/tun"

// opened is what comes back, beside one descriptor per queue.
type opened struct {
	MTU      int
	MAC      net.HardwareAddr
	Adopted  bool
	Ours     bool
	Up       bool
	Header   bool
	Offloads uint32
	Addrs    []netip.Prefix
	Warnings []string
}

func openInside(_ context.Context, cfg Config) (opened, []*os.File, error) {
	reply, files, err := openTAP(cfg)
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return opened{}, nil, err
	}
	return reply, files, nil
}

func openTAP(cfg Config) (r opened, files []*os.File, err error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return r, nil, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	tun, err := findTAP(nl, cfg.Name)
	if err != nil {
		return r, nil, err
	}
	r.Adopted = tun != nil
	if r.Adopted && cfg.Fresh {
		return r, nil, fmt.Errorf("interface %s is there already: remove it, or choose another name: %w", cfg.Name, unix.EEXIST)
	}
	if !r.Adopted {
		if err := create(cfg.Name, cfg.Queues > 1); err != nil {
			return r, nil, err
		}
		if tun, err = findTAP(nl, cfg.Name); err == nil && tun == nil {
			err = fmt.Errorf("interface %s vanished as soon as it was made: %w", cfg.Name, unix.ENODEV)
		}
		if err != nil {
			return r, nil, err
		}
	}
	alias := tun.Attrs().Alias
	r.Ours = !r.Adopted || alias == aliasOurs || alias == aliasUnfinished
	unfinished := !r.Adopted || alias == aliasUnfinished

	undo := func() {}
	if cfg.IPv6.IsValid() {
		undo = noDAD(cfg.Name)
	}
	if files, err = r.attach(tun, cfg); err == nil {
		err = r.dress(nl, tun, cfg, unfinished)
	}
	if err != nil {
		undo()
	}
	if err != nil && !r.Adopted {
		err = errors.Join(err, remove(nl, tun, files))
		return r, nil, err
	}
	return r, files, err
}

// remove takes back what create made, when a later step failed.
func remove(nl *netlink.Handle, tun *netlink.Tuntap, files []*os.File) error {
	for _, f := range files {
		f.Close()
	}
	return nl.LinkDel(tun)
}

// findTAP returns the interface of that name when it may be adopted, and nil when there is none.
func findTAP(nl *netlink.Handle, name string) (*netlink.Tuntap, error) {
	link, err := nl.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for interface %s: %w", name, err)
	}
	tun, ok := link.(*netlink.Tuntap)
	if !ok {
		return nil, fmt.Errorf("interface %s is no TAP but of type %s: choose another name: %w", name, link.Type(), unix.EEXIST)
	}
	// The attribute holds IFF_TAP itself; the library's constant of that name is the same number.
	if tun.Mode != netlink.TUNTAP_MODE_TAP {
		return nil, fmt.Errorf("interface %s is a TUN and no TAP: choose another name: %w", name, unix.EEXIST)
	}
	// Another attach to a multi-queue device would succeed and take a share of the traffic.
	if tun.Queues+tun.DisabledQueues > 0 {
		return nil, busy(name)
	}
	return tun, nil
}

func busy(name string) error {
	return fmt.Errorf("interface %s is busy: another program is attached to it: end that (as root, `grep -ls '^iff:\\s%[1]s$' /proc/*/fdinfo/*` finds it), "+
		"or choose another name: %w", name, unix.EBUSY)
}

// create makes a TAP that outlives its maker, so that a crash of usernet costs the container neither
// addresses nor routes. One that may have several queues has 256 of the kernel's, which it takes about a
// millisecond to make, and another to remove.
func create(name string, several bool) error {
	// Tried first because water says less, and leaks its descriptor where it fails.
	fd, err := openTUN()
	if err != nil {
		return err
	}
	unix.Close(fd)
	syscall.ForkLock.RLock() // water opens without close-on-exec
	defer syscall.ForkLock.RUnlock()
	w, err := water.New(water.Config{
		DeviceType:             water.TAP,
		PlatformSpecificParams: water.PlatformSpecificParams{Name: name, Persist: true, MultiQueue: several},
	})
	if err != nil {
		return fmt.Errorf("make interface %s: %w", name, explainIff(err))
	}
	return w.Close()
}

func openTUN() (int, error) {
	fd, err := unix.Open(tunPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == nil {
		return fd, nil
	}
	return -1, explainTUN(err)
}

func explainTUN(err error) error {
	remedy := ""
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		remedy = " (load the module, \"modprobe tun\", or in a container pass the device in: --device /dev/net/tun)"
	case errors.Is(err, unix.EACCES):
		remedy = " (it needs mode 0666, which is what udev gives it: \"chmod 0666 /dev/net/tun\" as root)"
	case errors.Is(err, unix.EPERM):
		remedy = " (a device policy forbids it: in a container pass --device /dev/net/tun)"
	}
	return fmt.Errorf("open %s%s: %w", tunPath, remedy, err)
}

func explainIff(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("no CAP_NET_ADMIN over the network namespace: %w", err)
	}
	return err
}

// attach opens the queues. VNET_HDR is a wish that the kernel may drop without a word, so that the flags
// are read back. Header size and offloads outlive who set them: both are set each time.
func (r *opened) attach(tun *netlink.Tuntap, cfg Config) (files []*os.File, err error) {
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI)
	queues := cfg.Queues
	if tun.Flags&netlink.TUNTAP_MULTI_QUEUE != 0 {
		flags |= unix.IFF_MULTI_QUEUE
	} else if queues > 1 {
		r.Warnings = append(r.Warnings, fmt.Sprintf("interface %s was made with one queue: it gets one instead of %d", cfg.Name, queues))
		queues = 1
	}
	if !cfg.NoOffload {
		flags |= unix.IFF_VNET_HDR
	}
	for i := range queues {
		fd, err := openTUN()
		if err != nil {
			return files, err
		}
		files = append(files, os.NewFile(uintptr(fd), cfg.Name))
		got, err := attachQueue(fd, cfg.Name, flags)
		if err != nil {
			return files, err
		}
		header := got&unix.IFF_VNET_HDR != 0
		if i > 0 && header != r.Header {
			return files, fmt.Errorf("interface %s: queue %d differs from the first in its header", cfg.Name, i)
		}
		r.Header = header
	}
	fd := int(files[0].Fd())
	if !r.Header {
		if !cfg.NoOffload {
			r.Warnings = append(r.Warnings, "the kernel gives no virtio-net header: frames go one by one, slowly")
		}
		return files, setOffload(fd, cfg.Name, 0)
	}
	for _, f := range files {
		if err := setHeader(int(f.Fd()), cfg.Name); err != nil {
			return files, err
		}
	}
	r.Offloads, err = offer(fd, cfg)
	return files, err
}

func attachQueue(fd int, name string, flags uint16) (uint16, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	req.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return 0, busy(name)
		}
		return 0, fmt.Errorf("attach to interface %s (TUNSETIFF): %w", name, explainIff(err))
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, req); err != nil {
		return 0, fmt.Errorf("interface %s: read its flags (TUNGETIFF): %w", name, err)
	}
	return req.Uint16(), nil
}

func setHeader(fd int, name string) error {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, headerLen); err != nil {
		return fmt.Errorf("interface %s: header of %d octets (TUNSETVNETHDRSZ): %w", name, headerLen, err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETLE, 1); err != nil {
		return fmt.Errorf("interface %s: little-endian header (TUNSETVNETLE): %w", name, err)
	}
	return nil
}

const (
	offloadTSO = unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	offloadUSO = unix.TUN_F_USO4 | unix.TUN_F_USO6 // both or neither
)

// offer asks for all offloads, then for fewer, until the kernel agrees.
func offer(fd int, cfg Config) (uint32, error) {
	masks := []uint32{
		unix.TUN_F_CSUM | offloadTSO | unix.TUN_F_TSO_ECN | offloadUSO,
		unix.TUN_F_CSUM | offloadTSO | unix.TUN_F_TSO_ECN,
		unix.TUN_F_CSUM,
		0,
	}
	if cfg.NoUSO {
		masks = masks[1:]
	}
	var err error
	for _, mask := range masks {
		if err = setOffload(fd, cfg.Name, mask); err == nil {
			return mask &^ unix.TUN_F_TSO_ECN, nil
		}
		if !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	return 0, err
}

func setOffload(fd int, name string, mask uint32) error {
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, int(mask)); err != nil {
		return fmt.Errorf("interface %s: offloads %#x (TUNSETOFFLOAD): %w", name, mask, err)
	}
	return nil
}
