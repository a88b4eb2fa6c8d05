package portdriver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"usernet/tap/inside"
)

// UDP goes by the TAP, but for the ports that are bound in the container on its loopback alone: nothing that comes by the
// TAP gets there. Their clients go through sockets of the namespace. UDP has no connect that would be refused
// in time, so it is looked beforehand, at Add and then as often as Auto looks, with the same question. Who has named an
// address of the loopback is led there without a look.

// mayEnter tells whether f may be led to the container's loopback.
func (f *forward) mayEnter() bool {
	return f.udp != nil && f.d.kit != nil && f.d.cfg.Path != PathStack && len(f.loopbacks) > 0
}

// entering are the forwards that may be led to the container's loopback.
func (d *Driver) entering() []*forward {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []*forward
	for _, f := range d.forwards {
		if f.mayEnter() {
			list = append(list, f)
		}
	}
	return list
}

func (d *Driver) anyMayEnterLocked() bool {
	for _, f := range d.forwards {
		if f.mayEnter() {
			return true
		}
	}
	return false
}

// look asks who listens in the container, and leads all UDP forwards accordingly, or those that are new.
func (d *Driver) look(ctx context.Context, added ...*forward) ([]inside.Listening, error) {
	d.looking.Lock()
	defer d.looking.Unlock()
	listening, err := d.kit.Listening(ctx)
	if err != nil {
		return nil, err
	}
	fs := added
	if len(fs) == 0 {
		fs = d.entering()
	}
	if len(fs) == 0 {
		return listening, nil
	}
	bound := make(map[uint16]binding)
	for _, l := range listening {
		if l.Proto == "udp" {
			port := l.Addr.Port()
			bound[port] = bound[port].and(l.Addr.Addr().Unmap())
		}
	}
	for _, f := range fs {
		if f.mayEnter() {
			f.lead(bound[f.spec.ContainerPort])
		}
	}
	return listening, nil
}

// A binding is where the container has a UDP port.
type binding struct {
	lo4, lo6 bool // 127.0.0.1, ::1
	more     bool // where the TAP leads to
}

func (b binding) and(a netip.Addr) binding {
	switch {
	case a == loopback4:
		b.lo4 = true
	case a == loopback6:
		b.lo6 = true
	case !a.IsLoopback():
		b.more = true
	}
	return b
}

// lead has f's new clients led to where its port is bound.
func (f *forward) lead(b binding) {
	var to []netip.AddrPort
	if f.spec.Container.IsLoopback() {
		to = append(to, netip.AddrPortFrom(f.spec.Container, f.spec.ContainerPort))
	} else if !b.more {
		for _, a := range f.loopbacks {
			if a == loopback4 && b.lo4 || a == loopback6 && b.lo6 {
				to = append(to, netip.AddrPortFrom(a, f.spec.ContainerPort))
			}
		}
	}
	var was []netip.AddrPort
	if p := f.inside.Load(); p != nil {
		was = *p
	}
	if slices.Equal(to, was) {
		return
	}
	for _, ap := range to {
		f.d.kit.Prepare(inside.Kind{V6: !ap.Addr().Is4(), UDP: true})
	}
	if err := f.udp.Through(f.d.udpSocket, to...); err != nil {
		f.d.log.Warn("lead a UDP port to the container's loopback", "forward", f.spec.String(), "err", err)
		return
	}
	if len(to) == 0 {
		f.inside.Store(nil)
	} else {
		f.inside.Store(&to)
	}
	f.d.log.Debug("UDP port", "forward", f.spec.String(), "through sockets to", to)
}

var errNotReady = errors.New("no socket lies ready")

// udpSocket is one of the namespace, if any lies ready.
func (d *Driver) udpSocket(v6 bool) (int, error) {
	if fd, ok := d.kit.Ready(inside.Kind{V6: v6, UDP: true}); ok {
		return fd, nil
	}
	return -1, errNotReady
}

// udpPath is pathOf for UDP.
func (f *forward) udpPath() (path, note string) {
	to, why := f.inside.Load(), f.d.noSockets()
	switch {
	case to == nil && why != nil && len(f.loopbacks) > 0:
		return PathTAP, "a server on the container's loopback alone is not reached"
	case to == nil:
		return PathTAP, ""
	case why != nil:
		return "", fmt.Sprintf("the server is on the container's loopback alone, which is not reached: %v", why)
	case (*to)[0].Addr().Is4():
		return PathKernel, fmt.Sprintf("the server is on the container's loopback alone: its clients appear as %v", loopback4)
	}
	return PathKernel, fmt.Sprintf("the server is on the container's loopback alone: its clients appear as %v", loopback6)
}
