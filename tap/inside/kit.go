package inside

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

// Config says how a Kit serves.
type Config struct {
	IPv6  bool // keep IPv6 clients' addresses as well
	Batch int  // sockets made at a go, for each kind that is in use; 0: 48. At most 200.
	Log   *slog.Logger
}

const (
	// defaultBatch is what a burst of connections finds ready. Two thirds of it are used between two refills, so that
	// 3 000 connections a second cost a hundred calls.
	defaultBatch = 48

	// maxBatch goes into one message of the helper's (SCM_MAX_FD is 253).
	maxBatch = 200

	// callLimit is how long the helper may take for one answer, which takes it less than a millisecond. One that
	// is stuck is ended, and the kernel path with it.
	callLimit = 5 * time.Second

	// repairPause lies between two repairs, however often somebody breaks it.
	repairPause = time.Second

	// failPause lies between two tries to make sockets where the last one failed.
	failPause = 100 * time.Millisecond
)

// A Kind is what a socket is for.
type Kind struct {
	V6          bool
	Transparent bool // it may have a foreign client's address
}

func (k Kind) index() int {
	i := 0
	if k.V6 {
		i |= 1
	}
	if k.Transparent {
		i |= 2
	}
	return i
}

func kindOf(i int) Kind { return Kind{V6: i&1 != 0, Transparent: i&2 != 0} }

// A Kit makes and keeps sockets of one namespace. Its methods may be called concurrently, except that Close comes
// after Run has returned.
type Kit struct {
	ns  *netns.NS
	cfg Config
	low int // a stock below that is refilled

	diag      diag
	ephemeral [2]uint16

	wake chan struct{} // to Run: a stock is low, or the routing is in doubt

	mu      sync.Mutex
	changed Changed
	why     [2]error // per family: no source addresses
	stocks  [4]stock // by Kind.index
	doubt   bool
	closed  bool
}

// A stock holds sockets of one kind. Nothing is made before the first is asked for.
type stock struct {
	fds    []int
	wanted bool
	filled chan struct{} // nil: nobody waits; closed after the next refill
	err    error         // of the last refill
}

var errEnded = errors.New("sockets inside the namespace: no more are made")

// Open sets the routing of transparent sockets up in ns and starts the helper where ns has none yet; ns must have been
// opened with Config.Helper where calls are made from a sandbox. That a client's address cannot be kept
// is no error: see Transparent. The caller closes the Kit, before ns.
func Open(ctx context.Context, ns *netns.NS, cfg Config) (*Kit, error) {
	if cfg.Batch == 0 {
		cfg.Batch = defaultBatch
	}
	if cfg.Batch < 0 || cfg.Batch > maxBatch {
		return nil, fmt.Errorf("batches of %d sockets: 1 to %d are possible", cfg.Batch, maxBatch)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	k := &Kit{ns: ns, cfg: cfg, low: (cfg.Batch + 2) / 3, diag: diag{fd: -1}, wake: make(chan struct{}, 1)}
	var r setupReply
	files, err := ns.Call(ctx, Ops(), opSetup, setupArgs{IPv6: cfg.IPv6, Diag: true}, &r)
	if err != nil {
		return nil, fmt.Errorf("prepare for published ports: %w", err)
	}
	k.learn(r)
	k.ephemeral = r.Ephemeral
	// A descriptor of our own: the File's would be closed by the garbage collector.
	k.diag.fd, err = unix.FcntlInt(files[0].Fd(), unix.F_DUPFD_CLOEXEC, 0)
	files[0].Close()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("prepare for published ports: %w", err), k.Close())
	}
	return k, nil
}

// learn takes in what setup found.
func (k *Kit) learn(r setupReply) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.changed = r.Changed
	for i, text := range r.Why {
		k.why[i] = nil
		if text != "" {
			k.why[i] = &whyNot{text, r.Errno[i]}
		}
	}
}

// A whyNot came over from the helper.
type whyNot struct {
	text  string
	errno unix.Errno
}

func (e *whyNot) Error() string { return e.text }

func (e *whyNot) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}

// Transparent is nil where a client's address of that family can be kept, and else says why not.
func (k *Kit) Transparent(v6 bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.why[Kind{V6: v6}.index()]
}

// Ephemeral is the range of ports from which the namespace's kernel picks those that nobody asked for: what
// is bound to one of them is hardly a service. It is read once.
func (k *Kit) Ephemeral() (low, high uint16) { return k.ephemeral[0], k.ephemeral[1] }

// Ready takes a socket from the stock, as Socket does, without ever waiting: ok is false where there is none, and one
// is made then.
func (k *Kit) Ready(kind Kind) (fd int, ok bool) {
	fd, _, err := k.take(kind, false)
	return fd, err == nil && fd >= 0
}

// Socket returns a TCP socket of the namespace, non-blocking and close-on-exec, with TCP_NODELAY, which is the
// caller's to close. A transparent one has IP_TRANSPARENT (IPV6_TRANSPARENT), Mark, SO_REUSEADDR and
// IP_BIND_ADDRESS_NO_PORT: bind it to the client's address and port, and, where that is taken, to the client's address
// and port 0. As a rule it lies ready and costs no system call; else Run makes it, and Socket waits until
// then, or until ctx ends.
func (k *Kit) Socket(ctx context.Context, kind Kind) (int, error) {
	for {
		fd, filled, err := k.take(kind, true)
		if err != nil || fd >= 0 {
			return fd, err
		}
		select {
		case <-filled:
			if err := k.failure(kind); err != nil {
				return -1, err
			}
		case <-ctx.Done():
			return -1, context.Cause(ctx)
		}
	}
}

// take returns a socket, or -1 and, if asked, what to wait for.
func (k *Kit) take(kind Kind, wait bool) (fd int, filled <-chan struct{}, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return -1, nil, errEnded
	}
	if kind.Transparent {
		if err := k.why[kind.index()&1]; err != nil {
			return -1, nil, fmt.Errorf("socket with a client's address: %w", err)
		}
	}
	s := &k.stocks[kind.index()]
	fd = -1
	if n := len(s.fds); n > 0 {
		fd, s.fds = s.fds[n-1], s.fds[:n-1]
	}
	if len(s.fds) < k.low && !s.wanted {
		s.wanted = true
		k.signal()
	}
	if fd < 0 && wait {
		if s.filled == nil {
			s.filled = make(chan struct{})
		}
		filled = s.filled
	}
	return fd, filled, nil
}

func (k *Kit) failure(kind Kind) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &k.stocks[kind.index()]
	if len(s.fds) > 0 {
		return nil
	}
	return s.err
}

// Doubt has Run look whether the routing is as it was set up, and put back what the container took away, once a second
// at most. Call it where a transparent connection got no answer.
func (k *Kit) Doubt() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.doubt = true
	k.signal()
}

func (k *Kit) signal() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Run makes sockets as they are used up, until ctx ends.
func (k *Kit) Run(ctx context.Context) error {
	defer k.end()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-k.wake:
		}
		if k.takeDoubt() {
			k.repair(ctx)
		}
		for i := range k.stocks {
			if ctx.Err() == nil && k.isWanted(i) {
				k.refill(ctx, i)
			}
		}
	}
}

// end lets nobody wait any longer.
func (k *Kit) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	for i := range k.stocks {
		s := &k.stocks[i]
		if s.filled != nil {
			close(s.filled)
			s.filled = nil
		}
	}
}

func (k *Kit) takeDoubt() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	was := k.doubt
	k.doubt = false
	return was
}

func (k *Kit) isWanted(i int) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.stocks[i].wanted
}

// call asks the helper. Its time does not end with ctx: a call that is broken off costs the helper its life, and
// the sandbox allows no other.
func (k *Kit) call(ctx context.Context, name string, args, reply any) ([]int, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callLimit)
	defer cancel()
	return k.ns.CallFDs(ctx, Ops(), name, args, reply)
}

func (k *Kit) refill(ctx context.Context, i int) {
	k.mu.Lock()
	n := k.cfg.Batch - len(k.stocks[i].fds)
	k.mu.Unlock()
	fds, err := k.call(ctx, opMake, makeArgs{kindOf(i), n}, nil)
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &k.stocks[i]
	if err != nil {
		err = fmt.Errorf("make sockets inside: %w", err)
		if s.err == nil {
			k.cfg.Log.Warn("published ports: no socket inside the namespace, connections take the way through the stack", "error", err)
		}
	}
	s.fds = append(s.fds, fds...)
	s.err = err
	s.wanted = false
	if s.filled != nil {
		close(s.filled)
		s.filled = nil
	}
}

func (k *Kit) repair(ctx context.Context) {
	k.mu.Lock()
	args := setupArgs{IPv6: k.cfg.IPv6, Repair: true, Changed: k.changed}
	k.mu.Unlock()
	var r setupReply
	if _, err := k.call(ctx, opSetup, args, &r); err != nil {
		k.cfg.Log.Warn("published ports: the routing inside the namespace cannot be looked at", "error", err)
		return
	}
	k.learn(r)
}

// Close closes what is in stock and puts the namespace's routing back as it was, as far as it is still ours. The first
// call counts.
func (k *Kit) Close() error {
	k.end()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ns == nil {
		return nil
	}
	for i := range k.stocks {
		for _, fd := range k.stocks[i].fds {
			unix.Close(fd)
		}
		k.stocks[i] = stock{}
	}
	k.diag.close()
	_, err := k.call(context.Background(), opUndo, k.changed, nil)
	k.ns = nil
	if err != nil {
		return fmt.Errorf("undo what published ports needed: %w", err)
	}
	return nil
}
