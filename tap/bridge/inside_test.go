package bridge_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

// A wanted socket listens, or is connected where To is set.
type wanted struct {
	Network  string // tcp or udp
	Addr, To netip.AddrPort
}

// connectPatience bounds what an operation inside waits for a peer that does not answer.
const connectPatience = 20 // seconds

// socket makes a socket of the namespace.
func socket(_ context.Context, w wanted) (_ struct{}, files []*os.File, err error) {
	family, kind := unix.AF_INET6, unix.SOCK_DGRAM
	if w.Addr.Addr().Is4() {
		family = unix.AF_INET
	}
	if w.Network == "tcp" {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return struct{}{}, nil, err
	}
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: connectPatience}),
		unix.Bind(fd, sockaddr(w.Addr)))
	switch {
	case err != nil:
	case w.To.IsValid():
		err = unix.Connect(fd, sockaddr(w.To))
	case w.Network == "tcp":
		err = unix.Listen(fd, 16)
	}
	if err != nil {
		unix.Close(fd)
		return struct{}{}, nil, fmt.Errorf("%+v: %w", w, err)
	}
	return struct{}{}, []*os.File{os.NewFile(uintptr(fd), w.Network)}, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// An iface is one as its namespace sees it.
type iface struct {
	Name, MAC, Master string
	Index             int
	Up                bool
	MTU               int
	Addrs             []string // tentative ones say so
	Routes            []string // with a gateway
}

// state lists all interfaces, lo among them.
func state(context.Context, struct{}) (all map[string]iface, _ []*os.File, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, nil, err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, nil, err
	}
	all = map[string]iface{}
	for _, l := range links {
		a := l.Attrs()
		i := iface{Name: a.Name, MAC: a.HardwareAddr.String(), Index: a.Index, Up: a.Flags&net.FlagUp != 0, MTU: a.MTU}
		for _, m := range links {
			if m.Attrs().Index == a.MasterIndex {
				i.Master = m.Attrs().Name
			}
		}
		addrs, err := h.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, nil, err
		}
		for _, a := range addrs {
			text := a.IPNet.String()
			if a.Flags&unix.IFA_F_TENTATIVE != 0 {
				text += " tentative"
			}
			i.Addrs = append(i.Addrs, text)
		}
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := h.RouteList(l, family)
			if err != nil {
				return nil, nil, err
			}
			for _, r := range routes {
				if r.Gw != nil {
					i.Routes = append(i.Routes, fmt.Sprintf("%s via %s", r.Dst, r.Gw))
				}
			}
		}
		all[i.Name] = i
	}
	return all, nil, nil
}

func see(t testing.TB, n *netns.NS) (all map[string]iface) {
	t.Helper()
	call(t, n, "state", struct{}{}, &all)
	return all
}

// A deed is what a user of the namespace does with an interface.
type deed struct {
	Name             string
	Make             string // "dummy", "bridge" or "tap" that nobody is attached to
	Delete, Down, Up bool
	Alias            string
	Bare             bool // its addresses are taken away
	Free             bool // it is a port no more
	Forget           bool // its neighbours
	Toggle           int  // so many times down and up
}

func change(_ context.Context, d deed) (_ struct{}, _ []*os.File, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return struct{}{}, nil, err
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = d.Name
	switch d.Make {
	case "bridge":
		err = h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	case "veth":
		v := netlink.NewVeth(attrs)
		v.PeerName = d.Name + "-peer"
		err = h.LinkAdd(v)
	case "tap":
		err = h.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_DEFAULTS})
	}
	if err != nil {
		return struct{}{}, nil, err
	}
	link, err := h.LinkByName(d.Name)
	if err == nil && d.Delete {
		return struct{}{}, nil, h.LinkDel(link)
	}
	if err == nil && d.Down {
		err = h.LinkSetDown(link)
	}
	if err == nil && d.Up {
		err = h.LinkSetUp(link)
	}
	if err == nil && d.Alias != "" {
		err = h.LinkSetAlias(link, d.Alias)
	}
	if err == nil && d.Free {
		err = h.LinkSetNoMaster(link)
	}
	if err == nil && d.Forget {
		var all []netlink.Neigh
		all, err = h.NeighList(link.Attrs().Index, netlink.FAMILY_V4)
		for _, n := range all {
			err = errors.Join(err, h.NeighDel(&n))
		}
	}
	for range d.Toggle {
		err = errors.Join(err, h.LinkSetDown(link), h.LinkSetUp(link))
	}
	if err != nil || !d.Bare {
		return struct{}{}, nil, err
	}
	addrs, err := h.AddrList(link, netlink.FAMILY_ALL)
	for _, a := range addrs {
		err = errors.Join(err, h.AddrDel(link, &a))
	}
	return struct{}{}, nil, err
}

// neighbour tells at which MAC an address is believed to be, "" where that is not known.
func neighbour(_ context.Context, addr netip.Addr) (mac string, _ []*os.File, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return "", nil, err
	}
	defer h.Close()
	all, err := h.NeighList(0, netlink.FAMILY_ALL)
	for _, n := range all {
		if ip, ok := netip.AddrFromSlice(n.IP); ok && ip.Unmap() == addr && n.State&unix.NUD_FAILED == 0 {
			mac = n.HardwareAddr.String()
		}
	}
	return mac, nil, err
}

// received tells how many frames an interface has got.
func received(_ context.Context, name string) (uint64, []*os.File, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return 0, nil, err
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		return 0, nil, err
	}
	return link.Attrs().Statistics.RxPackets, nil, nil
}

// learned tells how many addresses a bridge has learned, and how many it may at most; nothing where the kernel does not say.
func learned(_ context.Context, name string) (counts []string, _ []*os.File, err error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil, nil, err
	}
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(i.Index)
	req.AddData(msg)
	replies, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil {
		return nil, nil, err
	}
	attrs, err := nl.ParseRouteAttrAsMap(replies[0][unix.SizeofIfInfomsg:])
	for _, in := range []uint16{unix.IFLA_LINKINFO, nl.IFLA_INFO_DATA} {
		if err == nil {
			attrs, err = nl.ParseRouteAttrAsMap(attrs[in].Value)
		}
	}
	for _, which := range []uint16{unix.IFLA_BR_FDB_N_LEARNED, unix.IFLA_BR_FDB_MAX_LEARNED} {
		if a, ok := attrs[which]; ok {
			counts = append(counts, fmt.Sprint(binary.NativeEndian.Uint32(a.Value)))
		}
	}
	return counts, nil, err
}

// A forgery is a number of frames, each from an address of its own.
type forgery struct {
	Name   string
	Frames int
}

func forge(_ context.Context, f forgery) (_ struct{}, _ []*os.File, err error) {
	i, err := net.InterfaceByName(f.Name)
	if err != nil {
		return struct{}{}, nil, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return struct{}{}, nil, err
	}
	defer unix.Close(fd)
	frame := make([]byte, 60)
	copy(frame, net.HardwareAddr{2, 0xee, 0, 0, 0, 1}) // nobody
	binary.BigEndian.PutUint16(frame[12:], 0x88b5)     // a local experiment's, IEEE 802
	for n := range f.Frames {
		frame[6] = 2
		binary.BigEndian.PutUint32(frame[8:], uint32(n))
		for { // until there is room in the queue
			err = unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: i.Index, Halen: 6})
			if !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
				break
			}
		}
		if err != nil {
			return struct{}{}, nil, err
		}
	}
	return struct{}{}, nil, nil
}
