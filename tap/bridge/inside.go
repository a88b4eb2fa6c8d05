package bridge

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

// This file runs inside a namespace, the shared one or a member's: on a visiting thread or in the helper.

const (
	opOpen   = "bridge.open"
	opPlug   = "bridge.plug"
	opVeth   = "bridge.veth"
	opLook   = "bridge.look"
	opList   = "bridge.list"
	opRemove = "bridge.remove"
	opListen = "bridge.listen"

	opSettle   = "bridge.settle"
	opAnnounce = "bridge.announce"
)

// Ops are what this package does inside; a program adds them to the table of its helper, beside those of package tap.
func Ops() netns.Ops {
	return netns.Ops{
		opOpen:   withNetlink(openBridge),
		opPlug:   withNetlink(plug),
		opVeth:   withNetlink(veth),
		opLook:   withNetlink(look),
		opList:   withNetlink(list),
		opRemove: withNetlink(remove),
		opListen: netns.Handle(listen),

		opSettle:   netns.Handle(settle),
		opAnnounce: withNetlink(announce),
	}
}

// withNetlink makes an operation of what needs nothing but a netlink socket.
func withNetlink[A, R any](f func(context.Context, *netlink.Handle, A) (R, error)) netns.Op {
	return netns.Handle(func(ctx context.Context, args A) (reply R, _ []*os.File, err error) {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return reply, nil, fmt.Errorf("netlink: %w", err)
		}
		defer h.Close()
		reply, err = f(ctx, h, args)
		return reply, nil, err
	})
}

// openBridge tells whether the bridge was there.
func openBridge(_ context.Context, h *netlink.Handle, cfg Config) (adopted bool, err error) {
	link, err := find(h, cfg.Name)
	if err != nil {
		return false, err
	}
	if link == nil {
		quiet()
		off := false
		b := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
		b.Name, b.HardwareAddr = cfg.Name, cfg.MAC
		// Snooping learns from queries who wants a group, and without a querier, which no bridge here has, forgets
		// them: neighbour discovery would stop after minutes.
		b.MulticastSnooping = &off
		if err := h.LinkAdd(b); err != nil {
			return false, explain(err, "make it")
		}
		link = b
	} else if adopted = true; link.Type() != "bridge" {
		return false, fmt.Errorf("there is an interface of that name and of type %s: remove it: %w", link.Type(), unix.EEXIST)
	}
	if adopted && link.Attrs().HardwareAddr.String() != cfg.MAC.String() {
		if err := h.LinkSetHardwareAddr(link, cfg.MAC); err != nil {
			return adopted, explain(err, "MAC "+cfg.MAC.String())
		}
	}
	if err := raise(h, link, cfg.MTU); err != nil {
		return adopted, err
	}
	return adopted, limit(cfg.Name)
}

// limit bounds what the bridge remembers. Kernels before 6.7 have no such attribute, and take no notice of it.
func limit(name string) error {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(i.Index)
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
	info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(unix.IFLA_BR_FDB_MAX_LEARNED, nl.Uint32Attr(maxLearned))
	req.AddData(info)
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return explain(err, "bound what it learns")
	}
	return nil
}

// plugArgs ask for a port of a bridge.
type plugArgs struct {
	Bridge, Port string
	MTU          int
}

func plug(ctx context.Context, h *netlink.Handle, a plugArgs) (struct{}, error) {
	link, err := find(h, a.Port)
	if err == nil && link == nil {
		err = fmt.Errorf("no such interface: %w", unix.ENODEV)
	}
	if err != nil {
		return struct{}{}, err
	}
	if err := connect(h, link, a.Bridge, a.MTU); err != nil {
		return struct{}{}, err
	}
	_, _, err = settle(ctx, a.Port)
	return struct{}{}, err
}

func connect(h *netlink.Handle, link netlink.Link, to string, mtu int) error {
	bridge, err := find(h, to)
	if err == nil && bridge == nil {
		err = fmt.Errorf("bridge %s is gone: %w", to, unix.ENODEV)
	}
	if err != nil {
		return err
	}
	if link.Attrs().MasterIndex != bridge.Attrs().Index {
		err := h.LinkSetMaster(link, bridge)
		if errors.Is(err, unix.EXFULL) || errors.Is(err, unix.E2BIG) {
			return fmt.Errorf("a bridge has at most %d ports: %w", MaxPorts, err)
		}
		if err != nil {
			return explain(err, "make it a port of "+to)
		}
	}
	return raise(h, link, mtu)
}

// raise brings an interface of the shared namespace up, with the MTU, and without an address of its own.
func raise(h *netlink.Handle, link netlink.Link, mtu int) error {
	if link.Attrs().MTU != mtu {
		if err := h.LinkSetMTU(link, mtu); err != nil {
			return explain(err, fmt.Sprintf("MTU %d", mtu))
		}
	}
	// A kernel without IPv6 has no such mode, and no address.
	const none = 1 // IN6_ADDR_GEN_MODE_NONE, include/uapi/linux/if_link.h
	if err := h.LinkSetIP6AddrGenMode(link, none); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return explain(err, "keep link-local addresses off")
	}
	if err := h.LinkSetUp(link); err != nil {
		return explain(err, "bring it up")
	}
	return nil
}

// quiet keeps the shared namespace's kernel out of what passes. Where a sysctl cannot be written nothing is
// lost but time: without addresses there is little that IPv6 could do, and a namespace without rules drops nothing.
func quiet() {
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
	// With br_netfilter loaded, as on hosts of other containers, each frame would take the way of packets.
	hooks, _ := filepath.Glob("/proc/sys/net/bridge/bridge-nf-call-*")
	for _, name := range hooks {
		_ = os.WriteFile(name, []byte("0"), 0)
	}
}

// vethArgs ask for a cable whose other end is in the namespace that comes along.
type vethArgs struct {
	Bridge, Port string
	Name         string // of the member's end
	MAC          net.HardwareAddr
	MTU          int
}

func veth(ctx context.Context, h *netlink.Handle, a vethArgs) (_ struct{}, err error) {
	sent := netns.Sent(ctx)
	if len(sent) != 1 {
		return struct{}{}, fmt.Errorf("%d namespaces came along, want the member's: %w", len(sent), unix.EINVAL)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = a.Port, a.MTU
	v := netlink.NewVeth(attrs)
	v.PeerName, v.PeerHardwareAddr, v.PeerNamespace = a.Name, a.MAC, netlink.NsFd(sent[0])
	if err := h.LinkAdd(v); err != nil {
		return struct{}{}, err
	}
	link, err := find(h, a.Port)
	if err == nil && link == nil {
		err = fmt.Errorf("port %s vanished as soon as it was made: %w", a.Port, unix.ENODEV)
	}
	if err == nil {
		if err = connect(h, link, a.Bridge, a.MTU); err != nil {
			err = errors.Join(err, h.LinkDel(link))
		}
	}
	return struct{}{}, err
}

// settle has the kernel do at once what it has put off about an interface's carrier, which a bridge waits for before
// it forwards to a port. That is what asking for the carrier does (ethtool_op_get_link, net/ethtool/ioctl.c).
func settle(_ context.Context, name string) (carrier bool, _ []*os.File, err error) {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, nil, err
	}
	defer unix.Close(s)
	value := struct{ cmd, data uint32 }{cmd: unix.ETHTOOL_GLINK} // struct ethtool_value, include/uapi/linux/ethtool.h
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte // struct ifreq's union is longer
	}
	copy(req.name[:], name)
	req.data = unsafe.Pointer(&value)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return false, nil, fmt.Errorf("ask for its carrier: %w", errno)
	}
	return value.data != 0, nil, nil
}

// announce has the kernel tell everybody on the link of the interface's addresses, where arp_notify and ndisc_notify
// are set: a MAC that is set anew, be it the same, counts as a change.
func announce(_ context.Context, h *netlink.Handle, name string) (struct{}, error) {
	link, err := h.LinkByName(name)
	if err == nil {
		err = h.LinkSetHardwareAddr(link, link.Attrs().HardwareAddr)
	}
	return struct{}{}, err
}

// find returns nil where there is no interface of that name.
func find(h *netlink.Handle, name string) (netlink.Link, error) {
	link, err := h.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for interface %s: %w", name, err)
	}
	return link, nil
}

func explain(err error, what string) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%s: no CAP_NET_ADMIN over the network namespace: %w", what, err)
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%s: the kernel has no such interface (modprobe bridge veth): %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// look describes the interface of a name; the zero Link where there is none.
func look(_ context.Context, h *netlink.Handle, name string) (Link, error) {
	link, err := find(h, name)
	if err != nil || link == nil {
		return Link{}, err
	}
	return describe(link, ""), nil
}

func list(_ context.Context, h *netlink.Handle, _ struct{}) (all []Link, err error) {
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	for _, l := range links {
		if l.Attrs().Flags&net.FlagLoopback == 0 {
			all = append(all, describe(l, names[l.Attrs().MasterIndex]))
		}
	}
	return all, nil
}

func remove(_ context.Context, h *netlink.Handle, name string) (struct{}, error) {
	link, err := find(h, name)
	if err == nil && link != nil {
		err = h.LinkDel(link)
	}
	if errors.Is(err, unix.ENODEV) {
		err = nil
	}
	return struct{}{}, err
}
