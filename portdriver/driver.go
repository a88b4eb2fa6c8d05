package portdriver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"

	"usernet/forwarder/relay"
	"usernet/tap/inside"
)

// Config is what a Driver works with.
type Config struct {
	Loop  *relay.Loop  // serves the connections; it runs as long as the Driver, or longer
	Kit   *inside.Kit  // nil: there is no kernel path
	Stack StackDialer  // nil: there is no stack path
	UDP   UDPPublisher // nil: UDP ports are refused

	// WhyNoKernel says why Kit is nil, for Info and notes.
	WhyNoKernel error

	// The container's addresses and the gateway's, each family's as far as there is one; and
	// the networks of the container's, whose addresses no client may appear under.
	Container4, Container6 netip.Addr
	Gateway4, Gateway6     netip.Addr
	Subnets                []netip.Prefix

	// Path is PathAuto (or empty), PathKernel (never the stack, even where the client's address is lost thereby) or PathStack.
	Path string

	MaxFiles int // see LimitsFor; 0: half of RLIMIT_NOFILE

	DialTimeout time.Duration // of a connection in the container; 0: 10 s

	Log *slog.Logger // nil: slog.Default
}

// The data paths.
const (
	PathAuto   = "auto"
	PathKernel = "kernel"
	PathStack  = "stack"
	PathTAP    = "tap" // what UDP takes, but to servers on the container's loopback alone
)

// StackDialer connects to the container through the stack; src may have port 0.
type StackDialer interface {
	DialFrom(ctx context.Context, src, dst netip.AddrPort) (relay.End, error)
}

// UDPPublisher sends on what comes at fd, a bound, non-blocking UDP socket that it owns, also on an error.
// to is at most one address of each family; a client goes to that of its own, or else to the other. Without any, clients
// are led nowhere before Through says where.
type UDPPublisher interface {
	PublishUDP(fd int, to ...netip.AddrPort) (UDPForward, error)

	// TakeUDPPort calls bind when none of the container's own flows has port of the host, and none can get one
	// meanwhile. bind does not block; its error is returned.
	TakeUDPPort(port uint16, bind func() error) error
}

// UDPForward is a UDP port that is published.
type UDPForward interface {
	Close() error // closes the socket at once

	// Through leads new clients through sockets of the container's namespace that are connected to its address in to, at
	// most one of each family; without any, they are led there as PublishUDP was told. socket does not block.
	Through(socket func(v6 bool) (fd int, err error), to ...netip.AddrPort) error

	Stats() UDPStats
}

// UDPStats are what a UDPForward has counted.
type UDPStats struct {
	Clients             int // now
	Total               uint64
	Dropped             uint64 // datagrams
	OctetsIn, OctetsOut uint64 // host → container, container → host
}

// kit is what we use of *inside.Kit; tests put others in its place.
type kit interface {
	Socket(ctx context.Context, kind inside.Kind) (fd int, err error)
	Sockets() error
	Transparent(v6 bool) error
	Doubt()
	Ready(kind inside.Kind) (fd int, ok bool)
	Prepare(kind inside.Kind)
	Listening(ctx context.Context) ([]inside.Listening, error)
	Ephemeral() (low, high uint16)
}

// Driver is a table of forwards. All methods may be called concurrently.
type Driver struct {
	cfg       Config
	log       *slog.Logger
	kit       kit // nil: none
	addrs     addresses
	limits    Limits
	portStart int // see privileged

	dialCtx     context.Context // ends with the driver
	stopDials   context.CancelCauseFunc
	dials       dialTable
	locals      locals
	connections atomic.Int64

	mu       sync.Mutex // innermost but for forward.mu
	closed   bool
	nextID   int
	reserved int // forwards that are being added
	forwards map[int]*forward
	places   map[Spec]int // IDs by Spec.place
	autos    []AutoConfig
	kick     chan struct{} // tells Run of a change of autos, or of UDP to look for where nobody is watching
	watching bool          // Run looks again and again

	looking sync.Mutex // before mu: of who looks where UDP ports are bound, until what was seen is done
}

// New makes a Driver; nothing runs before Run, but forwards may be added. Close it, or run it.
func New(cfg Config) (*Driver, error) {
	if cfg.Loop == nil {
		return nil, errors.New("portdriver: no relay")
	}
	switch cfg.Path {
	case "":
		cfg.Path = PathAuto
	case PathAuto, PathKernel, PathStack:
	default:
		return nil, fmt.Errorf("path of published ports %q: it is %s, %s or %s", cfg.Path, PathAuto, PathKernel, PathStack)
	}
	d := &Driver{
		cfg: cfg, log: cmp.Or(cfg.Log, slog.Default()),
		addrs: addresses{
			container4: cfg.Container4, container6: cfg.Container6,
			gateway4: cfg.Gateway4, gateway6: cfg.Gateway6, subnets: cfg.Subnets,
		},
		limits: LimitsFor(cfg.MaxFiles), portStart: portStart(),
		nextID: 1, forwards: make(map[int]*forward), places: make(map[Spec]int),
		kick: make(chan struct{}, 1),
	}
	if cfg.Kit != nil {
		d.kit = cfg.Kit
		// Else new sockets wait while the old ones are used up, and then every connection does.
		cfg.Kit.Heed(func(fd int) {
			if err := cfg.Loop.Heed(fd); err != nil {
				d.log.Debug("sockets made ahead may be late", "error", err)
			}
		})
	}
	if d.cfg.DialTimeout <= 0 {
		d.cfg.DialTimeout = 10 * time.Second
	}
	d.dialCtx, d.stopDials = context.WithCancelCause(context.Background())
	return d, nil
}

// Run publishes what Auto asks for until ctx ends, then closes all listeners and resets all connections.
func (d *Driver) Run(ctx context.Context) error {
	d.watch(ctx)
	return d.Close()
}

// Close removes all forwards at once; Add fails from then on. It may be called again.
func (d *Driver) Close() error {
	d.mu.Lock()
	d.closed = true
	all := make([]*forward, 0, len(d.forwards))
	for _, f := range d.forwards {
		all = append(all, f)
	}
	clear(d.forwards)
	clear(d.places)
	d.mu.Unlock()
	var errs []error
	for _, f := range all {
		errs = append(errs, f.close(false))
	}
	d.stopDials(ErrClosed)
	d.dials.close()
	return errors.Join(errs...)
}

// A Forward is a snapshot of what is published.
type Forward struct {
	ID   int
	Spec Spec // with the port that the kernel picked
	Auto bool // Auto has added it

	Path string // what new connections take: PathKernel, PathStack or PathTAP; empty: they are refused
	Note string // why not PathKernel, and what else is to be known

	Active, Total, Refused uint64 // connections, or clients of UDP; Refused: reset, or datagrams that were dropped
	OctetsIn, OctetsOut    uint64 // host → container, container → host

	Draining bool // removed, but for the connections that it had
}

// Add publishes all specs, or none of them. An error is an ErrConflict, an ErrLimit, an *ErrListen or says
// what is wrong with a Spec.
func (d *Driver) Add(ctx context.Context, specs ...Spec) ([]Forward, error) {
	return d.add(ctx, specs, nil, false)
}

func (d *Driver) add(ctx context.Context, specs []Spec, said *port.Spec, auto bool) ([]Forward, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := d.reserve(specs); err != nil {
		return nil, err
	}
	fs, err := d.open(specs)
	if err == nil {
		err = d.start(fs)
	}
	d.mu.Lock()
	d.reserved -= len(specs)
	if err == nil && d.closed {
		err = ErrClosed
	}
	if err != nil {
		d.mu.Unlock()
		for _, f := range fs {
			_ = f.close(false)
		}
		return nil, err
	}
	added := make([]Forward, 0, len(fs))
	for _, f := range fs {
		f.id, f.said, f.auto = d.nextID, said, auto
		d.nextID++
		d.forwards[f.id] = f
		d.places[f.spec.place()] = f.id
	}
	watching := d.watching
	d.mu.Unlock()
	if slices.ContainsFunc(fs, (*forward).mayEnter) {
		_, _ = d.look(ctx, fs...) // what cannot be seen now is told by who looks next
		if !watching {
			d.kickWatch()
		}
	}
	for _, f := range fs {
		added = append(added, f.snapshot())
	}
	first, last := fs[0], fs[len(fs)-1]
	if first == last {
		d.log.Info("published", "id", first.id, "forward", first.spec.String())
	} else { // a range may have thousands
		d.log.Info("published", "ids", fmt.Sprintf("%d-%d", first.id, last.id), "first", first.spec.String(), "last", last.spec.String())
	}
	return added, nil
}

// place is what two forwards cannot have both.
func (s Spec) place() Spec {
	return Spec{Proto: s.Proto, Host: s.Host, HostPort: s.HostPort, HostPath: s.HostPath}
}

// reserve checks specs and takes room for them.
func (d *Driver) reserve(specs []Spec) error {
	if len(specs) == 0 {
		return errors.New("nothing to publish")
	}
	seen := make(map[Spec]bool, len(specs))
	for _, s := range specs {
		err := s.check()
		if err == nil {
			err = d.cfg.checkTarget(s.Container)
		}
		if err != nil {
			return fmt.Errorf("publish %v: %w", s, err)
		}
		if p := s.place(); p.HostPort != 0 || p.HostPath != "" {
			if seen[p] {
				return fmt.Errorf("publish %v: it is asked for twice", s)
			}
			seen[p] = true
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return ErrClosed
	}
	for p := range seen {
		if id, ok := d.places[p]; ok {
			return ErrConflict{id}
		}
	}
	if len(d.forwards)+d.reserved+len(specs) > d.limits.Forwards {
		return ErrLimit{Max: d.limits.Forwards, Files: d.limits.Files}
	}
	d.reserved += len(specs)
	return nil
}

// Remove closes a forward's listener at once, and resets its connections, which it waits for unless ctx ends
// before; or lets them live on, with drain. It returns ErrUnknownID for an id that there is not.
func (d *Driver) Remove(ctx context.Context, id int, drain bool) error {
	d.mu.Lock()
	f := d.forwards[id]
	if f == nil {
		d.mu.Unlock()
		return ErrUnknownID{id}
	}
	if drain {
		f.draining = true
	} else {
		delete(d.forwards, id)
	}
	if place := f.spec.place(); d.places[place] == id {
		delete(d.places, place)
	}
	d.mu.Unlock()
	err := f.close(drain)
	d.log.Info("withdrawn", "id", id, "forward", f.spec.String(), "drain", drain)
	if drain {
		return err
	}
	select {
	case <-f.idle:
		return err
	case <-ctx.Done():
		return errors.Join(err, fmt.Errorf("wait for the connections of the forward with ID %d: %w", id, context.Cause(ctx)))
	}
}

// drained forgets a forward that has lost its last connection.
func (d *Driver) drained(f *forward) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.forwards[f.id] == f && f.draining {
		delete(d.forwards, f.id)
	}
}

// List returns all forwards, in the order of their IDs.
func (d *Driver) List() []Forward {
	all := d.all()
	list := make([]Forward, len(all))
	for i, f := range all {
		list[i] = f.snapshot()
	}
	return list
}

// all are the forwards in the order of their IDs.
func (d *Driver) all() []*forward {
	d.mu.Lock()
	all := make([]*forward, 0, len(d.forwards))
	for _, f := range d.forwards {
		all = append(all, f)
	}
	d.mu.Unlock()
	slices.SortFunc(all, func(a, b *forward) int { return cmp.Compare(a.id, b.id) })
	return all
}

// Get returns one.
func (d *Driver) Get(id int) (Forward, bool) {
	d.mu.Lock()
	f := d.forwards[id]
	d.mu.Unlock()
	if f == nil {
		return Forward{}, false
	}
	return f.snapshot(), true
}
