package api

import (
	"io"
	"net"
	"sync"
)

// A conn is a client's connection whose first octet can be looked at ahead. Closing it gives its place back.
type conn struct {
	net.Conn
	first   byte // not yet read, where ahead
	ahead   bool
	release func()
	once    sync.Once
}

// peek reads the first octet and keeps it for Read.
func (c *conn) peek() error {
	var b [1]byte
	if _, err := io.ReadFull(c.Conn, b[:]); err != nil {
		return err
	}
	c.first, c.ahead = b[0], true
	return nil
}

func (c *conn) Read(p []byte) (int, error) {
	if c.ahead && len(p) > 0 {
		p[0], c.ahead = c.first, false
		return 1, nil
	}
	return c.Conn.Read(p)
}

func (c *conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.release)
	return err
}

// A handover is the listener of the HTTP server: it accepts what it is given.
type handover struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newHandover(addr net.Addr) *handover {
	return &handover{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

// give passes c on, or closes it where nobody takes any more.
func (h *handover) give(c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.done:
		c.Close()
	}
}

func (h *handover) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *handover) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

func (h *handover) Addr() net.Addr { return h.addr }
