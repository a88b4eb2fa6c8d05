package portdriver

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"usernet/tap/inside"
)

// scanPause lies between two looks at who listens in the container: a server that has just come up is published within
// half a second, and a look costs a dozen system calls: a question for each protocol and family, and its answer in two parts.
const scanPause = 500 * time.Millisecond

// Auto publishes what listens in the container, and withdraws it when it goes; what it has of connections
// then lives on. A port that is published already, or that the host does not give, is left out. It may be called any
// time; the Driver must run.
func (d *Driver) Auto(cfg AutoConfig) error {
	if d.kit == nil {
		return errors.Join(errors.New("publish what listens in the container: nobody can look there"), d.cfg.WhyNoKernel)
	}
	d.mu.Lock()
	d.autos = append(d.autos, cfg)
	d.mu.Unlock()
	d.kickWatch()
	return nil
}

// kickWatch has watch look now.
func (d *Driver) kickWatch() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

// watch does what Auto asks for, and looks where UDP ports are bound, until ctx ends.
func (d *Driver) watch(ctx context.Context) {
	w := watcher{d: d, ids: make(map[Spec]int), failed: make(map[Spec]string)}
	timer := time.NewTimer(scanPause)
	defer timer.Stop()
	for {
		d.mu.Lock()
		autos := slices.Clone(d.autos)
		d.watching = len(autos) > 0 || d.anyMayEnterLocked()
		watching := d.watching
		d.mu.Unlock()
		var tick <-chan time.Time
		if watching {
			w.look(ctx, autos)
			timer.Reset(scanPause)
			tick = timer.C
		}
		select {
		case <-ctx.Done():
			return
		case <-d.kick:
		case <-tick:
		}
	}
}

// watcher is what Auto has done so far.
type watcher struct {
	d      *Driver
	ids    map[Spec]int    // published
	failed map[Spec]string // not to be had, and said so
	blind  bool            // the container cannot be looked into, and it was said
	full   bool            // there are more than may be published, and it was said
}

func (w *watcher) look(ctx context.Context, autos []AutoConfig) {
	listening, err := w.d.look(ctx)
	if err != nil {
		if ctx.Err() == nil && !w.blind {
			w.blind = true
			w.d.log.Warn("who listens in the container cannot be seen", "err", err)
		}
		return
	}
	w.blind = false
	var ephemeral PortRange
	ephemeral.First, ephemeral.Last = w.d.kit.Ephemeral()
	want := make(map[Spec]bool)
	for _, a := range autos {
		for _, s := range a.specs(listening, ephemeral, &w.d.addrs) {
			want[s] = true
		}
	}
	for s, id := range w.ids {
		if _, there := w.d.Get(id); want[s] && there {
			continue
		}
		delete(w.ids, s)
		if err := w.d.Remove(ctx, id, true); err != nil && !errors.As(err, new(ErrUnknownID)) {
			w.d.log.Warn("withdraw a port", "forward", s.String(), "err", err)
		}
	}
	for s := range w.failed {
		if !want[s] {
			delete(w.failed, s)
		}
	}
	todo := slices.SortedFunc(func(yield func(Spec) bool) {
		for s := range want {
			if _, done := w.ids[s]; !done && !yield(s) {
				return
			}
		}
	}, func(a, b Spec) int { return cmp.Or(cmp.Compare(a.HostPort, b.HostPort), cmp.Compare(a.Proto, b.Proto)) })
	for _, s := range todo {
		if most := w.d.limits.Forwards / 2; len(w.ids) >= most {
			// A container that listens everywhere leaves room for what the user asks for.
			if !w.full {
				w.full = true
				w.d.log.Warn("more is listened on in the container than is published by itself", "published", most, "first left out", s.String())
			}
			return
		}
		w.publish(ctx, s)
	}
	w.full = false
}

func (w *watcher) publish(ctx context.Context, s Spec) {
	added, err := w.d.add(ctx, []Spec{s}, nil, true)
	if err != nil {
		if text := err.Error(); ctx.Err() == nil && w.failed[s] != text && !errors.As(err, new(ErrConflict)) {
			w.failed[s] = text
			w.d.log.Warn("a port that is listened on in the container is not published", "err", err)
		}
		return
	}
	delete(w.failed, s)
	w.ids[s] = added[0].ID
}

// specs are what a config makes of those who listen.
func (a AutoConfig) specs(listening []inside.Listening, ephemeral PortRange, addrs *addresses) []Spec {
	// A server on all addresses, or on the container's own, is for everybody; one on its loopback for the host's.
	type key struct {
		udp, loopback bool
		port          uint16
	}
	// One on another address, of a bridge in the container say, is to be named; it gives way to those that need no name.
	type families struct {
		v4, v6 bool
		named  netip.Addr
	}
	found := make(map[key]families)
	for _, l := range listening {
		addr, udp := l.Addr.Addr(), l.Proto == "udp"
		mapped := addr.Is4In6()
		addr = addr.Unmap()
		k := key{udp, addr.IsLoopback(), l.Addr.Port()}
		if !a.wants(udp, k.port, ephemeral) || k.port == 0 || addr.IsMulticast() {
			continue
		}
		f, seen := found[k]
		switch {
		case !addrs.sought(addr):
			if !seen || f.named.IsValid() && addr.Less(f.named) {
				found[k] = families{v4: addr.Is4(), v6: !addr.Is4(), named: addr}
			}
			continue
		case f.named.IsValid():
			f = families{}
		}
		f.v4 = f.v4 || addr.Is4() || !mapped && addr.IsUnspecified() && !l.V6Only
		f.v6 = f.v6 || !addr.Is4()
		found[k] = f
	}
	var specs []Spec
	for k, f := range found {
		if all := (key{k.udp, false, k.port}); k.loopback && (found[all].v4 || found[all].v6) {
			continue // it is reached by the other one's forward, where that one's server refuses
		}
		proto := "tcp"
		if k.udp {
			proto = "udp"
		}
		s := Spec{Host: a.Host, HostPort: k.port, Container: f.named, ContainerPort: k.port, Proto: proto}
		loopback := func(own netip.Addr) netip.Addr {
			if !a.Host.IsValid() || a.Host.IsUnspecified() {
				return own
			}
			return a.Host
		}
		switch {
		case k.loopback:
			if a.Host.IsValid() && !a.Host.IsUnspecified() && !a.Host.IsLoopback() {
				continue
			}
			if f.v4 {
				s.Host = loopback(loopback4)
				specs = append(specs, s)
			}
			if f.v6 && (s.Host != a.Host || !a.Host.IsValid() || !f.v4) {
				s.Host = loopback(loopback6)
				specs = append(specs, s)
			}
			continue
		case a.Host.IsValid():
		case !f.v6:
			s.Proto += "4"
		case !f.v4:
			s.Proto += "6"
		}
		specs = append(specs, s)
	}
	return specs
}
