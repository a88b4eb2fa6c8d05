package stack

import (
	"context"
	"encoding/binary"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// TCPRequest is a SYN of the container's that has not been answered yet. The handler dials
// first and then accepts or rejects, so that the container sees what the dial saw.
//
//	SYN ── ServeTCP ──┬─ Accept ─ SYN-ACK … ─ Conn
//	                  ├─ Reject(ECONNREFUSED) ─ RST
//	                  ├─ Reject(EHOSTUNREACH …) ─ ICMP unreachable
//	                  └─ Reject(ETIMEDOUT, context.Canceled …) ─ silence
//
// The context given to ServeTCP ends when the container resets the request, and when it has
// repeated no SYN for longer than its next backoff: nobody waits any more then.
type TCPRequest struct {
	Src, Dst netip.AddrPort // the container's end and the one it asked for

	s       *Stack
	id      stack.TransportEndpointID
	req     *tcp.ForwarderRequest
	ttl     uint8
	tos     uint8
	segment [header.TCPMinimumSize]byte // of the SYN, for an ICMP error to quote
	ctx     context.Context
	cancel  context.CancelFunc

	mu      sync.Mutex
	lastSYN time.Time
	backoff time.Duration
	giveUp  *time.Timer
}

const (
	// firstBackoff is how long a kernel waits before it repeats a SYN (RFC 6298 §2.1: 1 s).
	firstBackoff = time.Second

	// dialSlack is added to twice the last gap between SYNs. Early retransmission timers of other
	// systems go up to 3 s (RFC 1122 §4.2.3.1), and a loaded machine sends late.
	dialSlack = 3 * time.Second
)

// tcpRequests are the SYNs that wait for an answer.
type tcpRequests struct {
	s   *Stack
	fwd *tcp.Forwarder

	mu      sync.Mutex
	ctx     context.Context // nil before Run and after its end: SYNs are dropped
	pending map[stack.TransportEndpointID]*TCPRequest
	perHost map[tcpip.Address]int
	running sync.WaitGroup
}

func newTCPRequests(s *Stack) *tcpRequests {
	t := &tcpRequests{
		s:       s,
		pending: make(map[stack.TransportEndpointID]*TCPRequest),
		perHost: make(map[tcpip.Address]int),
	}
	// Our own limits come first; netstack's must never be the one that drops a SYN. The
	// window is the receive buffer's default.
	t.fwd = tcp.NewForwarder(s.ns, 0, 2*s.cfg.MaxDials+1, t.serve)
	return t
}

func (t *tcpRequests) start(ctx context.Context) {
	t.mu.Lock()
	t.ctx = ctx
	t.mu.Unlock()
}

// reject ends all requests: their contexts are done, and no further one begins.
func (t *tcpRequests) reject() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ctx = nil
	for _, r := range t.pending {
		r.cancel()
	}
}

// wait returns when all handlers have. A handshake that was beginning while netstack was closed has
// got an endpoint since then, which nobody else will end.
func (t *tcpRequests) wait() {
	ended := make(chan struct{})
	go func() {
		t.running.Wait()
		close(ended)
	}()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		select {
		case <-ended:
			return
		case <-again.C:
			for _, e := range t.s.ns.RegisteredEndpoints() {
				e.Abort()
			}
		}
	}
}

// handlePacket gets every segment that belongs to no connection, on the goroutine that reads frames.
func (t *tcpRequests) handlePacket(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if len(h) < header.TCPMinimumSize {
		return true
	}
	switch flags := h.Flags(); {
	case flags&header.TCPFlagRst != 0:
		t.mu.Lock()
		defer t.mu.Unlock()
		if r := t.pending[id]; r != nil {
			r.cancel()
		}
		return true
	case flags&(header.TCPFlagSyn|header.TCPFlagAck) != header.TCPFlagSyn:
		return false // netstack answers with RST
	}
	if !t.admit(id, h, pkt) {
		return true
	}
	if t.fwd.HandlePacket(id, pkt) {
		return true
	}
	t.forget(id)
	t.running.Done()
	return false
}

// admit notes a SYN, and reports whether it is a new one within the limits. A SYN over
// a limit is dropped: the container repeats it.
func (t *tcpRequests) admit(id stack.TransportEndpointID, h header.TCP, pkt *stack.PacketBuffer) bool {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if r := t.pending[id]; r != nil {
		if binary.BigEndian.Uint32(r.segment[header.TCPSeqNumOffset:]) == h.SequenceNumber() {
			r.repeated(now)
		} else {
			r.cancel() // another attempt from the same port: it is served when it is repeated
		}
		return false
	}
	if t.ctx == nil || t.ctx.Err() != nil {
		return false
	}
	t.s.stats.SYNs.Add(1)
	if t.perHost[id.LocalAddress] >= t.s.cfg.MaxDialsPerHost || len(t.pending) >= t.s.cfg.MaxDials && !t.makeRoomLocked(id.LocalAddress) {
		t.s.stats.SYNsOverLimit.Add(1)
		return false
	}
	r := &TCPRequest{
		s: t.s, id: id,
		Src:     addrPort(id.RemoteAddress, id.RemotePort),
		Dst:     addrPort(id.LocalAddress, id.LocalPort),
		lastSYN: now, backoff: firstBackoff,
	}
	copy(r.segment[:], h)
	if ip := pkt.NetworkHeader().Slice(); len(ip) >= header.IPv4MinimumSize {
		if r.Src.Addr().Is4() {
			r.ttl, r.tos = ip[8], ip[1]
		} else {
			r.ttl, r.tos = ip[7], ip[0]<<4|ip[1]>>4
		}
	}
	r.ctx, r.cancel = context.WithCancel(t.ctx)
	r.giveUp = time.AfterFunc(2*firstBackoff+dialSlack, r.cancel)
	t.pending[id] = r
	t.perHost[id.LocalAddress]++
	t.running.Add(1)
	return true
}

// makeRoomLocked ends a dial to an address that has more of them than addr will have. The container repeats
// that one's SYN. The place is free when its handler has returned, so that for a moment there is
// one more than MaxDials; past twice as many there is no room at all.
func (t *tcpRequests) makeRoomLocked(addr tcpip.Address) bool {
	if len(t.pending) >= 2*t.s.cfg.MaxDials {
		return false
	}
	looked := 0
	for _, r := range t.pending { // in random order
		if t.perHost[r.id.LocalAddress] > t.perHost[addr]+1 && r.ctx.Err() == nil {
			r.cancel()
			return true
		}
		if looked++; looked == maxLook {
			break
		}
	}
	return false
}

// maxLook is how many dials are looked at to find one that can be spared: with every place taken by
// hosts that have as few as the newcomer, there is none, and a flood of SYNs must not make it a long search.
const maxLook = 64

// repeated notes a SYN that was sent again; the next one is due after at most twice the gap.
func (r *TCPRequest) repeated(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.backoff = max(firstBackoff, now.Sub(r.lastSYN))
	r.lastSYN = now
	if r.giveUp.Stop() {
		r.giveUp.Reset(2*r.backoff + dialSlack)
	}
}

// forget takes a request out of the books.
func (t *tcpRequests) forget(id stack.TransportEndpointID) *TCPRequest {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.pending[id]
	if r == nil {
		return nil
	}
	delete(t.pending, id)
	if t.perHost[id.LocalAddress]--; t.perHost[id.LocalAddress] == 0 {
		delete(t.perHost, id.LocalAddress)
	}
	r.giveUp.Stop()
	r.cancel()
	return r
}

// serve is called by netstack in a goroutine of its own for each admitted SYN.
func (t *tcpRequests) serve(req *tcp.ForwarderRequest) {
	defer t.running.Done()
	t.mu.Lock()
	r := t.pending[req.ID()]
	t.mu.Unlock()
	r.req = req
	t.s.handler.ServeTCP(r.ctx, r)
	if r.req != nil {
		r.Reject(context.Canceled) // a handler that did neither
	}
}

// Accept answers the SYN and returns the connection once the container has acknowledged.
// The request is over, whatever is returned.
func (r *TCPRequest) Accept() (*Conn, error) {
	req := r.req
	r.req = nil
	defer r.s.tcp.forget(r.id)
	if err := r.ctx.Err(); err != nil {
		req.Complete(false) // nobody waits for the answer
		return nil, err
	}
	wq := new(waiter.Queue)
	r.giveUp.Stop() // the handshake has netstack's own timer from here on
	ep, terr := req.CreateEndpoint(wq)
	req.Complete(false)
	if terr != nil {
		return nil, errno(terr)
	}
	r.s.stats.Accepted.Add(1)
	return newConn(r.s, ep, wq, r.Dst, r.Src), nil
}

// Reject answers the SYN as the reason says: RST for ECONNREFUSED, ICMP unreachable for what
// Unreachable knows, and nothing for all else: a timeout stays a timeout. The request is over.
func (r *TCPRequest) Reject(reason error) {
	req := r.req
	r.req = nil
	refused := isErrno(reason, unix.ECONNREFUSED) || isErrno(reason, unix.ECONNRESET)
	cancelled := r.ctx.Err() != nil
	// In this order: a SYN in between is taken for a repetition. The other way round netstack would
	// still know the tuple, and the request that admit makes of the SYN would be served by nobody.
	req.Complete(refused && !cancelled)
	r.s.tcp.forget(r.id)
	if cancelled {
		return
	}
	r.s.stats.Rejected.Add(1)
	if refused {
		return
	}
	typ, code, ok := Unreachable(r.Src.Addr().Is6(), reason)
	if !ok {
		return
	}
	err := r.s.SendICMP(&ICMPError{
		Type: typ, Code: code, Protocol: uint8(header.TCPProtocolNumber),
		Src: r.Src.Addr(), Dst: r.Dst.Addr(), TTL: r.ttl, TOS: r.tos, Transport: r.segment[:],
	})
	if err != nil {
		r.s.log.Debug("unreachable not sent", "src", r.Src, "dst", r.Dst, "err", err)
	}
}
