package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"usernet/tap"
	"usernet/tap/netns"
)

// A Kind says what a cable is made of.
type Kind string

const (
	Auto Kind = ""     // a veth where the kernel permits one, else two TAPs
	Veth Kind = "veth" // the kernel carries the frames
	TAPs Kind = "taps" // Cable.Run does
)

// CableConfig says how a member is connected.
type CableConfig struct {
	Port string // the bridge's end, up to 15 octets
	Name string // the member's end, such as eth0
	Kind Kind

	MAC                net.HardwareAddr // of the member's end; nil means one that the kernel draws
	IPv4, IPv6         netip.Prefix     // the member's address in its network; zero means none of that family
	Gateway4, Gateway6 netip.Addr       // of the default routes; zero means no route, and one that is there stays
	Metric             int              // of these, so that a container of several networks has a route by each; zero means the kernel's

	// Adopt takes up what is there of a cable of these names, with the addresses that the member's end has,
	// and makes what is missing. Without it an interface of either name is refused: EEXIST.
	Adopt bool

	NoOffload bool // two TAPs only: as on a kernel without the virtio-net header

	Log *slog.Logger // nil means the bridge's
}

// A Cable connects a member's namespace with the bridge. One of two TAPs carries frames only during Run.
type Cable struct {
	bridge  *Bridge
	cfg     CableConfig
	kind    Kind
	adopted bool
	mac     net.HardwareAddr

	inner, outer *tap.Device // of two TAPs: the member's, the bridge's

	once sync.Once
	err  error
	done chan struct{} // closed by Close and Detach
}

// Attach connects the namespace member, and brings its end of the cable up with addresses, routes and lo. member is
// needed for this call only. It may have started a helper there, of which member.Rest lets go.
//
// An address works at once: IPv6's duplicate address detection is off, for addresses come from one who knows them all.
func (b *Bridge) Attach(ctx context.Context, member *netns.NS, cfg CableConfig) (*Cable, error) {
	if cfg.Log == nil {
		cfg.Log = b.cfg.Log
	}
	c := &Cable{bridge: b, cfg: cfg, done: make(chan struct{})}
	err := c.attach(ctx, member)
	if err != nil {
		return nil, fmt.Errorf("connect %s with bridge %s: %w", member, b.cfg.Name, err)
	}
	cfg.Log.Info("member is connected", "bridge", b.cfg.Name, "port", cfg.Port, "namespace", member.String(), "interface", cfg.Name,
		"cable", string(c.kind), "adopted", c.adopted, "mac", c.mac.String())
	return c, nil
}

// inside is the member's interface, as package tap wants to know it.
func (c *Cable) inside() tap.Config {
	return tap.Config{
		Name: c.cfg.Name, MTU: c.bridge.cfg.MTU, MAC: c.cfg.MAC, Configure: true, Shared: true,
		IPv4: c.cfg.IPv4, IPv6: c.cfg.IPv6, Gateway4: c.cfg.Gateway4, Gateway6: c.cfg.Gateway6, Metric: c.cfg.Metric,
		Fresh: !c.cfg.Adopt, Unlocked: true, NoOffload: c.cfg.NoOffload, Log: c.cfg.Log,
	}
}

// attach looks at both ends first. What is there of an interface of the member's decides what the cable is, not what was
// asked for.
func (c *Cable) attach(ctx context.Context, member *netns.NS) error {
	if err := c.inside().Check(); err != nil {
		return err
	}
	if err := tap.CheckName(c.cfg.Port); err != nil {
		return err
	}
	var outer, inner Link
	if _, err := c.bridge.ns.Call(ctx, Ops(), opLook, c.cfg.Port, &outer); err != nil {
		return err
	}
	if _, err := member.Call(ctx, Ops(), opLook, c.cfg.Name, &inner); err != nil {
		return err
	}
	pair := outer.Type == typeVeth && inner.Type == typeVeth && outer.Peer == inner.Index && inner.Peer == outer.Index
	switch {
	case !c.cfg.Adopt && outer.Name != "":
		return fmt.Errorf("port %s is in use: detach its member first: %w", c.cfg.Port, unix.EEXIST)
	case inner.Name != "" && !(c.cfg.Adopt && (pair || inner.Type == typeTAP && inner.Ours)):
		return c.taken(inner)
	case pair:
		c.adopted = true
		if err := c.bridge.plug(ctx, c.cfg.Port); err != nil {
			return err
		}
		return c.dress(ctx, member)
	case outer.Name != "" && !(outer.Type == typeTAP && outer.Ours):
		// The other end is gone, or somebody else's by now.
		if err := Remove(ctx, c.bridge.ns, c.cfg.Port); err != nil {
			return err
		}
	}
	if inner.Type == typeTAP || c.cfg.Kind == TAPs {
		return c.makeTAPs(ctx, member)
	}
	if outer.Type == typeTAP && outer.Ours {
		if err := Remove(ctx, c.bridge.ns, c.cfg.Port); err != nil {
			return err
		}
	}
	err := c.makeVeth(ctx, member)
	if errors.Is(err, unix.EPERM) && c.cfg.Kind == Auto {
		return c.makeTAPs(ctx, member)
	}
	return err
}

func (c *Cable) taken(l Link) error {
	return fmt.Errorf("it has an interface %s (of type %s) already: choose another name, or remove that one: %w", c.cfg.Name, l.Type, unix.EEXIST)
}

func (c *Cable) makeVeth(ctx context.Context, member *netns.NS) error {
	fds, err := c.bridge.ns.CallWith(ctx, Ops(), opVeth, vethArgs{
		Bridge: c.bridge.cfg.Name, Port: c.cfg.Port, Name: c.cfg.Name, MAC: c.cfg.MAC, MTU: c.bridge.cfg.MTU,
	}, nil, member.FD())
	closeFDs(fds)
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("veth %s: the member's namespace is not owned by the bridge's user namespace, nor by one below: %w", c.cfg.Port, err)
	case err != nil:
		err = fmt.Errorf("veth %s: %w", c.cfg.Port, err)
	default:
		if err = c.dress(ctx, member); err == nil {
			err = c.announce(ctx, member)
		}
	}
	if err != nil { // of a call that was cut short, too: there was no such port before
		return errors.Join(err, Remove(context.WithoutCancel(ctx), c.bridge.ns, c.cfg.Port))
	}
	return nil
}

// dress gives a veth's end in the member what it lacks.
func (c *Cable) dress(ctx context.Context, member *netns.NS) error {
	c.kind = Veth
	if err := tap.Dress(ctx, member, c.inside()); err != nil {
		return err
	}
	var inner Link
	if _, err := member.Call(ctx, Ops(), opLook, c.cfg.Name, &inner); err != nil {
		return err
	}
	c.mac = inner.MAC
	return nil
}

// announce has a veth's address told to the others, who may know a predecessor's MAC. When the member's end came up,
// the bridge had not heard yet that its own end had a carrier, and dropped what was told then. What TAPs are told waits
// for Run.
func (c *Cable) announce(ctx context.Context, member *netns.NS) error {
	if _, err := c.bridge.ns.Call(ctx, Ops(), opSettle, c.cfg.Port, nil); err != nil {
		return fmt.Errorf("port %s: %w", c.cfg.Port, err)
	}
	if _, err := member.Call(ctx, Ops(), opAnnounce, c.cfg.Name, nil); err != nil {
		return fmt.Errorf("interface %s: %w", c.cfg.Name, err)
	}
	return nil
}

// makeTAPs makes or adopts both. The member's comes first: what is wrong is more often there.
func (c *Cable) makeTAPs(ctx context.Context, member *netns.NS) (err error) {
	c.kind = TAPs
	if c.inner, err = tap.Open(ctx, member, c.inside()); err != nil {
		return err
	}
	c.mac = c.inner.MAC()
	c.outer, err = c.bridge.Uplink(ctx, tap.Config{
		Name: c.cfg.Port, Fresh: !c.cfg.Adopt, NoOffload: c.cfg.NoOffload, Log: c.cfg.Log,
	})
	if err == nil && c.inner.Queues()[0].Offloads() != c.outer.Queues()[0].Offloads() {
		err = errors.Join(fmt.Errorf("interfaces %s and %s differ in their offloads, and frames of one would break in the other", c.cfg.Name, c.cfg.Port),
			end(c.outer, !c.outer.Adopted()))
	}
	if err != nil {
		return errors.Join(err, end(c.inner, !c.inner.Adopted()))
	}
	c.adopted = c.inner.Adopted()
	return nil
}

// Kind is Veth or TAPs.
func (c *Cable) Kind() Kind { return c.kind }

// FDs are readable when Run has frames to carry; none of a veth. They are valid until Run ends or the cable is closed.
func (c *Cable) FDs() (fds []int) {
	if c.kind == TAPs {
		for _, d := range []*tap.Device{c.inner, c.outer} {
			fds = append(fds, d.Queues()[0].FD())
		}
	}
	return fds
}

// Adopted tells whether the member's end was there before.
func (c *Cable) Adopted() bool { return c.adopted }

// MAC is the member's, as it was found or set.
func (c *Cable) MAC() net.HardwareAddr { return c.mac }

// Close is the clean end: the interfaces are removed, at both ends, and nobody else on the bridge misses a frame. Of what
// the member's end has removed itself nothing is left to do.
func (c *Cable) Close() error { return c.end(true) }

// Detach leaves the interfaces to whoever comes after, with all that they have.
func (c *Cable) Detach() error { return c.end(false) }

func (c *Cable) end(clean bool) error {
	c.once.Do(func() {
		close(c.done)
		switch {
		case c.kind == TAPs && clean:
			c.err = errors.Join(c.inner.Close(), c.outer.Close())
		case c.kind == TAPs:
			c.err = errors.Join(c.inner.Detach(), c.outer.Detach())
		case clean:
			c.err = Remove(context.Background(), c.bridge.ns, c.cfg.Port)
		}
	})
	return c.err
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
