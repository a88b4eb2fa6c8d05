package portdriver

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"

	"usernet/forwarder/relay"
	"usernet/portdriver/sockfile"
)

// forward is an entry of the table.
//
//	open ── close(drain) ──▶ draining ──┐ the last connection ends
//	  └──── close ─────────────────────▶ closed ─▶ idle
type forward struct {
	d    *Driver
	spec Spec

	// Written once, under d.mu, before the forward is in the table.
	id   int
	auto bool
	said *port.Spec // in rootlesskit's words, if it came so

	draining bool // under d.mu

	to4, to6  []netip.Addr // targets of clients of either family
	loopbacks []netip.Addr // those of them, each once

	// What is listened on, from open to stop.
	fds       []int          // not yet handed on
	file      *sockfile.File // of a unix socket
	listeners []*relay.Listener
	udp       UDPForward
	inside    atomic.Pointer[[]netip.AddrPort] // where UDP is led inside; nil: by the TAP. Written by start, then under Driver.looking
	stopped   sync.Once
	stopErr   error

	count          relay.Count
	total, refused atomic.Uint64

	mu      sync.Mutex // innermost
	closed  bool       // no new connections
	reset   bool       // and none at all
	conns   map[*conn]struct{}
	detours [2]detour     // IPv4, IPv6
	idle    chan struct{} // closed when closed and without connections
}

func (d *Driver) newForward(spec Spec) *forward {
	f := &forward{
		d: d, spec: spec, to4: d.addrs.targets(spec, true), to6: d.addrs.targets(spec, false),
		conns: make(map[*conn]struct{}), idle: make(chan struct{}),
	}
	for _, list := range [...][]netip.Addr{f.to4, f.to6} {
		for _, a := range list {
			if a.IsLoopback() && !slices.Contains(f.loopbacks, a) {
				f.loopbacks = append(f.loopbacks, a)
			}
		}
	}
	return f
}

// start begins to serve. What fails leaves all to close.
func (d *Driver) start(fs []*forward) error {
	for _, f := range fs {
		for len(f.fds) > 0 {
			fd := f.fds[0]
			f.fds = f.fds[1:]
			if f.spec.udp() {
				u, err := d.cfg.UDP.PublishUDP(fd, f.udpTargets()...)
				if err != nil {
					return err
				}
				if f.udp = u; f.spec.Container.IsLoopback() {
					f.lead(binding{})
				}
				continue
			}
			ln, err := d.cfg.Loop.Listen(fd, f.accepted)
			if err != nil {
				return err
			}
			f.listeners = append(f.listeners, ln)
		}
	}
	return nil
}

// udpTargets are where datagrams go: at most one address of each family.
func (f *forward) udpTargets() []netip.AddrPort {
	var to []netip.AddrPort
	for _, a := range f.to4 {
		if !a.IsLoopback() {
			to = append(to, netip.AddrPortFrom(a, f.spec.ContainerPort))
		}
	}
	return to
}

// stop closes what is listened on; it may be called again.
func (f *forward) stop() error {
	f.stopped.Do(func() {
		var errs []error
		if f.file != nil {
			errs = append(errs, f.file.Remove())
		}
		for _, ln := range f.listeners {
			errs = append(errs, ln.Close())
		}
		if f.udp != nil {
			errs = append(errs, f.udp.Close())
		}
		for _, fd := range f.fds {
			closeFD(fd)
		}
		f.stopErr = errors.Join(errs...)
	})
	return f.stopErr
}

// close stops listening, and resets the connections unless drain; idle tells when they are gone.
func (f *forward) close(drain bool) error {
	err := f.stop()
	f.mu.Lock()
	was := f.closed && len(f.conns) == 0
	f.closed = true
	f.reset = f.reset || !drain
	if len(f.conns) == 0 && !was {
		close(f.idle)
	}
	empty := len(f.conns) == 0
	var joints []*relay.Joint
	if !drain {
		for c := range f.conns {
			if c.cancel != nil {
				c.cancel(errReset)
			}
			if c.joint != nil {
				joints = append(joints, c.joint)
			}
		}
	}
	f.mu.Unlock()
	for _, j := range joints {
		j.Abort()
	}
	if empty {
		f.d.drained(f)
	}
	return err
}

// snapshot says what there is to say of it now.
func (f *forward) snapshot() Forward {
	f.d.mu.Lock()
	draining := f.draining
	f.d.mu.Unlock()
	path, note := f.d.pathOf(f)
	s := Forward{ID: f.id, Spec: f.spec, Auto: f.auto, Path: path, Note: note, Draining: draining}
	if f.udp != nil {
		u := f.udp.Stats()
		s.Active, s.Total, s.Refused, s.OctetsIn, s.OctetsOut = uint64(u.Clients), u.Total, u.Dropped, u.OctetsIn, u.OctetsOut
		return s
	}
	f.mu.Lock()
	s.Active = uint64(len(f.conns))
	f.mu.Unlock()
	s.Total, s.Refused = f.total.Load(), f.refused.Load()
	s.OctetsIn, s.OctetsOut = f.count.In.Load(), f.count.Out.Load()
	return s
}
