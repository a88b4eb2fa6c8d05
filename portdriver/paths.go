package portdriver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"usernet/tap/inside"
)

// choose picks the path to dst for a client that is to appear as src. The error says why there is none, or is errWait
// where that can only be told by waiting, and ctx is nil.
func (d *Driver) choose(ctx context.Context, src netip.AddrPort, dst netip.Addr) (inside.Kind, string, error) {
	kind := inside.Kind{V6: !dst.Is4(), Transparent: src.IsValid()}
	if d.kit == nil || d.cfg.Path == PathStack {
		if !d.stackLeads(dst) {
			return kind, "", errNoPath
		}
		return kind, PathStack, nil
	}
	if kind.Transparent && d.kit.Transparent(kind.V6) != nil {
		d.kit.Doubt() // it may have become possible: lo is up again, say
		if d.stackLeads(dst) {
			return kind, PathStack, nil
		}
		kind.Transparent = false // better than nothing
	}
	if !dst.IsLoopback() {
		switch local, err := d.isLocal(ctx, dst); {
		case err == errWait:
			return kind, "", err
		case !local && d.stackLeads(dst):
			return kind, PathStack, nil
		case err != nil:
			return kind, "", err
		case !local:
			return kind, "", errNoPath
		}
	}
	return kind, PathKernel, nil
}

// stackLeads tells whether the stack path can reach dst: what is on the TAP, and not the container's loopback.
func (d *Driver) stackLeads(dst netip.Addr) bool {
	return d.cfg.Stack != nil && d.cfg.Path != PathKernel && !dst.IsLoopback()
}

// localTime is how long an answer of isLocal holds: a container that gets its address is
// found on the kernel path that much later at most.
const localTime = time.Second

// maxLocals bounds what is remembered: it is made of the addresses of forwards, which are bounded too, but not by much.
const maxLocals = 1024

// locals remembers which addresses the namespace has.
type locals struct {
	mu sync.Mutex
	by map[netip.Addr]local
}

type local struct {
	is   bool
	when time.Time
}

func (l *locals) get(a netip.Addr) (local, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e, ok := l.by[a]
	return e, ok
}

func (l *locals) put(a netip.Addr, is bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.by == nil || len(l.by) >= maxLocals {
		l.by = make(map[netip.Addr]local)
	}
	l.by[a] = local{is, time.Now()}
}

// isLocal tells whether the namespace has an address: a plain socket of it can be bound there. A connect over the kernel
// path to one that it has not would leave by the TAP and come back to us.
func (d *Driver) isLocal(ctx context.Context, a netip.Addr) (bool, error) {
	if e, ok := d.locals.get(a); ok && time.Since(e.when) < localTime {
		return e.is, nil
	}
	fd, err := d.socket(ctx, inside.Kind{V6: !a.Is4()})
	if err != nil {
		return false, err
	}
	err = bindTo(fd, netip.AddrPortFrom(a, 0))
	closeFD(fd)
	is := err == nil || !errors.Is(err, unix.EADDRNOTAVAIL)
	d.locals.put(a, is)
	return is, nil
}

// pathOf says what a forward's new connections take, and why it is not the kernel path, without asking anybody.
func (d *Driver) pathOf(f *forward) (path, note string) {
	if f.udp != nil {
		return f.udpPath()
	}
	_, v4, v6 := f.spec.families()
	if h := f.spec.Host; h.IsValid() {
		v4, v6 = h.Is4(), !h.Is4()
	}
	targets := f.to4
	if v6 && (!v4 || len(targets) == 0) {
		targets = f.to6
	}
	if len(targets) == 0 {
		return "", "the container has no address"
	}
	dst := targets[0]
	why := d.whyNoKernel(dst)
	if why == nil {
		why = f.onDetour(dst)
	}
	switch {
	case why == nil:
		return PathKernel, ""
	case d.stackLeads(dst):
		note := fmt.Sprintf("not by the kernel path: %v", why)
		if d.noSockets() != nil && len(targets) > 1 {
			note += "; a server on the container's loopback alone is not reached"
		}
		return PathStack, note
	case d.noSockets() == nil:
		return PathKernel, fmt.Sprintf("clients' addresses are not kept: %v", why)
	}
	return "", fmt.Sprintf("refused: not by the kernel path, %v, and the stack path does not lead to %v", why, dst)
}

// noSockets says why sockets of the namespace cannot be had, by which alone the container's loopback is reached; nil: they can.
func (d *Driver) noSockets() error {
	switch {
	case d.cfg.Path == PathStack:
		return errors.New("it is turned off")
	case d.kit != nil:
		return d.kit.Sockets()
	case d.cfg.WhyNoKernel != nil:
		return d.cfg.WhyNoKernel
	}
	return errors.New("there is none")
}

// whyNoKernel says why new connections to dst do not take the kernel path; nil: they do.
func (d *Driver) whyNoKernel(dst netip.Addr) error {
	if err := d.noSockets(); err != nil {
		return err
	}
	if e, ok := d.locals.get(dst); ok && !e.is && !dst.IsLoopback() {
		return fmt.Errorf("%v is not an address of the container itself now", dst)
	}
	if !d.addrs.gateway(dst).IsValid() {
		return nil
	}
	return d.kit.Transparent(!dst.Is4())
}
