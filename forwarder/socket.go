package forwarder

import (
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"usernet/stack"

	"golang.org/x/sys/unix"
)

// A socket is one of the host's that the poller watches. Whoever works on it holds a reference, and the
// last one closes it, so that its fd is never another socket's in the hands of somebody who is late.
type socket struct {
	refs   atomic.Int32
	fd     int
	id     uint64 // the poller's
	proto  uint8
	user   user
	poller *poller
	closed chan struct{} // closed with the socket; nil where nobody waits. Set by who has a reference, see TakeUDPPort
}

// A user is who a socket is for: a flow, or a published port with all its clients.
type user interface {
	read(r *receiver, now int64)

	// ends are the two ends, as the container knows them, of what went from the socket (its
	// address at, where it has several) to real. ok is false when nothing did.
	ends(at local, real netip.AddrPort) (src, dst netip.AddrPort, ok bool)

	books() *counter

	// failed tells of an error that the socket has met with before, and has no message about.
	failed(e unix.Errno)
}

// newSocket makes a socket of fd, which it owns from then on, with a reference for the caller.
// poller.add is the caller's, when u is ready to read.
func (f *Forwarder) newSocket(fd int, proto uint8, u user) *socket {
	s := &socket{fd: fd, proto: proto, user: u, poller: f.poller}
	s.refs.Store(1)
	return s
}

// acquire takes a reference unless the last one is gone.
func (s *socket) acquire() bool { return acquire(&s.refs) }

func (s *socket) release() {
	if s.refs.Add(-1) > 0 {
		return
	}
	s.poller.remove(s)
	unix.Close(s.fd)
	if s.closed != nil {
		close(s.closed)
	}
}

func acquire(refs *atomic.Int32) bool {
	for {
		n := refs.Load()
		if n == 0 {
			return false
		}
		if refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// A local is an address of the host at which something arrived. The zero local leaves it to the kernel.
type local struct {
	addr  netip.Addr
	iface int // its number, where addr or the other end is link-local; else 0
}

// defaultTTL is what the host's sockets send with when not told otherwise (net.ipv4.ip_default_ttl).
const defaultTTL = 64

// A sender is what one goroutine needs to send from the container to the host.
type sender struct {
	iov    []unix.Iovec
	hdr    unix.Msghdr
	name   name
	ctl    control
	ctlLen int // without UDP_SEGMENT
	header [echoHeaderLen]byte

	icmp  stack.ICMPError
	quote [quoteLen]byte
	errs  errorReader
}

// Senders are those that nobody uses: as many as there have been goroutines at once.
type senders struct {
	mu   sync.Mutex
	free []*sender
}

func (p *senders) get() *sender {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.free); n > 0 {
		s := p.free[n-1]
		p.free = p.free[:n-1]
		return s
	}
	return &sender{iov: make([]unix.Iovec, 0, 2*maxSegments)}
}

func (p *senders) put(s *sender) {
	clear(s.iov[:cap(s.iov)]) // payloads are the caller's again
	s.icmp = stack.ICMPError{}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = append(p.free, s)
}

// to begins a message with the TTL and TOS that the container gave it.
func (s *sender) to(dst netip.AddrPort, ttl, tos uint8) {
	s.iov = s.iov[:0]
	s.hdr = unix.Msghdr{Name: &s.name[0], Namelen: s.name.set(dst)}
	s.ctlLen = 0
	v4 := dst.Addr().Is4()
	if ttl != 0 && ttl != defaultTTL {
		if v4 {
			s.ctlLen = s.ctl.putInt(s.ctlLen, unix.SOL_IP, unix.IP_TTL, 4, int(ttl))
		} else {
			s.ctlLen = s.ctl.putInt(s.ctlLen, unix.SOL_IPV6, unix.IPV6_HOPLIMIT, 4, int(ttl))
		}
	}
	if tos != 0 {
		if v4 {
			s.ctlLen = s.ctl.putInt(s.ctlLen, unix.SOL_IP, unix.IP_TOS, 4, int(tos))
		} else {
			s.ctlLen = s.ctl.putInt(s.ctlLen, unix.SOL_IPV6, unix.IPV6_TCLASS, 4, int(tos))
		}
	}
}

// through begins a message through a connected socket.
func (s *sender) through(v6 bool, tos uint8) {
	to := netip.IPv4Unspecified()
	if v6 {
		to = netip.IPv6Unspecified()
	}
	s.to(netip.AddrPortFrom(to, 0), 0, tos)
	s.hdr.Name, s.hdr.Namelen = nil, 0
}

// from makes the message leave from an address of the host.
func (s *sender) from(at local) {
	if at.addr.IsValid() {
		s.ctlLen = s.ctl.putLocal(s.ctlLen, at)
	}
}

func (s *sender) append(payload ...[]byte) {
	for _, p := range payload {
		if len(p) > 0 {
			v := unix.Iovec{Base: &p[0]}
			v.SetLen(len(p))
			s.iov = append(s.iov, v)
		}
	}
}

// appendPart appends n octets of payload from off on.
func (s *sender) appendPart(payload [][]byte, off, n int) {
	for _, p := range payload {
		if n == 0 {
			return
		}
		if off >= len(p) {
			off -= len(p)
			continue
		}
		p = p[off:min(len(p), off+n)]
		off, n = 0, n-len(p)
		s.append(p)
	}
}

// push sends what s holds through sock, as a train where segment is not 0.
//
// An error that an earlier datagram met with, perhaps for another destination, is waiting in the
// socket and would fail this one: it is told to the container and the datagram sent again. Somebody else may
// have read it just before us, so an error that nothing waiting explains is believed the second time.
func (f *Forwarder) push(s *sender, sock *socket, segment int) unix.Errno {
	n := s.ctlLen
	if segment > 0 {
		n = s.ctl.putInt(n, unix.SOL_UDP, unix.UDP_SEGMENT, 2, segment)
	}
	s.hdr.Control, s.hdr.Iov = nil, nil
	s.hdr.SetControllen(n)
	if n > 0 {
		s.hdr.Control = &s.ctl.bytes()[0]
	}
	s.hdr.SetIovlen(len(s.iov))
	if len(s.iov) > 0 {
		s.hdr.Iov = &s.iov[0]
	}
	// More than one may come in while we send; a few tries are plenty.
	for tries, unexplained := 4, 0; ; tries-- {
		e := sendmsg(sock.fd, &s.hdr, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if e == 0 || e == unix.EAGAIN || tries == 0 {
			return e
		}
		if e == unix.ECONNREFUSED {
			sock.user.failed(e)
		}
		if !f.readErrors(&s.errs, sock) {
			if unexplained++; unexplained > 1 {
				return e
			}
		}
	}
}

// joins tells whether segments of so many octets may go as a train.
func (fl *flow) joins(segment int) bool {
	limit := fl.train.Load()
	return limit == 0 || segment < int(limit)
}

// receiveTOS makes fd tell the TOS of what it receives.
func receiveTOS(fd int, v6 bool) {
	if v6 {
		_ = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVTCLASS, 1)
	} else {
		_ = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVTOS, 1)
	}
}

// receiveErrors makes fd keep ICMP errors and the TOS of what it receives.
func receiveErrors(fd int, v6 bool) error {
	receiveTOS(fd, v6)
	if v6 {
		return os.NewSyscallError("setsockopt IPV6_RECVERR", unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVERR, 1))
	}
	return os.NewSyscallError("setsockopt IP_RECVERR", unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVERR, 1))
}

const (
	// receiveBatch is the most datagrams (or trains) read in one system call.
	receiveBatch = 64

	// receiveSize is the longest train that a socket gives us, in octets.
	receiveSize = 1 << 16
)

// A receiver is what the poller's goroutine needs to receive from the host.
type receiver struct {
	// mem is outside Go's heap: most of its 4 MiB are never touched, hence never there, and
	// the garbage collector need not count them.
	mem   []byte
	msgs  [receiveBatch]message
	iov   [receiveBatch]unix.Iovec
	names [receiveBatch]name
	ctls  [receiveBatch]control

	anc    ancillary
	pieces [][]byte
	out    [1]stack.Datagram
	sender sender // of what goes on through another socket
	errs   errorReader
}

func newReceiver() (*receiver, error) {
	mem, err := unix.Mmap(-1, 0, receiveBatch*receiveSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	r := &receiver{mem: mem, pieces: make([][]byte, 0, receiveBatch), sender: sender{iov: make([]unix.Iovec, 0, receiveBatch)}}
	for i := range r.msgs {
		r.iov[i].Base = &mem[i*receiveSize]
		r.iov[i].SetLen(receiveSize)
		h := &r.msgs[i].hdr
		h.Name, h.Iov, h.Control = &r.names[i][0], &r.iov[i], (*byte)(unsafe.Pointer(&r.ctls[i]))
		h.SetIovlen(1)
		r.again(i)
	}
	return r, nil
}

// again makes message i ready to be received into.
func (r *receiver) again(i int) {
	h := &r.msgs[i].hdr
	h.Namelen = uint32(len(r.names[i]))
	h.SetControllen(len(r.ctls[i].bytes()))
	h.Flags = 0
}

// read receives what fd has, at most receiveBatch messages, and returns how many. Errors
// wait for readErrors.
func (r *receiver) read(fd int) int {
	n, e := recvmmsg(fd, r.msgs[:])
	if e != 0 {
		return 0
	}
	return n
}

// A received is a datagram, or a train of them.
type received struct {
	data []byte // valid until the next read
	from netip.AddrPort
	*ancillary
}

// message returns message i of those read, once.
func (r *receiver) message(i int) received {
	h := &r.msgs[i].hdr
	m := received{
		data:      r.mem[i*receiveSize:][:min(int(r.msgs[i].len), receiveSize)],
		from:      addrPort(r.names[i][:min(int(h.Namelen), len(r.names[i]))]),
		ancillary: &r.anc,
	}
	r.anc.parse(r.ctls[i].bytes()[:h.Controllen])
	r.again(i)
	return m
}

func (r *receiver) close() { _ = unix.Munmap(r.mem) }
