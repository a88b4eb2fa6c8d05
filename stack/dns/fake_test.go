package dns

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// For tests in virtual time, where real sockets cannot be: packets and connections in memory.

type packet struct {
	data []byte
	addr net.Addr
}

type fakePacketConn struct {
	in, out chan packet
	closed  chan struct{}
	once    sync.Once
}

func (c *fakePacketConn) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case p := <-c.in:
		return copy(b, p.data), p.addr, nil
	case <-c.closed:
		return 0, nil, net.ErrClosed
	}
}

func (c *fakePacketConn) WriteTo(b []byte, to net.Addr) (int, error) {
	select {
	case c.out <- packet{append([]byte(nil), b...), to}:
		return len(b), nil
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

func (c *fakePacketConn) Close() error                     { c.once.Do(func() { close(c.closed) }); return nil }
func (c *fakePacketConn) LocalAddr() net.Addr              { return client("10.0.2.3") }
func (c *fakePacketConn) SetDeadline(time.Time) error      { return nil }
func (c *fakePacketConn) SetReadDeadline(time.Time) error  { return nil }
func (c *fakePacketConn) SetWriteDeadline(time.Time) error { return nil }

func client(ip string) net.Addr {
	return net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(ip), 5000))
}

// ask sends a question from ip and does not wait.
func (c *fakePacketConn) ask(t *testing.T, ip string, id uint16) {
	t.Helper()
	m := new(dns.Msg).SetQuestion("example.org.", dns.TypeA)
	m.Id = id
	c.in <- packet{pack(t, m), client(ip)}
}

// answer waits for the next answer.
func (c *fakePacketConn) answer(t *testing.T) (*dns.Msg, net.Addr) {
	t.Helper()
	p := <-c.out
	m := new(dns.Msg)
	if err := m.Unpack(p.data); err != nil {
		t.Fatal(err)
	}
	return m, p.addr
}

type fakeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *fakeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *fakeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *fakeListener) Addr() net.Addr { return client("10.0.2.3") }

type connFrom struct {
	net.Conn
	addr net.Addr
}

func (c connFrom) RemoteAddr() net.Addr { return c.addr }

// connect makes a connection from ip and returns the client's end.
func (l *fakeListener) connect(ip string) net.Conn {
	ours, theirs := net.Pipe()
	l.conns <- connFrom{theirs, client(ip)}
	return ours
}

// A world is a server in virtual time. reply is asked what an upstream says; nil is nothing, ever.
type world struct {
	*Server
	pc *fakePacketConn
	ln *fakeListener
}

func inVirtualTime(t *testing.T, cfg Config, reply func(network string, server netip.AddrPort, q *dns.Msg) *dns.Msg, f func(t *testing.T, w world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var wg sync.WaitGroup
		cfg.Log = slog.New(slog.DiscardHandler)
		cfg.Dial = func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
			ours, theirs := net.Pipe()
			wg.Go(func() {
				defer theirs.Close()
				var msg []byte
				var err error
				if network == "tcp" {
					msg, err = readMessage(theirs)
				} else {
					msg = make([]byte, 512)
					var n int
					n, err = theirs.Read(msg)
					msg = msg[:n]
				}
				q := new(dns.Msg)
				if err != nil || q.Unpack(msg) != nil {
					return
				}
				if a := reply(network, addr, q); a != nil {
					out, err := a.Pack()
					if err != nil {
						panic(err)
					}
					if network == "tcp" {
						out = frame(out)
					}
					theirs.Write(out)
				}
				io.Copy(io.Discard, theirs) // until it is closed
			})
			return ours, nil
		}
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		w := world{
			Server: s,
			pc:     &fakePacketConn{in: make(chan packet), out: make(chan packet, 4096), closed: make(chan struct{})},
			ln:     &fakeListener{conns: make(chan net.Conn), closed: make(chan struct{})},
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Serve(ctx, []net.PacketConn{w.pc}, []net.Listener{w.ln}) }()
		f(t, w)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		wg.Wait() // and synctest fails when anything else still runs
	})
}

func says(a string, q *dns.Msg) *dns.Msg {
	m := new(dns.Msg)
	give(a)(writer{m}, q)
	return m
}
