package main

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"

	"usernet/network"
	"usernet/portdriver"
	"usernet/tap/inside"
)

// kitBatch is how many sockets of a kind lie ready for a member: fewer than for a container of its own, as many may share the
// limit on files.
const kitBatch = 12

// regainPause lies between two tries to take lost ports back. A try costs a system call or two for each.
const regainPause = 2 * time.Second

// memberPorts publishes the ports of one member. Its driver comes with the first port: it has a helper in the member's namespace, which
// is a process of some megabytes.
type memberPorts struct {
	m    *member
	sn   *sharedNet
	rec  network.Member
	life context.Context
	log  *slog.Logger

	recording sync.Mutex // around mu: what is listed last is recorded last

	mu     sync.Mutex
	kit    *inside.Kit // nil: none, or not yet
	driver *portdriver.Driver
	autos  []string
	lost   []portdriver.Spec // published by the daemon before; somebody else's for now
	closed bool
}

func newMemberPorts(m *member, sn *sharedNet, rec network.Member, life context.Context, log *slog.Logger) *memberPorts {
	return &memberPorts{m: m, sn: sn, rec: rec, life: life, log: log}
}

// publish does what -p says. With adopt, when it was published before, a port that is somebody else's by now keeps no other from it; it
// stays recorded, and is taken back when it is free.
func (p *memberPorts) publish(ctx context.Context, what memberPortsSpec, adopt bool) error {
	if len(what.specs)+len(what.autos) == 0 {
		return nil
	}
	d, err := p.open(ctx)
	if err != nil {
		return err
	}
	for _, a := range what.autos {
		if err := d.Auto(a); err != nil {
			return err
		}
	}
	p.mu.Lock()
	p.autos = what.texts
	p.mu.Unlock()
	if len(what.specs) == 0 {
		return nil
	}
	if !adopt {
		_, err = p.Add(ctx, what.specs...)
		return err
	}
	if _, err = d.Add(ctx, what.specs...); err == nil {
		return nil
	}
	var first error
	for _, s := range what.specs {
		if _, err := d.Add(ctx, s); err != nil {
			p.lost = append(p.lost, s) // nobody else has p yet
			first = cmp.Or(first, err)
		}
	}
	if len(p.lost) > 0 {
		p.log.Warn("ports are somebody else's now, and taken back when they are free", "lost", len(p.lost), "published", len(what.specs)-len(p.lost), "error", first)
		p.m.work.Go(func() { p.regain(d) })
	}
	return nil
}

// regain takes lost ports back as they become free, but for those that something else was published in place of.
func (p *memberPorts) regain(d *portdriver.Driver) {
	tick := time.NewTicker(regainPause)
	defer tick.Stop()
	for {
		select {
		case <-p.life.Done():
			return
		case <-tick.C:
		}
		p.recording.Lock()
		p.mu.Lock()
		lost := p.lost
		p.mu.Unlock()
		left := slices.DeleteFunc(slices.Clone(lost), func(s portdriver.Spec) bool {
			_, err := d.Add(p.life, s)
			return err == nil || errors.As(err, new(portdriver.ErrConflict))
		})
		p.mu.Lock()
		p.lost = left
		p.mu.Unlock()
		p.recording.Unlock()
		if len(left) < len(lost) {
			p.record()
		}
		if len(left) == 0 {
			return
		}
	}
}

// open makes the driver, if there is none yet.
func (p *memberPorts) open(ctx context.Context) (*portdriver.Driver, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.driver != nil || p.closed {
		if p.closed {
			return nil, portdriver.ErrClosed
		}
		return p.driver, nil
	}
	config := p.sn.engine.portConfig(p.rec.IPv4, p.rec.IPv6, p.m.d.files)
	config.Log = p.log
	if p.sn.is.Internal {
		_, err := parsePorts(p.sn.is, []string{""})
		return nil, err
	}
	kit, err := inside.Open(ctx, p.m.ns, inside.Config{IPv6: p.rec.IPv6.IsValid(), Batch: kitBatch, Log: p.log})
	if err != nil {
		config.WhyNoKernel = err
		p.log.Warn("published ports take the slower path through the bridge", "error", err)
	} else {
		config.Kit = kit
		if _, err := p.m.ns.Call(ctx, ops(), opConfine, struct{}{}, nil); err != nil {
			p.log.Warn("sandbox: the helper keeps its rights", "error", err)
		}
	}
	d, err := portdriver.New(config)
	if err != nil {
		if kit != nil {
			kit.Close()
		}
		return nil, err
	}
	p.kit, p.driver = kit, d
	if kit != nil {
		p.m.work.Go(func() {
			if err := kit.Run(p.life); err != nil {
				p.log.Error("no more sockets are made inside: published ports take the path through the bridge", "error", err)
			}
		})
	}
	p.m.work.Go(func() {
		if err := d.Run(p.life); err != nil {
			p.log.Error("published ports end", "error", err)
		}
	})
	return d, nil
}

// is returns the driver that there is, or nil.
func (p *memberPorts) is() *portdriver.Driver {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.driver
}

// close comes when nothing of the member runs any more.
func (p *memberPorts) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var err error
	if p.driver != nil {
		err = p.driver.Close()
	}
	if p.kit != nil {
		if kerr := p.kit.Close(); kerr != nil {
			// The namespace may be gone, and with it what was to be put back.
			p.log.Info("published ports", "error", kerr)
		}
	}
	return err
}

func (p *memberPorts) info() *portdriver.Info {
	if d := p.is(); d != nil {
		i := d.Info()
		return &i
	}
	return &portdriver.Info{MaxForwards: portdriver.LimitsFor(p.m.d.files).Forwards}
}

// record writes down what is published now, for a daemon that comes after.
func (p *memberPorts) record() {
	p.recording.Lock()
	defer p.recording.Unlock()
	var specs []portdriver.Spec
	for _, f := range p.List() {
		if !f.Auto && !f.Draining {
			specs = append(specs, f.Spec)
		}
	}
	p.mu.Lock()
	for _, s := range p.lost {
		if !slices.Contains(specs, s) {
			specs = append(specs, s)
		}
	}
	texts := append(slices.Clone(p.autos), portTexts(specs)...)
	p.mu.Unlock()
	err := p.m.d.set.SetPorts(p.m.key.network, p.m.key.name, texts)
	if err == nil {
		err = p.m.d.save()
	}
	if err != nil {
		p.log.Warn("ports are not recorded, and will not be found again when the daemon is started anew", "error", err)
	}
}

// portTexts puts neighbours into one range.
func portTexts(specs []portdriver.Spec) (texts []string) {
	slices.SortFunc(specs, func(a, b portdriver.Spec) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), a.Host.Compare(b.Host), a.Container.Compare(b.Container),
			cmp.Compare(a.HostPath, b.HostPath), cmp.Compare(int(a.HostPort)-int(a.ContainerPort), int(b.HostPort)-int(b.ContainerPort)),
			cmp.Compare(a.HostPort, b.HostPort))
	})
	for i := 0; i < len(specs); {
		first, last := specs[i], specs[i]
		for i++; i < len(specs); i++ {
			next := last
			next.HostPort, next.ContainerPort = next.HostPort+1, next.ContainerPort+1
			if specs[i] != next || first.HostPath != "" {
				break
			}
			last = next
		}
		texts = append(texts, portText(first, last))
	}
	return texts
}

// Add publishes ports.
func (p *memberPorts) Add(ctx context.Context, specs ...portdriver.Spec) ([]portdriver.Forward, error) {
	d, err := p.open(ctx)
	if err != nil {
		return nil, err
	}
	added, err := d.Add(ctx, specs...)
	if err == nil {
		p.record()
	}
	return added, err
}

// Remove takes a port away.
func (p *memberPorts) Remove(ctx context.Context, id int, drain bool) error {
	d := p.is()
	if d == nil {
		return portdriver.ErrUnknownID{ID: id}
	}
	err := d.Remove(ctx, id, drain)
	if err == nil {
		p.record()
	}
	return err
}

// List returns what is published.
func (p *memberPorts) List() []portdriver.Forward {
	if d := p.is(); d != nil {
		return d.List()
	}
	return nil
}

// Get returns one of them.
func (p *memberPorts) Get(id int) (portdriver.Forward, bool) {
	if d := p.is(); d != nil {
		return d.Get(id)
	}
	return portdriver.Forward{}, false
}

// AddPort is Add in rootlesskit's words.
func (p *memberPorts) AddPort(ctx context.Context, spec port.Spec) (*port.Status, error) {
	d, err := p.open(ctx)
	if err != nil {
		return nil, err
	}
	status, err := d.Manager().AddPort(ctx, spec)
	if err == nil {
		p.record()
	}
	return status, err
}

// ListPorts is List in rootlesskit's words.
func (p *memberPorts) ListPorts(ctx context.Context) ([]port.Status, error) {
	if d := p.is(); d != nil {
		return d.Manager().ListPorts(ctx)
	}
	return []port.Status{}, nil
}

// RemovePort is Remove in rootlesskit's words.
func (p *memberPorts) RemovePort(ctx context.Context, id int) error {
	d := p.is()
	if d == nil {
		return portdriver.ErrUnknownID{ID: id}
	}
	err := d.Manager().RemovePort(ctx, id)
	if err == nil {
		p.record()
	}
	return err
}
