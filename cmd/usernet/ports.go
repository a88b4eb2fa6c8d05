package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"usernet/api"
	"usernet/forwarder"
	"usernet/forwarder/relay"
	"usernet/portdriver"
	"usernet/stack"
	"usernet/tap/inside"
	"usernet/tap/netns"
)

// Publishing ports, put together:
//
//	listener ─ portdriver ─┬─ kit: a socket inside, made by the helper ─ relay      the kernel path
//	                       ├─ stack.DialFrom ─ relay                                the stack path
//	                       └─ forwarder.PublishUDP                                  UDP
//	control socket ─ api ─ portdriver
//
// What needs rights is done before the sandbox: the helper is started, ports given with -p are bound, and
// the control socket is made. Nothing of it carries a container's own traffic, so that its failures are
// logged, and end the network only where they come before it has begun.

// wantsPorts tells whether ports are published, or may be later.
func (o *options) wantsPorts() bool {
	return len(o.publish)+len(o.auto) > 0 || o.apiSocket != apiNone
}

// wantsKit tells whether sockets inside the namespace may be needed: for the kernel path, and
// to see who listens there.
func (o *options) wantsKit() bool {
	return o.inNamespace() && o.wantsPorts() && (o.portPath != portdriver.PathStack || len(o.auto) > 0)
}

// openKit has the helper make what the kernel path needs. Without it ports take the stack's path. It returns ctx's error alone.
func (e *engine) openKit(ctx context.Context, files int) error {
	// What lies ready holds files: with few of them, an eighth of them at most, for there are six kinds in use.
	batch := max(1, min(files/48, 48))
	kit, err := inside.Open(ctx, e.ns, inside.Config{IPv6: e.o.plan.net6.IsValid(), Batch: batch, Log: e.log})
	switch {
	case ctx.Err() != nil && err != nil:
		return ctx.Err()
	case err != nil:
		e.whyNoKernel = err
		e.log.Warn("published ports take the slower path through the TAP", "error", err)
		return nil
	}
	e.kit = kit
	if e.o.sandbox {
		if err := e.confineHelper(ctx, opConfine); err != nil {
			e.log.Warn("sandbox: the helper keeps its rights", "error", err)
		}
	}
	return nil
}

// helperLimit is how long the helper may take to give something up, which takes it some milliseconds.
const helperLimit = 5 * time.Second

// confineHelper calls one of the two operations below. The end of ctx does not cut it short: a helper whose answer nobody
// awaits is ended, and from within the sandbox no other can be started, which takes down what was made inside.
func (e *engine) confineHelper(ctx context.Context, op string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), helperLimit)
	defer cancel()
	_, err := e.ns.Call(ctx, ops(), op, struct{}{}, nil)
	return err
}

// opConfine has the helper give up what it has no more use for, once the TAP is there, and opConfineMore the rest, when nobody waits.
const (
	opConfine     = "usernet.confine"
	opConfineMore = "usernet.confine-more"
)

// confinedHelper is an operation that gives up, by f, what a helper can do without.
func confinedHelper(f func(confinement, *slog.Logger)) netns.Op {
	return netns.Handle(func(context.Context, struct{}) (struct{}, []*os.File, error) {
		if cgoEnabled {
			return struct{}{}, nil, nil // its parent says it for both
		}
		f(confinement{caps: capsInside}, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
		return struct{}{}, nil, nil
	})
}

// openPorts publishes what -p names.
func (e *engine) openPorts(ctx context.Context, files int) error {
	o := e.o
	if e.ns == nil {
		e.whyNoKernel = errors.New("usernet has a device of the container and not its namespace")
	}
	config := e.portConfig(o.plan.container4, o.plan.container6, files)
	config.Kit, config.WhyNoKernel = e.kit, e.whyNoKernel
	var err error
	if e.ports, err = portdriver.New(config); err != nil {
		return err
	}
	if len(o.publish) > 0 {
		if _, err := e.ports.Add(ctx, o.publish...); err != nil {
			return err
		}
	}
	for _, auto := range o.auto {
		if err := e.ports.Auto(auto); err != nil {
			return fmt.Errorf("--publish: %w", err)
		}
	}
	return nil
}

// portConfig is that of a driver for a container on our link.
func (e *engine) portConfig(container4, container6 netip.Addr, files int) portdriver.Config {
	p := e.o.plan
	config := portdriver.Config{
		Loop:  e.forward.Relay(),
		Stack: stackDialer{e.stack}, UDP: udpPublisher{e.forward},
		Container4: container4, Container6: container6,
		Gateway4: p.gateway4, Gateway6: p.gateway6,
		Path: e.o.portPath, MaxFiles: files,
		Log: e.log,
	}
	for _, n := range []netip.Prefix{p.net4, p.net6} {
		if n.IsValid() {
			config.Subnets = append(config.Subnets, n)
		}
	}
	return config
}

// openControl makes the control socket. The one that nobody asked for by name may be missing.
func (e *engine) openControl(where netns.Config) error {
	path, err := e.o.apiSocket, error(nil)
	if path == "" {
		path, err = api.DefaultPath(strconv.Itoa(os.Getpid()))
	}
	if err == nil {
		info := e.info(where)
		e.control, err = api.Listen(api.Config{
			Path: path, Ports: e.ports, Rootlesskit: e.ports.Manager(),
			Info: info, Metrics: e.metrics, Pprof: e.o.pprof, Log: e.log,
		})
	}
	switch {
	case err == nil:
		e.log.Info("control socket", "path", e.control.Path())
		return nil
	case e.o.apiSocket == "":
		e.log.Warn("no control socket: name one with --api-socket, or none to do without", "error", err)
		return nil
	}
	return controlError{err}
}

// A controlError is why the control socket that was asked for cannot be.
type controlError struct{ error }

func (e controlError) Error() string { return "--api-socket: " + e.error.Error() }
func (e controlError) Unwrap() error { return e.error }

// info returns what tells about us.
func (e *engine) info(where netns.Config) func() api.Info {
	o, p := e.o, e.o.plan
	is := api.Info{
		Version: ourVersion(), Started: time.Now(),
		Namespace: where.Path, ContainerPID: where.PID,
		Interface: api.Interface{
			Name: e.link.name, MTU: e.link.mtu, MAC: e.link.mac.String(),
			Queues: len(e.link.devices), Offloads: offloads(e.link.devices[0].Offloads()),
		},
		Sandbox: o.sandbox && !cgoEnabled,
	}
	if where.PID != 0 {
		is.Namespace = fmt.Sprintf("/proc/%d/ns/net", where.PID)
	}
	is.IPv4 = &api.Addresses{Container: netip.PrefixFrom(p.container4, p.net4.Bits()), Gateway: p.gateway4}
	if p.net6.IsValid() {
		is.IPv6 = &api.Addresses{Container: netip.PrefixFrom(p.container6, p.net6.Bits()), Gateway: p.gateway6}
	}
	if o.dns {
		is.IPv4.DNS = p.dns4
		if is.IPv6 != nil {
			is.IPv6.DNS = p.dns6
		}
	}
	return func() api.Info {
		now, ports := is, e.ports.Info()
		now.Ports = &ports
		return now
	}
}

// offloads names the bits of a TAP's offload mask (TUN_F_…).
func offloads(mask uint32) []string {
	names := []string{}
	for _, o := range []struct {
		bit  uint32
		name string
	}{
		{unix.TUN_F_CSUM, "csum"}, {unix.TUN_F_TSO4, "tso4"}, {unix.TUN_F_TSO6, "tso6"}, {unix.TUN_F_TSO_ECN, "tso_ecn"},
		{unix.TUN_F_USO4, "uso4"}, {unix.TUN_F_USO6, "uso6"},
	} {
		if mask&o.bit != 0 {
			names = append(names, o.name)
		}
	}
	return names
}

// runPorts are the parts that run beside the stack. None of them ends the network.
func (e *engine) runPorts() []func(context.Context) error {
	var parts []func(context.Context) error
	add := func(what string, run func(context.Context) error) {
		parts = append(parts, func(ctx context.Context) error {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				e.log.Error(what, "error", err)
			}
			return nil
		})
	}
	if e.kit != nil {
		add("no more sockets are made inside: published ports take the path through the TAP", e.kit.Run)
	}
	if e.ports != nil {
		add("published ports end", e.ports.Run)
	}
	if e.control != nil {
		add("the control socket ends", e.control.Serve)
	}
	return parts
}

// closePorts closes in the opposite order.
func (e *engine) closePorts() error {
	var errs []error
	if e.control != nil {
		errs = append(errs, e.control.Close())
	}
	if e.ports != nil {
		errs = append(errs, e.ports.Close())
	}
	if e.kit != nil {
		errs = append(errs, e.kit.Close())
	}
	return errors.Join(errs...)
}

// stackDialer is the stack as portdriver wants it.
type stackDialer struct{ *stack.Stack }

func (d stackDialer) DialFrom(ctx context.Context, src, dst netip.AddrPort) (relay.End, error) {
	c, err := d.Stack.DialFrom(ctx, "tcp", src, dst)
	if err != nil {
		return nil, err // not a nil *Conn, which would be an End
	}
	return c, nil
}

// udpPublisher is the forwarder as portdriver wants it.
type udpPublisher struct{ *forwarder.Forwarder }

func (u udpPublisher) PublishUDP(fd int, targets ...netip.AddrPort) (portdriver.UDPForward, error) {
	p, err := u.Forwarder.PublishUDP(fd, targets...)
	if err != nil {
		return nil, err
	}
	return publishedUDP{p}, nil
}

type publishedUDP struct{ *forwarder.PublishedUDP }

func (p publishedUDP) Stats() portdriver.UDPStats {
	s := p.PublishedUDP.Stats()
	r := portdriver.UDPStats{Clients: s.Clients, Total: s.Opened, OctetsIn: s.InOctets, OctetsOut: s.OutOctets}
	for _, n := range s.Drops {
		r.Dropped += n
	}
	return r
}
