package portdriver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"usernet/forwarder/relay"
	"usernet/tap/inside"
)

var (
	errReset   = errors.New("the forward was removed")
	errCrowded = errors.New("too many connections wait for the container")
	errWait    = errors.New("the outcome is not there yet")
	errNoPath  = errors.New("there is no path to this address")
)

// conn is a client's connection, from its acceptance until both ends are closed.
//
//	accepted ─ dial ──────────────────────────────┬─ joined ─ the relay's Done ─ ended
//	             └─ errWait ─ a goroutine: dial ──┤
//	                                              └─ refused by all: RST ─ ended
type conn struct {
	f      *forward
	fd     int            // the client's, until it is joined or reset
	client netip.AddrPort // zero: on a unix socket
	next   int            // of the targets
	socket int            // inside, being connected; -1: none
	why    error          // the first target's
	trying bool           // whether the kernel path answers again: see detour
	astray bool           // over lo the next target did not answer, or something else did: the stack is asked
	asking bool           // of these: it was refused, and rightly so unless the stack has an answer at once

	// Under f.mu:
	cancel context.CancelCauseFunc // of the goroutine's dial
	joint  *relay.Joint
	over   bool
}

// atOnce stands where a context does, for what runs on the relay's worker and must not wait: errWait tells that it would have to.
var atOnce context.Context

// accepted is called by a worker of the relay's, and must not block.
func (f *forward) accepted(fd int, client netip.AddrPort) {
	c := &conn{f: f, fd: fd, client: client, socket: -1}
	if !f.begin(c) {
		f.refused.Add(1)
		relay.Reset(fd)
		return
	}
	if err := c.dial(atOnce); err == errWait {
		f.d.dialLater(c)
	} else if err != nil {
		c.refuse(err)
	}
}

// begin counts c, unless there are too many: in all, or of this forward when hardly a place is left, which is for the others.
func (f *forward) begin(c *conn) bool {
	most := f.d.limits.Connections
	now := int(f.d.connections.Add(1))
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || now > most || now > most-most/keptForOthers && len(f.conns) >= most/2 {
		f.d.connections.Add(-1)
		return false
	}
	f.total.Add(1)
	f.conns[c] = struct{}{}
	return true
}

// ended forgets c; both of its ends are closed.
func (c *conn) ended(error) {
	f := c.f
	f.mu.Lock()
	c.over = true
	delete(f.conns, c)
	last := f.closed && len(f.conns) == 0
	if last {
		close(f.idle)
	}
	f.mu.Unlock()
	f.d.connections.Add(-1)
	if last {
		f.d.drained(f)
	}
}

// refuse resets the client: nobody listens in the container, or nobody answers.
func (c *conn) refuse(err error) {
	c.f.refused.Add(1)
	if log := c.f.d.log; log.Enabled(context.Background(), slog.LevelDebug) {
		log.Debug("connection refused", "forward", c.f.spec.String(), "client", c.client, "err", err)
	}
	c.dropSocket()
	relay.Reset(c.fd)
	c.ended(err)
}

func (c *conn) dropSocket() {
	if c.socket >= 0 {
		closeFD(c.socket)
		c.socket = -1
	}
}

// dial tries the targets, one after the other, and joins the client to the first that does not refuse; c is
// the relay's then. Without ctx it does not wait, and returns errWait where it would have to; it goes on from
// there when it is called again. Else the error is that of the first target.
func (c *conn) dial(ctx context.Context) error {
	targets := c.f.to4
	if c.client.IsValid() && !c.client.Addr().Is4() {
		targets = c.f.to6
	}
	for ; c.next < len(targets); c.next++ {
		dst := netip.AddrPortFrom(targets[c.next], c.f.spec.ContainerPort)
		err := c.dialOne(ctx, dst)
		if err == nil || err == errWait {
			return err
		}
		c.dropSocket()
		c.astray, c.asking, c.trying = false, false, false
		if c.why == nil {
			c.why = fmt.Errorf("dial %v: %w", dst, err)
		}
		// A server that resets what it has accepted did not refuse: the next target would be another connection to it, maybe.
		// Where nobody listens it is ECONNREFUSED (net/ipv4/tcp_input.c, tcp_reset).
		if errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) || ctx != atOnce && ctx.Err() != nil {
			break
		}
	}
	if c.why == nil {
		return errNoPath
	}
	return c.why
}

// dialOne tries one target, on the path that leads there.
func (c *conn) dialOne(ctx context.Context, dst netip.AddrPort) error {
	d := c.f.d
	src := d.addrs.source(c.client, dst.Addr())
	kind, path, err := d.choose(ctx, src, dst.Addr())
	if err != nil {
		return err
	}
	other := d.stackLeads(dst.Addr())
	if path == PathKernel && !c.astray && !(kind.Transparent && other && c.detoured(dst.Addr())) {
		err := c.dialKernel(ctx, kind, src, dst)
		if err == nil {
			if other {
				c.answered(dst.Addr())
			}
			return c.join(nil)
		}
		c.astray = kind.Transparent && other && c.mayBeAstray(dst.Addr(), err)
		var none noSocket
		if !c.astray && (!errors.As(err, &none) || !other) {
			return err
		}
	}
	if c.astray {
		// NAT in the container may remember the SYN, and another one between the same ends goes astray as well.
		src = netip.AddrPortFrom(src.Addr(), 0)
	}
	c.dropSocket()
	if ctx == atOnce {
		return errWait
	}
	if c.asking {
		return c.ask(ctx, src, dst)
	}
	end, err := d.cfg.Stack.DialFrom(ctx, src, dst)
	if src.Port() != 0 && (errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL)) {
		end, err = d.cfg.Stack.DialFrom(ctx, netip.AddrPortFrom(src.Addr(), 0), dst)
	}
	if err != nil {
		return err
	}
	if c.astray {
		c.ledAway(dst.Addr())
	}
	return c.join(end)
}

// noSocket is the error of a socket of the namespace that cannot be had, or not be used: the stack path is left.
type noSocket struct{ error }

func (e noSocket) Unwrap() error { return e.error }

// dialKernel connects c.socket to dst.
func (c *conn) dialKernel(ctx context.Context, kind inside.Kind, src, dst netip.AddrPort) error {
	d := c.f.d
	if c.socket >= 0 { // it was begun without ctx
		return c.await(ctx, kind)
	}
	// The client's port may be taken in there: by a server of that number, by another forward's connection of
	// the same client, or by one in TIME-WAIT. Its address is what counts.
	for first := true; ; first = false {
		fd, err := d.socket(ctx, kind)
		if err != nil {
			return err
		}
		c.socket = fd
		if kind.Transparent {
			err = bindTo(fd, src)
		}
		if err == nil {
			var done bool
			if done, err = d.cfg.Loop.StartConnect(fd, dst); !done {
				return c.await(ctx, kind)
			}
			if err == nil && !kind.Transparent && selfConnected(fd, dst) {
				relay.Reset(fd)
				c.socket = -1
				return unix.ECONNREFUSED
			}
		}
		if err == nil || !first || src.Port() == 0 || !kind.Transparent || !taken(err) {
			return err
		}
		c.dropSocket()
		src = netip.AddrPortFrom(src.Addr(), 0)
	}
}

// await waits for c.socket's connect; ctx has the deadline. Over lo there is nothing to wait for, unless the machine is
// busy, the server's queue is full, the container has taken the routing away that leads back to us, or leads the connection elsewhere.
func (c *conn) await(ctx context.Context, kind inside.Kind) error {
	if ctx == atOnce {
		return errWait
	}
	d := c.f.d
	if !kind.Transparent {
		return d.cfg.Loop.AwaitConnect(ctx, c.socket, d.cfg.DialTimeout)
	}
	err := d.cfg.Loop.AwaitConnect(ctx, c.socket, min(c.patience(), d.cfg.DialTimeout))
	if errors.Is(err, unix.ETIMEDOUT) {
		d.kit.Doubt()
		return noSocket{err}
	}
	return err
}

// taken tells the errors of a bind or connect from a port that is in use, or privileged.
func taken(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EACCES)
}

// bindTo binds a socket to a client's address.
func bindTo(fd int, src netip.AddrPort) error {
	if src.Addr().Is4() {
		return unix.Bind(fd, &unix.SockaddrInet4{Port: int(src.Port()), Addr: src.Addr().As4()})
	}
	return unix.Bind(fd, &unix.SockaddrInet6{Port: int(src.Port()), Addr: src.Addr().As16()})
}

// selfConnected tells whether a socket is connected to itself, which a dial to a port that nobody listens on
// is when the kernel happens to choose that very port for its source (RFC 9293 §3.5).
func selfConnected(fd int, dst netip.AddrPort) bool {
	port, err := boundPort(fd)
	if err != nil || port != dst.Port() {
		return false
	}
	switch sa, _ := unix.Getsockname(fd); sa := sa.(type) {
	case *unix.SockaddrInet4:
		return sa.Addr == dst.Addr().As4()
	case *unix.SockaddrInet6:
		return sa.Addr == dst.Addr().As16()
	}
	return false
}

// socket takes a socket of the namespace; without ctx, one that lies ready.
func (d *Driver) socket(ctx context.Context, kind inside.Kind) (int, error) {
	if fd, ok := d.kit.Ready(kind); ok {
		return fd, nil
	}
	if ctx == atOnce {
		return -1, errWait
	}
	ctx, cancel := context.WithTimeout(ctx, socketPatience)
	defer cancel()
	fd, err := d.kit.Socket(ctx, kind)
	if err != nil {
		return -1, noSocket{err}
	}
	return fd, nil
}

// kernelPatience is how long a server over lo may take to answer before the stack path is tried: the time of three SYNs.
const kernelPatience = 3500 * time.Millisecond

// socketPatience is how long a socket of the namespace is waited for; the stack path is taken then. A
// batch of them is made in a millisecond.
const socketPatience = time.Second

// join gives the client, and end or the socket inside, to the relay.
func (c *conn) join(end relay.End) error {
	f := c.f
	// Clients' sockets are as forward.bindTo has prepared the listener, and those inside as the Kit makes them.
	o := relay.Options{Done: c.ended, Count: &f.count, Prepared: f.spec.HostPath == ""}
	var j *relay.Joint
	if end != nil {
		j, _ = f.d.cfg.Loop.Join(end, c.fd, o) // on an error it has closed both, and called Done
	} else {
		socket := c.socket
		c.socket = -1
		j, _ = f.d.cfg.Loop.JoinSockets(c.fd, socket, o)
	}
	if j == nil {
		return nil
	}
	f.mu.Lock()
	c.joint = j
	abort := f.reset && !c.over
	f.mu.Unlock()
	if abort {
		j.Abort()
	}
	return nil
}
