package stack

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Conn is a TCP connection with the container. It is a net.Conn with deadlines and half-close;
// for speed it also has a side that never blocks: Drain, Fill and OnReady. Errors keep
// their errno, so errors.Is(err, unix.ECONNRESET) tells an abort from the end of the stream.
//
// Local is the address that the container speaks to, Remote is the container's.
type Conn struct {
	s             *Stack
	ep            tcpip.Endpoint
	wq            *waiter.Queue
	local, remote netip.AddrPort

	entry waiter.Entry // of OnReady
	ready func(in, out, ended bool)
	feed  feeder
	reset atomic.Bool // by the container, after its FIN

	readMu, writeMu             sync.Mutex
	readDeadline, writeDeadline deadline
	closeOnce                   sync.Once
}

func newConn(s *Stack, ep tcpip.Endpoint, wq *waiter.Queue, local, remote netip.AddrPort) *Conn {
	c := &Conn{s: s, ep: ep, wq: wq, local: local, remote: remote}
	s.setEndpointOptions(ep, s.conns.Add(1))
	return c
}

// OnReady has ready called whenever something may be new, and once with all of it before
// OnReady returns: in, Drain may have octets or the end of them; out, Fill may have room; ended, the
// connection is over, in order or not. ready is called with netstack's locks held: it must not block nor
// call the Conn. It is called no more once Close or Abort has returned. Call OnReady at most once.
func (c *Conn) OnReady(ready func(in, out, ended bool)) {
	c.ready = ready
	c.entry.Init(c, waiter.AllEvents)
	c.wq.EventRegister(&c.entry)
	ready(true, true, true)
}

// NotifyEvent is netstack's side of OnReady.
func (c *Conn) NotifyEvent(mask waiter.EventMask) {
	c.ready(
		mask&(waiter.ReadableEvents|waiter.EventRdHUp) != 0,
		mask&waiter.WritableEvents != 0,
		mask&(waiter.EventErr|waiter.EventHUp) != 0,
	)
}

// Drain hands write what the container has sent, in order and without a copy, and
// drops as many octets as write says it took. write may take fewer, and is called without
// netstack's locks. n is what was dropped. err is write's, or unix.EAGAIN when nothing is
// there, io.EOF after the container's FIN, or the errno that ended the connection; write has not been
// called then. One goroutine at a time may drain or read.
func (c *Conn) Drain(write func(pieces [][]byte) (int, error)) (n int, err error) {
	p := c.s.peekers.Get().(*peeker)
	defer c.s.peekers.Put(p)
	p.pieces, p.size = p.pieces[:0], 0
	if _, terr := c.ep.Read(p, tcpip.ReadOptions{Peek: true}); terr != nil {
		return 0, errno(terr)
	}
	n, err = write(p.pieces)
	clear(p.pieces)
	if n > 0 {
		p.left = n
		if _, terr := c.ep.Read((*consumer)(p), tcpip.ReadOptions{}); terr != nil && err == nil {
			err = errno(terr)
		}
		c.moderate(n)
	}
	return n, err
}

// Err returns what ended the connection before its time (unix.ECONNRESET after the container's
// RST, unix.ETIMEDOUT when it has gone silent), and nil while it stands or after an orderly end.
func (c *Conn) Err() error {
	switch tcp.EndpointState(c.ep.State()) {
	case tcp.StateError:
		if err := c.ep.LastError(); err != nil {
			return errno(err)
		}
		return unix.ECONNRESET
	case tcp.StateClose:
		// netstack's way to say that a RST came after the container's FIN (RFC 9293 §3.10.7.4, CLOSE-WAIT).
		// It says so once.
		if _, reset := c.ep.LastError().(*tcpip.ErrAborted); reset {
			c.reset.Store(true)
		}
		if c.reset.Load() {
			return unix.ECONNRESET
		}
	}
	return nil
}

// moderate lets netstack grow the receive window with what was read.
func (c *Conn) moderate(n int) {
	if m, ok := c.ep.(interface{ ModerateRecvBuf(int) }); ok {
		m.ModerateRecvBuf(n)
	}
}

// maxPieces and maxPeek bound one Drain: IOV_MAX is 1024, and one connection must not keep the others waiting.
const (
	maxPieces = 64
	maxPeek   = 1 << 20 // octets
)

// peeker collects the pieces of a receive queue. Peekers are shared: an idle connection needs none.
type peeker struct {
	pieces [][]byte
	size   int
	left   int // of a consumer
}

func (p *peeker) Write(b []byte) (int, error) {
	if len(p.pieces) == maxPieces || p.size >= maxPeek {
		return 0, io.ErrShortWrite
	}
	p.pieces = append(p.pieces, b)
	p.size += len(b)
	return len(b), nil
}

// consumer takes left octets out of a receive queue and forgets them.
type consumer peeker

func (c *consumer) Write(b []byte) (int, error) {
	if len(b) > c.left {
		n := c.left
		c.left = 0
		return n, io.ErrShortWrite
	}
	c.left -= len(b)
	return len(b), nil
}

// Fill has read provide n octets, in as many calls as it takes, and sends them to the container;
// less if there is less room. read is called only while there is room, and without netstack's
// locks; it must have n octets ready. err is read's (nothing is sent then, and what it has read is lost), or
// unix.EAGAIN when there is no room, or the errno that ended the connection; read has
// not been called in these two cases. One goroutine at a time may fill or write.
func (c *Conn) Fill(n int, read func(p []byte) (int, error)) (int, error) {
	c.feed = feeder{read: read, left: n}
	sent, terr := c.ep.Write(&c.feed, tcpip.WriteOptions{})
	err := c.feed.err
	c.feed = feeder{}
	if err != nil {
		return int(sent), err
	}
	return int(sent), errno(terr)
}

// feeder is the tcpip.Payloader of Fill. One that ends early with io.EOF would be asked for ever
// (buffer.WriteFromReaderAndLimitedReader never sees an io.EOF); TestDrainAndFill pins it.
type feeder struct {
	read func([]byte) (int, error)
	left int
	err  error
}

func (f *feeder) Len() int { return f.left }

func (f *feeder) Read(p []byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	if len(p) == 0 {
		return 0, nil // netstack asks whether this is the end
	}
	n, err := f.read(p[:min(len(p), f.left)])
	f.left -= n
	if err == nil && n == 0 || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	f.err = err
	return n, err
}

// Close ends the connection in order: what was written is still delivered, then FIN. What the
// container sends from now on is answered with RST.
func (c *Conn) Close() error {
	c.closeOnce.Do(func() {
		c.unregister()
		c.s.conns.Add(-1)
		c.ep.Close()
		c.readDeadline.close()
		c.writeDeadline.close()
	})
	return nil
}

// Abort ends the connection with RST.
func (c *Conn) Abort() {
	c.closeOnce.Do(func() {
		c.unregister()
		c.s.conns.Add(-1)
		c.ep.Abort()
		c.ep.Close()
		c.readDeadline.close()
		c.writeDeadline.close()
	})
}

func (c *Conn) unregister() {
	if c.ready != nil {
		c.wq.EventUnregister(&c.entry)
	}
}

// CloseWrite sends FIN after what was written; reading goes on.
func (c *Conn) CloseWrite() error {
	return errno(c.ep.Shutdown(tcpip.ShutdownWrite))
}

// CloseRead ends reading; writing goes on.
func (c *Conn) CloseRead() error {
	return errno(c.ep.Shutdown(tcpip.ShutdownRead))
}

func (c *Conn) Read(b []byte) (int, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if len(b) == 0 {
		return 0, nil
	}
	w := tcpip.SliceWriter(b)
	for {
		if c.readDeadline.passed() {
			return 0, c.timeout("read", &c.readDeadline)
		}
		entry, ch := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
		c.wq.EventRegister(&entry)
		res, terr := c.ep.Read(&w, tcpip.ReadOptions{})
		if _, again := terr.(*tcpip.ErrWouldBlock); !again {
			c.wq.EventUnregister(&entry)
			if terr != nil {
				return 0, c.wrap("read", errno(terr))
			}
			c.moderate(res.Count)
			return res.Count, nil
		}
		select {
		case <-ch:
		case <-c.readDeadline.wait():
		}
		c.wq.EventUnregister(&entry)
	}
}

func (c *Conn) Write(b []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	done := 0
	for done < len(b) {
		if c.writeDeadline.passed() {
			return done, c.timeout("write", &c.writeDeadline)
		}
		entry, ch := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
		c.wq.EventRegister(&entry)
		n, terr := c.ep.Write(bytes.NewReader(b[done:]), tcpip.WriteOptions{})
		done += int(n)
		if _, again := terr.(*tcpip.ErrWouldBlock); again {
			select {
			case <-ch:
			case <-c.writeDeadline.wait():
			}
		}
		c.wq.EventUnregister(&entry)
		if _, again := terr.(*tcpip.ErrWouldBlock); terr != nil && !again {
			return done, c.wrap("write", errno(terr))
		}
	}
	return done, nil
}

func (c *Conn) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(c.local) }
func (c *Conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

func (c *Conn) SetDeadline(t time.Time) error {
	c.readDeadline.set(t)
	c.writeDeadline.set(t)
	return nil
}

func (c *Conn) SetReadDeadline(t time.Time) error {
	c.readDeadline.set(t)
	return nil
}

func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.writeDeadline.set(t)
	return nil
}

// wrap gives err the form that package net's connections use; io.EOF stays bare.
func (c *Conn) wrap(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// timeout tells a passed deadline from Close, which also lets one pass.
func (c *Conn) timeout(op string, d *deadline) error {
	if d.isClosed() {
		return c.wrap(op, net.ErrClosed)
	}
	return c.wrap(op, os.ErrDeadlineExceeded)
}
