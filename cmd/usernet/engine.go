package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"usernet/api"
	"usernet/forwarder"
	"usernet/portdriver"
	"usernet/stack"
	"usernet/stack/dhcp"
	"usernet/stack/dns"
	"usernet/stack/ra"
	"usernet/tap/capture"
	"usernet/tap/inside"
	"usernet/tap/netns"
)

// An engine is the network of one container, put together:
//
//	namespace → link → (capture) → stack → forwarder → the host's sockets
//	                                   ├─→ resolver
//	                                   └─← published ports ← control socket (see ports.go)
//
// openEngine opens all that needs rights and starts nothing; run is its life; close takes it down.
//
// At the end the services go first, so that their connections are reset while the stack can still say so
// to the container; then the stack, which closes the devices; then the link, usually a TAP.
type engine struct {
	o   *options
	log *slog.Logger

	ns      *netns.NS // nil: the container is known by its device alone, see link
	link    *link
	capture *capture.Writer // nil: none
	forward *forwarder.Forwarder
	stack   *stack.Stack
	resolv  *dns.ResolvConf // nil without a resolver
	server  *dns.Server     // nil without a resolver
	pcs     []net.PacketConn
	lns     []net.Listener

	kit         *inside.Kit // nil: published ports take the stack's path, and whyNoKernel may say why
	whyNoKernel error
	ports       *portdriver.Driver // nil: no ports are published
	control     *api.Server        // nil: no control socket

	spare netns.Spare
}

// openEngine opens the namespace and all that serves it.
func openEngine(ctx context.Context, o *options, where netns.Config, log *slog.Logger) (_ *engine, err error) {
	e := &engine{o: o, log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.close())
		}
	}()
	files, err := raiseFiles()
	if err != nil {
		log.Warn("fewer flows than there could be", "error", err)
	}
	if o.inNamespace() {
		where.Helper = o.wantsKit() // it makes sockets inside as long as we live
		if e.ns, err = netns.Open(where); err != nil {
			return nil, err
		}
		if err := notOurs(e.ns); err != nil {
			return nil, err
		}
	}
	devices, err := e.openDevices(ctx)
	if err != nil {
		return nil, err
	}
	if o.wantsKit() {
		if err := e.openKit(ctx, files); err != nil {
			return nil, err
		}
	}
	if e.ns != nil && e.kit == nil {
		if err := e.ns.Rest(); err != nil { // all that is left to do is done through the TAP's descriptor
			return nil, fmt.Errorf("end the helper: %w", err)
		}
	}
	if e.forward, err = forwarder.New(e.forwarderConfig(files)); err != nil {
		return nil, err
	}
	if err := e.openResolver(); err != nil {
		return nil, err
	}
	config, err := e.stackConfig()
	if err != nil {
		return nil, err
	}
	if e.stack, err = stack.New(config, devices, e.forward); err != nil {
		return nil, err
	}
	e.forward.Bind(e.stack)
	if len(e.link.fds) > 0 {
		if err := e.forward.Linger(slices.Concat(e.link.fds, o.others)...); err != nil {
			return nil, err
		}
	}
	if err := e.listen(); err != nil {
		return nil, err
	}
	if o.wantsPorts() {
		if err := e.openPorts(ctx, files); err != nil {
			return nil, err
		}
	}
	if o.apiSocket != apiNone {
		if err := e.openControl(where); err != nil {
			return nil, err
		}
	}
	e.spare = netns.OpenSpare()
	return e, nil
}

// notOurs refuses the network namespace that we are in: its default route would lead to us, and our own
// sockets would follow it, so that a slip of root's would cut off the host.
func notOurs(ns *netns.NS) error {
	var theirs, ours unix.Stat_t
	if err := errors.Join(unix.Fstat(ns.FD(), &theirs), unix.Stat("/proc/thread-self/ns/net", &ours)); err != nil {
		return fmt.Errorf("%s: compare it with ours: %w", ns, err)
	}
	if theirs.Dev == ours.Dev && theirs.Ino == ours.Ino {
		return fmt.Errorf("%s is the one that usernet itself is in: name another, or make one with \"usernet run\"", ns)
	}
	return nil
}

// openDevices opens the link and puts the capture around its devices.
func (e *engine) openDevices(ctx context.Context) (_ []stack.Device, err error) {
	if e.link, err = e.openLink(ctx); err != nil {
		return nil, err
	}
	if e.o.pcap == "" {
		return e.link.devices, nil
	}
	if err := e.openCapture(); err != nil {
		return nil, err
	}
	var devices []stack.Device
	for _, d := range e.link.devices {
		devices = append(devices, e.capture.Around(d))
	}
	return devices, nil
}

// openCapture makes the file, which holds what may be nobody else's to read.
func (e *engine) openCapture() error {
	f, err := os.OpenFile(e.o.pcap, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("--pcap: %w", err)
	}
	e.capture, err = capture.New(capture.Config{File: f, Interface: e.link.name, Limit: e.o.pcapSize, Log: e.log})
	if err != nil {
		return errors.Join(fmt.Errorf("--pcap: %w", err), f.Close())
	}
	return nil
}

func (e *engine) forwarderConfig(files int) forwarder.Config {
	p := e.o.plan
	return forwarder.Config{
		Policy: forwarder.Policy{
			Subnet4: p.net4, Subnet6: p.net6,
			Gateway4: p.gateway4, Gateway6: p.gateway6,
			DNS4: p.dns4, DNS6: p.dns6,
			HostAlias4: p.host4, HostAlias6: p.host6,
			HostLoopback: e.o.hostLoopback, Internal: e.o.internal,
		},
		Outbound: e.o.outbound,
		MaxFiles: files,
		TCP:      forwarder.TCPConfig{Shared: e.o.uplink != nil},
		Log:      e.log,
	}
}

// openResolver opens resolv.conf, whose search list the container gets in any case, and makes the resolver.
func (e *engine) openResolver() error {
	if !e.o.dns {
		return nil
	}
	var err error
	if e.resolv, err = dns.OpenResolvConf("/etc/resolv.conf"); err != nil {
		return fmt.Errorf("the host's resolvers: %w (name others with --dns, or none with --no-dns)", err)
	}
	config := dns.Config{Upstreams: e.resolv, Dial: e.dialResolver, Log: e.log}
	if e.o.namesFor != nil {
		config.NamesFor = e.o.namesFor
	} else {
		config.Names = dns.StaticNames(e.names())
	}
	if len(e.o.upstreams) > 0 || e.o.internal {
		config.Upstreams = dns.StaticUpstreams(e.o.upstreams)
	}
	e.server, err = dns.New(config)
	return err
}

// dialResolver reaches the host's resolvers from where all else leaves the host.
func (e *engine) dialResolver(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) {
	family := unix.AF_INET
	if server.Addr().Is6() {
		family = unix.AF_INET6
	}
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = e.o.outbound.Prepare(int(fd), family, server.Addr()) })
		return errors.Join(cerr, err)
	}}
	return d.DialContext(ctx, network, server.String())
}

// names are the host's, which no other resolver knows.
func (e *engine) names() map[string][]netip.Addr {
	names := map[string][]netip.Addr{}
	for _, n := range hostNames {
		names[n] = e.o.plan.host()
	}
	return names
}

func (e *engine) stackConfig() (stack.Config, error) {
	o, p := e.o, e.o.plan
	c := stack.Config{
		MTU: e.mtu(), MAC: p.gatewayMAC(),
		Gateway4: withLen(p.gateway4, p.net4), Gateway6: withLen(p.gateway6, p.net6),
		Extra:     p.extra(),
		MaxDials:  e.forward.MaxDials(),
		Beside:    e.forward.Sources(),
		Others:    o.others,
		LinkLocal: p.linkLocal,
		Log:       e.log,
	}
	d := dhcp.Config{
		Subnet: p.net4, Gateway: p.gateway4, Client: p.container4, Lookup: o.lease, NoRoute: o.internal,
		MTU: e.mtu(), Search: e.search(),
	}
	if o.dns {
		d.DNS = p.dns4
	}
	leases, err := dhcp.New(d)
	if err != nil {
		return c, err
	}
	c.DHCP = func(request []byte) ([]byte, netip.AddrPort, bool) {
		return leases.Handle(request, time.Now())
	}
	if p.net6.IsValid() {
		r := ra.Config{
			Prefix: p.net6, MTU: e.mtu(), Search: e.search(), LinkAddr: [6]byte(p.gatewayMAC()),
			Static: o.lease != nil, NoRouter: o.internal,
		}
		if o.dns {
			r.DNS = []netip.Addr{p.dns6}
		}
		c.Advertisement, c.AdvertInterval, c.IsSolicitation = ra.Advertisement(r), ra.Interval, ra.IsSolicitation
	}
	return c, nil
}

// mtu is what the container's packets may measure, in octets. Of an interface that its maker has yet to configure,
// who starts us says it: rootlesskit gives it to its TAP only when we are ready.
func (e *engine) mtu() int {
	if e.ns != nil && e.o.mtuAgreed && !e.o.configure {
		return e.o.mtu
	}
	return e.link.mtu
}

// listen opens the resolver's ports.
func (e *engine) listen() error {
	if !e.o.dns {
		return nil
	}
	for _, a := range e.o.plan.dns() {
		at := netip.AddrPortFrom(a, 53)
		pc, err := e.stack.ListenPacket(at)
		if err != nil {
			return fmt.Errorf("the resolver: %w", err)
		}
		e.pcs = append(e.pcs, pc)
		ln, err := e.stack.Listen(at)
		if err != nil {
			return fmt.Errorf("the resolver: %w", err)
		}
		e.lns = append(e.lns, ln)
	}
	return nil
}

// run carries traffic until ctx ends, which is no error, or a part fails. ready is called when all parts run.
func (e *engine) run(ctx context.Context, ready func() error) error {
	services, stopServices := context.WithCancel(ctx)
	defer stopServices()
	below, stopStack := context.WithCancel(context.WithoutCancel(ctx))
	defer stopStack()

	stackEnded := make(chan error, 1)
	go func() {
		stackEnded <- e.link.ended(e.stack.Run(below))
		stopServices()
	}()
	parts := []func(context.Context) error{
		e.forward.Run,
		func(ctx context.Context) error {
			if !e.link.wait(ctx) {
				return nil
			}
			return ready()
		},
	}
	if e.server != nil {
		parts = append(parts, func(ctx context.Context) error { return e.server.Serve(ctx, e.pcs, e.lns) })
	}
	parts = append(parts, e.settle)
	parts = append(parts, e.runPorts()...)
	err := goEach(services, parts...)
	stopStack()
	if err = errors.Join(err, <-stackEnded); err == nil && ctx.Err() == nil {
		err = errors.New("the network ended, and nothing said why") // a part's mistake; nobody must wait for it
	}
	return err
}

// settleAfter is when the start is over, and what comes now is what will come.
const settleAfter = 2 * time.Second

// settle gives up what only the start needed: the rest of the rights, and most of the pages of a binary that has just begun.
func (e *engine) settle(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(settleAfter):
	}
	if e.o.sandbox {
		confineMore(e.confinement(nil), e.log)
		if e.kit != nil {
			if err := e.confineHelper(ctx, opConfineMore); err != nil {
				e.log.Warn("sandbox: the helper keeps its bounding set of capabilities", "error", err)
			}
		}
	}
	e.spare.Trim()
	return nil
}

// endWithNamespace returns an ending when the namespace is gone.
func (e *engine) endWithNamespace(ctx context.Context) error {
	if e.ns == nil {
		return nil
	}
	switch err := e.ns.Watch(ctx); {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return err
	}
	return ending{e.ns.String() + " is gone"}
}

// close closes the link and lets go of the namespace. It comes after run, or in its place.
func (e *engine) close() error {
	errs := []error{e.closePorts(), e.spare.Close()}
	if e.forward != nil {
		errs = append(errs, e.forward.Close())
	}
	if e.link != nil {
		errs = append(errs, e.link.close())
	}
	if e.capture != nil {
		errs = append(errs, e.capture.Close())
	}
	if e.ns != nil {
		errs = append(errs, e.ns.Close())
	}
	if e.resolv != nil {
		errs = append(errs, e.resolv.Close())
	}
	return errors.Join(errs...)
}

// confinement is what the engine needs while it runs and is taken down. pid may be nil.
func (e *engine) confinement(pid *pidFile) confinement {
	c := confinement{caps: capsForwarding, profile: e.o.pprof}
	if e.resolv != nil {
		c.readDirs = e.resolv.Dirs()
	}
	if pid != nil {
		c.removeDirs = []*os.File{pid.dir}
	}
	if e.link.dir != nil {
		c.removeDirs = append(c.removeDirs, e.link.dir)
	}
	if e.control != nil {
		c.removeDirs = append(c.removeDirs, e.control.Dir())
	}
	if e.ports != nil {
		c.removeDirs = append(c.removeDirs, e.ports.Dirs()...)
	}
	if e.o.outbound.Interface4 != "" || e.o.outbound.Interface6 != "" {
		c.caps |= capsBindDevice
	}
	return c
}

// search begins with the network's own domain, if it has one: then short names are found.
func (e *engine) search() []string {
	if e.resolv == nil {
		return nil
	}
	if e.o.domain != "" {
		return append([]string{e.o.domain}, e.resolv.Search()...)
	}
	return e.resolv.Search()
}

func (e *engine) resolverOptions() []string {
	if e.resolv == nil {
		return nil
	}
	return e.resolv.Options()
}
