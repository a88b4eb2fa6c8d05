package stack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// nicID is the one interface of the stack.
const nicID = 1

// Config describes the gateway that the container sees.
type Config struct {
	MTU int              // IP MTU of the devices, octets; 1280 to 65535
	MAC net.HardwareAddr // the gateway's; 6 octets, unicast

	// Gateway4 and Gateway6 are the gateway's own addresses with their subnets' lengths.
	// The zero Prefix turns the family off.
	Gateway4, Gateway6 netip.Prefix

	// NextHop4 and NextHop6 are where addresses outside the gateways' subnets are reached. Zero:
	// they are all taken to be on the link, as the world's end of a link with one container sees it.
	NextHop4, NextHop6 netip.Addr

	// Extra are further addresses of ours: we answer ARP and neighbour solicitations for
	// them, and Listen and ListenPacket may use them.
	Extra []netip.Addr

	// LinkLocal is the gateway's link-local IPv6 address; zero: fe80::2.
	LinkLocal netip.Addr

	// Advertisement is the ICMPv6 router advertisement to send, its checksum not filled in.
	// Empty: none is sent. It goes out every AdvertInterval (0: 10 minutes), and whenever the container sends an
	// ICMPv6 message with a hop limit of 255 that IsSolicitation recognises (nil: none is).
	Advertisement  []byte
	AdvertInterval time.Duration
	IsSolicitation func(icmp []byte) bool

	// DHCP answers a DHCPv4 message; nil leaves DHCP unanswered. It is called by the goroutine
	// that reads frames and must not block. to is where the answer goes, port 68 included.
	DHCP func(request []byte) (reply []byte, to netip.AddrPort, ok bool)

	// MaxDials is how many SYNs may wait for an answer at once, and MaxDialsPerHost how many of them to
	// one address, so that a black hole cannot stop the rest. 0: 4096, and an eighth of MaxDials. When
	// all places are taken, an address that has fewer than another takes one of that other's.
	MaxDials, MaxDialsPerHost int

	// Beside are served by the goroutine that reads the first device, for as long as there is traffic and
	// where that is faster. They must not depend on it.
	Beside []Source

	// Others are descriptors that are readable when somebody else in this process, whom Go's poller tells, has something to
	// do. The goroutine that reads the first device lets him. They stay his, and outlast Run.
	Others []int

	// Log gets life events at Info and flows at Debug; nil discards.
	Log *slog.Logger

	clock tcpip.Clock // netstack's; nil: the real one. Tests of long times set it.
}

// Stack is the gateway. Make it with New, then call Run.
type Stack struct {
	cfg       Config
	log       *slog.Logger
	ns        *stack.Stack
	link      *link
	devs      []Device
	handler   Handler
	mac       hardwareAddr
	own       map[netip.Addr]bool // our own addresses; never changes after New
	listeners sync.Map            // netip.AddrPort of UDP ports taken by ListenPacket
	tcp       *tcpRequests

	conns      atomic.Int64 // that stand
	peekers    sync.Pool    // *peeker
	neighbours neighbours
	stats      counters
	ipID       atomic.Uint32
}

// New makes a stack over devs, which it closes at the end of Run. Nothing runs before Run, and
// nothing is read from the devices before it either. Flows are kept in order on each device.
func New(cfg Config, devs []Device, h Handler) (*Stack, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if len(devs) == 0 {
		return nil, errors.New("stack: no device")
	}
	silenceNetstack()
	s := &Stack{
		cfg: cfg, log: cfg.Log, devs: devs, handler: h,
		mac: hardwareAddr(cfg.MAC),
		own: make(map[netip.Addr]bool),
	}
	s.neighbours.init()
	s.peekers.New = func() any { return new(peeker) }
	s.ipID.Store(rand.Uint32())
	s.link = newLink(devs, tcpip.LinkAddress(cfg.MAC), cfg.MTU, &s.stats)
	s.ns = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{arp.NewProtocol, ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
		Clock: cfg.clock,
	})
	s.tcp = newTCPRequests(s)
	if err := s.configure(); err != nil {
		s.ns.Destroy()
		return nil, err
	}
	return s, nil
}

func (cfg *Config) validate() error {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MTU < 1280 && cfg.Gateway6.IsValid() {
		return fmt.Errorf("MTU %d: IPv6 needs at least 1280 octets (RFC 8200 §5)", cfg.MTU)
	}
	if cfg.MTU < 68 || cfg.MTU > 65535 {
		return fmt.Errorf("MTU %d is not between 68 (RFC 791) and 65535 octets", cfg.MTU)
	}
	if len(cfg.MAC) != 6 || cfg.MAC[0]&1 != 0 {
		return fmt.Errorf("%q is not a unicast Ethernet address", cfg.MAC)
	}
	if !cfg.Gateway4.IsValid() && !cfg.Gateway6.IsValid() {
		return errors.New("neither an IPv4 nor an IPv6 gateway address")
	}
	if g := cfg.Gateway4; g.IsValid() && !g.Addr().Is4() {
		return fmt.Errorf("%v is not an IPv4 gateway", g)
	}
	if g := cfg.Gateway6; g.IsValid() && !g.Addr().Is6() {
		return fmt.Errorf("%v is not an IPv6 gateway", g)
	}
	if !cfg.LinkLocal.IsValid() {
		cfg.LinkLocal = netip.MustParseAddr("fe80::2")
	}
	if cfg.AdvertInterval == 0 {
		cfg.AdvertInterval = 10 * time.Minute
	}
	if cfg.MaxDials == 0 {
		cfg.MaxDials = 4096
	}
	if cfg.MaxDialsPerHost == 0 {
		cfg.MaxDialsPerHost = max(1, cfg.MaxDials/8)
	}
	return nil
}

// configure gives netstack its interface, addresses, routes and options.
func (s *Stack) configure() error {
	s.setTCPOptions()
	s.setHandlers()
	if err := s.ns.CreateNICWithOptions(nicID, s.link, stack.NICOptions{Name: "gateway", QDisc: s.link}); err != nil {
		return fmt.Errorf("make netstack's interface: %w", errno(err))
	}
	// Promiscuous: every address of the world is answered here. Spoofing: with any of them as the source.
	if err := s.ns.SetPromiscuousMode(nicID, true); err != nil {
		return fmt.Errorf("set promiscuous mode: %w", errno(err))
	}
	if err := s.ns.SetSpoofing(nicID, true); err != nil {
		return fmt.Errorf("set spoofing: %w", errno(err))
	}
	var routes []tcpip.Route
	bits := map[bool]int{true: 32, false: 128}
	if g := s.cfg.Gateway4; g.IsValid() {
		bits[true] = g.Bits()
		if err := s.addAddress(g.Addr(), g.Bits()); err != nil {
			return err
		}
		routes = append(routes, routesBy(g, s.cfg.NextHop4)...)
	}
	if g := s.cfg.Gateway6; g.IsValid() {
		bits[false] = g.Bits()
		for addr, n := range map[netip.Addr]int{g.Addr(): g.Bits(), s.cfg.LinkLocal: 64} {
			if err := s.addAddress(addr, n); err != nil {
				return err
			}
		}
		routes = append(routes, routesBy(g, s.cfg.NextHop6)...)
	}
	for _, a := range s.cfg.Extra {
		if err := s.addAddress(a, bits[a.Is4()]); err != nil {
			return err
		}
	}
	s.ns.SetRouteTable(routes)
	return nil
}

// routesBy returns the routes of one family: g's subnet is on the link, the rest behind next.
func routesBy(g netip.Prefix, next netip.Addr) []tcpip.Route {
	all := zero4
	if g.Addr().Is6() {
		all = zero6
	}
	if !next.IsValid() {
		return []tcpip.Route{{Destination: all, NIC: nicID}}
	}
	subnet := tcpip.AddressWithPrefix{Address: address(g.Addr()), PrefixLen: g.Bits()}.Subnet()
	return []tcpip.Route{
		{Destination: subnet, NIC: nicID},
		{Destination: all, Gateway: address(next), NIC: nicID},
	}
}

func (s *Stack) addAddress(a netip.Addr, bits int) error {
	proto := ipv4.ProtocolNumber
	if a.Is6() {
		proto = ipv6.ProtocolNumber
	}
	err := s.ns.AddProtocolAddress(nicID, tcpip.ProtocolAddress{
		Protocol:          proto,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: address(a), PrefixLen: bits},
	}, stack.AddressProperties{})
	if err != nil {
		return fmt.Errorf("add address %v: %w", a, errno(err))
	}
	s.own[a] = true
	return nil
}

// gateway is the gateway's address in a family, the zero Addr if that is off.
func (s *Stack) gateway(v4 bool) netip.Addr {
	if v4 {
		return s.cfg.Gateway4.Addr()
	}
	return s.cfg.Gateway6.Addr()
}

// Run carries frames until ctx ends, a device fails or all are closed. It returns when every
// goroutine that the stack began has ended and the devices are closed; it can be called once.
//
// The order at the end: close the devices, so that readers stop and writes fail; cancel
// the requests, so that handlers end; close netstack, which resets what still stands, and wait for it.
func (s *Stack) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.tcp.start(ctx)

	failed := make(chan error, len(s.devs))
	var readers sync.WaitGroup
	for i, d := range s.devs {
		r := newReader(s, d)
		if i == 0 {
			if r.near = newLingerer(d, s.cfg.Beside, s.cfg.Others); r.near != nil {
				r.acks = new(ackHolder)
				s.link.acks.Store(r.acks)
			}
		}
		readers.Go(func() { failed <- r.run() })
	}
	var err error
	adverts := time.NewTimer(0)
	defer adverts.Stop()
	for open := len(s.devs); open > 0 && ctx.Err() == nil && err == nil; {
		select {
		case <-ctx.Done():
		case err = <-failed:
			open--
		case <-adverts.C:
			s.advertise()
			adverts.Reset(s.cfg.AdvertInterval)
		}
	}
	cancel()
	s.tcp.reject() // resets still pass: the devices are open
	s.ns.Close()
	for _, d := range s.devs {
		err = errors.Join(err, d.Close())
	}
	readers.Wait()
	s.tcp.wait()
	s.ns.Wait()
	s.ns.Destroy()
	return err
}
