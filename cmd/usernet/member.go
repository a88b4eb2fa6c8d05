package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"usernet/api"
	"usernet/network"
	"usernet/portdriver"
	"usernet/tap/bridge"
	"usernet/tap/netns"
)

// A member is a container that a network serves: its cable, and what publishes its ports.
type member struct {
	d    *daemon
	key  memberKey
	port string // the bridge's end of the cable
	ns   *netns.NS

	cable   *bridge.Cable
	ports   *memberPorts
	control *api.Server

	stop context.CancelFunc
	work sync.WaitGroup
}

// firstMetric is below the metrics of members' default routes. What a container has of its own, with none, goes first.
const firstMetric = 100

// open connects the member and starts what serves it. What it has opened it closes on an error, ns too. With adopt it takes up what
// is there, and ports that cannot be published any more are no reason to leave a container without a network.
func (m *member) open(ctx context.Context, sn *sharedNet, rec network.Member, ports memberPortsSpec, adopt bool) (err error) {
	log := m.d.memberLog(m.key)
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close(!adopt))
		}
	}()
	config := bridge.CableConfig{
		Port: m.port, Name: rec.Ifname, MAC: rec.MAC.HardwareAddr(), Adopt: adopt, Log: log,
		IPv4: withLen(rec.IPv4, sn.is.Subnet), IPv6: withLen(rec.IPv6, sn.is.Subnet6),
	}
	if !sn.is.Internal { // without a way out there is no route: what cannot be reached is told at once
		config.Gateway4, config.Gateway6 = sn.is.Gateway, sn.is.Gateway6
		config.Metric = firstMetric + rec.Number // by the network that was joined first, and when that is left by another
	}
	if m.cable, err = sn.bridge.Attach(ctx, m.ns, config); err != nil {
		return err
	}
	if err := m.d.taps.add(m.cable.FDs()...); err != nil {
		return err
	}
	if err := m.ns.Rest(); err != nil { // a helper is some megabytes, which few members need for longer
		return err
	}
	life, stop := context.WithCancel(context.Background())
	m.stop = stop
	m.ports = newMemberPorts(m, sn, rec, life, log)
	if err := m.ports.publish(ctx, ports, adopt); err != nil {
		if !adopt {
			return err
		}
		log.Warn("ports are not published any more", "error", err)
	}
	path, err := m.d.dir.Socket(m.key.network, m.key.name)
	if err != nil {
		return err
	}
	m.control, err = api.Listen(api.Config{
		Path: path, Ports: m.ports, Rootlesskit: m.ports, Info: m.info(sn, rec), Metrics: sn.engine.metrics, Log: log,
	})
	if err != nil {
		return err
	}
	m.work.Go(func() {
		if err := m.control.Serve(life); err != nil {
			log.Error("the control socket ends", "error", err)
		}
	})
	m.work.Go(func() { m.watch(life, rec, log) })
	if m.cable.Kind() == bridge.TAPs {
		m.work.Go(func() {
			if err := m.cable.Run(life); err != nil && life.Err() == nil {
				log.Info("the cable ends", "reason", err)
				m.leave(life)
			}
		})
	}
	return nil
}

// watch waits for the end of the member's process, or for its path to lead elsewhere.
func (m *member) watch(life context.Context, rec network.Member, log *slog.Logger) {
	if pidfd, err := rec.Process.Open(); err == nil {
		// Without a thread of its own, which ns.Watch takes: members are many.
		stop := context.AfterFunc(life, func() { pidfd.SetReadDeadline(time.Unix(1, 0)) })
		untilReadable(pidfd)
		stop()
		pidfd.Close()
	} else if err := m.ns.Watch(life); err != nil && life.Err() == nil {
		log.Error("the member is not watched any more", "error", err)
		return
	}
	m.leave(life)
}

// leave has the daemon end the membership, which ends life.
func (m *member) leave(life context.Context) {
	select {
	case m.d.ended <- m:
	case <-life.Done():
	}
}

// close ends what there is. remove takes the interfaces away, at both ends; else they stay for a successor.
func (m *member) close(remove bool) error {
	var errs []error
	if m.stop != nil {
		m.stop()
	}
	m.work.Wait()
	if m.control != nil {
		errs = append(errs, m.control.Close())
	}
	if m.ports != nil {
		errs = append(errs, m.ports.close())
	}
	switch {
	case m.cable == nil:
	case remove:
		errs = append(errs, m.cable.Close())
	default:
		errs = append(errs, m.cable.Detach())
	}
	if m.ns != nil {
		errs = append(errs, m.ns.Close())
	}
	return errors.Join(errs...)
}

// info is what the member's control socket says.
func (m *member) info(sn *sharedNet, rec network.Member) func() api.Info {
	p := sn.engine.o.plan
	is := api.Info{
		Version: ourVersion(), Started: m.d.started, Namespace: rec.Path, ContainerPID: rec.Process.PID,
		Interface: api.Interface{
			Name: rec.Ifname, MTU: sn.is.MTU, MAC: rec.MAC.String(),
			Queues: 1, Offloads: offloads(sn.engine.link.devices[0].Offloads()),
		},
		IPv4: &api.Addresses{Container: withLen(rec.IPv4, p.net4), Gateway: p.gateway4, DNS: p.dns4},
	}
	if is.Namespace == "" {
		is.Namespace = fmt.Sprintf("/proc/%d/ns/net", rec.Process.PID)
	}
	if rec.IPv6.IsValid() {
		is.IPv6 = &api.Addresses{Container: withLen(rec.IPv6, p.net6), Gateway: p.gateway6, DNS: p.dns6}
	}
	return func() api.Info {
		now := is
		now.Ports = m.ports.info()
		return now
	}
}

// A memberPortsSpec is what -p of attach says, read.
type memberPortsSpec struct {
	specs []portdriver.Spec
	autos []portdriver.AutoConfig
	texts []string // of the autos
}

func parsePorts(n network.Network, words []string) (p memberPortsSpec, err error) {
	bad := func(format string, args ...any) (memberPortsSpec, error) {
		return p, &api.Error{Status: http.StatusBadRequest, Code: api.CodeBadRequest, Message: fmt.Sprintf(format, args...)}
	}
	if n.Internal && len(words) > 0 {
		return bad("network %q is internal: there is no way in or out of it, and no port of its members is published", n.Name)
	}
	for _, w := range words {
		if auto, is, err := portdriver.ParseAuto(w); err != nil {
			return bad("%v", err)
		} else if is {
			p.autos, p.texts = append(p.autos, auto), append(p.texts, w)
			continue
		}
		specs, err := portdriver.ParseSpec(w)
		if err != nil {
			return bad("%v", err)
		}
		if path := specs[0].HostPath; path != "" && !filepath.IsAbs(path) {
			return bad("%q is not an absolute path: a client's directory is not known here", path)
		}
		p.specs = append(p.specs, specs...)
	}
	return p, nil
}

// portText is a spec in the words of -p.
func portText(s portdriver.Spec, last portdriver.Spec) string {
	span := func(from, to uint16) string {
		if from == to {
			return fmt.Sprint(from)
		}
		return fmt.Sprintf("%d-%d", from, to)
	}
	side := func(a netip.Addr, from, to uint16) string {
		switch {
		case !a.IsValid():
			return span(from, to)
		case a.Is6():
			return "[" + a.String() + "]:" + span(from, to)
		}
		return a.String() + ":" + span(from, to)
	}
	host := s.HostPath
	if host == "" {
		host = side(s.Host, s.HostPort, last.HostPort)
	}
	text := host + ":" + side(s.Container, s.ContainerPort, last.ContainerPort)
	if s.HostPath != "" {
		return text
	}
	return text + "/" + s.Proto
}
