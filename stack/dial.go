package stack

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

func networkProtocol(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

// listens reports whether ListenPacket has taken a port of ours.
func (s *Stack) listens(ap netip.AddrPort) bool {
	_, ok := s.listeners.Load(ap)
	return ok
}

// ListenPacket opens a UDP port on one of our own addresses. It may be called before Run.
func (s *Stack) ListenPacket(addr netip.AddrPort) (net.PacketConn, error) {
	if !s.own[addr.Addr()] {
		return nil, fmt.Errorf("listen on udp %v: %w", addr, unix.EADDRNOTAVAIL)
	}
	if _, taken := s.listeners.LoadOrStore(addr, struct{}{}); taken {
		return nil, fmt.Errorf("listen on udp %v: %w", addr, unix.EADDRINUSE)
	}
	full := fullAddress(addr)
	c, err := gonet.DialUDP(s.ns, &full, nil, networkProtocol(addr.Addr()))
	if err != nil {
		s.listeners.Delete(addr)
		return nil, fmt.Errorf("listen on udp %v: %w", addr, err)
	}
	return &packetConn{UDPConn: c, s: s, addr: addr}, nil
}

// packetConn gives the port back when it is closed.
type packetConn struct {
	*gonet.UDPConn
	s    *Stack
	addr netip.AddrPort
}

func (p *packetConn) Close() error {
	p.s.listeners.Delete(p.addr)
	return p.UDPConn.Close()
}

// Listen opens a TCP port on one of our own addresses. It may be called before Run.
func (s *Stack) Listen(addr netip.AddrPort) (net.Listener, error) {
	if !s.own[addr.Addr()] {
		return nil, fmt.Errorf("listen on tcp %v: %w", addr, unix.EADDRNOTAVAIL)
	}
	l, err := gonet.ListenTCP(s.ns, fullAddress(addr), networkProtocol(addr.Addr()))
	if err != nil {
		return nil, fmt.Errorf("listen on tcp %v: %w", addr, err)
	}
	return l, nil
}

// DialContext connects to a port of the container's, from the gateway's address. network is tcp, tcp4 or tcp6,
// address an IP address and a port.
func (s *Stack) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	dst, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", address, err)
	}
	c, err := s.DialFrom(ctx, network, netip.AddrPort{}, dst)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// DialFrom is DialContext with the client's own address as the source. A zero src is the
// gateway's address; port 0 is any.
func (s *Stack) DialFrom(ctx context.Context, network string, src, dst netip.AddrPort) (*Conn, error) {
	is4 := dst.Addr().Is4()
	switch {
	case network == "tcp", network == "tcp4" && is4, network == "tcp6" && !is4:
	default:
		return nil, net.UnknownNetworkError(network)
	}
	if !src.IsValid() {
		src = netip.AddrPortFrom(s.gateway(is4), 0)
	}
	if !src.Addr().IsValid() || src.Addr().Is4() != is4 {
		return nil, fmt.Errorf("dial %v: %w", dst, unix.EAFNOSUPPORT)
	}
	c, err := s.dial(ctx, src, dst)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Source: net.TCPAddrFromAddrPort(src), Addr: net.TCPAddrFromAddrPort(dst), Err: err}
	}
	return c, nil
}

func (s *Stack) dial(ctx context.Context, src, dst netip.AddrPort) (*Conn, error) {
	wq := new(waiter.Queue)
	ep, terr := s.ns.NewEndpoint(tcp.ProtocolNumber, networkProtocol(dst.Addr()), wq)
	if terr != nil {
		return nil, errno(terr)
	}
	entry, ch := waiter.NewChannelEntry(waiter.WritableEvents)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	if terr := ep.Bind(fullAddress(src)); terr != nil {
		ep.Close()
		return nil, errno(terr)
	}
	terr = ep.Connect(fullAddress(dst))
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ctx.Done():
			ep.Abort()
			ep.Close()
			return nil, context.Cause(ctx)
		case <-ch:
			terr = ep.LastError()
		}
	}
	if terr != nil {
		ep.Close()
		return nil, errno(terr)
	}
	local := src
	if a, err := ep.GetLocalAddress(); err == nil {
		local = netip.AddrPortFrom(src.Addr(), a.Port)
	}
	return newConn(s, ep, wq, local, dst), nil
}
