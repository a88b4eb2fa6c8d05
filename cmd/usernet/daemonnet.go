package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"usernet/api"
	"usernet/network"
	"usernet/portdriver"
	"usernet/stack/dns"
	"usernet/tap"
	"usernet/tap/bridge"
	"usernet/tap/netns"
)

// A sharedNet is a network that is open: its bridge, and the engine that is its gateway.
type sharedNet struct {
	is     network.Network // as it was when it was opened; who is a member the Set knows
	bridge *bridge.Bridge
	engine *engine
	stop   context.CancelFunc
	served chan error
}

// netOptions are an engine's for a network. What differs from a container's own is that names and addresses are the Set's.
func (d *daemon) netOptions(n network.Network, br *bridge.Bridge) *options {
	o := &options{
		tapFD: -1, readyFD: -1, exitFD: -1, mtu: n.MTU, queues: 1,
		plan: plan{
			net4: n.Subnet, net6: n.Subnet6, gateway4: n.Gateway, gateway6: n.Gateway6, dns4: n.Gateway, dns6: n.Gateway6,
			host4: network.Host4, host6: n.Host6,
		},
		portPath: portdriver.PathAuto, apiSocket: apiNone,
		dns: true, internal: n.Internal, domain: n.Domain, others: []int{d.taps.fd},
	}
	if n.Subnet6.IsValid() {
		o.plan.linkLocal = netip.MustParseAddr("fe80::2")
	}
	if n.Internal {
		o.plan.host4, o.plan.host6 = netip.Addr{}, netip.Addr{}
	}
	names := d.set.Names(n.Name)
	o.namesFor = func(client netip.Addr) dns.Names { return names.For(client) }
	o.lease = func(client net.HardwareAddr) (netip.Addr, bool) {
		if len(client) != 6 {
			return netip.Addr{}, false
		}
		m, ok := d.set.ByMAC(n.Name, network.MAC(client))
		return m.IPv4, ok
	}
	o.uplink = func(ctx context.Context) (*link, error) {
		dev, err := br.Uplink(ctx, tap.Config{Name: n.Uplink(), Log: d.log})
		if err != nil {
			return nil, err
		}
		l := tapLink(dev)
		l.close = dev.Detach // the bridge keeps its port for who comes after
		if err := d.taps.add(l.fds...); err != nil {
			return nil, errors.Join(err, l.close())
		}
		return l, nil
	}
	return o
}

// openNet opens a network, or returns it if it is open. mu is held.
func (d *daemon) openNet(ctx context.Context, n network.Network) (_ *sharedNet, err error) {
	if sn := d.nets[n.Name]; sn != nil {
		return sn, nil
	}
	sn := &sharedNet{is: n, served: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("network %q: %w", n.Name, err), sn.close(d.ns, true))
		}
	}()
	sn.bridge, err = bridge.Open(ctx, d.ns, bridge.Config{Name: n.Bridge(), MAC: n.BridgeMAC().HardwareAddr(), MTU: n.MTU, Log: d.log})
	if err != nil {
		return nil, err
	}
	o := d.netOptions(n, sn.bridge)
	if sn.engine, err = openEngine(ctx, o, netns.Config{}, d.log.With("network", n.Name)); err != nil {
		return nil, err
	}
	for _, m := range n.Members {
		sn.know(m)
	}
	life, stop := context.WithCancel(context.Background())
	up := make(chan struct{})
	sn.stop = stop
	go func() {
		err := sn.engine.run(life, func() error { close(up); return nil })
		if life.Err() == nil {
			d.fail(fmt.Errorf("network %q: %w", n.Name, err))
		}
		sn.served <- err
	}()
	select {
	case <-up:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	d.nets[n.Name] = sn
	return sn, nil
}

// know tells the stack where a member is that has not said anything yet.
func (sn *sharedNet) know(m network.Member) {
	for _, a := range valid(m.IPv4, m.IPv6) {
		sn.engine.stack.Know(a, m.MAC)
	}
}

// close ends what has been opened of it. remove takes the interfaces away.
func (sn *sharedNet) close(ns *netns.NS, remove bool) error {
	var errs []error
	if sn.stop != nil {
		sn.stop()
		if err := <-sn.served; err != nil && !errors.Is(err, context.Canceled) {
			errs = append(errs, err)
		}
		logStats(sn.engine.log, sn.engine)
	}
	if sn.engine != nil {
		errs = append(errs, sn.engine.close())
	}
	if remove && sn.bridge != nil {
		ctx, cancel := context.WithTimeout(context.Background(), changePatience)
		defer cancel()
		errs = append(errs, bridge.Remove(ctx, ns, sn.is.Uplink()), sn.bridge.Remove(ctx))
	}
	return errors.Join(errs...)
}

// Create makes a network. Its bridge comes with the first member.
func (d *daemon) Create(_ context.Context, cfg network.Config) (network.Network, error) {
	d.touch()
	d.mu.Lock()
	defer d.mu.Unlock()
	host, err := hostNetworks()
	if err != nil {
		return network.Network{}, err
	}
	n, err := d.set.Create(cfg, host)
	if err != nil {
		return n, err
	}
	if err := d.save(); err != nil {
		return n, errors.Join(err, d.set.Remove(n.Name))
	}
	d.log.Info("network", "name", n.Name, "subnet", n.Subnet, "subnet6", n.Subnet6, "internal", n.Internal)
	return n, nil
}

// List returns all networks.
func (d *daemon) List() []network.Network { d.touch(); return d.set.List() }

// Get returns one.
func (d *daemon) Get(name string) (network.Network, error) { d.touch(); return d.set.Get(name) }

// Remove removes a network without members.
func (d *daemon) Remove(_ context.Context, name string) error {
	d.touch()
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.set.Remove(name); err != nil {
		return err
	}
	d.shutUnused(name)
	return errors.Join(d.save(), d.dir.RemoveNetwork(name))
}

// Attach makes a namespace a member.
func (d *daemon) Attach(ctx context.Context, name string, request api.AttachRequest) (_ api.Attached, err error) {
	d.touch()
	// A client that goes away shall not leave half a member.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), changePatience)
	defer cancel()
	d.mu.Lock()
	defer d.mu.Unlock()
	n, err := d.set.Get(name)
	if err != nil {
		return api.Attached{}, err
	}
	ports, err := parsePorts(n, request.Publish)
	if err != nil {
		return api.Attached{}, err
	}
	ns, join, err := d.openMember(request)
	if err != nil {
		return api.Attached{}, err
	}
	rec, err := d.set.Join(name, join)
	if err != nil {
		return api.Attached{}, errors.Join(err, ns.Close())
	}
	m := &member{d: d, key: memberKey{name, rec.Name}, ns: ns, port: rec.Port()}
	if err := d.join(ctx, n, m, rec, ports, false); err != nil {
		_, lerr := d.set.Leave(name, rec.Name)
		serr := d.save()
		d.shutUnused(name)
		return api.Attached{}, errors.Join(fmt.Errorf("join %q to network %q: %w", rec.Name, name, err), lerr, serr)
	}
	if rec, err = d.set.Member(name, rec.Name); err != nil {
		return api.Attached{}, err
	}
	e := d.nets[name].engine
	return api.Attached{Member: rec, Socket: m.control.Path(), Search: e.search(), Options: e.resolverOptions()}, nil
}

// join connects a member that is recorded, and has it recorded how. ns is the member's own from here on. mu is held.
func (d *daemon) join(ctx context.Context, n network.Network, m *member, rec network.Member, ports memberPortsSpec, adopt bool) error {
	sn, err := d.openNet(ctx, n)
	if err == nil {
		sn.know(rec)
		err = m.open(ctx, sn, rec, ports, adopt)
	} else {
		err = errors.Join(err, m.close(true))
	}
	if err != nil {
		return err
	}
	d.members[m.key] = m
	cable := network.CableVeth
	if m.cable.Kind() == bridge.TAPs {
		cable = network.CableTAP
	}
	err = errors.Join(d.set.SetCable(m.key.network, m.key.name, cable), d.save())
	if err != nil {
		delete(d.members, m.key)
		return errors.Join(err, m.close(true))
	}
	return nil
}

// Detach ends a membership.
func (d *daemon) Detach(_ context.Context, name, member string) error {
	d.touch()
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.set.Member(name, member); err != nil {
		return err
	}
	m := d.members[memberKey{name, member}]
	if m == nil { // recorded, and could not be connected
		_, err := d.set.Leave(name, member)
		return errors.Join(err, d.save())
	}
	d.drop(m)
	return nil
}

// openMember opens the namespace that a request names.
func (d *daemon) openMember(r api.AttachRequest) (*netns.NS, network.Request, error) {
	join := network.Request{
		Name: r.Name, Aliases: r.Aliases, IPv4: r.IPv4, IPv6: r.IPv6, MAC: r.MAC, Ifname: r.Ifname, Path: r.Path, Ports: r.Publish,
	}
	bad := func(err error) (*netns.NS, network.Request, error) {
		return nil, join, &api.Error{Status: http.StatusBadRequest, Code: api.CodeBadRequest, Message: err.Error()}
	}
	ns, err := netns.Open(netns.Config{PID: r.PID, Path: r.Path, Helper: true})
	if err != nil {
		return bad(err)
	}
	if r.Path == "" {
		if join.Process, err = network.ReadProcess(r.PID); err != nil {
			return bad(errors.Join(err, ns.Close()))
		}
	}
	err = notOurs(ns)
	if err == nil {
		join.NetNS, err = identify(ns)
	}
	var shared network.NetNS
	if err == nil {
		shared, err = identify(d.ns)
	}
	if err == nil && shared == join.NetNS {
		err = fmt.Errorf("%s is that of the bridges: it cannot be a member", ns)
	}
	if err != nil {
		return bad(errors.Join(err, ns.Close()))
	}
	return ns, join, nil
}

func identify(ns *netns.NS) (network.NetNS, error) {
	var st unix.Stat_t
	if err := unix.Fstat(ns.FD(), &st); err != nil {
		return network.NetNS{}, fmt.Errorf("%s: %w", ns, err)
	}
	return network.NetNS{Dev: st.Dev, Inode: st.Ino}, nil
}

// restoreAtOnce is how many members are connected at a time after a start: each takes a process in its namespace.
const restoreAtOnce = 4

// restore serves what was recorded, as far as it lives, and removes interfaces of which nothing is recorded.
func (d *daemon) restore(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	before := time.Now()
	type found struct {
		n   network.Network
		rec network.Member
		m   *member
		err error
	}
	var all []*found
	for _, n := range d.set.List() {
		if len(n.Members) == 0 && !n.Persist {
			continue
		}
		if _, err := d.openNet(ctx, n); err != nil {
			return err
		}
		for _, rec := range n.Members {
			all = append(all, &found{n: n, rec: rec, m: &member{d: d, key: memberKey{n.Name, rec.Name}, port: rec.Port()}})
		}
	}
	g := errgroup.Group{}
	g.SetLimit(restoreAtOnce)
	for _, f := range all {
		g.Go(func() error { f.err = d.reconnect(ctx, d.nets[f.n.Name], f.m, f.rec); return nil })
	}
	_ = g.Wait()
	for _, f := range all {
		if f.err == nil {
			d.members[f.m.key] = f.m
			cable := network.CableVeth
			if f.m.cable.Kind() == bridge.TAPs {
				cable = network.CableTAP
			}
			if err := d.set.SetCable(f.n.Name, f.rec.Name, cable); err != nil {
				return err
			}
			continue
		}
		d.log.Warn("a recorded member is not there any more", "network", f.n.Name, "name", f.rec.Name, "reason", f.err)
		if _, err := d.set.Leave(f.n.Name, f.rec.Name); err != nil {
			return err
		}
		if err := d.dir.RemoveSocket(f.n.Name, f.rec.Name); err != nil {
			d.log.Warn("a member's control socket is left", "network", f.n.Name, "name", f.rec.Name, "error", err)
		}
		d.shutUnused(f.n.Name)
	}
	if len(all) > 0 {
		d.log.Info("recorded members are served", "members", len(d.members), "of", len(all), "after", time.Since(before))
	}
	return errors.Join(d.removeStrays(ctx), d.save())
}

// oursNames are those of interfaces that we make in the shared namespace.
var oursNames = regexp.MustCompile(`^[bum][0-9]+$`)

func (d *daemon) removeStrays(ctx context.Context) error {
	links, err := bridge.List(ctx, d.ns)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, sn := range d.nets {
		known[sn.is.Bridge()], known[sn.is.Uplink()] = true, true
	}
	for _, m := range d.members {
		known[m.port] = true
	}
	for _, l := range links {
		if known[l.Name] || !oursNames.MatchString(l.Name) {
			continue
		}
		d.log.Warn("an interface of which nothing is recorded is removed", "interface", l.Name)
		err = errors.Join(err, bridge.Remove(ctx, d.ns, l.Name))
	}
	return err
}

// reconnect finds a recorded member, and connects it if it is the one that it was. A predecessor's interfaces
// may still be on their way out: of a namespace whose last user was killed the kernel takes them some time after.
func (d *daemon) reconnect(ctx context.Context, sn *sharedNet, m *member, rec network.Member) error {
	ctx, cancel := context.WithTimeout(ctx, changePatience)
	defer cancel()
	if rec.Process != (network.Process{}) {
		if now, err := network.ReadProcess(rec.Process.PID); err != nil || now != rec.Process {
			return errors.Join(err, errors.New("its process has ended"))
		}
	}
	ports, err := parsePorts(sn.is, rec.Ports)
	if err != nil {
		return err
	}
	where := netns.Config{PID: rec.Process.PID, Path: rec.Path, Helper: true}
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for {
		ns, err := netns.Open(where)
		if err != nil {
			return err
		}
		if is, err := identify(ns); err != nil || is != rec.NetNS {
			return errors.Join(err, errors.New("another namespace is there"), ns.Close())
		}
		m.ns = ns
		err = m.open(ctx, sn, rec, ports, true)
		if !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EBUSY) {
			return err
		}
		*m = member{d: d, key: m.key, port: m.port}
		select {
		case <-t.C:
		case <-ctx.Done():
			return err
		}
	}
}

func (d *daemon) memberLog(key memberKey) *slog.Logger {
	return d.log.With("network", key.network, "member", key.name)
}
