package forwarder

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"usernet/forwarder/relay"
	"usernet/stack"

	"golang.org/x/sys/unix"
)

// TCPConfig bounds the TCP flows. Zero fields take the default.
type TCPConfig struct {
	// DialTimeout ends a dial that nobody has answered (130 s). The host's kernel gives up
	// after 127 s by itself (net.ipv4.tcp_syn_retries = 6), and so does a container's.
	DialTimeout time.Duration

	MaxFlows int // dials included; see LimitsFor

	// Shared says that several containers are behind the stack: an address that has a quarter of MaxFlows gets none of the last eighth,
	// which is for the others.
	Shared bool
}

func (c TCPConfig) withDefaults(l Limits) TCPConfig {
	orDefault(&c.DialTimeout, 130*time.Second)
	orDefault(&c.MaxFlows, l.TCP)
	return c
}

// maxDials is how many dials may hang at once. Each holds a file, and one of them is worth less than a flow that stands.
const maxDials = 4096

// MaxDials is how many SYNs the stack shall let wait for their dials: half of the flows at most, so that black
// holes leave room for what answers.
func (f *Forwarder) MaxDials() int { return min(maxDials, max(f.cfg.TCP.MaxFlows/2, 1)) }

// tcpCounts are what ServeTCP counts; the relay counts the rest.
type tcpCounts struct {
	dialling, flows   atomic.Int64
	dialled, failed   atomic.Uint64
	refused, timedOut atomic.Uint64
	forbidden         atomic.Uint64
	dropped           atomic.Uint64

	mu sync.Mutex
	of map[netip.Addr]int // how many flows each container's address has; TCPConfig.Shared only
}

// TCPStats are the counts of TCP.
type TCPStats struct {
	Dialling, Flows     int    // now
	Dialled             uint64 // dials that succeeded
	Forbidden           uint64 // SYNs refused by the policy
	Refused             uint64 // dials answered with ECONNREFUSED
	TimedOut            uint64 // dials that nobody answered, or that the container gave up
	Failed              uint64 // dials that failed otherwise
	Dropped             uint64 // SYNs dropped by the policy, or because there was no file left
	Aborted             uint64 // flows ended by RST or an error of either end
	OctetsOut, OctetsIn uint64 // container → host, host → container
}

func (f *Forwarder) tcpStats() TCPStats {
	c, r := &f.tcp, f.relay.Stats()
	return TCPStats{
		Dialling: int(c.dialling.Load()), Flows: int(c.flows.Load()),
		Dialled: c.dialled.Load(), Forbidden: c.forbidden.Load(), Refused: c.refused.Load(), TimedOut: c.timedOut.Load(),
		Failed: c.failed.Load(), Dropped: c.dropped.Load(),
		Aborted: uint64(r.Aborted), OctetsOut: r.OctetsOut, OctetsIn: r.OctetsIn,
	}
}

// errSilent has a SYN dropped: the container repeats it.
var errSilent = errors.New("no answer")

// ServeTCP dials the host before the container's SYN is answered, so that the container
// sees what the dial saw.
func (f *Forwarder) ServeTCP(ctx context.Context, r *stack.TCPRequest) {
	c := &f.tcp
	dst, verdict := f.resolve(Flow{Proto: protoTCP, Src: r.Src, Dst: r.Dst})
	switch verdict.Action {
	case Drop:
		c.dropped.Add(1)
		r.Reject(errSilent)
		return
	case Refuse:
		c.forbidden.Add(1)
		r.Reject(verdict.Reason)
		return
	}
	src := r.Src.Addr()
	if !c.begin(src, f.cfg.TCP) {
		c.dropped.Add(1)
		f.noFile(unix.EMFILE)
		r.Reject(errSilent)
		return
	}
	fd, err := f.dialTCP(ctx, dst)
	if err != nil {
		c.end(src)
		f.countDial(err)
		f.log.Debug("dial", "src", r.Src, "dst", r.Dst, "host", dst, "err", err)
		r.Reject(err)
		return
	}
	c.dialled.Add(1)
	conn, err := r.Accept()
	if err != nil {
		c.end(src)
		relay.Reset(fd)
		f.log.Debug("handshake with the container", "src", r.Src, "dst", r.Dst, "err", err)
		return
	}
	f.log.Debug("flow", "src", r.Src, "dst", r.Dst, "host", dst)
	// Join owns both ends from here on, also when it fails.
	_, _ = f.relay.Join(conn, fd, relay.Options{Done: func(error) { c.end(src) }})
}

// begin counts a flow, unless there is no room for one from src.
func (c *tcpCounts) begin(src netip.Addr, cfg TCPConfig) bool {
	n := int(c.flows.Add(1))
	ok := n <= cfg.MaxFlows
	if ok && cfg.Shared {
		c.mu.Lock()
		if ok = n <= cfg.MaxFlows-cfg.MaxFlows/8 || c.of[src] < cfg.MaxFlows/4; ok {
			if c.of == nil {
				c.of = make(map[netip.Addr]int)
			}
			c.of[src]++
		}
		c.mu.Unlock()
	}
	if !ok {
		c.flows.Add(-1)
	}
	return ok
}

// end counts it no more.
func (c *tcpCounts) end(src netip.Addr) {
	c.flows.Add(-1)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.of[src] {
	case 0: // not Shared
	case 1:
		delete(c.of, src) // sources that are gone take no memory
	default:
		c.of[src]--
	}
}

// dialTCP returns a connected socket.
func (f *Forwarder) dialTCP(ctx context.Context, dst netip.AddrPort) (int, error) {
	f.tcp.dialling.Add(1)
	defer f.tcp.dialling.Add(-1)
	fam := family(dst.Addr())
	fd, err := unix.Socket(fam, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		if errors.Is(err, unix.EAFNOSUPPORT) {
			err = unix.ENETUNREACH // the host has not got this family at all
		}
		return -1, os.NewSyscallError("socket", err)
	}
	if err := f.cfg.Outbound.Prepare(fd, fam, dst.Addr()); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if err := f.relay.Connect(ctx, fd, dst, f.cfg.TCP.DialTimeout); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if selfConnected(fd, dst) {
		relay.Reset(fd)
		return -1, os.NewSyscallError("connect", unix.ECONNREFUSED)
	}
	return fd, nil
}

// selfConnected tells whether a socket is connected to itself, which a dial to a port of the host's own
// that nobody listens on is when the kernel happens to choose that very port for its source (RFC 9293
// §3.5, simultaneous open).
func selfConnected(fd int, dst netip.AddrPort) bool {
	switch sa, _ := unix.Getsockname(fd); sa := sa.(type) {
	case *unix.SockaddrInet4:
		return sa.Port == int(dst.Port()) && sa.Addr == dst.Addr().As4()
	case *unix.SockaddrInet6:
		return sa.Port == int(dst.Port()) && sa.Addr == dst.Addr().As16()
	}
	return false
}

// countDial books a dial that failed.
func (f *Forwarder) countDial(err error) {
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		f.tcp.refused.Add(1)
	case errors.Is(err, unix.ETIMEDOUT), errors.Is(err, context.Canceled):
		f.tcp.timedOut.Add(1)
	case noFiles(err):
		f.tcp.dropped.Add(1)
		f.noFile(err)
	default:
		f.tcp.failed.Add(1)
	}
}
