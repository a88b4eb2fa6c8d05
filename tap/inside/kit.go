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
	// callLimit is how long the helper may take for one answer, which takes it less than a millisecond. One that
	// is stuck is ended, and the kernel path with it.
	callLimit = 5 * time.Second

	// repairPause lies between two looks at the routing, however often somebody breaks it. After a look that did not
	// help it doubles, up to the longest.
	repairPause     = time.Second
	repairPauseMost = 30 * time.Second
)

// A Kit makes and keeps sockets of one namespace. Its methods may be called concurrently, except that Close comes
// after Run has returned.
type Kit struct {
	ns  *netns.NS
	ops netns.Ops
	cfg Config
	low int // a stock below that is refilled

	heed      func(fd int) // see Heed
	diag      diag
	ephemeral [2]uint16

	wake chan struct{} // to Run: a stock is low, or the routing is in doubt

	mu     sync.Mutex
	why    [2]error     // per family: no source addresses
	stocks [kinds]stock // by Kind.index
	mute   error        // see Sockets
	doubt  bool
	ended  bool
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
	k := &Kit{ns: ns, ops: Ops(), cfg: cfg, low: (cfg.Batch + 2) / 3, diag: diag{fd: -1}, wake: make(chan struct{}, 1)}
	var r setupReply
	files, err := ns.Call(ctx, k.ops, opSetup, setupArgs{IPv6: cfg.IPv6, First: true}, &r)
	if err != nil {
		return nil, fmt.Errorf("prepare for published ports: %w", err)
	}
	k.why = r.errors()
	k.ephemeral = r.Ephemeral
	// A descriptor of our own: the File's would be closed by the garbage collector.
	k.diag.fd, err = unix.FcntlInt(files[0].Fd(), unix.F_DUPFD_CLOEXEC, 0)
	files[0].Close()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("prepare for published ports: %w", err), k.Close())
	}
	return k, nil
}

func (r setupReply) errors() (why [2]error) {
	for i, text := range r.Why {
		if text != "" {
			why[i] = &whyNot{text, r.Errno[i]}
		}
	}
	return why
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
	return k.why[Kind{V6: v6}.family()]
}

// Sockets is nil where sockets can be had, and else says why not: the helper did not do what it was last asked for, which goes
// on until it does again. What lies in stock is given out all the same.
func (k *Kit) Sockets() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.mute
}

// Ephemeral is the range of ports from which the namespace's kernel picks those that nobody asked for: what
// is bound to one of them is hardly a service. It is read once.
func (k *Kit) Ephemeral() (low, high uint16) { return k.ephemeral[0], k.ephemeral[1] }

// Heed has f called, now and whenever the helper has been asked for something, with a descriptor as of netns.NS.Answers: what Run
// waits for while it makes sockets. It is one and the same until the helper has to be replaced. Call it before Run.
func (k *Kit) Heed(f func(fd int)) {
	k.heed = f
	k.ns.Answers(f)
}

// Doubt has Run look whether the routing is as it was set up, and put back what the container took away; once a second
// at most. Call it where a transparent connection got no answer.
func (k *Kit) Doubt() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.doubtLocked()
}

func (k *Kit) doubtLocked() {
	if !k.doubt {
		k.doubt = true
		k.signal()
	}
}

func (k *Kit) signal() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Run makes sockets as they are used up, until ctx ends. Socket fails afterwards.
func (k *Kit) Run(ctx context.Context) error {
	defer k.end()
	pause := time.NewTimer(0) // ends when the routing may be looked at
	defer pause.Stop()
	due, length := false, repairPause
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-pause.C:
			due = true
		case <-k.wake:
		}
		for i := range k.stocks {
			if ctx.Err() == nil && k.isWanted(i) {
				k.refill(ctx, i)
			}
		}
		if due && k.isDoubted() {
			due = false
			if k.repair(ctx) {
				length = repairPause
			} else {
				length = min(2*length, repairPauseMost)
			}
			pause.Reset(length)
		}
	}
}

// end lets nobody wait any longer.
func (k *Kit) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ended = true
	for i := range k.stocks {
		k.stocks[i].wakeUp()
	}
}

func (k *Kit) isDoubted() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.doubt
}

// call asks the helper. Its time does not end with ctx: a call that is broken off costs the helper its life, and
// the sandbox allows no other.
func (k *Kit) call(ctx context.Context, name string, args, reply any) ([]int, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callLimit)
	defer cancel()
	fds, err := k.ns.CallFDs(ctx, k.ops, name, args, reply)
	if k.heed != nil {
		k.ns.Answers(k.heed)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case err == nil:
		k.mute = nil
	case k.mute == nil: // what follows is rather that another cannot be started, from a sandbox
		k.mute = fmt.Errorf("the helper in the namespace does not answer (start usernet again to have another): %w", err)
	}
	return fds, err
}

// repair tells whether the routing is in order now, as far as it ever will be.
func (k *Kit) repair(ctx context.Context) bool {
	k.mu.Lock()
	k.doubt = false
	k.mu.Unlock()
	var r setupReply
	_, err := k.call(ctx, opSetup, setupArgs{IPv6: k.cfg.IPv6}, &r)
	why := r.errors()
	k.mu.Lock()
	defer k.mu.Unlock()
	if err != nil {
		why = [2]error{k.mute, k.mute}
	}
	fine := true
	for i, name := range []string{"IPv4", "IPv6"} {
		if !k.cfg.IPv6 && i == 1 {
			continue
		}
		was := k.why[i]
		k.why[i] = why[i]
		switch {
		case why[i] != nil:
			fine = false
			if was == nil {
				k.cfg.Log.Warn("published ports: clients' addresses cannot be kept inside the namespace any more", "family", name, "error", why[i])
			}
		case was != nil:
			k.cfg.Log.Info("published ports: clients' addresses can be kept inside the namespace", "family", name)
		}
	}
	return fine
}

// Close closes what is in stock and puts the namespace's routing back as it was, as far as it is still ours. A second
// call does nothing.
func (k *Kit) Close() error {
	k.end()
	k.mu.Lock()
	ns := k.ns
	k.ns = nil
	for i := range k.stocks {
		for _, fd := range k.stocks[i].fds {
			unix.Close(fd)
		}
		k.stocks[i].fds = nil
	}
	k.mu.Unlock()
	if ns == nil {
		return nil
	}
	k.diag.close()
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	if _, err := ns.Call(ctx, k.ops, opUndo, struct{}{}, nil); err != nil {
		return fmt.Errorf("undo what published ports needed: %w: the rule for mark %#x, table %d and sysctls may be left in the namespace; "+
			"the next usernet that serves it removes them at its end", err, Mark, Table)
	}
	return nil
}
