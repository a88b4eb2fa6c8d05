// Package dhcp is the DHCPv4 server on the gateway's address, for whoever in the container asks (RFC 2131). It is
// a function from a request and the time to a reply; sockets are somebody else's.
//
// The container's own address is already on its TAP as a rule; the first client that asks is taken for the
// container and gets that one. Further clients (nested bridges, macvlans) get addresses from a
// small pool, fifteen places above the network's: 10.0.2.15 to 10.0.2.30 by default, as slirp has it.
//
// Leases live in memory only. A usernet that was restarted believes what clients say they had, if it is
// free: there is no other server on this link that could know better.
package dhcp

import (
	"fmt"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/rfc1035label"
)

const (
	clientPort = 68 // RFC 2131 §4.1

	poolFirst, poolLast = 15, 30 // counted from the network's address

	defaultLease = 12 * time.Hour

	// minMessage is the length of a UDP payload that every client takes (RFC 2131 §2: an IP datagram of
	// 576 octets). Replies stay within it, so that nothing needs to be negotiated.
	minMessage = 576 - 28
)

// Config of a Server. Subnet, Gateway and one of Client and Lookup must be set.
type Config struct {
	Subnet  netip.Prefix // IPv4
	Gateway netip.Addr   // the router, and the server's own address
	DNS     netip.Addr   // zero: none is told
	Client  netip.Addr   // for the first client
	NoRoute bool         // no router is told: there is nothing behind the gateway

	// Lookup takes the place of Client and of the pool where somebody else knows who has which address: each client gets
	// that of its hardware address, or none. It is called for each request, and must not block.
	Lookup func(client net.HardwareAddr) (netip.Addr, bool)

	MTU int // of IP packets, in octets; zero: none is told

	Search []string // the search list (option 119, RFC 3397); left out whole if it is too long for a reply

	Lease time.Duration // zero: 12 hours
}

// A Server answers requests. Handle may be called concurrently.
type Server struct {
	cfg     Config
	options []dhcpv4.Option // of every reply but a NAK
	lease   time.Duration

	mu    sync.Mutex
	table table
}

// New checks cfg and makes a server of it.
func New(cfg Config) (*Server, error) {
	subnet := cfg.Subnet.Masked()
	if !subnet.IsValid() || !subnet.Addr().Is4() || subnet.Bits() > 30 {
		return nil, fmt.Errorf("dhcp: subnet %s: must be IPv4, /30 or shorter: a gateway and a client need room", cfg.Subnet)
	}
	first, last := subnet.Addr(), broadcast(subnet)
	hosts := []netip.Addr{cfg.Gateway}
	if cfg.Lookup == nil {
		hosts = append(hosts, cfg.Client)
	}
	for _, a := range hosts {
		if !subnet.Contains(a) || a == first || a == last {
			return nil, fmt.Errorf("dhcp: %s is no address of a host in %s", a, subnet)
		}
	}
	if cfg.Client == cfg.Gateway {
		return nil, fmt.Errorf("dhcp: client and gateway are both %s", cfg.Client)
	}
	if cfg.DNS.IsValid() && !cfg.DNS.Is4() {
		return nil, fmt.Errorf("dhcp: name server %s is not an IPv4 address", cfg.DNS)
	}
	if cfg.MTU != 0 && (cfg.MTU < 68 || cfg.MTU > math.MaxUint16) { // RFC 2132 §5.1
		return nil, fmt.Errorf("dhcp: mtu %d: must be 68 to 65535", cfg.MTU)
	}
	if cfg.Lease == 0 {
		cfg.Lease = defaultLease
	}
	if cfg.Lease < time.Second || cfg.Lease/time.Second > math.MaxUint32 {
		return nil, fmt.Errorf("dhcp: lease of %v: must be a second to 136 years", cfg.Lease)
	}
	cfg.Subnet = subnet
	s := &Server{cfg: cfg, lease: cfg.Lease.Truncate(time.Second)}
	s.setOptions()
	if cfg.Lookup != nil {
		return s, nil
	}
	var pool []netip.Addr
	addr := subnet.Addr()
	for i := range poolLast + 1 {
		if i >= poolFirst && subnet.Contains(addr) && addr != last &&
			addr != cfg.Gateway && addr != cfg.DNS && addr != cfg.Client {
			pool = append(pool, addr)
		}
		addr = addr.Next()
	}
	s.table = newTable(append([]netip.Addr{cfg.Client}, pool...), s.lease)
	return s, nil
}

func (s *Server) setOptions() {
	o := []dhcpv4.Option{
		dhcpv4.OptServerIdentifier(s.cfg.Gateway.AsSlice()),
		dhcpv4.OptSubnetMask(net.CIDRMask(s.cfg.Subnet.Bits(), 32)),
		dhcpv4.OptBroadcastAddress(broadcast(s.cfg.Subnet).AsSlice()),
	}
	if !s.cfg.NoRoute {
		o = append(o, dhcpv4.OptRouter(s.cfg.Gateway.AsSlice()))
	}
	if s.cfg.DNS.IsValid() {
		o = append(o, dhcpv4.OptDNS(s.cfg.DNS.AsSlice()))
	}
	if s.cfg.MTU != 0 {
		o = append(o, dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{byte(s.cfg.MTU >> 8), byte(s.cfg.MTU)}))
	}
	if labels := searchLabels(s.cfg.Search); len(labels) > 0 {
		o = append(o, dhcpv4.OptDomainSearch(&rfc1035label.Labels{Labels: labels}))
	}
	s.options = o
}

// searchLabels drops what is no domain name.
func searchLabels(search []string) []string {
	var out []string
	for _, name := range search {
		name = strings.TrimSuffix(name, ".")
		ok := name != "" && len(name) <= 253
		for label := range strings.SplitSeq(name, ".") {
			ok = ok && label != "" && len(label) <= 63
		}
		if ok {
			out = append(out, name)
		}
	}
	return out
}

// broadcast is the last address of an IPv4 prefix.
func broadcast(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	for bit := p.Bits(); bit < 32; bit++ {
		a[bit/8] |= 0x80 >> (bit % 8)
	}
	return netip.AddrFrom4(a)
}

var everybody = netip.AddrPortFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), clientPort)

// Handle answers one request, the UDP payload that came to port 67. Where ok, reply is to be sent from the
// gateway's port 67 to dst, which is 255.255.255.255 for every client that has no address yet: it
// could not answer ARP (RFC 2131 §4.1 allows this). What is malformed, relayed or for another server
// has no reply.
func (s *Server) Handle(request []byte, now time.Time) (reply []byte, dst netip.AddrPort, ok bool) {
	m, err := dhcpv4.FromBytes(request)
	// Relays (giaddr) have no place on a link that ends in this process.
	if err != nil || m.OpCode != dhcpv4.OpcodeBootRequest || !unset(m.GatewayIPAddr) {
		return nil, dst, false
	}
	client, ok := identify(m)
	if !ok {
		return nil, dst, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var r *dhcpv4.DHCPv4
	switch m.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		r = s.discover(m, client, now)
	case dhcpv4.MessageTypeRequest:
		r = s.request(m, client, now)
	case dhcpv4.MessageTypeInform:
		r = s.inform(m)
	case dhcpv4.MessageTypeDecline: // §4.3.3
		if s.chosen(m) {
			s.table.decline(client, addrOf(m.RequestedIPAddress()), now)
		}
	case dhcpv4.MessageTypeRelease: // §4.3.4
		if s.chosen(m) {
			s.table.release(client, addrOf(m.ClientIPAddr), now)
		}
	}
	if r == nil {
		return nil, dst, false
	}
	dst = everybody
	if to := addrOf(m.ClientIPAddr); r.MessageType() != dhcpv4.MessageTypeNak && s.host(to) {
		dst = netip.AddrPortFrom(to, clientPort)
	}
	return s.pack(r), dst, true
}

// identify returns what tells one client from another: its identifier, else its hardware address (RFC 2131 §4.2).
func identify(m *dhcpv4.DHCPv4) (string, bool) {
	if id := m.Options.Get(dhcpv4.OptionClientIdentifier); len(id) > 0 {
		return "id" + string(id), len(id) <= 255 // more is several options joined (RFC 3396)
	}
	return fmt.Sprintf("hw%d:%s", m.HWType, string(m.ClientHWAddr)), len(m.ClientHWAddr) > 0
}

// discover: RFC 2131 §4.3.1.
func (s *Server) discover(m *dhcpv4.DHCPv4, client string, now time.Time) *dhcpv4.DHCPv4 {
	addr, ok := s.offer(m, client, now)
	if !ok {
		return nil // the pool is used up; another server, were there one, may have room
	}
	return s.give(m, dhcpv4.MessageTypeOffer, addr)
}

func (s *Server) offer(m *dhcpv4.DHCPv4, client string, now time.Time) (netip.Addr, bool) {
	if s.cfg.Lookup != nil {
		return s.cfg.Lookup(m.ClientHWAddr)
	}
	return s.table.offer(client, addrOf(m.RequestedIPAddress()), now)
}

func (s *Server) bind(m *dhcpv4.DHCPv4, client string, want netip.Addr, now time.Time) bool {
	if s.cfg.Lookup != nil {
		addr, ok := s.cfg.Lookup(m.ClientHWAddr)
		return ok && addr == want
	}
	return s.table.bind(client, want, now)
}

// request: RFC 2131 §4.3.2. Its four states differ in which fields are set.
func (s *Server) request(m *dhcpv4.DHCPv4, client string, now time.Time) *dhcpv4.DHCPv4 {
	want := addrOf(m.ClientIPAddr) // RENEWING, REBINDING
	switch {
	case m.Options.Has(dhcpv4.OptionServerIdentifier): // SELECTING
		if !s.chosen(m) {
			s.table.forget(client)
			return nil
		}
		want = addrOf(m.RequestedIPAddress())
	case unset(m.ClientIPAddr): // INIT-REBOOT
		want = addrOf(m.RequestedIPAddress())
	}
	// An address of another network, or of another client, is refused. One that we know nothing of, after a restart
	// of ours, is not, if it is free.
	if !s.bind(m, client, want, now) {
		return s.refuse(m)
	}
	return s.give(m, dhcpv4.MessageTypeAck, want)
}

// inform: RFC 2131 §4.3.5. The client has an address and asks for the rest; an answer goes nowhere but into the subnet.
func (s *Server) inform(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	if !s.host(addrOf(m.ClientIPAddr)) {
		return nil
	}
	r := s.begin(m, dhcpv4.MessageTypeAck)
	r.ClientIPAddr = m.ClientIPAddr
	for _, o := range s.options {
		r.UpdateOption(o)
	}
	return r
}

// chosen tells whether the message names us as its server.
func (s *Server) chosen(m *dhcpv4.DHCPv4) bool {
	return addrOf(m.ServerIdentifier()) == s.cfg.Gateway
}

// host tells whether an address may be that of a client here.
func (s *Server) host(a netip.Addr) bool {
	return s.cfg.Subnet.Contains(a) && a != s.cfg.Subnet.Addr() && a != broadcast(s.cfg.Subnet) && a != s.cfg.Gateway
}

// begin makes a reply with what every one has: RFC 2131 table 3.
func (s *Server) begin(m *dhcpv4.DHCPv4, kind dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	r := &dhcpv4.DHCPv4{
		OpCode:        dhcpv4.OpcodeBootReply,
		HWType:        m.HWType,
		ClientHWAddr:  m.ClientHWAddr,
		TransactionID: m.TransactionID,
		Flags:         m.Flags & 0x8000, // the rest must be zero
		Options:       dhcpv4.Options{},
	}
	r.UpdateOption(dhcpv4.OptMessageType(kind))
	if id := m.Options.Get(dhcpv4.OptionClientIdentifier); len(id) > 0 { // RFC 6842 §3
		r.UpdateOption(dhcpv4.OptClientIdentifier(id))
	}
	return r
}

// give makes an offer or an acknowledgement of addr.
func (s *Server) give(m *dhcpv4.DHCPv4, kind dhcpv4.MessageType, addr netip.Addr) *dhcpv4.DHCPv4 {
	r := s.begin(m, kind)
	r.YourIPAddr = addr.AsSlice()
	if kind == dhcpv4.MessageTypeAck {
		r.ClientIPAddr = m.ClientIPAddr
	}
	for _, o := range s.options {
		r.UpdateOption(o)
	}
	r.UpdateOption(dhcpv4.OptIPAddressLeaseTime(s.lease))
	return r
}

// refuse makes a NAK.
func (s *Server) refuse(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	r := s.begin(m, dhcpv4.MessageTypeNak)
	r.UpdateOption(dhcpv4.OptServerIdentifier(s.cfg.Gateway.AsSlice()))
	return r
}

// pack encodes a reply in what every client takes: names that are too long for it go.
func (s *Server) pack(r *dhcpv4.DHCPv4) []byte {
	out := r.ToBytes()
	if len(out) > minMessage {
		r.DeleteOption(dhcpv4.OptionDNSDomainSearchList)
		out = r.ToBytes()
	}
	return out
}

// addrOf is the zero Addr for what is no IPv4 address.
func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	if a = a.Unmap(); !a.Is4() {
		return netip.Addr{}
	}
	return a
}

func unset(ip net.IP) bool { return len(ip) == 0 || ip.IsUnspecified() }
