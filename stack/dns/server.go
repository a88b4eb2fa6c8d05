package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Upstreams tells whom to ask. Servers is called for each question, possibly concurrently; the slice is
// in order of preference and is not changed by either side afterwards. When it is
// empty, questions are answered SERVFAIL.
type Upstreams interface {
	Servers() []netip.AddrPort
}

// StaticUpstreams are upstreams that do not change.
type StaticUpstreams []netip.AddrPort

// Servers returns s.
func (s StaticUpstreams) Servers() []netip.AddrPort { return s }

// Config of a Server. Upstreams must be set; zero means the default elsewhere.
type Config struct {
	Upstreams Upstreams

	// Names are answered here. Nil: none.
	Names Names

	// NamesFor takes the place of Names where the answer depends on who asks. client is the address that the question
	// came from, the zero Addr if it has none. It is called for each question, and what it returns is used for that one alone;
	// it must not block. Nil: Names.
	NamesFor func(client netip.Addr) Names

	// Dial connects to an upstream, network being "udp" or "tcp". It must end when ctx does. A UDP conn must be
	// connected, so that the kernel passes datagrams of that server alone, and have a source port of
	// its own that cannot be guessed. Nil: net.Dialer, which has both.
	Dial func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error)

	Log *slog.Logger // nil: slog.Default()

	// Timeout ends a question that no upstream answered: SERVFAIL is sent then. Default 10 s, as
	// long as glibc's resolver waits in all (two attempts of 5 s).
	Timeout time.Duration

	// AttemptTimeout is how long one upstream has before the next is asked as well. Default 2 s: less
	// than half of what a client waits before it gives up on us.
	AttemptTimeout time.Duration

	// DeadTime is how long an upstream that stays silent where another one answers is asked last. Default 30 s.
	DeadTime time.Duration

	// IdleTimeout closes a TCP connection without a new question (RFC 7766 §6.2.3); a question counts
	// once it is complete. Default 30 s. It must be longer than Timeout, so that no
	// connection is closed on a question that is still out.
	IdleTimeout time.Duration

	// WriteTimeout closes a TCP connection whose client does not take an answer. Default 5 s.
	WriteTimeout time.Duration

	// MaxInFlight is the limit on questions that wait for an upstream; each holds a descriptor of
	// the host per upstream asked, and a buffer as long as the client's EDNS size. One client gets at most
	// half of it. Beyond, the answer is SERVFAIL at once: stub resolvers take it
	// as "try again" or go to their next server, where silence would cost them 5 s and
	// REFUSED is ignored by musl. Default 1024: a hundred hanging questions a second.
	MaxInFlight int

	// MaxConns is the limit on TCP connections of clients; one client gets at most half
	// of it and finds further ones closed. Default 128: with 16 questions each, clients that read no
	// answer can hold 128 MiB at the very worst.
	MaxConns int
}

// Stats are counts since New.
type Stats struct {
	Queries   uint64 // messages from clients that were questions, good or malformed
	Answers   uint64 // answers passed on, or given for names of ours
	Failures  uint64 // SERVFAIL that we made: no upstream, or none that answered
	Timeouts  uint64 // upstreams that did not answer in AttemptTimeout
	Limited   uint64 // questions and connections turned away by a limit
	Truncated uint64 // UDP answers that we cut; those that came truncated do not count
	Malformed uint64 // refused as malformed or unsupported
}

// A Server answers questions. It may serve any number of addresses.
type Server struct {
	cfg       Config
	health    *health
	questions *share
	conns     *share
	stats     struct {
		queries, answers, failures, timeouts, limited, truncated, malformed atomic.Uint64
	}
}

// New makes a server; it starts nothing.
func New(cfg Config) (*Server, error) {
	if cfg.Upstreams == nil {
		return nil, errors.New("dns: Config.Upstreams is nil")
	}
	if cfg.Dial == nil {
		var d net.Dialer
		cfg.Dial = func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
			return d.DialContext(ctx, network, addr.String())
		}
	}
	if cfg.NamesFor == nil {
		cfg.NamesFor = func(netip.Addr) Names { return cfg.Names }
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	for _, d := range []struct {
		value *time.Duration
		zero  time.Duration
	}{
		{&cfg.Timeout, 10 * time.Second},
		{&cfg.AttemptTimeout, 2 * time.Second},
		{&cfg.DeadTime, 30 * time.Second},
		{&cfg.IdleTimeout, 30 * time.Second},
		{&cfg.WriteTimeout, 5 * time.Second},
	} {
		if *d.value == 0 {
			*d.value = d.zero
		}
		if *d.value < 0 {
			return nil, fmt.Errorf("dns: a timeout of %v", *d.value)
		}
	}
	if cfg.IdleTimeout <= cfg.Timeout {
		return nil, fmt.Errorf("dns: IdleTimeout %v must be longer than Timeout %v", cfg.IdleTimeout, cfg.Timeout)
	}
	if cfg.MaxInFlight == 0 {
		cfg.MaxInFlight = 1024
	}
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 128
	}
	if cfg.MaxInFlight < 0 || cfg.MaxConns < 0 {
		return nil, fmt.Errorf("dns: limits of %d questions and %d connections", cfg.MaxInFlight, cfg.MaxConns)
	}
	return &Server{
		cfg:       cfg,
		health:    newHealth(cfg.AttemptTimeout, cfg.DeadTime, cfg.Log),
		questions: newShare(cfg.MaxInFlight),
		conns:     newShare(cfg.MaxConns),
	}, nil
}

// Stats returns the counts as they are now.
func (s *Server) Stats() Stats {
	return Stats{
		Queries:   s.stats.queries.Load(),
		Answers:   s.stats.answers.Load(),
		Failures:  s.stats.failures.Load(),
		Timeouts:  s.stats.timeouts.Load(),
		Limited:   s.stats.limited.Load(),
		Truncated: s.stats.truncated.Load(),
		Malformed: s.stats.malformed.Load(),
	}
}

// settle is how long Serve goes on without a socket that has failed, for ctx to end: a socket fails as a rule because
// the network below it ends, and whoever ends that knows the cause and says it. It is much longer than
// such an end takes.
const settle = time.Second

// Serve answers what arrives on pcs and lns until ctx ends, and returns nil then, or until one of them
// fails and ctx does not end soon after. It owns them: all are closed, and all that it started has ended, when it returns.
func (s *Server) Serve(ctx context.Context, pcs []net.PacketConn, lns []net.Listener) error {
	outer := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	for _, pc := range pcs {
		wg.Go(func() {
			if err := s.servePacket(ctx, pc); err != nil {
				wait(ctx, settle)
				cancel(err)
			}
		})
	}
	for _, ln := range lns {
		wg.Go(func() {
			if err := s.serveStream(ctx, ln); err != nil {
				wait(ctx, settle)
				cancel(err)
			}
		})
	}
	<-ctx.Done()
	for _, pc := range pcs {
		pc.Close() // the only way to end a Read or an Accept on all of them
	}
	for _, ln := range lns {
		ln.Close()
	}
	wg.Wait()
	defer cancel(nil)
	if outer.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

// receive looks at a message. It returns the question to pass on, or its answer where that needs
// no upstream, or neither.
func (s *Server) receive(client netip.Addr, msg []byte) (q question, answer []byte, forward bool) {
	q, rcode := parse(msg)
	if rcode == drop {
		return q, nil, false
	}
	s.stats.queries.Add(1)
	if rcode != rcodeNone {
		s.stats.malformed.Add(1)
		return q, q.refuse(rcode), false
	}
	if answer := q.local(s.cfg.NamesFor(client)); answer != nil {
		s.stats.answers.Add(1)
		return q, answer, false
	}
	return q, nil, true
}

// resolve asks the upstreams and returns what the client is to be told; nil when
// ctx has ended.
func (s *Server) resolve(ctx context.Context, network string, q *question) []byte {
	limited, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	answer := s.ask(limited, network, q)
	switch {
	case answer != nil:
		s.stats.answers.Add(1)
		copy(answer, q.wire[:2])
		return answer
	case ctx.Err() != nil:
		return nil
	}
	s.stats.failures.Add(1)
	return q.refuse(rcodeFailure)
}

// overload is the answer to a question beyond the client's share.
func (s *Server) overload(q *question) []byte {
	s.stats.limited.Add(1)
	return q.refuse(rcodeFailure)
}

// clientOf is the key by which clients share.
func clientOf(addr net.Addr) netip.Addr {
	switch a := addr.(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr().Unmap()
	case *net.TCPAddr:
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{} // all whose address we cannot read share as one
}
