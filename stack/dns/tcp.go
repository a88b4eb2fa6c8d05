package dns

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// maxPipelined is the limit on questions of one connection that are not answered yet (RFC 7766
// §6.2.1.1). Beyond it the connection is not read, which costs nobody but its client.
const maxPipelined = 16

// serveStream accepts connections from ln until it is closed, and waits for their end.
func (s *Server) serveStream(ctx context.Context, ln net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for said := false; ; {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if !passing(err) {
				return fmt.Errorf("accept questions on tcp %s: %w", ln.Addr(), err)
			}
			if !said {
				s.cfg.Log.Warn("name server takes no connection", "listener", ln.Addr(), "err", err)
			}
			said = true
			wait(ctx, 100*time.Millisecond) // until somebody closes a descriptor
			continue
		}
		said = false
		client := clientOf(conn.RemoteAddr())
		if !s.conns.take(client) {
			s.stats.limited.Add(1)
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer s.conns.give(client)
			c := &stream{Server: s, conn: conn, client: client, turn: make(chan struct{}, 1)}
			c.serve(ctx)
		})
	}
}

// passing tells errors of accept(2) that say nothing about the listener.
func passing(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// A stream is one connection of a client: RFC 7766.
type stream struct {
	*Server
	conn   net.Conn
	client netip.Addr

	// turn holds a token while an answer is written. No mutex: the wait may be long, and tests in virtual time
	// see through a channel only.
	turn chan struct{}
}

// serve reads questions until the client has no more, and waits for the answers to them: a client that
// has shut down its sending side still reads.
func (c *stream) serve(ctx context.Context) {
	defer c.conn.Close()
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()

	r := bufio.NewReaderSize(c.conn, 1024)
	places := make(chan struct{}, maxPipelined)
	for {
		places <- struct{}{} // questions end by themselves, so that this does
		msg, err := c.read(r)
		if err != nil {
			return
		}
		q, answer, forward := c.receive(c.client, msg)
		if forward && !c.questions.take(c.client) {
			answer, forward = c.overload(&q), false
		}
		if !forward {
			c.write(answer)
			<-places
			continue
		}
		wg.Go(func() {
			answer := c.resolve(ctx, "tcp", &q)
			c.questions.give(c.client) // before a client that may be slow to read
			c.write(answer)
			<-places
		})
	}
}

// read returns the next message: RFC 1035 §4.2.2.
func (c *stream) read(r *bufio.Reader) ([]byte, error) {
	if err := c.conn.SetReadDeadline(time.Now().Add(c.cfg.IdleTimeout)); err != nil {
		return nil, err
	}
	return readMessage(r)
}

// readMessage reads a message and the two octets of length before it.
func readMessage(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(r, msg); err != nil {
		return nil, fmt.Errorf("message of %d octets: %w", len(msg), err)
	}
	return msg, nil
}

// frame puts the length before a message; one Write, one segment (RFC 7766 §8).
func frame(msg []byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg))), msg...)
}

// write sends an answer; a client that does not take it in time loses its connection.
func (c *stream) write(answer []byte) {
	if answer == nil {
		return
	}
	c.turn <- struct{}{}
	defer func() { <-c.turn }()
	err := c.conn.SetWriteDeadline(time.Now().Add(c.cfg.WriteTimeout))
	if err == nil {
		_, err = c.conn.Write(frame(answer))
	}
	if err != nil {
		c.conn.Close() // ends read; what else waits to be written fails
	}
}
