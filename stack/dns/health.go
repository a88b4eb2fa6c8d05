package dns

import (
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// strikes is how many questions in a row an upstream may leave unanswered before it counts as dead, where no other
// one answered them either. One alone may be about a zone whose servers are down: a healthy resolver is as silent
// about that. Where another one had the answer, one is enough.
const strikes = 2

// health remembers which upstreams do not answer, so that not every question waits for them. A dead one is asked
// last; once its time is over one question tries it, the others wait for the outcome.
type health struct {
	attempt, dead time.Duration // AttemptTimeout, DeadTime
	log           *slog.Logger

	mu    sync.Mutex
	state map[upstream]*state
}

// An upstream may answer by UDP and not by TCP.
type upstream struct {
	network string
	addr    netip.AddrPort
}

type state struct {
	answered time.Time // last
	silent   int       // questions without an answer since then
	until    time.Time // dead until; zero: it is not
}

func newHealth(attempt, dead time.Duration, log *slog.Logger) *health {
	return &health{attempt: attempt, dead: dead, log: log, state: map[upstream]*state{}}
}

// order returns the servers in the order in which to ask them.
func (h *health) order(network string, servers []netip.AddrPort) []netip.AddrPort {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.state) > 2*len(servers) { // by either network: some are not asked any more
		for u := range h.state {
			if !slices.Contains(servers, u.addr) {
				delete(h.state, u)
			}
		}
	}
	if len(servers) < 2 {
		return servers
	}
	now := time.Now()
	live := make([]netip.AddrPort, 0, len(servers))
	var dead []netip.AddrPort
	for _, server := range servers {
		st := h.state[upstream{network, server}]
		switch {
		case st == nil || st.until.IsZero():
			live = append(live, server)
		case now.Before(st.until):
			dead = append(dead, server)
		default:
			st.until = now.Add(h.attempt)
			live = append(live, server)
		}
	}
	return append(live, dead...)
}

// answered is told of every answer, a refusal too.
func (h *health) answered(network string, server netip.AddrPort) {
	h.mu.Lock()
	defer h.mu.Unlock()
	st := h.of(network, server)
	if !st.until.IsZero() {
		h.log.Info("resolver answers again", "server", server, "network", network)
	}
	*st = state{answered: time.Now()}
}

// missed is told of a question that was asked at the time given and has no answer: because the server cannot be
// reached (err says why) or because it stays silent (nil).
func (h *health) missed(network string, server netip.AddrPort, asked time.Time, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	st := h.of(network, server)
	if st.answered.After(asked) {
		return // other questions, asked later perhaps
	}
	if st.silent++; st.silent >= strikes {
		h.buryLocked(network, server, err)
	}
}

// beaten is told of a question that was asked at the time given and left unanswered, and that another server
// answered: each further question would wait as long.
func (h *health) beaten(network string, server netip.AddrPort, asked time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.of(network, server).answered.After(asked) {
		h.buryLocked(network, server, nil)
	}
}

// buryLocked makes the server one that is asked last for a while.
func (h *health) buryLocked(network string, server netip.AddrPort, err error) {
	st := h.of(network, server)
	if st.until.IsZero() {
		h.log.Info("resolver does not answer", "server", server, "network", network, "err", err)
	}
	st.until = time.Now().Add(h.dead)
}

func (h *health) of(network string, server netip.AddrPort) *state {
	u := upstream{network, server}
	if h.state[u] == nil {
		h.state[u] = &state{}
	}
	return h.state[u]
}
