package stack

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	icmp4 = uint8(header.ICMPv4ProtocolNumber)
	icmp6 = uint8(header.ICMPv6ProtocolNumber)

	// How much of an erroneous packet is sent back: the error is at most 576 octets long for
	// IPv4 (RFC 1812 §4.3.2.3), and at most 1280 for IPv6 (RFC 4443 §2.4 c).
	maxError4 = 576
	maxError6 = 1280
)

// echo4 hands an echo request on, if it is one and not for an address of our own: those netstack answers.
func (r *reader) echo4(f *frame) bool {
	h := f.transport()
	if len(h) < header.ICMPv4MinimumSize || header.ICMPv4(h).Type() != header.ICMPv4Echo || r.s.own[f.dst] {
		return false
	}
	r.echo(f, h)
	return true
}

// icmp6 does the same for ICMPv6, answers router solicitations, and looks at neighbour discovery.
func (r *reader) icmp6(f *frame) bool {
	h := f.transport()
	if len(h) < header.ICMPv6MinimumSize {
		return false
	}
	switch header.ICMPv6(h).Type() {
	case header.ICMPv6EchoRequest:
		if len(h) < header.ICMPv6EchoMinimumSize || r.s.own[f.dst] || f.dst.IsMulticast() {
			return false
		}
		r.echo(f, h)
		return true
	case header.ICMPv6RouterSolicit:
		// Only a neighbour's hop limit is still 255.
		if is := r.s.cfg.IsSolicitation; is != nil && f.ttl == 255 && f.ipPayloadLen() == len(h) && is(h) {
			r.s.advertise()
		}
		return true
	}
	if !r.s.discovery(f, h) {
		r.s.stats.NotForUs.Add(1)
		return true
	}
	return false
}

// echo calls the handler. ICMP and ICMPv6 lay out an echo alike: type, code, checksum, ID, sequence.
func (r *reader) echo(f *frame, h []byte) {
	e := Echo{
		Src: f.src, Dst: f.dst, TTL: f.ttl, TOS: f.tos,
		ID: binary.BigEndian.Uint16(h[4:]), Seq: binary.BigEndian.Uint16(h[6:]),
		Payload: h[8:],
	}
	if rest := f.ipPayloadLen() - len(h); rest > 0 {
		e.Payload = append(append(make([]byte, 0, len(h)-8+rest), h[8:]...), f.tail[:rest]...)
	}
	r.s.handler.ServeEcho(e)
}

// SendEchoReply sends an answer to the container: Src is who answers, Dst who had asked.
func (s *Stack) SendEchoReply(e Echo) error {
	if e.Src.Is4() != e.Dst.Is4() {
		return unix.EAFNOSUPPORT
	}
	if len(e.Payload) > maxUDPPayload(e.Src) { // an echo's header is as long as UDP's
		return unix.EMSGSIZE
	}
	typ := byte(header.ICMPv4EchoReply)
	if e.Src.Is6() {
		typ = byte(header.ICMPv6EchoReply)
	}
	msg := make([]byte, 8, 8+len(e.Payload))
	msg[0] = typ
	binary.BigEndian.PutUint16(msg[4:], e.ID)
	binary.BigEndian.PutUint16(msg[6:], e.Seq)
	return s.sendICMP(e.Src, e.Dst, e.TTL, e.TOS, append(msg, e.Payload...))
}

// SendICMP tells the container of an error. Nothing is said about multicast and broadcast,
// nor about an error (RFC 1122 §3.2.2); the policy keeps these from coming here.
func (s *Stack) SendICMP(e *ICMPError) error {
	if e.Src.Is4() != e.Dst.Is4() {
		return unix.EAFNOSUPPORT
	}
	from := e.From
	if !from.IsValid() || from.Is4() != e.Src.Is4() {
		from = s.gateway(e.Src.Is4())
		if !from.IsValid() {
			return unix.EAFNOSUPPORT
		}
	}
	room, ipHeader := maxError4, header.IPv4MinimumSize
	if e.Src.Is6() {
		room, ipHeader = maxError6, header.IPv6MinimumSize
	}
	quoted := e.Transport[:min(len(e.Transport), room-2*ipHeader-8)]
	msg := make([]byte, 8, 8+ipHeader+len(quoted))
	msg[0], msg[1] = e.Type, e.Code
	binary.BigEndian.PutUint32(msg[4:], e.Info)
	w := s.link.writes.Get().(*frameWriter)
	ttl := e.TTL
	at := s.putIP(w, e.Src, e.Dst, e.Protocol, ttl, e.TOS, len(e.Transport))
	msg = append(msg, w.header[at-ipHeader:at]...)
	s.link.writes.Put(w)
	s.stats.ICMPErrorsOut.Add(1)
	return s.sendICMP(from, e.Src, 0, 0, append(msg, quoted...))
}

// sendICMP completes an ICMP or ICMPv6 message with its checksum and sends it.
func (s *Stack) sendICMP(src, dst netip.Addr, ttl, tos uint8, msg []byte) error {
	proto := icmp4
	var x sum
	if src.Is6() {
		proto = icmp6
		x.pseudo(src, dst, proto, len(msg))
	}
	msg[2], msg[3] = 0, 0
	x.add(msg)
	binary.BigEndian.PutUint16(msg[2:], x.final())
	flow := Datagram{Src: netip.AddrPortFrom(src, 0), Dst: netip.AddrPortFrom(dst, 0)}
	return s.fragment(src, dst, proto, ttl, tos, msg, &flow)
}

// allNodes is where a router advertisement goes (RFC 4861 §4.2).
var allNodes = netip.MustParseAddr("ff02::1")

// advertise sends the router advertisement, if there is one.
func (s *Stack) advertise() {
	if len(s.cfg.Advertisement) == 0 {
		return
	}
	msg := append([]byte(nil), s.cfg.Advertisement...)
	if err := s.sendICMP(s.cfg.LinkLocal, allNodes, 255, 0, msg); err != nil {
		s.log.Debug("router advertisement not sent", "err", err)
	}
}
