package forwarder

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"usernet/stack"

	"golang.org/x/sys/unix"
)

// A published port goes by the same ways as what the container begins, from the other end:
//
//	poller                                       ServeUDP
//	  recvmmsg from the published socket           train: datagrams that go together
//	  client: by its address and the host's        client: by the two ends as the container
//	          that it spoke to; or a new one               has them; else it is no answer
//	  train: datagrams that go together            sendmsg from the address that the client
//	  Stack.SendUDP with the client's address              spoke to, with UDP_SEGMENT
//
// Each client is a flow, whose one peer is its real address: so it is timed, evicted and counted like
// any other, and its owner is the port. Only what a client has begun leaves by the socket. Those of a server that the TAP
// does not lead to go through sockets of the container's (inside.go).
//
// The two ends that the container sees name one client. Where they would name two (the same client at
// two ports or addresses of the host, the host's own clients behind the gateway) the later
// one gets another port, as Linux's own translation does it.

// A PublishedUDP is a UDP port of the host that leads to the container.
type PublishedUDP struct {
	f        *Forwarder
	to4, to6 netip.AddrPort // each may be zero
	sock     *socket
	count    counter
	closing  sync.Once

	passage atomic.Pointer[passage] // nil: new clients go by the TAP
	entered atomic.Bool             // there may be clients inside
}

// A client is what a flow of a published port has beside the others.
type client struct {
	forward *PublishedUDP
	real    netip.AddrPort
	at      local    // where it spoke to
	passage *passage // nil: it goes by the TAP
}

// A clientKey is a client as the host knows it.
type clientKey struct {
	forward *PublishedUDP
	real    netip.AddrPort
	at      local
}

func (c *client) key() clientKey { return clientKey{c.forward, c.real, c.at} }

// PublishUDP leads what comes to fd to the container, at most one address of each family, until Close.
// fd is a bound UDP socket of the host, which the Forwarder owns from then on, also when it fails; it may
// be one for IPv4 and IPv6. Without an address clients are led nowhere but Through sockets.
//
// The container sees the client's own address, except for clients of the host's loopback, on its links
// (link-local) and those whose address belongs to the container's network, or to the family
// that the container has no address of: those are the gateway, with the client's port if that is free and not below 1024.
func (f *Forwarder) PublishUDP(fd int, to ...netip.AddrPort) (*PublishedUDP, error) {
	p := &PublishedUDP{f: f}
	err := aim(&p.to4, &p.to6, to)
	if err == nil {
		err = receiveClients(fd)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("publish a UDP port: %w", err), unix.Close(fd))
	}
	p.sock = f.newSocket(fd, protoUDP, p)
	p.sock.closed = make(chan struct{})
	if err := f.forwards.add(p); err != nil {
		p.sock.release()
		return nil, fmt.Errorf("publish a UDP port: %w", err)
	}
	if err := f.poller.add(p.sock); err != nil {
		p.Close()
		return nil, fmt.Errorf("publish a UDP port: %w", err)
	}
	return p, nil
}

// aim sorts to by family.
func aim(to4, to6 *netip.AddrPort, to []netip.AddrPort) error {
	for _, ap := range to {
		mine := to4
		if ap.Addr().Is6() {
			mine = to6
		}
		if !ap.IsValid() || ap.Port() == 0 || ap.Addr().Is4In6() || ap.Addr().Zone() != "" || mine.IsValid() {
			return fmt.Errorf("to %v: want a port of one address of the container for each family", to)
		}
		*mine = ap
	}
	return nil
}

// receiveClients makes fd tell where a datagram was sent to, and keep ICMP errors.
func receiveClients(fd int) error {
	family, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return fmt.Errorf("getsockopt SO_DOMAIN: %w", err)
	}
	receiveTrains(fd)
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1); err != nil {
			return fmt.Errorf("setsockopt IPV6_RECVPKTINFO: %w", err)
		}
		// What others on the host have joined is not for us.
		_ = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_MULTICAST_ALL, 0)
		if err := receiveErrors(fd, true); err != nil {
			return err
		}
	}
	// Also of IPv6, whose socket may have IPv4 clients.
	_ = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_MULTICAST_ALL, 0)
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_PKTINFO, 1); err != nil {
		return fmt.Errorf("setsockopt IP_PKTINFO: %w", err)
	}
	return receiveErrors(fd, false)
}

// Close closes the socket and forgets its clients. When it returns the port of the host is free. It may
// be called any number of times, and after the Forwarder's own Close.
func (p *PublishedUDP) Close() error {
	p.closing.Do(func() {
		f := p.f
		f.poller.remove(p.sock)
		f.poller.settle() // whoever reads the socket now may still make a client
		for _, k := range []*kind{&f.published, &f.inside} {
			for _, fl := range k.table.forget(ownerKey{forward: p}) {
				fl.release()
			}
		}
		f.forwards.remove(p, &f.published.count)
		p.sock.release()
	})
	<-p.sock.closed // whoever sends an answer now does not wait for anything
	return nil
}

// read, books and ends make p the user of its socket.
func (p *PublishedUDP) read(r *receiver, now int64) {
	p.f.receiveUDP(r, p.sock.fd, &p.count, p, now)
}

func (p *PublishedUDP) books() *counter   { return &p.count }
func (p *PublishedUDP) failed(unix.Errno) {}

func (p *PublishedUDP) ends(at local, real netip.AddrPort) (src, dst netip.AddrPort, ok bool) {
	fl := p.f.published.table.clientOf(clientKey{p, real, at.between(real)})
	if fl == nil {
		return src, dst, false
	}
	defer fl.release()
	// The other family's ICMP says nothing to the container.
	return fl.key.src, fl.key.peer, fl.v6() == real.Addr().Is6()
}

// between leaves the interface away where it makes no difference: the host's routes may have changed.
func (at local) between(real netip.AddrPort) local {
	if !at.addr.IsLinkLocalUnicast() && !real.Addr().IsLinkLocalUnicast() {
		at.iface = 0
	}
	return at
}

// came is udpReceiver's: it finds the client or makes one.
func (p *PublishedUDP) came(real netip.AddrPort, at local, now int64) (w way, why dropReason, ok bool) {
	f := p.f
	key := clientKey{p, real, at.between(real)}
	fl := f.published.table.clientOf(key)
	if fl == nil && p.entered.Load() {
		fl = f.inside.table.clientOf(key)
	}
	if fl != nil && !fl.spoke(now) {
		f.drop(fl.kind, fl)
		fl.release()
		fl = nil
	}
	if fl == nil {
		if fl, why = p.newClient(key, now); fl == nil {
			return w, why, false
		}
	}
	if fl.kind == &f.inside {
		return fl.enter()
	}
	defer fl.release()
	return way{src: fl.key.peer, dst: fl.key.src}, 0, true
}

// aliasTries bounds the search for a free port of the gateway. However many clients there are,
// most of its ports are free.
const aliasTries = 64

// newClient makes a client, with a reference for the caller; it is called by one goroutine at a time.
func (p *PublishedUDP) newClient(key clientKey, now int64) (*flow, dropReason) {
	f, real, port := p.f, key.real, key.real.Port()
	k, g := &f.published, p.passage.Load()
	var to netip.AddrPort
	var addr netip.Addr
	ok := true
	if g != nil {
		k, to, addr = &f.inside, g.to(real.Addr()), real.Addr()
	} else {
		to, addr, ok = p.alias(real.Addr())
	}
	if !ok || port == 0 { // RFC 768: port 0 is nobody who could be answered
		return nil, dropNoName
	}
	// Ports of the gateway below 1024 are its own services'.
	if addr != real.Addr() && port < lowestKept {
		port = anyPort()
	}
	for range aliasTries {
		fl := &flow{
			key:    flowKey{proto: protoUDP, src: to, peer: netip.AddrPortFrom(addr, port)},
			client: &client{p, real, key.at, g},
		}
		fl.peers.list = []peer{{real: real, used: fl.key.peer, last: now}}
		made, err := f.newFlow(k, fl, now)
		switch {
		case err != nil:
			return nil, dropStopped
		case made == fl && fl.err != nil:
			f.drop(k, fl)
			why := f.noClient(fl.err)
			fl.release()
			return nil, why
		case made == fl:
			return fl, 0
		}
		made.release()
		port = anyPort()
	}
	return nil, dropNoName
}

// noClient is why there is no client where its flow met with err.
func (f *Forwarder) noClient(err error) dropReason {
	switch {
	case errors.Is(err, errStopped):
		return dropStopped
	case errors.Is(err, errNoSocket), noFiles(err):
		return dropFiles
	}
	f.log.Debug("no socket for a client of a published port", "error", err)
	return dropError
}

func anyPort() uint16 { return uint16(lowestKept + rand.IntN(1<<16-lowestKept)) }

// alias is where a client's datagrams go, and the address that they come from there.
func (p *PublishedUDP) alias(real netip.Addr) (to netip.AddrPort, addr netip.Addr, ok bool) {
	to, other := p.to4, p.to6
	if real.Is6() {
		to, other = other, to
	}
	if to.IsValid() && real != to.Addr() && p.f.stranger(real) {
		return to, real, true
	}
	if !to.IsValid() {
		to = other
	}
	if !to.IsValid() {
		return to, addr, false
	}
	addr = p.f.cfg.Policy.Gateway4
	if to.Addr().Is6() {
		addr = p.f.cfg.Policy.Gateway6
	}
	return to, addr, addr.IsValid()
}

// openClient is kind.open for clients.
func openClient(fl *flow) (*socket, error) {
	s := fl.client.forward.sock
	if !s.acquire() {
		return nil, errStopped
	}
	return s, nil
}

// spoke notes that the client of fl has sent something; false when fl has ended.
func (fl *flow) spoke(now int64) bool {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if fl.gone {
		return false
	}
	p := &fl.peers.list[0]
	p.last = now
	if p.answered && !fl.answered.Load() {
		// It goes on after an answer, as nobody does who has forged his address and hears nothing:
		// it makes room last.
		fl.answered.Store(true)
	}
	fl.last.Store(now)
	return true
}

// replied notes that the container has answered the client of fl; false when fl has ended.
func (fl *flow) replied(now int64) bool {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if fl.gone {
		return false
	}
	p := &fl.peers.list[0]
	p.last, p.answered = now, true
	fl.last.Store(now)
	return true
}

// sendToClient sends run, whose datagrams make up t, if it answers a client.
func (f *Forwarder) sendToClient(s *sender, run []stack.Datagram, t train, now int64) bool {
	d := &run[0]
	fl := f.published.table.get(flowKey{proto: protoUDP, src: d.Src, peer: d.Dst})
	if fl == nil {
		return false
	}
	defer fl.release()
	if !fl.replied(now) {
		return false
	}
	s.to(fl.client.real, d.TTL, d.TOS)
	s.from(fl.client.at)
	f.sendRun(s, way{fl: fl, sock: fl.sock}, run, t)
	return true
}

// idleClient is kind.idle for clients.
func (f *Forwarder) idleClient(fl *flow, p *peer) time.Duration {
	c := &f.cfg.UDP
	switch {
	case fl.key.src.Port() == 53:
		return c.DNS
	case p.answered:
		return c.Answered
	}
	return c.Unanswered
}

// Forwards are the published ports that are open.
type forwards struct {
	mu     sync.Mutex
	closed bool
	open   map[*PublishedUDP]struct{}
}

func (o *forwards) add(p *PublishedUDP) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return errStopped
	}
	if o.open == nil {
		o.open = make(map[*PublishedUDP]struct{})
	}
	o.open[p] = struct{}{}
	return nil
}

// remove takes p out and adds to past what it has counted.
func (o *forwards) remove(p *PublishedUDP, past *counter) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.open, p)
	past.add(&p.count)
}

// close closes all, and lets no further one open.
func (o *forwards) close() {
	o.mu.Lock()
	o.closed = true
	all := make([]*PublishedUDP, 0, len(o.open))
	for p := range o.open {
		all = append(all, p)
	}
	o.mu.Unlock()
	for _, p := range all {
		p.Close()
	}
}

// PublishedStats are the counts of one published port since it was opened. Octets are payload; In is
// from the host to the container.
type PublishedStats struct {
	Clients         int    // now
	Opened, Evicted uint64 // clients
	In, InOctets    uint64 // datagrams
	Out, OutOctets  uint64
	Errors          uint64 // ICMP errors given to the container
	Drops           map[string]uint64
}

// Stats may be called at any time, also after Close.
func (p *PublishedUDP) Stats() PublishedStats {
	s := p.count.snapshot()
	return PublishedStats{
		Clients: s.Flows, Opened: s.Opened, Evicted: s.Evicted,
		In: s.Received, InOctets: s.ReceivedOctets,
		Out: s.Sent, OutOctets: s.SentOctets,
		Errors: s.Errors, Drops: s.Drops,
	}
}

// publishedStats sums up all published ports there are and were.
func (f *Forwarder) publishedStats() FlowStats {
	f.forwards.mu.Lock()
	defer f.forwards.mu.Unlock()
	var sum counter
	sum.add(&f.published.count)
	flows := 0
	for p := range f.forwards.open {
		sum.add(&p.count)
		flows += int(p.count.flows.Load())
	}
	s := sum.snapshot()
	s.Flows = flows
	return s
}
