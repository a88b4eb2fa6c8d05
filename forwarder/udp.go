package forwarder

import (
	"errors"
	"net/netip"
	"time"

	"usernet/stack"

	"golang.org/x/sys/unix"
)

// UDP is translated datagram by datagram; there is no connection, endpoint or goroutine per flow.
//
//	ServeUDP                                   poller
//	  train: datagrams that go together          recvmmsg from the flow's socket
//	  Policy: where they go, or a refusal        peers: who is it to the container?
//	  table: the flow of the source,             train: datagrams that go together
//	         with an unconnected socket          Stack.SendUDP
//	  peers: remember the destination            and, where an error is queued (errqueue.go),
//	  sendmsg, with UDP_SEGMENT for trains       Stack.SendICMP
//
// The socket has the source's port where the host has that free, and serves all its
// destinations. A client of a published port (published.go) is a flow as well, that began at the other end.

// ServeUDP sends what the container sent. It is part of stack.Handler.
func (f *Forwarder) ServeUDP(batch []stack.Datagram) {
	s := f.senders.get()
	defer f.senders.put(s)
	now := f.now()
	for len(batch) > 0 {
		n, t := joined(batch)
		f.sendUDP(s, batch[:n], t, now)
		batch = batch[n:]
	}
}

// joined tells how many datagrams at the head of batch can leave together, and as what.
func joined(batch []stack.Datagram) (int, train) {
	var t train
	first := &batch[0]
	t.add(first.Len(), first.Segment)
	n := 1
	for ; n < len(batch); n++ {
		d := &batch[n]
		if d.Dst != first.Dst || d.Src != first.Src || d.TTL != first.TTL || d.TOS != first.TOS || !t.add(d.Len(), d.Segment) {
			break
		}
	}
	return n, t
}

// sendUDP sends run, whose datagrams make up t.
func (f *Forwarder) sendUDP(s *sender, run []stack.Datagram, t train, now int64) {
	if f.sendToClient(s, run, t, now) {
		return
	}
	d := &run[0]
	to, verdict := f.resolve(Flow{Proto: protoUDP, Src: d.Src, Dst: d.Dst})
	switch {
	case verdict.Action == Drop:
		f.udp.count.drop(dropPolicy, t.count)
		return
	case verdict.Action == Refuse:
		f.udp.count.drop(dropRefused, t.count)
		f.refuseUDP(s, &f.udp.count, d, verdict.Reason)
		return
	}
	key := flowKey{proto: protoUDP, src: d.Src, local: f.local(to.Addr())}
	fl, err := f.flowTo(&f.udp, key, to, d.Dst, now)
	if err != nil {
		f.noFlow(&f.udp, t.count, err)
		if !errors.Is(err, errStopped) {
			f.refuseUDP(s, &f.udp.count, d, err)
		}
		return
	}
	defer fl.release()
	s.to(to, d.TTL, d.TOS)
	f.sendRun(s, way{fl: fl, sock: fl.sock}, run, t)
}

// A way is where datagrams go on to: to the container by the TAP, with their two ends as it has them, or for
// a flow through a socket.
type way struct {
	src, dst netip.AddrPort
	fl       *flow
	sock     *socket // nil: by the TAP. Its flow's, or the published port's for what a client is answered through its own
	in       bool    // through a socket inside the container
}

// sendRun sends run by w, through its socket, to where s was told.
func (f *Forwarder) sendRun(s *sender, w way, run []stack.Datagram, t train) {
	fl := w.fl
	if t.count == 1 || !fl.joins(t.segment) {
		f.sendApart(s, w, run)
		return
	}
	for i := range run {
		s.append(run[i].Payload...)
	}
	switch e := f.push(s, w.sock, t.segment); e {
	case unix.EIO, unix.EINVAL, unix.EMSGSIZE:
		// Longer than the path's MTU, which only datagrams for themselves may be, or an
		// interface without checksum offload.
		fl.train.Store(int32(t.segment))
		if e == unix.EIO {
			fl.train.Store(1)
		}
		s.iov = s.iov[:0]
		f.sendApart(s, w, run)
	default:
		f.sentUDP(s, w, &run[0], t.count, t.octets, e)
	}
}

// sendApart sends each datagram of run for itself.
func (f *Forwarder) sendApart(s *sender, w way, run []stack.Datagram) {
	for i := range run {
		d := &run[i]
		octets, segment := d.Len(), d.Segment
		if segment <= 0 || segment > octets {
			segment = octets
		}
		for off, more := 0, true; more; more = off < octets { // once for an empty datagram
			n := min(segment, octets-off)
			s.appendPart(d.Payload, off, n)
			f.sentUDP(s, w, d, 1, n, f.push(s, w.sock, 0))
			off += n
		}
	}
}

// sentUDP books n datagrams like d, which the kernel took or refused with e.
func (f *Forwarder) sentUDP(s *sender, w way, d *stack.Datagram, n, octets int, e unix.Errno) {
	s.iov = s.iov[:0]
	count := w.fl.count()
	switch {
	case w.in && e == 0:
		count.receivedSome(n, octets)
	case count.sentOr(n, octets, e), w.fl.kind == &f.inside: // nobody on the TAP has sent it
	case e != unix.EMSGSIZE: // what is too long has been told by the error queue, with the MTU
		f.refuseUDP(s, count, d, e)
	}
}

// refuseUDP tells the container by ICMP that d met with err, if there is a message for that.
func (f *Forwarder) refuseUDP(s *sender, count *counter, d *stack.Datagram, err error) {
	e := &s.icmp
	*e = stack.ICMPError{Protocol: protoUDP, Src: d.Src.Addr(), Dst: d.Dst.Addr(), TTL: d.TTL, TOS: d.TOS}
	octets := d.Len()
	if d.Segment > 0 {
		octets = min(octets, d.Segment)
	}
	putUDPHeader(s.quote[:], d.Src.Port(), d.Dst.Port(), octets)
	n := udpHeaderLen
	for _, p := range d.Payload {
		n += copy(s.quote[n:min(len(s.quote), udpHeaderLen+octets)], p)
	}
	e.Transport = s.quote[:n]
	f.tell(count, e, err)
}

// openUDP is kind.open for UDP.
func (f *Forwarder) openUDP(fl *flow) (*socket, error) {
	family, v6 := family(fl.key.src.Addr()), fl.v6()
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err = receiveErrors(fd, v6); err == nil {
		if v6 {
			err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1) // the IPv4 port is another flow's
		}
		receiveTrains(fd)
	}
	if err == nil {
		err = f.bindUDP(fd, family, fl.key)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return f.newSocket(fd, protoUDP, fl), nil
}

// receiveTrains asks for what a UDP socket works less well without: single datagrams come in
// (before Linux 5.0), a burst is lost.
func receiveTrains(fd int) {
	_ = unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, udpReceiveBuffer)
}

// udpReceiveBuffer, in octets, holds what comes while the poller serves other flows. The
// kernel grants net.core.rmem_max at most.
const udpReceiveBuffer = 1 << 20

// lowestKept is the lowest port of the container that its flow has on the host too. Those
// below belong to the host's daemons, whoever we run as.
const lowestKept = 1024

// bindUDP binds fd to the source's own port where it is free, else to any.
func (f *Forwarder) bindUDP(fd, family int, key flowKey) error {
	o := &f.cfg.Outbound
	if key.local {
		o = &Outbound{}
	}
	if err := o.bindDevice(fd, family); err != nil {
		return err
	}
	if port := key.src.Port(); port >= lowestKept {
		switch err := o.bindAddr(fd, family, port); {
		case errors.Is(err, unix.EADDRINUSE), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		default:
			return err
		}
	}
	return o.bindAddr(fd, family, 0)
}

// readUDP is kind.read for UDP.
func (f *Forwarder) readUDP(r *receiver, fl *flow, now int64) {
	f.receiveUDP(r, fl.sock.fd, &f.udp.count, fl, now)
}

// A udpReceiver tells by which way the datagrams go on that came from one sender to one address of the host,
// or with ok false why they go no further. A way through a socket has a reference to its flow and to the socket.
type udpReceiver interface {
	came(from netip.AddrPort, at local, now int64) (w way, why dropReason, ok bool)
}

func (fl *flow) came(from netip.AddrPort, _ local, now int64) (w way, why dropReason, ok bool) {
	used, ok := fl.answer(from, now)
	if !ok {
		used, ok = from, fl.f.cfg.UDP.FullCone && fl.f.stranger(from.Addr())
	}
	return way{src: used, dst: fl.key.src}, dropFiltered, ok
}

// end lets go of what w has.
func (w *way) end() {
	if w.sock != nil {
		w.sock.release()
		w.fl.release()
	}
	*w = way{}
}

// receiveUDP sends on what fd has, in trains.
func (f *Forwarder) receiveUDP(r *receiver, fd int, count *counter, to udpReceiver, now int64) {
	n := r.read(fd)
	var t train
	var from netip.AddrPort
	var at local
	var w way
	var why dropReason
	var ok bool
	out := &r.out[0]
	for i := range n {
		m := r.message(i)
		if m.group {
			count.drop(dropGroup, 1)
			continue
		}
		if m.from != from || m.at != at || !from.IsValid() {
			f.receivedUDP(r, count, &w, &t)
			w.end()
			from, at = m.from, m.at
			w, why, ok = to.came(from, at, now)
		}
		if !ok {
			count.drop(why, 1)
			continue
		}
		segment := m.segment
		if segment <= 0 || segment > len(m.data) {
			segment = len(m.data)
		}
		// One datagram or a train, which may be longer than we may pass on.
		for data, more := m.data, true; more; more = len(data) > 0 {
			part := data[:min(len(data), maxSegments*segment)]
			data = data[len(part):]
			if t.count > 0 && (out.TOS != m.tos || !t.add(len(part), segment)) {
				f.receivedUDP(r, count, &w, &t)
			}
			if t.count == 0 {
				t.add(len(part), segment)
				*out = stack.Datagram{Src: w.src, Dst: w.dst, Payload: r.pieces[:0], TOS: m.tos}
			}
			out.Payload = append(out.Payload, part)
		}
	}
	f.receivedUDP(r, count, &w, &t)
	w.end()
}

// receivedUDP sends r.out, which is t, by w.
func (f *Forwarder) receivedUDP(r *receiver, count *counter, w *way, t *train) {
	if t.count == 0 {
		return
	}
	out := &r.out[0]
	if t.count > 1 {
		out.Segment = t.segment
	}
	switch {
	case w.sock != nil:
		f.sendOn(&r.sender, w, r.out[:], *t)
	case f.stack.SendUDP(out) != nil:
		count.drop(dropStack, t.count)
	default:
		count.receivedSome(t.count, t.octets)
	}
	r.pieces = out.Payload // perhaps grown
	*t = train{}
}

// stranger tells whether a, to which the container has not sent, may be shown to it as it is.
func (f *Forwarder) stranger(a netip.Addr) bool {
	p := &f.cfg.Policy
	return !p.martian(a) && !a.IsLinkLocalUnicast() && !p.Subnet4.Contains(a) && !p.Subnet6.Contains(a)
}

// idleUDP is kind.idle for UDP.
func (f *Forwarder) idleUDP(_ *flow, p *peer) time.Duration {
	c := &f.cfg.UDP
	switch {
	case p.real.Port() == 53:
		return c.DNS
	case p.answered:
		return c.Answered
	}
	return c.Unanswered
}
