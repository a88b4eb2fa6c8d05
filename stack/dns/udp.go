package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// servePacket reads questions from pc until it is closed, and waits for the answers to them.
func (s *Server) servePacket(ctx context.Context, pc net.PacketConn) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	buf := make([]byte, 1<<16)
	for said := false; ; {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
				return fmt.Errorf("read questions on udp %s: %w", pc.LocalAddr(), err)
			}
			// An ICMP error, perhaps, that a client sent to be rid of us.
			if !said {
				s.cfg.Log.Warn("name server reads no question", "socket", pc.LocalAddr(), "err", err)
			}
			said = true
			wait(ctx, 100*time.Millisecond)
			continue
		}
		said = false
		client := clientOf(from)
		q, answer, forward := s.receive(client, buf[:n])
		if forward && !s.questions.take(client) {
			answer, forward = s.overload(&q), false
		}
		if forward {
			q.wire = bytes.Clone(q.wire) // buf is for the next one
			wg.Go(func() {
				defer s.questions.give(client)
				s.sendPacket(pc, &q, s.resolve(ctx, "udp", &q), from)
			})
			continue
		}
		s.sendPacket(pc, &q, answer, from)
	}
}

// sendPacket sends an answer in what the client takes. An answer that cannot be sent is lost like any other
// datagram: the client asks again.
func (s *Server) sendPacket(pc net.PacketConn, q *question, answer []byte, to net.Addr) {
	if answer == nil {
		return
	}
	if len(answer) > q.size {
		s.stats.truncated.Add(1)
		answer = q.truncate(answer)
	}
	pc.WriteTo(answer, to)
}
