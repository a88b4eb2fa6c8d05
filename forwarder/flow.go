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
// (endpoint-independent mapping, RFC 4787 §4.1).
type flowKey struct {
	proto uint8          // protoUDP, protoICMP or protoICMPv6
	src   netip.AddrPort // with the identifier of an echo in place of the port

	// local flows go to addresses of the host itself where the others are bound to an
	// outbound interface or address.
	local bool
}

// A flow is a source in the container and its socket of the host. It is a few hundred
// octets beside the kernel's own: buffers belong to those who send and receive.
//
// Life: whoever wants a flow that is not in the table makes one, locks mu, inserts it and
// opens the socket; others that find it wait for mu. The table holds one reference, and
// so does everybody at work on the socket. The last one closes it, so that its fd is never another
// socket's in the hands of somebody who is late.
type flow struct {
	key  flowKey
	refs atomic.Int32
	f    *Forwarder
	fd   int // -1 where opening failed
	id   uint64

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
func (fl *flow) acquire() bool {
	for {
		n := fl.refs.Load()
		if n == 0 {
			return false
		}
		if fl.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (fl *flow) release() {
	if fl.refs.Add(-1) > 0 {
		return
	}
	if fl.fd >= 0 {
		fl.f.poller.remove(fl)
		unix.Close(fl.fd)
		fl.f.kind(fl.key.proto).count.flows.Add(-1)
	}
}

func (fl *flow) v6() bool { return fl.key.src.Addr().Is6() }

// A kind is what differs between the protocols that flows are made for.
type kind struct {
	table    *table
	count    counter
	maxPeers int
	idle     func(*peer) time.Duration
	open     func(fl *flow) (fd int, err error)
	read     func(r *receiver, fl *flow, now int64)
}

// flowTo returns the flow of key, made if need be, after it has noted that the container
// sends to real and calls it used. The caller releases it. err tells why there is none.
func (f *Forwarder) flowTo(k *kind, key flowKey, real, used netip.AddrPort, now int64) (*flow, error) {
	for {
		fl := k.table.get(key)
		if fl == nil {
			var err error
			if fl, err = f.newFlow(k, key, now); err != nil {
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

// newFlow makes the flow of key, or finds that somebody else just did.
func (f *Forwarder) newFlow(k *kind, key flowKey, now int64) (*flow, error) {
	fl := &flow{key: key, f: f, fd: -1}
	fl.refs.Store(2) // the table's and the caller's
	fl.last.Store(now)
	fl.mu.Lock()
	existing, evicted, ok := k.table.insert(fl, now)
	if evicted != nil {
		k.count.evicted.Add(1)
		evicted.release()
	}
	if !ok {
		return nil, errStopped
	}
	if existing != nil {
		return existing, nil
	}
	fd, err := k.open(fl)
	if err == unix.EMFILE || err == unix.ENFILE {
		if old := k.table.evict(fl); old != nil {
			k.count.evicted.Add(1)
			old.release()
			fd, err = k.open(fl)
		}
	}
	if err == nil {
		fl.fd = fd
		k.count.flows.Add(1)
		k.count.opened.Add(1)
		err = f.poller.add(fl)
	}
	if err != nil {
		fl.gone, fl.err = true, err
	}
	fl.mu.Unlock()
	if err == nil {
		k.table.schedule(fl, now+int64(time.Second))
		if f.log.Enabled(context.Background(), slog.LevelDebug) {
			f.log.Debug("flow", "protocol", key.proto, "src", key.src)
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
		next := fl.peers.expire(now, k.idle)
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
