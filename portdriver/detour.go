package portdriver

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// What comes over lo need not get to the server whom the TAP leads to: DNAT in the container (docker's, kube-proxy's) gives a
// connection another destination, which our own rule takes for local, and a firewall may trust no foreign address on lo. Such
// a connection finds silence, or with IPv6 a refusal. A forward whose server answered on the stack path after that takes it for a
// while, so that not every client waits for the silence:
//
//	over lo ── no answer, and the stack has one ──▶ detour ── its time is over: one client ──▶ over lo
//	   ▲                                              ▲         tries lo, others do not           │
//	   └───────────────── an answer ──────────────────┴────────────── none ──────────────────────┘

const (
	// detourTime is how long a detour is taken; at first it is short, as the routing may be what is missing, which Kit puts
	// back in a second, and doubles with each try that is in vain.
	detourTime     = time.Second
	detourTimeMost = time.Minute

	// shortPatience takes kernelPatience's place where silence is likely: on a try in a detour, and where the container's kernel tracks
	// connections, without which there is no DNAT. An answer over lo takes a millisecond; this is a hundred times more.
	shortPatience = 250 * time.Millisecond

	// askTime lies between two refused connections of which the stack is asked as well: a forward to a server on the container's loopback
	// alone hardly pays for it, and DNAT that is new is found as soon. Where the stack is silent too, it doubles, up to detourTimeMost.
	askTime = time.Second
)

var errLedAway = errors.New("over lo the container's port did not answer, and by the TAP it did: rules of the container (DNAT, a firewall) lead such connections elsewhere")

// A detour is of one family; a forward has no two targets of a family that the stack leads to.
type detour struct {
	until time.Time     // of the next try; zero: there is no detour
	time  time.Duration // how long this one is

	ask   time.Time     // until then the stack is not asked after a refusal
	pause time.Duration // after an ask that found silence, until the next
}

func (f *forward) detourLocked(dst netip.Addr) *detour {
	if dst.Is4() {
		return &f.detours[0]
	}
	return &f.detours[1]
}

// detoured tells whether c takes the detour to dst. Once c is to try lo, it stays with that.
func (c *conn) detoured(dst netip.Addr) bool {
	if c.trying || c.socket >= 0 {
		return false
	}
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	t := c.f.detourLocked(dst)
	now := time.Now()
	if t.until.IsZero() || now.Before(t.until) {
		return !t.until.IsZero()
	}
	c.trying = true
	t.until = now.Add(max(t.time, c.f.d.cfg.DialTimeout)) // the others go on as they did until c has its outcome
	return false
}

// answered ends the detour: c had an answer over lo.
func (c *conn) answered(dst netip.Addr) {
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	*c.f.detourLocked(dst) = detour{}
}

// mayBeAstray tells whether to ask the stack as well after that outcome over lo: always after silence, and after a refusal, which is
// nearly always the server's, now and then.
func (c *conn) mayBeAstray(dst netip.Addr, err error) bool {
	if errors.Is(err, unix.ETIMEDOUT) {
		return true
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return false
	}
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	t, now := c.f.detourLocked(dst), time.Now()
	if !c.trying && now.Before(t.ask) {
		return false
	}
	t.ask = now.Add(askTime)
	c.asking = true
	return true
}

// ask is the dial by the stack after a refusal over lo; the error is that refusal.
func (c *conn) ask(ctx context.Context, src, dst netip.AddrPort) error {
	short, cancel := context.WithTimeout(ctx, shortPatience)
	defer cancel()
	end, err := c.f.d.cfg.Stack.DialFrom(short, src, dst)
	if err == nil {
		c.ledAway(dst.Addr())
		return c.join(end)
	}
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	t := c.f.detourLocked(dst.Addr())
	if short.Err() == nil {
		t.pause = 0
	} else if ctx.Err() == nil {
		// A firewall before the TAP, say: this must not cost a client a second its patience.
		t.pause = min(max(2*t.pause, 2*askTime), detourTimeMost)
		t.ask = time.Now().Add(t.pause)
	}
	return unix.ECONNREFUSED
}

// ledAway begins the detour, or goes on with it: c had no answer over lo, and one by the stack.
func (c *conn) ledAway(dst netip.Addr) {
	f := c.f
	f.mu.Lock()
	t := f.detourLocked(dst)
	now := time.Now()
	first := t.until.IsZero()
	if first || c.trying {
		t.time = min(max(2*t.time, detourTime), detourTimeMost)
		t.until = now.Add(t.time)
	}
	f.mu.Unlock()
	if first {
		f.d.log.Info("a published port takes the stack path for a while", "forward", f.spec.String(), "to", dst, "err", errLedAway)
	}
}

// onDetour is errLedAway while there is a detour to dst.
func (f *forward) onDetour(dst netip.Addr) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.detourLocked(dst).until.IsZero() {
		return nil
	}
	return errLedAway
}

// patience is how long c's socket may wait for an answer over lo.
func (c *conn) patience() time.Duration {
	if c.trying || tracked(c.socket) {
		return shortPatience
	}
	return kernelPatience
}

// tracked tells whether the kernel keeps a socket's connection in its table of NAT (net/netfilter/nf_conntrack_proto.c, getorigdst): what
// it asks for is the original destination, which only such a connection has.
func tracked(fd int) bool {
	const original = unix.SO_ORIGINAL_DST // IP6T_SO_ORIGINAL_DST is the same number
	// Of the calls that x/sys has these two have room for the answer, a sockaddr_in and a sockaddr_in6.
	_, err4 := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, original)
	_, err6 := unix.GetsockoptIPv6MTUInfo(fd, unix.SOL_IPV6, original)
	return err4 == nil || err6 == nil
}
