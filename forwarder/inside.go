package forwarder

import (
	"errors"
	"fmt"
	"net/netip"

	"usernet/stack"

	"golang.org/x/sys/unix"
)

// A server on the container's loopback alone hears nothing of what comes by the TAP. Clients of such a port are led
// through sockets of the container's own namespace, each through one of its own, as the server tells them
// apart by the socket's port:
//
//	poller                                       poller
//	  recvmmsg from the published socket           recvmmsg from the client's socket inside
//	  client: by its address and the host's        train: datagrams that go together
//	  train: datagrams that go together            sendmsg from the address that the client
//	  sendmsg through the client's socket inside   spoke to, with UDP_SEGMENT
//
// Such a client is a flow like the others, in a table of its own, as each holds a file. A client keeps its way: which one
// new clients take may change at any time.

// A passage is where new clients are led: to at most one address of each family.
type passage struct {
	socket   func(v6 bool) (fd int, err error)
	to4, to6 netip.AddrPort
}

// to is where a client goes to whose address is real: that of its family, or else the other.
func (g *passage) to(real netip.Addr) netip.AddrPort {
	if real.Is4() && g.to4.IsValid() || !g.to6.IsValid() {
		return g.to4
	}
	return g.to6
}

// Through leads clients that come from now on through sockets inside the container, to at most one address of each
// family, which need not lie on the TAP; a client goes to that of its own, or else to the other. The server sees
// the address that the kernel picks, such as 127.0.0.1. Without addresses they are led by the TAP again. Clients that there
// are go on as they began, but those that nobody has answered by the TAP begin anew.
//
// socket makes an unconnected UDP socket of the container's namespace that is the Forwarder's from then on. It must not
// block: the datagram is dropped where it fails, and the next one of the client tries again.
func (p *PublishedUDP) Through(socket func(v6 bool) (fd int, err error), to ...netip.AddrPort) error {
	var g *passage
	if len(to) > 0 {
		g = &passage{socket: socket}
		if err := aim(&g.to4, &g.to6, to); err != nil {
			return fmt.Errorf("lead a UDP port through sockets: %w", err)
		}
		p.entered.Store(true)
	}
	f := p.f
	p.passage.Store(g)
	if g == nil {
		return nil // those inside hear where nobody is any more, and an answer may be under way
	}
	f.poller.settle() // whoever reads the socket now may still make a client of the old way
	for _, fl := range f.published.table.of(ownerKey{forward: p}) {
		fl.mu.Lock()
		end := !fl.gone && !fl.peers.list[0].answered
		fl.gone = fl.gone || end
		fl.mu.Unlock()
		if end {
			f.drop(&f.published, fl)
		}
		fl.release()
	}
	return nil
}

// errNoSocket is why a client is not led inside where its datagram comes too early.
var errNoSocket = errors.New("no socket inside the container")

// openInside is kind.open for clients that go through a socket inside.
func (f *Forwarder) openInside(fl *flow) (*socket, error) {
	fd, err := fl.client.passage.socket(fl.v6())
	if err != nil {
		return nil, errors.Join(errNoSocket, err)
	}
	// Without IP_RECVERR: an error comes from the call that meets it next, and ends the client.
	if err := unix.Connect(fd, sockaddr(fl.key.src)); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connect inside the container: %w", err)
	}
	if holds(fd, fl.key.src.Port()) { // the server is gone, and the kernel chose its port for us: we would hear ourselves
		unix.Close(fd)
		return nil, fmt.Errorf("connect inside the container: %w", unix.ECONNREFUSED)
	}
	receiveTOS(fd, fl.v6())
	receiveTrains(fd)
	return f.newSocket(fd, protoUDP, fl), nil
}

// enter is the way in for a client's datagrams through its socket; fl's reference goes with it.
func (fl *flow) enter() (w way, why dropReason, ok bool) {
	if !fl.sock.acquire() {
		fl.release()
		return w, dropStopped, false
	}
	return way{fl: fl, sock: fl.sock, in: true}, 0, true
}

// readInside is kind.read for clients that go through a socket inside.
func (f *Forwarder) readInside(r *receiver, fl *flow, now int64) {
	f.receiveUDP(r, fl.sock.fd, fl.count(), answers{fl}, now)
}

// answers are what comes out of a client's socket inside.
type answers struct{ *flow }

func (a answers) came(_ netip.AddrPort, _ local, now int64) (w way, why dropReason, ok bool) {
	fl, sock := a.flow, a.client.forward.sock
	if !fl.replied(now) || !fl.acquire() {
		return w, dropStopped, false
	}
	if !sock.acquire() {
		fl.release()
		return w, dropStopped, false
	}
	return way{fl: fl, sock: sock}, 0, true
}

// sendOn sends run, whose datagrams make up t, through a socket that they did not come by.
func (f *Forwarder) sendOn(s *sender, w *way, run []stack.Datagram, t train) {
	if w.in {
		s.through(w.fl.v6(), run[0].TOS)
	} else {
		s.to(w.fl.client.real, 0, run[0].TOS)
		s.from(w.fl.client.at)
	}
	f.sendRun(s, *w, run, t)
}

// failed is user's: a client whose server is gone ends with its socket, and the next datagram finds who is there then.
func (fl *flow) failed(unix.Errno) {
	if fl.kind != &fl.f.inside {
		return
	}
	fl.mu.Lock()
	fl.gone = true
	fl.mu.Unlock()
	fl.f.drop(fl.kind, fl)
}
