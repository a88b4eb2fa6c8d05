package dns

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// exchange asks one upstream, on a socket of its own, and returns its answer with
// the ID that we asked with. It ends when ctx does.
func (s *Server) exchange(ctx context.Context, network string, server netip.AddrPort, q *question) ([]byte, error) {
	conn, err := s.cfg.Dial(ctx, network, server)
	if err != nil {
		return nil, fmt.Errorf("ask %s by %s: %w", server, network, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	ask := askPacket
	if network == "tcp" {
		ask = askStream
	}
	answer, err := ask(conn, q)
	if err != nil {
		return nil, fmt.Errorf("ask %s by %s: %w", server, network, err)
	}
	return answer, nil
}

// askPacket asks by UDP. What is no answer to this question is passed over: anybody who guesses our port can
// send such.
func askPacket(conn net.Conn, q *question) ([]byte, error) {
	msg, id := disguise(q)
	if _, err := conn.Write(msg); err != nil {
		return nil, err
	}
	// One octet more than the client takes shows that there was more.
	buf := make([]byte, q.size+1)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return nil, err
		}
		if q.answeredBy(buf[:n], id) {
			return buf[:n], nil
		}
	}
}

// askStream asks by TCP, one connection for one question: a stub that asks by TCP is rare, and what the
// resolvers of a host make of an idle connection is many different things.
func askStream(conn net.Conn, q *question) ([]byte, error) {
	msg, id := disguise(q)
	if _, err := conn.Write(frame(msg)); err != nil {
		return nil, err
	}
	answer, err := readMessage(bufio.NewReaderSize(conn, 1024))
	if err != nil {
		return nil, err
	}
	if !q.answeredBy(answer, id) {
		return nil, errors.New("what came is not the answer to the question")
	}
	return answer, nil
}

// disguise returns the question with an ID of its own: the client's could be known to others (RFC 5452 §9.2).
func disguise(q *question) ([]byte, uint16) {
	msg := bytes.Clone(q.wire)
	rand.Read(msg[:2])
	return msg, binary.BigEndian.Uint16(msg)
}
