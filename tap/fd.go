package tap

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

const opLook = "tap.look"

// FDConfig says how to take a TAP that somebody has opened already.
type FDConfig struct {
	// MTU is the interface's, in octets, where we may not ask for it, or where it is down, so that whoever configures
	// it has yet to come. 0 means DefaultMTU.
	MTU int

	NoOffload bool // no super-segments, also where there is a virtio-net header
	NoUSO     bool

	Log *slog.Logger // nil means slog.Default
}

// found is how a TAP came to us, for Close to leave it like that.
type found struct {
	blocking bool
	size     int // of the virtio-net header, octets; 0: none
	little   int // whether that is little-endian, as TUNGETVNETLE has it
}

// FromFD makes a device of an open TAP, whose interface may be in a namespace that we cannot enter. Nothing is asked of
// the interface but what the descriptor and our rights tell, and nothing is configured. The descriptor belongs to the
// Device on success, and the interface stays at the end in any case. Several queues of one device, of which the
// descriptor is one, stay what they are: the others have their own readers.
func FromFD(ctx context.Context, fd int, cfg FDConfig) (*Device, error) {
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.MTU < minMTU || cfg.MTU > maxMTU {
		return nil, fmt.Errorf("MTU %d: a TAP takes %d to %d octets", cfg.MTU, minMTU, maxMTU)
	}
	name, flags, err := identify(fd)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d: %w", fd, err)
	}
	d := &Device{name: name, control: -1, is: opened{Adopted: true, MTU: cfg.MTU, Header: flags&unix.IFF_VNET_HDR != 0}}
	if d.found, err = find(fd, name, d.is.Header); err != nil {
		return nil, err
	}
	if err := d.outfit(fd, cfg); err != nil {
		return nil, err
	}
	if d.control, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("interface %s: %w", name, err)
	}
	d.ask(ctx, fd)
	unix.CloseOnExec(fd)
	q, err := newQueue(fd, d.is.Header, d.is.Offloads)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("interface %s: %w", name, err), d.Close())
	}
	d.queues = []*Queue{q}
	cfg.Log.Info("tap attached", "interface", name, "descriptor", fd, "mtu", d.is.MTU, "header", d.is.Header,
		"offloads", fmt.Sprintf("%#x", d.is.Offloads))
	return d, nil
}

// identify asks whose queue a descriptor is, and refuses what does not carry Ethernet frames, one to a read.
func identify(fd int) (name string, flags uint16, err error) {
	req, err := unix.NewIfreq("")
	if err != nil {
		return "", 0, err
	}
	err = unix.IoctlIfreq(fd, unix.TUNGETIFF, req)
	name, flags = req.Name(), req.Uint16()
	switch {
	case errors.Is(err, unix.EBADF):
		return "", 0, fmt.Errorf("it is not open, or not passed on to usernet: %w", err)
	case errors.Is(err, unix.EBADFD):
		return "", 0, fmt.Errorf("%s is open there and attached to no interface: TUNSETIFF comes first: %w", tunPath, err)
	case err != nil:
		return "", 0, fmt.Errorf("it is no TAP (TUNGETIFF): %w", err)
	case flags&unix.IFF_TAP == 0:
		return "", 0, fmt.Errorf("interface %s is a TUN and no TAP: make it with IFF_TAP: %w", name, unix.EINVAL)
	case flags&unix.IFF_DETACH_QUEUE != 0:
		return "", 0, fmt.Errorf("interface %s: this queue is detached: TUNSETQUEUE with IFF_ATTACH_QUEUE comes first: %w", name, unix.EINVAL)
	}
	if pi, err := packetInfo(fd, req); err != nil {
		return "", 0, fmt.Errorf("interface %s: %w", name, err)
	} else if pi {
		return "", 0, fmt.Errorf("interface %s puts packet information before each frame: make it with IFF_NO_PI: %w", name, unix.EINVAL)
	}
	return name, flags, nil
}

// packetInfo tells whether four octets precede each frame. TUNGETIFF gives one bit two meanings, IFF_NO_PI and
// IFF_NOFILTER, "this queue has no socket filter" (drivers/net/tun.c). So the queue gets one, for the moment of
// asking, that lets everything pass; whoever has one already has the answer.
func packetInfo(fd int, req *unix.Ifreq) (bool, error) {
	if req.Uint16()&unix.IFF_NO_PI == 0 {
		return true, nil
	}
	pass := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 1<<32 - 1}
	program := unix.SockFprog{Len: 1, Filter: &pass}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNATTACHFILTER, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return false, nil // it is more likely to be as it should than not
	}
	err := unix.IoctlIfreq(fd, unix.TUNGETIFF, req)
	if derr := unix.IoctlSetInt(fd, unix.TUNDETACHFILTER, 0); derr != nil {
		return false, fmt.Errorf("take a filter away again (TUNDETACHFILTER): %w", derr)
	}
	return err == nil && req.Uint16()&unix.IFF_NO_PI == 0, nil
}

func find(fd int, name string, header bool) (f found, err error) {
	mode, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return f, fmt.Errorf("interface %s: %w", name, err)
	}
	if mode&unix.O_ACCMODE != unix.O_RDWR {
		return f, fmt.Errorf("interface %s: its descriptor is not open for reading and writing: %w", name, unix.EBADF)
	}
	f.blocking = mode&unix.O_NONBLOCK == 0
	if !header {
		return f, nil
	}
	if f.size, err = unix.IoctlGetInt(fd, unix.TUNGETVNETHDRSZ); err != nil {
		return f, fmt.Errorf("interface %s: size of its header (TUNGETVNETHDRSZ): %w", name, err)
	}
	if f.little, err = unix.IoctlGetInt(fd, unix.TUNGETVNETLE); err != nil {
		return f, fmt.Errorf("interface %s: order of its header's octets (TUNGETVNETLE): %w", name, err)
	}
	return f, nil
}

// outfit sets header and offloads. Without a header none of those may be left of a predecessor's: the kernel would
// hand over super-segments of which nothing tells that they are some.
func (d *Device) outfit(fd int, cfg FDConfig) (err error) {
	if d.is.Header {
		if err := setHeader(fd, d.name); err != nil {
			return err
		}
	}
	if !d.is.Header || cfg.NoOffload {
		return setOffload(fd, d.name, 0)
	}
	d.is.Offloads, err = offer(fd, Config{Name: d.name, NoUSO: cfg.NoUSO})
	return err
}

// ask finds out what it may about the interface. Its hardware address everyone with the descriptor may see; for the rest
// one must be allowed to enter its namespace, and who is not goes by FDConfig.
func (d *Device) ask(ctx context.Context, fd int) {
	if mac, err := hardwareAddr(fd, d.name); err == nil {
		d.is.MAC = mac
	}
	nsFD, err := unix.IoctlRetInt(fd, unix.TUNGETDEVNETNS)
	if err != nil {
		return
	}
	defer unix.Close(nsFD)
	unix.CloseOnExec(nsFD)
	ns, err := netns.OpenPath(fmt.Sprintf("/proc/self/fd/%d", nsFD))
	if err != nil {
		return
	}
	defer ns.Close()
	var is opened
	if _, err := ns.Call(ctx, Ops(), opLook, d.name, &is); err == nil && is.Up {
		d.is.MTU, d.is.Addrs = is.MTU, is.Addrs
	}
}

// lookInside is ask's other half, in the namespace.
func lookInside(_ context.Context, name string) (r opened, _ []*os.File, err error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return r, nil, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	return r, nil, r.look(nl, name)
}

// hardwareAddr asks the device and not the interface's namespace.
func hardwareAddr(fd int, name string) (net.HardwareAddr, error) {
	var req struct {
		name [unix.IFNAMSIZ]byte
		addr unix.RawSockaddr
		_    [8]byte // struct ifreq's union is longer than its sockaddr
	}
	copy(req.name[:], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGIFHWADDR, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return nil, errno
	}
	mac := make(net.HardwareAddr, 6)
	for i := range mac {
		mac[i] = byte(req.addr.Data[i])
	}
	return mac, nil
}

// giveBack leaves the device as it was found.
func (d *Device) giveBack() error {
	err := d.say(unix.TUNSETOFFLOAD)
	if d.is.Header && err == nil {
		err = errors.Join(d.restore(unix.TUNSETVNETHDRSZ, d.found.size), d.restore(unix.TUNSETVNETLE, d.found.little))
	}
	return err
}

func (d *Device) restore(what uint, value int) error {
	err := unix.IoctlSetPointerInt(d.control, what, value)
	if err != nil && !errors.Is(err, unix.EBADFD) {
		return fmt.Errorf("give tap %s back: ioctl %#x: %w", d.name, what, err)
	}
	return nil
}
