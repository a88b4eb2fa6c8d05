package forwarder

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A flowKey is one end in the container, which all its destinations share
// (endpoint-independent mapping, RFC 4787 §4.1), or one end and one client of a published port.
type flowKey struct {
	proto uint8          // protoUDP, protoICMP or protoICMPv6
	src   netip.AddrPort // with the identifier of an echo in place of the port
	peer  netip.AddrPort // a client as the container calls it; zero for what the container began

	// local flows go to addresses of the host itself where the others are bound to an
	// outbound interface or address.
	local bool
}

// A flow is a source in the container and its socket of the host, or a client of a published
// port, whose socket it shares, or that has one inside the container. It is a few hundred octets beside the kernel's own: buffers
// belong to those who send and receive.
//
// Life: whoever wants a flow that is not in the table makes one, locks mu, inserts it and
// opens the socket; others that find it wait for mu. The table holds one reference, and
// so does everybody at work on the flow. The last one lets go of the socket.
type flow struct {
	key    flowKey
	kind   *kind
	refs   atomic.Int32
	f      *Forwarder
	sock   *socket // nil where opening failed
	client *client // nil for what the container began

	last     atomic.Int64 // when something passed (Forwarder.now)
	answered atomic.Bool

	mu    sync.Mutex
	gone  bool  // it has expired or could not be opened; make another
	err   error // why it could not be opened
	peers peers

	// train is the shortest segment that the kernel would not send as part of a train,
	// because it exceeds the path's MTU or for what an interface lacks; 0 before that happened.
	train atomic.Int32

	// Guarded by table.mu:
	owner    *owner
	age, due link
	seen     int64 // last, when the table looked
}

// acquire takes a reference unless the last one is gone.
func (fl *flow) acquire() bool { return acquire(&fl.refs) }

func (fl *flow) release() {
	if fl.refs.Add(-1) == 0 && fl.sock != nil {
		fl.count().flows.Add(-1)
		fl.sock.release()
	}
}

func (fl *flow) v6() bool { return fl.key.src.Addr().Is6() }

// count is where what happens to the flow is booked.
func (fl *flow) count() *counter {
	if fl.client != nil {
		return &fl.client.forward.count
	}
	return &fl.kind.count
}

// read, ends and books make a flow the user of its socket.
func (fl *flow) read(r *receiver, now int64) { fl.kind.read(r, fl, now) }
func (fl *flow) books() *counter             { return &fl.kind.count }

func (fl *flow) ends(_ local, real netip.AddrPort) (src, dst netip.AddrPort, ok bool) {
	used, ok := fl.called(real)
	return fl.key.src, used, ok
}

// A kind is what differs between the protocols that flows are made for.
type kind struct {
	table    *table
	count    counter
	maxPeers int
	idle     func(*flow, *peer) time.Duration
	open     func(fl *flow) (*socket, error) // with a reference for fl
	read     func(r *receiver, fl *flow, now int64)
}

// flowTo returns the flow of key, made if need be, after it has noted that the container
// sends to real and calls it used. The caller releases it. err tells why there is none.
func (f *Forwarder) flowTo(k *kind, key flowKey, real, used netip.AddrPort, now int64) (*flow, error) {
	for {
		fl := k.table.get(key)
		if fl == nil {
			var err error
			if fl, err = f.newFlow(k, &flow{key: key}, now); err != nil {
				return nil, err
			}
		}
		fl.mu.Lock()
		if !fl.gone {
			p := fl.peers.find(real)
			if p == nil {
				p = fl.peers.add(real, k.maxPeers)
			}
			p.used, p.last = used, now
			fl.mu.Unlock()
			fl.last.Store(now)
			return fl, nil
		}
		err := fl.err
		fl.mu.Unlock()
		f.drop(k, fl)
		fl.release()
		if err != nil {
			return nil, err
		}
	}
}

// drop takes fl out of its table, if it is still in.
func (f *Forwarder) drop(k *kind, fl *flow) {
	if k.table.remove(fl) {
		fl.release()
	}
}

// newFlow begins fl, of which its key and client are given, or finds that somebody else just did.
func (f *Forwarder) newFlow(k *kind, fl *flow, now int64) (*flow, error) {
	fl.f, fl.kind = f, k
	fl.refs.Store(2) // the table's and the caller's
	fl.last.Store(now)
	f.taking.RLock()
	defer f.taking.RUnlock()
	fl.mu.Lock()
	existing, evicted, ok := k.table.insert(fl, now)
	if evicted != nil {
		evicted.count().evicted.Add(1)
		evicted.release()
	}
	if !ok {
		return nil, errStopped
	}
	if existing != nil {
		return existing, nil
	}
	sock, err := k.open(fl)
	// Somebody may be at work on what is evicted and close it a moment later: then another one goes.
	for tries := 4; tries > 0 && (err == unix.EMFILE || err == unix.ENFILE); tries-- {
		old := k.table.evict(fl)
		if old == nil {
			break
		}
		old.count().evicted.Add(1)
		old.release()
		sock, err = k.open(fl)
	}
	if err == nil {
		fl.sock = sock
		fl.count().flows.Add(1)
		fl.count().opened.Add(1)
		if sock.user == fl { // and is not shared
			err = f.poller.add(sock)
		}
	}
	if err != nil {
		fl.gone, fl.err = true, err
	}
	fl.mu.Unlock()
	if err == nil {
		k.table.schedule(fl, now+int64(time.Second))
		f.poller.stir()
		if f.log.Enabled(context.Background(), slog.LevelDebug) {
			f.log.Debug("flow", "protocol", fl.key.proto, "src", fl.key.src, "client", fl.key.peer)
		}
	}
	return fl, nil
}

// answer notes that something came from real and returns what the container calls it; ok is false
// when the container has not sent to it.
func (fl *flow) answer(real netip.AddrPort, now int64) (used netip.AddrPort, ok bool) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	p := fl.peers.find(real)
	if p == nil {
		return netip.AddrPort{}, false
	}
	p.last, p.answered = now, true
	if !fl.answered.Load() {
		fl.answered.Store(true)
	}
	fl.last.Store(now)
	return p.used, true
}

// called is what the container calls real.
func (fl *flow) called(real netip.AddrPort) (used netip.AddrPort, ok bool) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if p := fl.peers.find(real); p != nil {
		return p.used, true
	}
	return netip.AddrPort{}, false
}

// sweep ends the flows whose peers have all been idle for long enough.
func (f *Forwarder) sweep(k *kind, now int64, list []*flow) []*flow {
	list = k.table.expired(now, list[:0])
	for i, fl := range list {
		fl.mu.Lock()
		next := fl.peers.expire(now, func(p *peer) time.Duration { return k.idle(fl, p) })
		fl.gone = fl.gone || next == 0
		fl.mu.Unlock()
		if next == 0 {
			f.drop(k, fl)
		} else {
			k.table.schedule(fl, next)
		}
		fl.release()
		list[i] = nil
	}
	return list
}
