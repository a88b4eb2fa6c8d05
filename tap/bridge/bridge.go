package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"usernet/tap"
	"usernet/tap/netns"
)

// MaxPorts is how many ports a bridge takes, the uplink among them: the kernel has ten bits for a port's number,
// and 0 is none (BR_PORT_BITS, net/bridge/br_private.h).
const MaxPorts = 1<<10 - 1

// maxLearned is how many addresses of others than itself a bridge remembers, for a member may send from any. Frames
// to the rest go to all ports.
const maxLearned = 16 * (MaxPorts + 1)

// Config says what the bridge shall be.
type Config struct {
	Name string // up to 15 octets

	// MAC is the bridge's own, which stays when ports come and go; one that the kernel chooses is its lowest port's, and
	// changes with that one. No member may have it, nor the stack behind the uplink: frames to it end in the bridge.
	MAC net.HardwareAddr

	MTU int // of the bridge and all that is connected to it, IP octets; 0 means tap.DefaultMTU

	Log *slog.Logger `json:"-"` // nil means slog.Default
}

// A Bridge is one in a namespace. Its methods may be called concurrently.
type Bridge struct {
	ns      *netns.NS
	cfg     Config
	adopted bool
}

// Open makes the bridge in ns, or takes up the one of that name with the ports it has. ns stays the caller's, and must
// stay open as long as the bridge is used.
func Open(ctx context.Context, ns *netns.NS, cfg Config) (*Bridge, error) {
	if cfg.MTU == 0 {
		cfg.MTU = tap.DefaultMTU
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.MAC == nil {
		return nil, fmt.Errorf("bridge %s: it needs a MAC of its own", cfg.Name)
	}
	if err := (tap.Config{Name: cfg.Name, MAC: cfg.MAC, MTU: cfg.MTU}).Check(); err != nil {
		return nil, fmt.Errorf("bridge %s: %w", cfg.Name, err)
	}
	b := &Bridge{ns: ns, cfg: cfg}
	if _, err := ns.Call(ctx, Ops(), opOpen, cfg, &b.adopted); err != nil {
		return nil, fmt.Errorf("bridge %s: %w", cfg.Name, err)
	}
	cfg.Log.Info("bridge is up", "bridge", cfg.Name, "namespace", ns.String(), "adopted", b.adopted, "mtu", cfg.MTU, "mac", cfg.MAC.String())
	return b, nil
}

// Name is the bridge's interface.
func (b *Bridge) Name() string { return b.cfg.Name }

// MTU is the bridge's, in IP octets.
func (b *Bridge) MTU() int { return b.cfg.MTU }

// Adopted tells whether the bridge was there before.
func (b *Bridge) Adopted() bool { return b.adopted }

// Uplink opens a TAP of the bridge's, for a stack that is the network's gateway: one of a predecessor's, or a new one. It
// has the bridge's MTU and no address, and a MAC that is not the stack's. The caller ends it: Close removes it from the
// bridge, Detach leaves it to who comes after, and members keep talking to each other either way.
func (b *Bridge) Uplink(ctx context.Context, cfg tap.Config) (*tap.Device, error) {
	cfg.MTU, cfg.MAC, cfg.Unlocked, cfg.Configure = b.cfg.MTU, nil, true, false
	if cfg.Log == nil {
		cfg.Log = b.cfg.Log
	}
	d, err := tap.Open(ctx, b.ns, cfg)
	if err != nil {
		return nil, fmt.Errorf("bridge %s: %w", b.cfg.Name, err)
	}
	if err := b.plug(ctx, cfg.Name); err != nil {
		return nil, errors.Join(err, end(d, !d.Adopted()))
	}
	return d, nil
}

// end closes a device, and takes it away where it was made for nothing.
func end(d *tap.Device, remove bool) error {
	if remove {
		return d.Close()
	}
	return d.Detach()
}

// plug makes an interface of the shared namespace a port of the bridge that is up. It may be one.
func (b *Bridge) plug(ctx context.Context, port string) error {
	_, err := b.ns.Call(ctx, Ops(), opPlug, plugArgs{Bridge: b.cfg.Name, Port: port, MTU: b.cfg.MTU}, nil)
	if err != nil {
		return fmt.Errorf("bridge %s: port %s: %w", b.cfg.Name, port, err)
	}
	return nil
}

// Remove takes the bridge away. Ports that it still has stay behind, without a bridge.
func (b *Bridge) Remove(ctx context.Context) error { return Remove(ctx, b.ns, b.cfg.Name) }
