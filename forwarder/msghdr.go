package forwarder

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What package unix offers for messages allocates for each of them. These are the same
// structures of the kernel, laid out once and used again.

// A name is a struct sockaddr_in or sockaddr_in6 (the longer one).
type name [unix.SizeofSockaddrInet6]byte

// set writes ap and returns its length in octets.
func (n *name) set(ap netip.AddrPort) uint32 {
	*n = name{}
	binary.BigEndian.PutUint16(n[2:], ap.Port())
	if a := ap.Addr(); a.Is4() {
		binary.NativeEndian.PutUint16(n[0:], unix.AF_INET)
		a4 := a.As4()
		copy(n[4:], a4[:])
		return unix.SizeofSockaddrInet4
	}
	binary.NativeEndian.PutUint16(n[0:], unix.AF_INET6)
	a16 := ap.Addr().As16()
	copy(n[8:], a16[:])
	return unix.SizeofSockaddrInet6
}

// addrPort reads a sockaddr of any family; the zero AddrPort when b is of another or cut off.
// An IPv4-mapped address is the IPv4 one. A zone is left out: the interface of a client is
// in its local.
func addrPort(b []byte) netip.AddrPort {
	if len(b) < unix.SizeofSockaddrInet4 {
		return netip.AddrPort{}
	}
	port := binary.BigEndian.Uint16(b[2:])
	switch family := binary.NativeEndian.Uint16(b); {
	case family == unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port)
	case family == unix.AF_INET6 && len(b) >= unix.SizeofSockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])).Unmap(), port)
	}
	return netip.AddrPort{}
}

// Control is room for control messages, aligned as the kernel wants it.
type control [24]uint64

func (c *control) bytes() []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(c)), len(c)*8)
}

// putInt appends a control message with an int (of size octets, 2 or 4) at off and returns where the next one goes.
func (c *control) putInt(off int, level, typ int32, size, value int) int {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&c.bytes()[off]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(size))
	data := c.bytes()[off+unix.CmsgLen(0):]
	if size == 2 {
		binary.NativeEndian.PutUint16(data, uint16(value))
	} else {
		binary.NativeEndian.PutUint32(data, uint32(value))
	}
	return off + unix.CmsgSpace(size)
}

// putLocal appends the control message that makes a datagram leave from an address.
func (c *control) putLocal(off int, at local) int {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&c.bytes()[off]))
	data := c.bytes()[off+unix.CmsgLen(0):]
	if at.addr.Is4() { // struct in_pktinfo
		h.Level, h.Type = unix.SOL_IP, unix.IP_PKTINFO
		h.SetLen(unix.CmsgLen(unix.SizeofInet4Pktinfo))
		a4 := at.addr.As4()
		binary.NativeEndian.PutUint32(data[0:], uint32(at.iface))
		copy(data[4:], a4[:]) // ipi_spec_dst
		copy(data[8:], a4[:])
		return off + unix.CmsgSpace(unix.SizeofInet4Pktinfo)
	}
	h.Level, h.Type = unix.SOL_IPV6, unix.IPV6_PKTINFO // struct in6_pktinfo
	h.SetLen(unix.CmsgLen(unix.SizeofInet6Pktinfo))
	a16 := at.addr.As16()
	copy(data[0:], a16[:])
	binary.NativeEndian.PutUint32(data[16:], uint32(at.iface))
	return off + unix.CmsgSpace(unix.SizeofInet6Pktinfo)
}

// Ancillary is what the control messages of a received datagram said.
type ancillary struct {
	segment  int // of UDP_GRO; 0 for one datagram
	ttl, tos uint8
	at       local                 // of IP_PKTINFO or IPV6_PKTINFO: where it arrived
	group    bool                  // it was sent to a multicast or broadcast address
	err      *unix.SockExtendedErr // of the error queue; points into the control messages
	offender netip.Addr
}

func (a *ancillary) parse(b []byte) {
	*a = ancillary{}
	for len(b) >= unix.SizeofCmsghdr {
		h, data, rest, err := unix.ParseOneSocketControlMessage(b)
		if err != nil {
			return
		}
		b = rest
		switch [2]int32{h.Level, h.Type} {
		case [2]int32{unix.SOL_UDP, unix.UDP_GRO}:
			if len(data) >= 4 {
				a.segment = int(binary.NativeEndian.Uint32(data))
			}
		case [2]int32{unix.SOL_IP, unix.IP_TOS}, [2]int32{unix.SOL_IPV6, unix.IPV6_TCLASS}:
			a.tos = small(data)
		case [2]int32{unix.SOL_IP, unix.IP_PKTINFO}:
			if len(data) >= unix.SizeofInet4Pktinfo {
				a.arrived(netip.AddrFrom4([4]byte(data[8:12])), data[0:])
				// ipi_spec_dst is who would answer: another one than a group's address.
				a.group = netip.AddrFrom4([4]byte(data[4:8])) != a.at.addr
			}
		case [2]int32{unix.SOL_IPV6, unix.IPV6_PKTINFO}:
			if len(data) >= unix.SizeofInet6Pktinfo && !a.at.addr.IsValid() {
				a.arrived(netip.AddrFrom16([16]byte(data[0:16])).Unmap(), data[16:])
			}
		case [2]int32{unix.SOL_IP, unix.IP_TTL}, [2]int32{unix.SOL_IPV6, unix.IPV6_HOPLIMIT}:
			a.ttl = small(data)
		case [2]int32{unix.SOL_IP, unix.IP_RECVERR}, [2]int32{unix.SOL_IPV6, unix.IPV6_RECVERR}:
			const size = int(unsafe.Sizeof(unix.SockExtendedErr{}))
			if len(data) >= size {
				a.err = (*unix.SockExtendedErr)(unsafe.Pointer(&data[0]))
				a.offender = addrPort(data[size:]).Addr()
			}
		}
	}
}

func (a *ancillary) arrived(at netip.Addr, iface []byte) {
	a.at = local{addr: at, iface: int(binary.NativeEndian.Uint32(iface))}
	a.group = at.IsMulticast()
}

// small reads the octet that the kernel gives as one octet (IP_TOS) or as an int (the others).
func small(data []byte) uint8 {
	if len(data) >= 4 {
		return uint8(binary.NativeEndian.Uint32(data))
	}
	if len(data) > 0 {
		return data[0]
	}
	return 0
}

// sendmsg and recvmsg are the system calls on h.
func sendmsg(fd int, h *unix.Msghdr, flags int) unix.Errno {
	for {
		_, _, e := unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(h)), uintptr(flags))
		if e != unix.EINTR {
			return e
		}
	}
}

func recvmsg(fd int, h *unix.Msghdr, flags int) (int, unix.Errno) {
	for {
		n, _, e := unix.Syscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(h)), uintptr(flags))
		if e != unix.EINTR {
			return int(n), e
		}
	}
}

// A message is struct mmsghdr.
type message struct {
	hdr unix.Msghdr
	len uint32
}

func recvmmsg(fd int, m []message) (int, unix.Errno) {
	for {
		n, _, e := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), unix.MSG_DONTWAIT, 0, 0)
		if e != unix.EINTR {
			return int(n), e
		}
	}
}
