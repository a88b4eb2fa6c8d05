package forwarder

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"usernet/stack"

	"golang.org/x/sys/unix"
)

const (
	parameterProblem4 = 12

	udpHeaderLen  = 8
	echoHeaderLen = 8

	// quoteLen is how much of a packet, from its transport header on, is quoted back: what an
	// ICMPv6 error may be in all (1280, RFC 4443 §2.4) less its headers.
	quoteLen = 1280 - 40 - 8 - 40
)

// putUDPHeader writes the header of a datagram with so many octets of payload. A quoted
// header needs no checksum.
func putUDPHeader(b []byte, src, dst uint16, octets int) {
	binary.BigEndian.PutUint16(b[0:], src)
	binary.BigEndian.PutUint16(b[2:], dst)
	binary.BigEndian.PutUint16(b[4:], uint16(udpHeaderLen+octets))
	binary.BigEndian.PutUint16(b[6:], 0)
}

// An errorReader is what a goroutine needs to read the error queue of a flow's socket.
type errorReader struct {
	hdr  unix.Msghdr
	iov  unix.Iovec
	name name
	ctl  control
	anc  ancillary
	buf  [quoteLen]byte
	icmp stack.ICMPError
}

// maxErrors is the most errors read at a time, so that somebody who makes errors faster
// than we tell them does not hold us.
const maxErrors = 64

// readErrors empties the error queue of sock (IP_RECVERR, ip(7)), tells the container each error as if
// it had sent the datagram itself, and clears the socket's pending error. It returns whether
// there was one: then a call on the socket failed for no reason of its own.
func (f *Forwarder) readErrors(r *errorReader, sock *socket) (pending bool) {
	udp := sock.proto == protoUDP
	for range maxErrors {
		// What comes is the datagram's payload; of an echo, the ICMP message.
		room := r.buf[:]
		if udp {
			room = room[udpHeaderLen:]
		}
		r.iov.Base = &room[0]
		r.iov.SetLen(len(room))
		r.hdr = unix.Msghdr{Name: &r.name[0], Namelen: uint32(len(r.name)), Iov: &r.iov, Control: &r.ctl.bytes()[0]}
		r.hdr.SetIovlen(1)
		r.hdr.SetControllen(len(r.ctl.bytes()))
		n, e := recvmsg(sock.fd, &r.hdr, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if e != 0 {
			break
		}
		r.anc.parse(r.ctl.bytes()[:r.hdr.Controllen])
		if ee := r.anc.err; ee != nil {
			pending = pending || ee.Origin != unix.SO_EE_ORIGIN_LOCAL
			real := addrPort(r.name[:min(int(r.hdr.Namelen), len(r.name))])
			if src, dst, ok := sock.user.ends(r.anc.at, real); ok {
				f.pass(r, sock, real, src, dst, n)
			}
		}
	}
	if e, err := unix.GetsockoptInt(sock.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && e != 0 {
		pending = true
		sock.user.failed(unix.Errno(e))
	}
	return pending
}

// pass tells the container the error that r has read, which quotes n octets of what src sent to dst, or real.
func (f *Forwarder) pass(r *errorReader, sock *socket, real, src, dst netip.AddrPort, n int) {
	count, ee := sock.user.books(), r.anc.err
	i := &r.icmp
	*i = stack.ICMPError{Protocol: sock.proto, Src: src.Addr(), Dst: dst.Addr()}
	if sock.proto == protoUDP {
		putUDPHeader(r.buf[:], src.Port(), dst.Port(), n)
		n += udpHeaderLen
	} else {
		n = max(n, echoHeaderLen)
		putEchoHeader(r.buf[:], src.Addr().Is6(), src.Port(), binary.BigEndian.Uint16(r.buf[6:]))
	}
	i.Transport = r.buf[:n]
	switch ee.Origin {
	case unix.SO_EE_ORIGIN_ICMP, unix.SO_EE_ORIGIN_ICMP6:
		i.Type, i.Code, i.Info = ee.Type, ee.Code, ee.Info
		if ee.Origin == unix.SO_EE_ORIGIN_ICMP && ee.Type == parameterProblem4 {
			i.Info <<= 24 // the kernel gives the pointer, which is the word's first octet (RFC 792)
		}
		i.From = f.router(r.anc.offender, real.Addr(), dst.Addr())
		f.send(count, i)
	case unix.SO_EE_ORIGIN_LOCAL:
		i.Info = ee.Info
		f.tell(count, i, unix.Errno(ee.Errno))
	}
}

// router is who an error comes from, as the container may know it: the destination under the name
// that the container has for it, the gateway for the host's loopback, else the router.
func (f *Forwarder) router(offender, real, used netip.Addr) netip.Addr {
	switch {
	case offender == real:
		return used
	case !offender.IsValid(), offender.IsLoopback(), offender.IsUnspecified(), offender.IsLinkLocalUnicast():
		return netip.Addr{}
	}
	return offender
}

// tell completes i with the message for err, if there is one, and gives it to the container.
func (f *Forwarder) tell(count *counter, i *stack.ICMPError, err error) {
	typ, code, ok := stack.Unreachable(i.Dst.Is6(), err)
	if !ok {
		return
	}
	i.Type, i.Code = typ, code
	if errors.Is(err, unix.ECONNREFUSED) {
		i.From = i.Dst // only the destination itself can say that a port is shut
	}
	f.send(count, i)
}

func (f *Forwarder) send(count *counter, i *stack.ICMPError) {
	if f.stack.SendICMP(i) == nil {
		count.errors.Add(1)
	}
}
