package forwarder

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"

	"usernet/stack"

	"golang.org/x/sys/unix"
)

// Echo requests leave by the kernel's ping sockets (IPPROTO_ICMP with SOCK_DGRAM), which need no
// privilege but a group in net.ipv4.ping_group_range. The kernel gives each socket an
// identifier of its own and the replies with it; a flow is one identifier of one source in
// the container. Nothing is answered that the world did not answer.

const (
	echoRequest4, echoReply4 = 8, 0 // RFC 792
	echoRequest6, echoReply6 = 128, 129
)

// putEchoHeader writes the header of an echo request without a checksum, which the kernel
// computes for what is sent and nobody verifies in what is quoted.
func putEchoHeader(b []byte, v6 bool, id, seq uint16) {
	b[0], b[1], b[2], b[3] = echoRequest4, 0, 0, 0
	if v6 {
		b[0] = echoRequest6
	}
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], seq)
}

// ServeEcho sends an echo request of the container. It is part of stack.Handler.
func (f *Forwarder) ServeEcho(e stack.Echo) {
	proto := uint8(protoICMP)
	if e.Dst.Is6() {
		proto = protoICMPv6
	}
	src, dst := netip.AddrPortFrom(e.Src, e.ID), netip.AddrPortFrom(e.Dst, 0)
	to, verdict := f.resolve(Flow{Proto: proto, Src: src, Dst: dst})
	if verdict.Action == Drop {
		f.echo.count.drop(dropPolicy, 1)
		return
	}
	s := f.senders.get()
	defer f.senders.put(s)
	if verdict.Action == Refuse {
		f.echo.count.drop(dropRefused, 1)
		f.refuseEcho(s, &e, verdict.Reason)
		return
	}
	fl, err := f.flowTo(&f.echo, flowKey{proto: proto, src: src, local: f.local(to.Addr())}, to, dst, f.now())
	if err != nil {
		f.noFlow(&f.echo, 1, err)
		if !errors.Is(err, errStopped) {
			f.refuseEcho(s, &e, err)
		}
		return
	}
	defer fl.release()
	s.to(to, e.TTL, e.TOS)
	putEchoHeader(s.header[:], fl.v6(), e.ID, e.Seq)
	s.append(s.header[:])
	s.append(e.Payload)
	errno := f.push(s, fl.sock, 0)
	if !f.echo.count.sentOr(1, len(e.Payload), errno) && errno != unix.EMSGSIZE {
		f.refuseEcho(s, &e, errno)
	}
}

// refuseEcho tells the container by ICMP that e met with err, if there is a message for that.
func (f *Forwarder) refuseEcho(s *sender, e *stack.Echo, err error) {
	i := &s.icmp
	*i = stack.ICMPError{Protocol: protoICMP, Src: e.Src, Dst: e.Dst, TTL: e.TTL, TOS: e.TOS}
	if e.Dst.Is6() {
		i.Protocol = protoICMPv6
	}
	putEchoHeader(s.quote[:], e.Dst.Is6(), e.ID, e.Seq)
	i.Transport = s.quote[:echoHeaderLen+copy(s.quote[echoHeaderLen:], e.Payload)]
	f.tell(&f.echo.count, i, err)
}

// openEcho is kind.open for echoes.
func (f *Forwarder) openEcho(fl *flow) (*socket, error) {
	family, proto, v6 := unix.AF_INET, unix.IPPROTO_ICMP, fl.v6()
	if v6 {
		family, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		if err == unix.EACCES || err == unix.EPERM {
			f.pingForbidden.Do(func() {
				f.log.Warn("the kernel forbids us to ping: the container's pings are refused (administratively prohibited)",
					"remedy", `sysctl -w net.ipv4.ping_group_range="0 2147483647"`, "error", err)
			})
		}
		return nil, err
	}
	if err = receiveErrors(fd, v6); err == nil {
		if v6 {
			_ = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVHOPLIMIT, 1)
		} else {
			_ = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVTTL, 1)
		}
		if !fl.key.local {
			err = f.cfg.Outbound.bind(fd, family)
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return f.newSocket(fd, fl.key.proto, fl), nil
}

// readEcho is kind.read for echoes.
func (f *Forwarder) readEcho(r *receiver, fl *flow, now int64) {
	reply := byte(echoReply4)
	if fl.v6() {
		reply = echoReply6
	}
	for i := range r.read(fl.sock.fd) {
		m := r.message(i)
		if len(m.data) < echoHeaderLen || m.data[0] != reply {
			continue
		}
		used, known := fl.answer(m.from, now)
		if !known {
			f.echo.count.drop(dropFiltered, 1)
			continue
		}
		err := f.stack.SendEchoReply(stack.Echo{
			Src: used.Addr(), Dst: fl.key.src.Addr(),
			ID: fl.key.src.Port(), Seq: binary.BigEndian.Uint16(m.data[6:]),
			Payload: m.data[echoHeaderLen:],
			TTL:     m.ttl, TOS: m.tos,
		})
		if err != nil {
			f.echo.count.drop(dropStack, 1)
			continue
		}
		f.echo.count.received.Add(1)
		f.echo.count.receivedOctets.Add(uint64(len(m.data) - echoHeaderLen))
	}
}

// idleEcho is kind.idle for echoes.
func (f *Forwarder) idleEcho(*flow, *peer) time.Duration { return f.cfg.Echo.Idle }
