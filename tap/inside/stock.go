package inside

import (
	"context"
	"fmt"
	"time"
)

const (
	// defaultBatch is what a burst of connections finds ready. Two thirds of it are used between two refills, so that
	// 3 000 connections a second cost a hundred calls.
	defaultBatch = 48

	// maxBatch goes into one message of the helper's (SCM_MAX_FD is 253).
	maxBatch = 200

	// failPause lies between two tries to make sockets where the last one failed.
	failPause = 100 * time.Millisecond
)

// A Kind is what a socket is for.
type Kind struct {
	V6          bool
	Transparent bool // it may have a foreign client's address
	UDP         bool // not TCP
}

// kinds is how many there are.
const kinds = 8

func (k Kind) index() int {
	i := 0
	if k.V6 {
		i |= 1
	}
	if k.Transparent {
		i |= 2
	}
	if k.UDP {
		i |= 4
	}
	return i
}

// family is an index, as of families.
func (k Kind) family() int { return k.index() & 1 }

func kindOf(i int) Kind { return Kind{V6: i&1 != 0, Transparent: i&2 != 0, UDP: i&4 != 0} }

// A stock holds sockets of one kind. Nothing is made before the first is asked for.
type stock struct {
	fds    []int
	wanted bool          // Run is to refill it
	filled chan struct{} // nil: nobody waits; closed after the next refill
	err    error         // of the last refill
	retry  time.Time     // not before, where that failed
}

// Prepare has Run make sockets of a kind before the first one is asked for. It does not wait.
func (k *Kit) Prepare(kind Kind) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s := &k.stocks[kind.index()]; len(s.fds) < k.low && !s.wanted {
		s.wanted = true
		k.signal()
	}
}

// Ready is Socket for whoever cannot wait: ok is false where none lies ready, and Run makes some then.
func (k *Kit) Ready(kind Kind) (fd int, ok bool) {
	fd, _, err := k.take(kind, false)
	return fd, err == nil && fd >= 0
}

// Socket returns a socket of the namespace, non-blocking and close-on-exec, one of TCP with TCP_NODELAY, SO_OOBINLINE and
// SO_KEEPALIVE, which is the caller's to close. A transparent one has IP_TRANSPARENT (IPV6_TRANSPARENT), Mark, SO_REUSEADDR and
// IP_BIND_ADDRESS_NO_PORT as well: bind it to the client's address and port, and where that is refused, as it is taken or
// below the namespace's first unprivileged port, to the client's address and port 0. As a rule it lies ready and costs no system
// call; else Run makes it, and Socket waits until then, or until ctx ends.
func (k *Kit) Socket(ctx context.Context, kind Kind) (int, error) {
	for {
		fd, filled, err := k.take(kind, true)
		if err != nil || fd >= 0 {
			return fd, err
		}
		select {
		case <-filled:
		case <-ctx.Done():
			return -1, context.Cause(ctx)
		}
	}
}

// take returns a socket, or -1 and, if asked, what to wait for.
func (k *Kit) take(kind Kind, wait bool) (fd int, filled <-chan struct{}, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ended {
		return -1, nil, errEnded
	}
	if why := k.why[kind.family()]; kind.Transparent && why != nil {
		k.doubtLocked() // it may have become possible
		return -1, nil, fmt.Errorf("keep a client's address: %w", why)
	}
	s := &k.stocks[kind.index()]
	fd = -1
	if n := len(s.fds); n > 0 {
		fd, s.fds = s.fds[n-1], s.fds[:n-1]
	}
	if s.err != nil && len(s.fds) < k.low && time.Now().Before(s.retry) {
		if fd < 0 {
			return -1, nil, s.err
		}
		return fd, nil, nil
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

func (s *stock) wakeUp() {
	if s.filled != nil {
		close(s.filled)
		s.filled = nil
	}
}

func (k *Kit) isWanted(i int) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.stocks[i].wanted
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
			k.cfg.Log.Warn("published ports: no more sockets inside the namespace for now", "error", err)
		}
		s.retry = time.Now().Add(failPause)
		k.doubtLocked() // a helper that has ended has undone the routing
	}
	s.fds = append(s.fds, fds...)
	s.err = err
	s.wanted = false
	s.wakeUp()
}
