package dns

import (
	"context"
	"net/netip"
	"time"
)

// A reply is what came of asking one upstream.
type reply struct {
	server netip.AddrPort
	asked  time.Time
	answer []byte
	err    error
}

// ask asks the upstreams until one has an answer. The next one is asked when the one before has failed, has refused, or
// has been silent for AttemptTimeout; that one may still answer then, and the first answer
// counts. A refusal is returned if nobody knows better; nil means that nobody said anything.
func (s *Server) ask(ctx context.Context, network string, q *question) []byte {
	servers := s.health.order(network, s.cfg.Upstreams.Servers())
	ctx, cancel := context.WithCancel(ctx)
	replies := make(chan reply, len(servers))
	pending := 0
	defer func() {
		cancel()
		for ; pending > 0; pending-- {
			<-replies
		}
	}()

	patience := time.NewTimer(s.cfg.AttemptTimeout)
	defer patience.Stop()
	var last reply // the one that patience is for
	next := func() bool {
		if len(servers) == 0 {
			return false
		}
		r := reply{server: servers[0], asked: time.Now()}
		servers = servers[1:]
		last = r
		pending++
		go func() {
			r.answer, r.err = s.exchange(ctx, network, r.server, q)
			replies <- r
		}()
		patience.Reset(s.cfg.AttemptTimeout)
		return true
	}

	var refusal []byte
	var silent []reply // those that patience ran out with
	for next(); pending > 0; {
		select {
		case r := <-replies:
			pending--
			if r.err != nil {
				if ctx.Err() == nil {
					s.health.missed(network, r.server, r.asked, r.err)
				}
			} else {
				s.health.answered(network, r.server)
				if !refuses(r.answer) {
					for _, other := range silent {
						s.health.beaten(network, other.server, other.asked)
					}
					return r.answer
				}
				if refusal == nil {
					refusal = r.answer
				}
			}
			next()
		case <-patience.C:
			s.stats.timeouts.Add(1)
			s.health.missed(network, last.server, last.asked, nil)
			silent = append(silent, last)
			if !next() && refusal != nil {
				return refusal
			}
		case <-ctx.Done():
			return refusal
		}
	}
	return refusal
}

// refuses tells the answers after which glibc's resolver, too, asks the next server.
func refuses(answer []byte) bool {
	switch answer[3] & 0xf {
	case rcodeFailure, rcodeNotImpl, rcodeRefused:
		return true
	}
	return false
}
