package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"

	"usernet/portdriver"
	"usernet/portdriver/sockfile"
)

// What clients can take of us. They are our own user and root, so this bounds mistakes rather than attacks.
const (
	// maxConns are served at a time, out of the 128 descriptors that flows leave to all else. The rest waits.
	maxConns = 32

	// patience with a client: for its first octet, then for its headers or its whole JSON request.
	patience = 5 * time.Second

	// bodyPatience: for a whole request of HTTP; answerPatience: for taking the answer.
	bodyPatience   = 10 * time.Second
	answerPatience = 30 * time.Second

	// idlePatience: a connection kept alive without a request holds a place.
	idlePatience = 10 * time.Second

	// grace for requests that run when the server ends.
	grace = 2 * time.Second

	maxHeader = 16 << 10
	// maxBody: 10 000 forwards, each spelled out; ranges take no more than a line.
	maxBody = 1 << 20
	// maxAdd forwards can one request ask for: all ports of TCP and UDP.
	maxAdd = 2 * 65535
)

// Ports is what the server asks of *portdriver.Driver. Its methods are called concurrently.
type Ports interface {
	Add(ctx context.Context, specs ...portdriver.Spec) ([]portdriver.Forward, error) // all or nothing
	Remove(ctx context.Context, id int, drain bool) error
	List() []portdriver.Forward
	Get(id int) (portdriver.Forward, bool)
}

// A Config says what a Server speaks of.
type Config struct {
	Path string // of the socket file; needed

	// Ports and Rootlesskit do the work, the latter for /v1/ports. nil: no port can be published, and requests say so.
	Ports       Ports
	Rootlesskit port.Manager

	// Networks are those of the shared mode, whose daemon alone has them; nil: none.
	Networks Networks

	// Info describes the process; called when Serve begins and for each request, concurrently. It need not set
	// APIVersion, PID and, where Ports is a *portdriver.Driver, its Ports.
	Info func() Info

	// Metrics writes what is counted beside forwards; nil: nothing. Called concurrently.
	Metrics func(*Metrics)

	// Pprof serves profiles of this process below /v1/usernet/debug/pprof.
	Pprof bool

	Log *slog.Logger // nil: none
}

// A Server listens at the control socket.
type Server struct {
	cfg  Config
	gate gate
	ln   net.Listener
	file *sockfile.File
	web  *http.Server

	patience time.Duration // the constant, but in tests

	slots   chan struct{}  // one for each connection
	serving sync.WaitGroup // goroutines that look at the first octet or speak JSON, and handlers of HTTP
	mu      sync.Mutex
	conns   map[*conn]struct{}
	ended   bool      // no handler begins any more
	warned  time.Time // when a stranger was last told of

	once sync.Once
	err  error // of Close
}

// Listen makes the socket, with the mode 0600 from the first moment. A dead socket of ours in its place is replaced; a live
// one, somebody else's, and any other file is an error. Clients can connect from now on and are answered by Serve.
// Close ends it, also without Serve. Listen belongs before a sandbox, Serve and Close work within.
func Listen(cfg Config) (*Server, error) {
	if cfg.Info == nil {
		return nil, errors.New("api: Config without Info")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, gate: newGate(), patience: patience, slots: make(chan struct{}, maxConns), conns: map[*conn]struct{}{}}
	if s.gate.uid == s.gate.overflow {
		cfg.Log.Warn("only root can use the control socket: our own user ID is the one that all unknown users have here", "uid", s.gate.uid)
	}
	var err error
	if s.ln, s.file, err = listenAt(cfg.Path); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	s.web = &http.Server{
		ReadTimeout: bodyPatience, WriteTimeout: answerPatience, IdleTimeout: idlePatience,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}
	return s, nil
}

// Path is where the socket is, absolute.
func (s *Server) Path() string { return s.file.Path() }

// Dir is the directory of the socket. A sandbox must allow removing files in it, or else the socket is left behind.
// It belongs to the Server.
func (s *Server) Dir() *os.File { return s.file.Dir() }

// Close removes the socket file, if it is still ours, and stops listening, which ends Serve.
func (s *Server) Close() error {
	s.once.Do(func() {
		s.err = errors.Join(s.file.Remove(), s.ln.Close())
		if s.err != nil {
			s.err = fmt.Errorf("control socket: %w", s.err)
		}
	})
	return s.err
}

// Serve answers clients until ctx ends or Close is called. Requests that run then have a moment to finish.
// It returns when nothing it began runs any more. It is called once at most.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, s.unblock)
	defer stop()

	s.web.Handler = s.handler()
	s.web.ReadHeaderTimeout = s.patience
	s.web.BaseContext = func(net.Listener) context.Context { return ctx }
	web := newHandover(s.ln.Addr())
	var group sync.WaitGroup
	group.Go(func() { _ = s.web.Serve(web) }) // it returns only what we tell it: http.ErrServerClosed

	s.accept(ctx, web)

	end, done := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer done()
	if s.web.Shutdown(end) != nil { // closes web, too
		_ = s.web.Close()
	}
	cancel()
	group.Wait()
	s.closeConns()
	s.serving.Wait()
	for range maxConns { // the last goroutine of a connection closes it
		s.slots <- struct{}{}
	}
	return nil
}

// unblock makes Accept return.
func (s *Server) unblock() {
	if ln, ok := s.ln.(*net.UnixListener); ok {
		_ = ln.SetDeadline(time.Unix(1, 0))
	}
}

// accept hands out connections until ctx ends or the listener is closed.
func (s *Server) accept(ctx context.Context, web *handover) {
	for {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		c, err := s.ln.Accept()
		if err == nil {
			s.serving.Go(func() { s.serve(ctx, s.open(c), web) })
			continue
		}
		<-s.slots
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		// Out of descriptors or memory, mostly. That passes, and forwards come first.
		s.cfg.Log.Warn("control socket: accept", "error", err)
		if !wait(ctx, time.Second) {
			return
		}
	}
}

// wait sleeps, and returns false where ctx has ended first.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// open takes note of a connection, which gives its place back when it is closed.
func (s *Server) open(c net.Conn) *conn {
	wrapped := &conn{Conn: c}
	wrapped.release = func() {
		s.mu.Lock()
		delete(s.conns, wrapped)
		s.mu.Unlock()
		<-s.slots
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[wrapped] = struct{}{}
	return wrapped
}

// begin counts a handler in, which Serve then waits for, also where it has cut its connection; not at the end.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.serving.Add(1)
	}
	return !s.ended
}

// closeConns cuts off those who are left at the end, without taking their goroutine's closing from it.
func (s *Server) closeConns() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	for c := range s.conns {
		_ = c.Conn.Close()
	}
}

// warnEvery is how often, at most, the log tells of strangers: they come as often as they like.
const warnEvery = 10 * time.Second

// seldom tells whether it is time to tell again.
func (s *Server) seldom() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.warned.IsZero() && time.Since(s.warned) < warnEvery {
		return false
	}
	s.warned = time.Now()
	return true
}

// serve decides by the first octet who answers a connection.
func (s *Server) serve(ctx context.Context, c *conn, web *handover) {
	if err := s.gate.check(c.Conn.(*net.UnixConn)); err != nil {
		if s.seldom() {
			s.cfg.Log.Warn("control socket: refused", "reason", err)
		}
		c.Close()
		return
	}
	_ = c.SetDeadline(time.Now().Add(s.patience))
	switch err := c.peek(); {
	case err != nil && !errors.Is(err, io.EOF):
		c.Close() // it says nothing, or we end
	case c.ahead && c.first >= 'A' && c.first <= 'Z': // as every method of HTTP does, and no JSON
		_ = c.SetDeadline(time.Time{})
		web.give(c)
	default:
		defer c.Close()
		s.slirp(ctx, c)
	}
}
