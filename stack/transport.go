package stack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// TCP's limits, in octets per connection and direction. A buffer is only as large as what
// waits in it; these say when the sender is held back.
const (
	minBuffer     = 4 << 10
	defaultBuffer = 1 << 20 // enough for 8 Gbit/s at 1 ms, before netstack lets it grow
	maxBuffer     = 8 << 20 // 640 Mbit/s at 100 ms

	// fullBuffers is how many connections may have buffers up to maxBuffer. Those beyond have less, by
	// the square of how many there are, down to leastBuffer (two super-segments): whatever a
	// container leaves unread, it costs no more than half a GiB each way and leastBuffer for each connection.
	fullBuffers = 32
	leastBuffer = 128 << 10

	// timeWait: frames do not linger on a TAP, so a tuple is free again long before 2 MSL
	// of RFC 9293 §3.3.2; 10 000 short connections would be remembered for a minute else.
	timeWait = 2 * time.Second

	// finWait is how long a connection that both ends of the relay have let go waits for
	// the container's FIN.
	finWait = 30 * time.Second

	// As Linux has them (net.ipv4.tcp_keepalive_*).
	keepaliveIdle     = 2 * time.Hour
	keepaliveInterval = 75 * time.Second
	keepaliveCount    = 9
)

func (s *Stack) setTCPOptions() {
	send := tcpip.TCPSendBufferSizeRangeOption{Min: minBuffer, Default: defaultBuffer, Max: maxBuffer}
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: defaultBuffer, Max: maxBuffer}
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	noRACK := tcpip.TCPRecovery(0) // a TAP loses and reorders nothing, and RACK's timers cost
	cubic := tcpip.CongestionControlOption("cubic")
	linger := tcpip.TCPLingerTimeoutOption(finWait)
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	for _, o := range []tcpip.SettableTransportProtocolOption{&send, &receive, &sack, &moderate, &noRACK, &cubic, &linger, &wait} {
		if err := s.ns.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			panic("netstack does not know its own option: " + err.String())
		}
	}
}

// bufferFor is the largest buffer of the nth connection that stands at once.
func bufferFor(n int64) int64 {
	if n <= fullBuffers {
		return maxBuffer
	}
	return max(maxBuffer*fullBuffers/n*fullBuffers/n, leastBuffer)
}

// setEndpointOptions is for each connection, the nth that stands. Nagle's delay is the sender's business,
// not a relay's.
func (s *Stack) setEndpointOptions(ep tcpip.Endpoint, n int64) {
	o := ep.SocketOptions()
	if size := bufferFor(n); size < maxBuffer {
		// Setting a size also keeps netstack from letting it grow.
		o.SetReceiveBufferSize(min(size, defaultBuffer), true)
		o.SetSendBufferSize(min(size, defaultBuffer), true)
	}
	o.SetDelayOption(false)
	o.SetKeepAlive(true)
	idle := tcpip.KeepaliveIdleOption(keepaliveIdle)
	interval := tcpip.KeepaliveIntervalOption(keepaliveInterval)
	_ = ep.SetSockOpt(&idle)
	_ = ep.SetSockOpt(&interval)
	_ = ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepaliveCount)
}

func (s *Stack) setHandlers() {
	s.ns.SetTransportProtocolHandler(tcp.ProtocolNumber, s.tcp.handlePacket)
	s.ns.SetTransportProtocolHandler(udp.ProtocolNumber, s.handleUDP)
	s.ns.SetTransportProtocolHandler(icmp.ProtocolNumber4, s.handleICMP)
	s.ns.SetTransportProtocolHandler(icmp.ProtocolNumber6, s.handleICMP)
}

// handleUDP gets the datagrams that netstack has reassembled, or read behind an extension
// header; the reader took all others. Nobody has verified their checksum.
func (s *Stack) handleUDP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.UDP(pkt.TransportHeader().Slice())
	payload := pkt.Data().AsRange().ToSlice()
	d := Datagram{
		Src:     addrPort(id.RemoteAddress, id.RemotePort),
		Dst:     addrPort(id.LocalAddress, id.LocalPort),
		Payload: [][]byte{payload},
	}
	d.TTL, d.TOS = ttlAndTOS(pkt)
	if h.Checksum() != 0 || d.Src.Addr().Is6() {
		var x sum
		x.pseudo(d.Src.Addr(), d.Dst.Addr(), uint8(udp.ProtocolNumber), len(h)+len(payload))
		x.add(h)
		x.add(payload)
		if x.final() != 0 {
			s.stats.BadChecksum.Add(1)
			return true
		}
	}
	s.stats.DatagramsIn.Add(1)
	if !s.gatewayUDP(&d) {
		s.handler.ServeUDP([]Datagram{d})
	}
	return true
}

// handleICMP gets what netstack has reassembled, and what is for our own addresses. True
// keeps netstack from answering an echo itself.
func (s *Stack) handleICMP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	msg := stack.PayloadSince(pkt.TransportHeader())
	defer msg.Release()
	b := msg.AsSlice()
	src, dst := netipAddr(id.RemoteAddress), netipAddr(id.LocalAddress)
	want := byte(header.ICMPv4Echo)
	if src.Is6() {
		want = byte(header.ICMPv6EchoRequest)
	}
	if len(b) < 8 || b[0] != want || s.own[dst] || dst.IsMulticast() {
		return false
	}
	var x sum
	if src.Is6() {
		x.pseudo(src, dst, icmp6, len(b))
	}
	x.add(b)
	if x.final() != 0 {
		s.stats.BadChecksum.Add(1)
		return true
	}
	e := Echo{Src: src, Dst: dst, ID: binary.BigEndian.Uint16(b[4:]), Seq: binary.BigEndian.Uint16(b[6:]), Payload: b[8:]}
	e.TTL, e.TOS = ttlAndTOS(pkt)
	s.handler.ServeEcho(e)
	return true
}

func ttlAndTOS(pkt *stack.PacketBuffer) (ttl, tos uint8) {
	ip := pkt.NetworkHeader().Slice()
	switch {
	case len(ip) >= header.IPv6MinimumSize && ip[0]>>4 == 6:
		return ip[7], ip[0]<<4 | ip[1]>>4
	case len(ip) >= header.IPv4MinimumSize:
		return ip[8], ip[1]
	}
	return 0, 0
}

const dhcpServerPort = 67

// gatewayUDP handles what the gateway itself serves without a socket: DHCP. It reports whether it did.
func (s *Stack) gatewayUDP(d *Datagram) bool {
	if d.Dst.Port() != dhcpServerPort || s.cfg.DHCP == nil || !d.Src.Addr().Is4() {
		return false
	}
	if a := d.Dst.Addr(); a != broadcast4 && a != s.cfg.Gateway4.Addr() {
		return false
	}
	if d.Segment != 0 {
		return true
	}
	request := d.Payload[0]
	if len(d.Payload) > 1 {
		return true // RFC 2131 §2: a message of over 2 KiB is no client's
	}
	reply, to, ok := s.cfg.DHCP(request)
	if !ok {
		return true
	}
	from := netip.AddrPortFrom(s.cfg.Gateway4.Addr(), dhcpServerPort)
	if err := s.SendUDP(&Datagram{Src: from, Dst: to, Payload: [][]byte{reply}}); err != nil {
		s.log.Debug("DHCP answer not sent", "to", to, "err", err)
	}
	return true
}

// silenceNetstack keeps netstack from writing to standard error, which is the user's: what a container
// sends must not be able to write there. What matters of it is counted.
var silenceNetstack = sync.OnceFunc(func() { log.SetTarget(noLog{}) })

type noLog struct{}

func (noLog) Emit(int, log.Level, time.Time, string, ...any) {}

func isErrno(err error, want error) bool { return errors.Is(err, want) }
