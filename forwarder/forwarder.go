// Package forwarder carries what a container sends to the host's sockets and back: the policy,
// TCP, UDP and ICMP echo. It knows neither frames nor gVisor.
package forwarder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"usernet/forwarder/relay"
	"usernet/stack"

	"golang.org/x/sys/unix"
)

// A Stack is where answers to the container go; *stack.Stack is one. None of its methods
// may block or keep what it is given.
type Stack interface {
	SendUDP(d *stack.Datagram) error
	SendEchoReply(e stack.Echo) error
	SendICMP(e *stack.ICMPError) error
}

// A Config is what a Forwarder needs to know.
type Config struct {
	Policy   Policy
	Outbound Outbound
	Log      *slog.Logger // nil: none

	UDP  UDPConfig
	Echo EchoConfig
	TCP  TCPConfig

	// MaxFiles is the most files of the host that flows may hold open; see LimitsFor.
	MaxFiles int
}

// A Forwarder is the stack.Handler that reaches the world through the host's sockets.
//
// Life: New, Bind, then Run beside the stack's own Run. What the container sends before
// Bind or after Run has ended is dropped.
type Forwarder struct {
	cfg    Config
	limits Limits
	log    *slog.Logger
	hosts  HostAddresses
	now    func() int64 // nanoseconds of a clock that only goes forward, from 1 on

	stack Stack

	tcp           tcpCounts
	relay         *relay.Loop
	udp, echo     kind
	published     kind // clients of published ports, by the TAP
	inside        kind // such clients, through sockets inside the container
	forwards      forwards
	taking        sync.RWMutex // before flow.mu; held for reading while a flow begins, else by TakeUDPPort
	poller        *poller
	receiver      *receiver
	senders       senders
	pingForbidden sync.Once
	due           []*flow

	filesLogged, outboundLogged atomic.Int64 // see seldom
	closing                     sync.Once
}

// errStopped is why there is no flow when the Forwarder is not (or no longer) at work.
var errStopped = errors.New("forwarder is stopped")

// New opens what a Forwarder needs and starts nothing. Close releases it.
func New(cfg Config) (*Forwarder, error) {
	if err := cfg.Outbound.Check(); err != nil {
		return nil, err
	}
	limits := LimitsFor(cfg.MaxFiles)
	cfg.TCP = cfg.TCP.withDefaults(limits)
	cfg.UDP, cfg.Echo = cfg.UDP.withDefaults(limits), cfg.Echo.withDefaults(limits)
	start := time.Now()
	f := &Forwarder{
		cfg:    cfg,
		limits: limits,
		log:    cfg.Log,
		now:    func() int64 { return 1 + int64(time.Since(start)) },
		stack:  unbound{},
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	f.udp.maxPeers, f.udp.idle, f.udp.open, f.udp.read = cfg.UDP.MaxPeers, f.idleUDP, f.openUDP, f.readUDP
	f.echo.maxPeers, f.echo.idle, f.echo.open, f.echo.read = cfg.Echo.MaxPeers, f.idleEcho, f.openEcho, f.readEcho
	f.published.idle, f.published.open = f.idleClient, openClient
	f.inside.idle, f.inside.open, f.inside.read = f.idleClient, f.openInside, f.readInside
	f.newTables()
	var err error
	if f.poller, err = newPoller(f.anyFlow); err != nil {
		return nil, fmt.Errorf("forwarder: %w", err)
	}
	if f.receiver, err = newReceiver(); err != nil {
		f.poller.close()
		return nil, fmt.Errorf("forwarder: %w", err)
	}
	if f.relay, err = relay.NewLoop(); err != nil {
		f.receiver.close()
		f.poller.close()
		return nil, fmt.Errorf("forwarder: %w", err)
	}
	return f, nil
}

// newTables makes the tables of the flows, empty.
func (f *Forwarder) newTables() {
	now := f.now()
	f.udp.table, f.echo.table = newTable(f.cfg.UDP.MaxFlows, now), newTable(f.cfg.Echo.MaxFlows, now)
	f.published.table = newTable(f.cfg.UDP.MaxClients, now)
	f.published.table.share = f.cfg.UDP.MaxPortClients
	f.inside.table = newTable(f.cfg.UDP.MaxInside, now)
}

// anyFlow tells whether there is a flow that may end for being idle.
func (f *Forwarder) anyFlow() bool {
	return f.udp.table.len()+f.echo.table.len()+f.published.table.len()+f.inside.table.len() > 0
}

// Unbound is the Stack before Bind.
type unbound struct{}

func (unbound) SendUDP(*stack.Datagram) error   { return errStopped }
func (unbound) SendEchoReply(stack.Echo) error  { return errStopped }
func (unbound) SendICMP(*stack.ICMPError) error { return errStopped }

// Bind tells where answers go. It is called once, before Run and before the stack runs.
func (f *Forwarder) Bind(s Stack) { f.stack = s }

// Run forwards until ctx ends, and returns when all it has begun has ended and all flows are closed. It is
// called once. Close comes after it.
func (f *Forwarder) Run(ctx context.Context) error {
	defer f.endFlows()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	relayed := make(chan error, 1)
	go func() {
		defer cancel()
		relayed <- f.relay.Run(ctx)
	}()
	err := f.poller.run(ctx, f.ready, f.tick)
	cancel()
	if err := errors.Join(err, <-relayed); err != nil {
		return fmt.Errorf("forwarder: %w", err)
	}
	return nil
}

// Sources are the host's sockets, for a stack that serves them beside its device. They are valid until Close.
func (f *Forwarder) Sources() []stack.Source {
	sources := []stack.Source{{FD: f.poller.epoll.FD(), Serve: func() { f.poller.poll(f.ready) }}}
	f.relay.Sources(func(fd int, serve func()) {
		sources = append(sources, stack.Source{FD: fd, Serve: serve})
	})
	return sources
}

// Relay is what joins the Forwarder's TCP flows, for others to use as well: its Run is the Forwarder's, and so is its Close.
func (f *Forwarder) Relay() *relay.Loop { return f.relay }

// Linger lets the relay wait in the kernel between events that follow one another closely, with an eye on the stack's
// device and other descriptors that Go's poller serves: see relay.Loop.Linger. It is called before Run.
func (f *Forwarder) Linger(device ...int) error {
	return f.relay.Linger(append(device, f.poller.epoll.FD())...)
}

// Close releases what New has opened, and ends all flows and published ports. Neither Run nor a stack that serves the Sources may
// still be at work.
func (f *Forwarder) Close() error {
	f.endFlows()
	f.closing.Do(func() {
		f.forwards.close()
		f.relay.Close()
		f.receiver.close()
		f.poller.close()
	})
	return nil
}

// endFlows closes what flows there are, and lets no further one begin.
func (f *Forwarder) endFlows() {
	for _, k := range []*kind{&f.udp, &f.echo, &f.published, &f.inside} {
		for _, fl := range k.table.close() {
			fl.release()
		}
	}
}

// ready serves a socket that has something; the poller calls it.
func (f *Forwarder) ready(s *socket, events uint32) {
	if events&unix.EPOLLERR != 0 {
		f.readErrors(&f.receiver.errs, s)
	}
	if events&unix.EPOLLIN != 0 {
		s.user.read(f.receiver, f.now())
	}
}

// tick ends the flows that were idle for long enough.
func (f *Forwarder) tick() {
	now := f.now()
	f.due = f.sweep(&f.udp, now, f.due)
	f.due = f.sweep(&f.echo, now, f.due)
	f.due = f.sweep(&f.published, now, f.due)
	f.due = f.sweep(&f.inside, now, f.due)
}

// resolve asks the Policy, with the host's addresses as they are now.
func (f *Forwarder) resolve(flow Flow) (netip.AddrPort, Verdict) {
	var host HostAddrs
	if f.cfg.Policy.alias(flow.Dst.Addr()) {
		host = f.hosts.Now()
	}
	dst, verdict := f.cfg.Policy.Resolve(flow, host)
	if verdict.Action == Forward && f.cfg.Outbound.confined(dst.Addr()) {
		return refuse(unix.ENETUNREACH)
	}
	return dst, verdict
}

// local tells whether what goes to dst does not leave the host, where that makes a difference:
// sockets bound for the world would not hear the answers (see Outbound.Prepare).
func (f *Forwarder) local(dst netip.Addr) bool {
	addr, dev := f.cfg.Outbound.of(family(dst))
	switch {
	case dev != "":
		return f.hosts.Local(dst)
	case addr.IsValid():
		return dst.IsLoopback() && !f.cfg.Outbound.ToLoopback
	}
	return false
}

// warnEvery is how often, at most, we say that flows of the container fail for a reason of ours.
const warnEvery = int64(10 * time.Second)

// seldom tells whether it is time to say again what was last said at *last.
func (f *Forwarder) seldom(last *atomic.Int64) bool {
	now, then := f.now(), last.Load()
	return (then == 0 || now-then >= warnEvery) && last.CompareAndSwap(then, now)
}

// noFlow books n datagrams that were dropped because their flow could not be made.
func (f *Forwarder) noFlow(k *kind, n int, err error) {
	switch {
	case errors.Is(err, errStopped):
		k.count.drop(dropStopped, n)
	case noFiles(err):
		k.count.drop(dropFiles, n)
		f.noFile(err)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.EADDRNOTAVAIL):
		k.count.drop(dropError, n)
		if f.seldom(&f.outboundLogged) {
			f.log.Warn("the outbound address or interface is gone: new flows of the container are refused", "error", err)
		}
	default:
		k.count.drop(dropError, n)
		f.log.Debug("no socket for a flow", "error", err)
	}
}

// noFiles tells whether err is that the process or the host has no room for another socket.
func noFiles(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EAGAIN} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// noFile says, now and then, that a flow was dropped for want of a socket.
func (f *Forwarder) noFile(err error) {
	if f.seldom(&f.filesLogged) {
		f.log.Warn("no socket for a new flow of the container: it is dropped", "error", err,
			"remedy", "raise the limit of open files (ulimit -Hn)")
	}
}

// Stats are counts since the start.
type Stats struct {
	TCP       TCPStats
	UDP, Echo FlowStats
	Published FlowStats // of the clients of published UDP ports
}

// Stats may be called at any time.
func (f *Forwarder) Stats() Stats {
	return Stats{TCP: f.tcpStats(), UDP: f.udp.count.snapshot(), Echo: f.echo.count.snapshot(), Published: f.publishedStats()}
}
