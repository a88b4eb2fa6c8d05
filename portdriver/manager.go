package portdriver

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port/portutil"
)

// Protos are those of a Spec, as rootlesskit's info lists them.
var Protos = []string{"tcp", "tcp4", "tcp6", "udp", "udp4", "udp6"}

// Manager is the driver as rootlesskit knows one. Its errors have rootlesskit's words, and a Spec that
// came through it is listed as it came.
func (d *Driver) Manager() port.Manager { return manager{d} }

type manager struct{ d *Driver }

func (m manager) AddPort(ctx context.Context, said port.Spec) (*port.Status, error) {
	// What is there already is the table's to know: validation would look through all of it.
	if err := portutil.ValidatePortSpec(said, nil); err != nil {
		return nil, err
	}
	spec, err := specOf(said)
	if err != nil {
		return nil, err
	}
	added, err := m.d.add(ctx, []Spec{spec}, &said, false)
	if err != nil {
		return nil, m.d.rootlesskitText(err)
	}
	return &port.Status{ID: added[0].ID, Spec: said}, nil
}

// ListPorts returns nil for none, as rootlesskit's do. What has no place in rootlesskit's words (unix
// sockets, and what is on its way out) is left out.
func (m manager) ListPorts(context.Context) ([]port.Status, error) {
	var list []port.Status
	for _, f := range m.d.all() {
		m.d.mu.Lock()
		draining := f.draining
		m.d.mu.Unlock()
		switch {
		case draining || f.spec.HostPath != "":
		case f.said != nil:
			list = append(list, port.Status{ID: f.id, Spec: *f.said})
		default:
			list = append(list, port.Status{ID: f.id, Spec: saidOf(f.spec)})
		}
	}
	return list, nil
}

func (m manager) RemovePort(ctx context.Context, id int) error {
	return m.d.Remove(ctx, id, false)
}

// specOf reads a Spec that portutil has found valid.
func specOf(said port.Spec) (Spec, error) {
	spec := Spec{Proto: said.Proto, HostPort: uint16(said.ParentPort), ContainerPort: uint16(said.ChildPort)}
	if transport, _, _ := spec.families(); transport == "" {
		return spec, fmt.Errorf("unsupported port protocol %s", said.Proto)
	}
	// Both were read by net.ParseIP already, which takes nothing that netip does not.
	if said.ParentIP != "" {
		spec.Host, _ = netip.ParseAddr(said.ParentIP)
	}
	if said.ChildIP != "" {
		spec.Container, _ = netip.ParseAddr(said.ChildIP)
	}
	spec.Host, spec.Container = spec.Host.Unmap(), spec.Container.Unmap()
	return spec, nil
}

// saidOf puts a Spec in rootlesskit's words.
func saidOf(s Spec) port.Spec {
	said := port.Spec{Proto: s.Proto, ParentPort: int(s.HostPort), ChildPort: int(s.ContainerPort)}
	if s.Host.IsValid() {
		said.ParentIP = s.Host.String()
	}
	if s.Container.IsValid() {
		said.ChildIP = s.Container.String()
	}
	return said
}
