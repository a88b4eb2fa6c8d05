package dns

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

var (
	first  = netip.MustParseAddrPort("192.0.2.53:53")
	second = netip.MustParseAddrPort("198.51.100.53:53")
)

func never(string, netip.AddrPort, *dns.Msg) *dns.Msg { return nil }

func TestQuestionTimesOut(t *testing.T) {
	inVirtualTime(t, with(first, second), never, func(t *testing.T, w world) {
		start := time.Now()
		w.pc.ask(t, "10.0.2.100", 1)
		m, _ := w.pc.answer(t)
		if m.Rcode != dns.RcodeServerFailure || time.Since(start) != 10*time.Second {
			t.Errorf("%s after %v", dns.RcodeToString[m.Rcode], time.Since(start))
		}
		if got := w.Stats(); got.Failures != 1 || got.Timeouts != 2 || got.Answers != 0 {
			t.Errorf("%+v", got)
		}
	})
}

func TestWithoutUpstreamsTheAnswerIsAtOnce(t *testing.T) {
	inVirtualTime(t, with(), never, func(t *testing.T, w world) {
		start := time.Now()
		w.pc.ask(t, "10.0.2.100", 1)
		if m, _ := w.pc.answer(t); m.Rcode != dns.RcodeServerFailure || time.Since(start) != 0 {
			t.Errorf("%v after %v", m, time.Since(start))
		}
	})
}

// One question finds out that the first upstream is dead; the others need not wait, until its time is over and one
// question tries it again.
func TestDeadUpstreamIsRemembered(t *testing.T) {
	alive := false
	reply := func(_ string, server netip.AddrPort, q *dns.Msg) *dns.Msg {
		if server == first && !alive {
			return nil
		}
		return says(server.Addr().String(), q)
	}
	inVirtualTime(t, with(first, second), reply, func(t *testing.T, w world) {
		ask := func(want netip.AddrPort, after time.Duration) {
			t.Helper()
			start := time.Now()
			w.pc.ask(t, "10.0.2.100", 1)
			m, _ := w.pc.answer(t)
			if got := address(t, m); got != want.Addr().String() || time.Since(start) != after {
				t.Fatalf("%s after %v, want %s after %v", got, time.Since(start), want, after)
			}
		}
		ask(second, 2*time.Second)
		ask(second, 0)
		time.Sleep(29 * time.Second)
		ask(second, 0)
		time.Sleep(time.Second)

		// One tries, the other is spared.
		start := time.Now()
		w.pc.ask(t, "10.0.2.100", 1)
		synctest.Wait()
		w.pc.ask(t, "10.0.2.100", 2)
		if m, _ := w.pc.answer(t); m.Id != 2 || time.Since(start) != 0 {
			t.Errorf("ID %d after %v", m.Id, time.Since(start))
		}
		if m, _ := w.pc.answer(t); m.Id != 1 || time.Since(start) != 2*time.Second {
			t.Errorf("ID %d after %v", m.Id, time.Since(start))
		}
		ask(second, 0)

		alive = true
		time.Sleep(30 * time.Second)
		ask(first, 0)
		ask(first, 0)
	})
}

// Two dead upstreams before one that lives cost the first question their time, and the next one nothing.
func TestDeadUpstreamsCostOneQuestion(t *testing.T) {
	third := netip.MustParseAddrPort("203.0.113.53:53")
	reply := func(_ string, server netip.AddrPort, q *dns.Msg) *dns.Msg {
		if server != third {
			return nil
		}
		return says(server.Addr().String(), q)
	}
	inVirtualTime(t, with(first, second, third), reply, func(t *testing.T, w world) {
		for i, want := range []time.Duration{4 * time.Second, 0, 0} {
			start := time.Now()
			w.pc.ask(t, "10.0.2.100", 1)
			if m, _ := w.pc.answer(t); address(t, m) != third.Addr().String() || time.Since(start) != want {
				t.Errorf("question %d: %v after %v, want %v", i, m, time.Since(start), want)
			}
		}
	})
}

// An answer that comes late is an answer: its upstream lives, and the one that was asked meanwhile does too.
func TestLateAnswerIsNoDeath(t *testing.T) {
	reply := func(_ string, server netip.AddrPort, q *dns.Msg) *dns.Msg {
		if server == second {
			return nil
		}
		time.Sleep(3 * time.Second)
		return says(server.Addr().String(), q)
	}
	inVirtualTime(t, with(first, second), reply, func(t *testing.T, w world) {
		for range 3 {
			start := time.Now()
			w.pc.ask(t, "10.0.2.100", 1)
			if m, _ := w.pc.answer(t); address(t, m) != first.Addr().String() || time.Since(start) != 3*time.Second {
				t.Errorf("%v after %v", m, time.Since(start))
			}
		}
	})
}

// One question that nobody has an answer to says nothing about the upstreams, nor does one that another refuses.
func TestOneSilenceIsNoDeath(t *testing.T) {
	for name, other := range map[string]func(q *dns.Msg) *dns.Msg{
		"silence": func(*dns.Msg) *dns.Msg { return nil },
		"refusal": func(q *dns.Msg) *dns.Msg { return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure) },
	} {
		t.Run(name, func(t *testing.T) {
			var n atomic.Int32
			reply := func(_ string, server netip.AddrPort, q *dns.Msg) *dns.Msg {
				switch {
				case server == first && n.Add(1)%2 == 0:
					return says(server.Addr().String(), q)
				case server == first:
					return nil
				}
				return other(q)
			}
			inVirtualTime(t, with(first, second), reply, func(t *testing.T, w world) {
				for i := range 6 {
					start := time.Now()
					w.pc.ask(t, "10.0.2.100", 1)
					m, _ := w.pc.answer(t)
					if i%2 == 0 {
						if m.Rcode != dns.RcodeServerFailure {
							t.Errorf("question %d: %v", i, m)
						}
					} else if address(t, m) != first.Addr().String() || time.Since(start) != 0 {
						t.Errorf("question %d: %v after %v", i, m, time.Since(start))
					}
				}
			})
		})
	}
}

// Nor do many, if it answers others meanwhile.
func TestSilenceAmongAnswersIsNoDeath(t *testing.T) {
	reply := func(_ string, server netip.AddrPort, q *dns.Msg) *dns.Msg {
		if server == first && q.Question[0].Name == "hole.example." {
			return nil
		}
		return says(server.Addr().String(), q)
	}
	inVirtualTime(t, with(first, second), reply, func(t *testing.T, w world) {
		hole := pack(t, new(dns.Msg).SetQuestion("hole.example.", dns.TypeA))
		for range 10 {
			w.pc.in <- packet{hole, client("10.0.2.100")}
		}
		time.Sleep(time.Second)
		for range 2 { // one in time, and one that shows what became of it
			w.pc.ask(t, "10.0.2.100", 1)
			if m, _ := w.pc.answer(t); address(t, m) != first.Addr().String() {
				t.Error(m)
			}
			time.Sleep(2 * time.Second)
			for range len(w.pc.out) {
				w.pc.answer(t)
			}
		}
	})
}

// With a refusal in hand the others get their time, and no more.
func TestRefusalBesideSilence(t *testing.T) {
	reply := func(_ string, server netip.AddrPort, q *dns.Msg) *dns.Msg {
		if server == second {
			return nil
		}
		m := new(dns.Msg)
		return m.SetRcode(q, dns.RcodeRefused)
	}
	inVirtualTime(t, with(first, second), reply, func(t *testing.T, w world) {
		start := time.Now()
		w.pc.ask(t, "10.0.2.100", 1)
		if m, _ := w.pc.answer(t); m.Rcode != dns.RcodeRefused || time.Since(start) != 2*time.Second {
			t.Errorf("%v after %v", m, time.Since(start))
		}
	})
}

// A client whose questions all hang gets SERVFAIL at once beyond half of the places; another one is
// served meanwhile.
func TestOneClientCannotStarveAnother(t *testing.T) {
	cfg := with(first)
	cfg.MaxInFlight = 100
	reply := func(_ string, _ netip.AddrPort, q *dns.Msg) *dns.Msg {
		if q.Question[0].Qtype == dns.TypeAAAA {
			return nil
		}
		return says("192.0.2.1", q)
	}
	inVirtualTime(t, cfg, reply, func(t *testing.T, w world) {
		hang := pack(t, new(dns.Msg).SetQuestion("example.org.", dns.TypeAAAA))
		for range 200 {
			w.pc.in <- packet{hang, client("10.0.2.100")}
		}
		for range 150 {
			if m, to := w.pc.answer(t); m.Rcode != dns.RcodeServerFailure || to.String() != client("10.0.2.100").String() {
				t.Fatalf("%v to %v", m, to)
			}
		}
		synctest.Wait()
		if n := len(w.pc.out); n != 0 || w.Stats().Limited != 150 {
			t.Fatalf("%d more answers, %+v", n, w.Stats())
		}
		start := time.Now()
		w.pc.ask(t, "10.0.2.101", 9)
		if m, _ := w.pc.answer(t); address(t, m) != "192.0.2.1" || time.Since(start) != 0 {
			t.Errorf("%v after %v", m, time.Since(start))
		}
		// And when its questions have timed out, the first one has its places again.
		for range 50 {
			w.pc.answer(t)
		}
		w.pc.ask(t, "10.0.2.100", 10)
		if m, _ := w.pc.answer(t); address(t, m) != "192.0.2.1" {
			t.Error(m)
		}
	})
}

func TestShare(t *testing.T) {
	s := newShare(9)
	a, b, c := netip.MustParseAddr("10.0.2.1"), netip.MustParseAddr("10.0.2.2"), netip.MustParseAddr("10.0.2.3")
	fill := func(client netip.Addr) (n int) {
		for s.take(client) {
			n++
		}
		return n
	}
	if x, y, z := fill(a), fill(b), fill(c); x != 5 || y != 2 || z != 1 {
		t.Errorf("%d %d %d", x, y, z)
	}
	for range 5 {
		s.give(a)
	}
	if n := fill(b); n != 2 || !s.take(a) {
		t.Errorf("of six free places b took %d more and left none for a", n)
	}
	s.give(a)
	if len(s.held) != 2 {
		t.Errorf("%d clients remembered", len(s.held))
	}
	if one := newShare(1); !one.take(a) || one.take(b) {
		t.Error("one place")
	}
}

// Questions of one connection are answered in the order in which answers come.
func TestPipelining(t *testing.T) {
	release := make(chan struct{})
	reply := func(_ string, _ netip.AddrPort, q *dns.Msg) *dns.Msg {
		if q.Question[0].Name == "slow.example." {
			<-release
		}
		return says("192.0.2.1", q)
	}
	cfg := with(first)
	inVirtualTime(t, cfg, reply, func(t *testing.T, w world) {
		release = make(chan struct{})
		conn := w.ln.connect("10.0.2.100")
		defer conn.Close()
		for id, name := range []string{"slow.example.", "b.example.", "c.example."} {
			m := new(dns.Msg).SetQuestion(name, dns.TypeA)
			m.Id = uint16(id)
			if _, err := conn.Write(frame(pack(t, m))); err != nil {
				t.Fatal(err)
			}
		}
		next := func() uint16 {
			msg, err := readMessage(conn)
			if err != nil {
				t.Fatal(err)
			}
			m := new(dns.Msg)
			if err := m.Unpack(msg); err != nil || len(m.Answer) != 1 {
				t.Fatal(m, err)
			}
			return m.Id
		}
		if got := next() + next(); got != 1+2 {
			t.Errorf("the slow one was among the first two")
		}
		close(release)
		if next() != 0 {
			t.Error("not the slow one")
		}
	})
}

func TestIdleConnectionIsClosed(t *testing.T) {
	inVirtualTime(t, with(first), never, func(t *testing.T, w world) {
		for _, sent := range []string{"", "\x00", "\x00\x20half a question"} {
			conn := w.ln.connect("10.0.2.100")
			start := time.Now()
			io.WriteString(conn, sent)
			if _, err := conn.Read(make([]byte, 1)); err != io.EOF || time.Since(start) != 30*time.Second {
				t.Errorf("%q: %v after %v", sent, err, time.Since(start))
			}
			conn.Close()
		}
	})
}

// A client that takes no answers loses its connection, and nobody else waits for it.
func TestSlowReaderCostsNobodyElse(t *testing.T) {
	reply := func(_ string, _ netip.AddrPort, q *dns.Msg) *dns.Msg { return says("192.0.2.1", q) }
	cfg := with(first)
	cfg.MaxInFlight = 2 // one for each client
	inVirtualTime(t, cfg, reply, func(t *testing.T, w world) {
		slow := w.ln.connect("10.0.2.100")
		defer slow.Close()
		q := frame(pack(t, new(dns.Msg).SetQuestion("example.org.", dns.TypeA)))
		start := time.Now()
		for range 3 {
			slow.Write(q)
			synctest.Wait()
		}
		w.pc.ask(t, "10.0.2.100", 1) // of the same address even
		if m, _ := w.pc.answer(t); address(t, m) != "192.0.2.1" || time.Since(start) != 0 {
			t.Errorf("%v after %v", m, time.Since(start))
		}
		time.Sleep(6 * time.Second)
		if _, err := slow.Write(q); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("the connection lives: %v", err)
		}
	})
}

func TestPipelineIsBounded(t *testing.T) {
	inVirtualTime(t, with(first), never, func(t *testing.T, w world) {
		conn := w.ln.connect("10.0.2.100")
		defer conn.Close()
		conn.SetWriteDeadline(time.Now().Add(time.Second))
		q := frame(pack(t, new(dns.Msg).SetQuestion("example.org.", dns.TypeA)))
		for range 200 {
			if _, err := conn.Write(q); err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error(err)
				}
				break
			}
		}
		if n := w.Stats().Queries; n != maxPipelined {
			t.Errorf("%d questions read", n)
		}
	})
}

func TestConnectionsAreBounded(t *testing.T) {
	cfg := with(first)
	cfg.MaxConns = 4
	inVirtualTime(t, cfg, never, func(t *testing.T, w world) {
		var held []net.Conn
		for range 2 {
			held = append(held, w.ln.connect("10.0.2.100"))
		}
		third := w.ln.connect("10.0.2.100")
		if _, err := third.Read(make([]byte, 1)); err != io.EOF || w.Stats().Limited != 1 {
			t.Errorf("third: %v, %+v", err, w.Stats())
		}
		other := w.ln.connect("10.0.2.101")
		if _, err := other.Write([]byte{0}); err != nil {
			t.Error(err)
		}
		for _, c := range append(held, other) {
			c.Close()
		}
		synctest.Wait()
		again := w.ln.connect("10.0.2.100")
		if _, err := again.Write([]byte{0}); err != nil {
			t.Error(err)
		}
		again.Close()
	})
}

// A listener that runs out of descriptors is not the end.
func TestAcceptGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := with()
		var log strings.Builder
		cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ln := &tiredListener{fakeListener: fakeListener{conns: make(chan net.Conn), closed: make(chan struct{})}, tired: 3}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Serve(ctx, nil, []net.Listener{ln}) }()
		conn := ln.connect("10.0.2.100")
		conn.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := strings.Count(log.String(), "too many open files"); n != 1 {
			t.Errorf("said %d times:\n%s", n, &log)
		}
	})
}

// Nor is a socket that returns an error which says nothing about it; one that is closed is.
func TestReadGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := with()
		var log strings.Builder
		cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		pc := &tiredPacketConn{tired: 3, fakePacketConn: fakePacketConn{
			in: make(chan packet), out: make(chan packet, 1), closed: make(chan struct{}),
		}}
		done := make(chan error)
		go func() { done <- s.Serve(t.Context(), []net.PacketConn{pc}, nil) }()
		pc.ask(t, "10.0.2.100", 1)
		if m, _ := pc.answer(t); m.Rcode != dns.RcodeServerFailure {
			t.Error(m)
		}
		if n := strings.Count(log.String(), "connection refused"); n != 1 {
			t.Errorf("said %d times:\n%s", n, &log)
		}
		pc.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
}

// Where the network below ends, its sockets fail before ctx does, and it is not for us to say why.
func TestEndOfTheNetworkIsNoFailure(t *testing.T) {
	for name, close := range map[string]func(*fakePacketConn, *fakeListener){
		"UDP": func(pc *fakePacketConn, _ *fakeListener) { pc.Close() },
		"TCP": func(_ *fakePacketConn, ln *fakeListener) { ln.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, err := New(with(first))
				if err != nil {
					t.Fatal(err)
				}
				pc := &fakePacketConn{in: make(chan packet), closed: make(chan struct{})}
				ln := &fakeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error)
				go func() { done <- s.Serve(ctx, []net.PacketConn{pc}, []net.Listener{ln}) }()
				close(pc, ln)
				time.Sleep(settle / 2)
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

type tiredPacketConn struct {
	fakePacketConn
	tired int
}

func (c *tiredPacketConn) ReadFrom(b []byte) (int, net.Addr, error) {
	if c.tired > 0 {
		c.tired--
		return 0, nil, &net.OpError{Op: "read", Err: syscall.ECONNREFUSED}
	}
	return c.fakePacketConn.ReadFrom(b)
}

type tiredListener struct {
	fakeListener
	tired int
}

func (l *tiredListener) Accept() (net.Conn, error) {
	if l.tired > 0 {
		l.tired--
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return l.fakeListener.Accept()
}
