package relay

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tcpSide returns a connected socket of TCP for JoinSockets, and its peer.
func tcpSide(t testing.TB) (int, net.Conn) { return hostPair(t) }

// unixSide is tcpSide of AF_UNIX.
func unixSide(t testing.TB) (int, net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fds[0], netConn(t, fds[1])
}

// netConn makes a net.Conn of a socket, until the test ends.
func netConn(t testing.TB, fd int) net.Conn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

type sideFunc func(testing.TB) (int, net.Conn)

// joined returns the far ends of a pair: what a client on the host has, and a server in the container.
func joined(t testing.TB, l *Loop, host, container sideFunc, o Options) (client, server net.Conn, j *Joint) {
	t.Helper()
	h, client := host(t)
	c, server := container(t)
	j, err := l.JoinSockets(h, c, o)
	if err != nil {
		t.Fatal(err)
	}
	return client, server, j
}

func closeWrite(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Error(err)
	}
}

// reset closes c with RST.
func reset(t testing.TB, c net.Conn) {
	t.Helper()
	if err := errors.Join(c.(*net.TCPConn).SetLinger(0), c.Close()); err != nil {
		t.Error(err)
	}
}

// outcome returns Options with a Done, and what it says.
func outcome() (Options, chan error) {
	done := make(chan error, 2) // two: a second call shows
	return Options{Done: func(err error) { done <- err }, Count: new(Count)}, done
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 131 >> 3)
	}
	return b
}

func TestPairPassesBothWays(t *testing.T) {
	for _, test := range []struct {
		name            string
		host, container sideFunc
	}{{"TCP", tcpSide, tcpSide}, {"AF_UNIX to TCP", unixSide, tcpSide}, {"AF_UNIX", unixSide, unixSide}} {
		t.Run(test.name, func(t *testing.T) {
			l, _ := running(t)
			o, done := outcome()
			client, server, _ := joined(t, l, test.host, test.container, o)
			up, down := pattern(5<<20+1), pattern(3<<20+7)
			var wg sync.WaitGroup
			for c, b := range map[net.Conn][]byte{client: up, server: down} {
				wg.Go(func() {
					if n, err := c.Write(b); err != nil {
						t.Errorf("wrote %d of %d octets: %v", n, len(b), err)
					}
					closeWrite(t, c)
				})
			}
			for c, want := range map[net.Conn][]byte{server: up, client: down} {
				wg.Go(func() {
					if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
						t.Errorf("read %d of %d octets, %v", len(got), len(want), err)
					}
				})
			}
			wg.Wait()
			if err := <-done; err != nil {
				t.Errorf("ended with %v", err)
			}
			if in, out := o.Count.In.Load(), o.Count.Out.Load(); in != uint64(len(up)) || out != uint64(len(down)) {
				t.Errorf("counted %d in and %d out, want %d and %d", in, out, len(up), len(down))
			}
			if st := l.Stats(); st.Active != 0 || st.Joined != 1 || st.Aborted != 0 || st.OctetsIn != uint64(len(up)) || st.OctetsOut != uint64(len(down)) {
				t.Errorf("counted %+v", st)
			}
			if held := l.rests.held.Load(); held != 0 {
				t.Errorf("%d octets are still lent", held)
			}
		})
	}
}

// A FIN ends one direction only, whichever comes first.
func TestPairHalfClose(t *testing.T) {
	for _, first := range []string{"client", "server"} {
		t.Run(first, func(t *testing.T) {
			l, _ := running(t)
			o, done := outcome()
			a, b, _ := joined(t, l, tcpSide, tcpSide, o)
			if first == "server" {
				a, b = b, a
			}
			closeWrite(t, a)
			if n, err := b.Read(make([]byte, 1)); err != io.EOF {
				t.Fatalf("read %d, %v; want the end", n, err)
			}
			for range 3 {
				if _, err := b.Write([]byte("late")); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, 4)
				if _, err := io.ReadFull(a, got); err != nil || string(got) != "late" {
					t.Fatalf("read %q, %v", got, err)
				}
			}
			select {
			case err := <-done:
				t.Fatalf("ended with %v, though one direction stands", err)
			default:
			}
			closeWrite(t, b)
			if _, err := a.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("read: %v, want the end", err)
			}
			if err := <-done; err != nil {
				t.Errorf("ended with %v", err)
			}
		})
	}
}

func TestPairReset(t *testing.T) {
	for _, first := range []string{"client", "server"} {
		for _, half := range []bool{false, true} {
			t.Run(first, func(t *testing.T) {
				l, _ := running(t)
				o, done := outcome()
				a, b, _ := joined(t, l, tcpSide, tcpSide, o)
				if first == "server" {
					a, b = b, a
				}
				if half { // a RST after the other's FIN
					closeWrite(t, b)
					if _, err := a.Read(make([]byte, 1)); err != io.EOF {
						t.Fatalf("read: %v, want the end", err)
					}
				}
				reset(t, a)
				if _, err := b.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the other end saw %v, want ECONNRESET", err)
				}
				if err := <-done; !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("ended with %v, want ECONNRESET", err)
				}
				if st := l.Stats(); st.Aborted != 1 || st.Active != 0 {
					t.Errorf("counted %+v", st)
				}
			})
		}
	}
}

// AF_UNIX has no RST: its peer sees the end of the stream.
func TestPairResetToUnix(t *testing.T) {
	l, _ := running(t)
	o, done := outcome()
	client, server, _ := joined(t, l, unixSide, tcpSide, o)
	if _, err := server.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	reset(t, server)
	if got, err := io.ReadAll(client); err != nil || len(got) > 0 && string(got) != "last words" {
		t.Errorf("read %q, %v", got, err)
	}
	if err := <-done; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("ended with %v, want ECONNRESET", err)
	}
}

// What came before a RST arrives before it: an early answer to a request that the server does not read.
func TestPairOctetsBeforeReset(t *testing.T) {
	l, _ := running(t)
	for range 50 {
		o, done := outcome()
		client, server, _ := joined(t, l, tcpSide, tcpSide, o)
		if _, err := client.Write([]byte("a request that nobody reads")); err != nil {
			t.Fatal(err)
		}
		if _, err := server.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if _, err := server.Write([]byte("413")); err != nil {
			t.Fatal(err)
		}
		server.Close() // octets are unread, so this is a RST
		got, err := io.ReadAll(client)
		if string(got) != "413" || !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("the client read %q, %v", got, err)
		}
		if err := <-done; !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			t.Errorf("ended with %v, want a reset", err)
		}
	}
}

// clog has c written to until neither the pair nor the kernel takes more, and returns how many octets that were. The
// peer of c does not read.
func clog(t *testing.T, l *Loop, c net.Conn) int {
	t.Helper()
	raw, err := c.(interface {
		SyscallConn() (syscall.RawConn, error)
	}).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	sent, idle := 0, 0
	b := pattern(64 << 10)
	until(t, "the pair is clogged", func() bool {
		took := false
		if err := raw.Control(func(fd uintptr) {
			for {
				n, err := unix.SendmsgN(int(fd), b[:1+(sent*7)%len(b)], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
				if err != nil {
					break
				}
				sent, took = sent+n, true
			}
		}); err != nil {
			t.Fatal(err)
		}
		if took || l.rests.held.Load() == 0 && lent(l) == 0 {
			idle = 0
		} else {
			idle++
		}
		return idle > 1000
	})
	return sent
}

// A reader that stops keeps nobody else waiting, loses nothing, and costs no more than a rest.
func TestPairSlowReader(t *testing.T) {
	l, _ := running(t)
	o, done := outcome()
	client, server, _ := joined(t, l, tcpSide, tcpSide, o)
	sent := clog(t, l, client)
	if held := l.rests.held.Load() + int64(lent(l))*conduitSize; held < 1 || held > mostRead {
		t.Errorf("%d octets are lent to one direction that is stuck", held)
	}
	for range 2 * len(l.workers) { // on the same worker too
		c, s, _ := joined(t, l, tcpSide, tcpSide, Options{})
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := server.Write([]byte("back")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(client, make([]byte, 4)); err != nil {
		t.Fatalf("the other direction: %v", err)
	}
	closeWrite(t, client)
	n, err := io.Copy(io.Discard, server)
	if err != nil || int(n) != sent {
		t.Errorf("read %d of %d octets, %v", n, sent, err)
	}
	closeWrite(t, server)
	if err := <-done; err != nil {
		t.Errorf("ended with %v", err)
	}
	if held := l.rests.held.Load(); held != 0 {
		t.Errorf("%d octets are still lent", held)
	}
}

// Streams that always have more leave turns to the others.
func TestPairTakesTurns(t *testing.T) {
	l, stop := running(t)
	var wg sync.WaitGroup
	for range 2 * len(l.workers) { // each worker has one
		client, server, _ := joined(t, l, tcpSide, tcpSide, Options{})
		wg.Go(func() {
			for b := pattern(1 << 20); ; {
				if _, err := client.Write(b); err != nil {
					return
				}
			}
		})
		wg.Go(func() {
			for b := make([]byte, 1<<20); ; {
				if _, err := server.Read(b); err != nil {
					return
				}
			}
		})
	}
	defer wg.Wait()
	defer stop()
	client, server, _ := joined(t, l, tcpSide, tcpSide, Options{})
	b := make([]byte, 1)
	for range 100 {
		for _, c := range [][2]net.Conn{{client, server}, {server, client}} {
			if _, err := c[0].Write(b); err != nil {
				t.Fatal(err)
			}
			if _, err := c[1].Read(b); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A reader that has stopped is not waited for when the other end is reset.
func TestPairResetWhileClogged(t *testing.T) {
	for _, who := range []string{"writer", "reader"} {
		t.Run(who, func(t *testing.T) {
			l, _ := running(t)
			o, done := outcome()
			client, server, _ := joined(t, l, tcpSide, tcpSide, o)
			clog(t, l, client)
			gone, left := client, server
			if who == "reader" {
				gone, left = server, client
			}
			reset(t, gone)
			if err := <-done; !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("ended with %v, want ECONNRESET", err)
			}
			if _, err := io.Copy(io.Discard, left); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the other end saw %v, want ECONNRESET", err)
			}
			if held := l.rests.held.Load(); held != 0 {
				t.Errorf("%d octets are still lent", held)
			}
		})
	}
}

// Octets come in order however they are cut: one side takes little at once, so that rests come and go.
func TestPairRests(t *testing.T) {
	l, _ := running(t)
	h, client := tcpSide(t)
	c, server := unixSide(t) // TCP with so small a buffer waits for timers
	if err := unix.SetsockoptInt(c, unix.SOL_SOCKET, unix.SO_SNDBUF, 8<<10); err != nil {
		t.Fatal(err)
	}
	if _, err := l.JoinSockets(h, c, Options{}); err != nil {
		t.Fatal(err)
	}
	want := pattern(8 << 20)
	go func() {
		client.Write(want)
		client.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(server)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d of %d octets, %v", len(got), len(want), err)
	}
}

func TestPairAbort(t *testing.T) {
	l, stop := running(t)
	o, done := outcome()
	client, server, j := joined(t, l, tcpSide, tcpSide, o)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(j.Abort)
	}
	wg.Wait()
	for _, c := range []net.Conn{client, server} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("read: %v, want ECONNRESET", err)
		}
	}
	if err := <-done; !errors.Is(err, ErrAborted) {
		t.Errorf("ended with %v", err)
	}
	j.Abort()
	stop()
	j.Abort()
	if len(done) != 0 {
		t.Error("ended twice")
	}
}

func TestStreamAbort(t *testing.T) {
	l, _ := running(t)
	e := newMemoryEnd()
	fd, peer := hostPair(t)
	o, done := outcome()
	j, err := l.Join(e, fd, o)
	if err != nil {
		t.Fatal(err)
	}
	j.Abort()
	if err := <-done; !errors.Is(err, ErrAborted) {
		t.Errorf("ended with %v", err)
	}
	if _, err := peer.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the host saw %v, want ECONNRESET", err)
	}
	e.until(t, "the container's end is aborted", func() bool { return e.aborted })
	j.Abort()
}

func TestPairsWhenTheLoopStops(t *testing.T) {
	l, stop := running(t)
	o, done := outcome()
	client, server, _ := joined(t, l, tcpSide, tcpSide, o)
	stop()
	if err := <-done; !errors.Is(err, ErrStopped) {
		t.Errorf("ended with %v", err)
	}
	h, late := tcpSide(t)
	c, alsoLate := tcpSide(t)
	if _, err := l.JoinSockets(h, c, o); !errors.Is(err, ErrStopped) {
		t.Errorf("join: %v", err)
	}
	if err := <-done; !errors.Is(err, ErrStopped) {
		t.Errorf("the late one ended with %v", err)
	}
	for _, c := range []net.Conn{client, server, late, alsoLate} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("read: %v, want ECONNRESET", err)
		}
	}
}

// urgent sends an urgent octet.
func urgent(t testing.TB, c net.Conn, octet string) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if err := unix.Sendto(int(fd), []byte(octet), unix.MSG_OOB, nil); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
}

// A read stops before an urgent octet. What follows it must not wait for the next event.
func TestPairUrgent(t *testing.T) {
	l, _ := running(t)
	h, client := tcpSide(t)
	c, server := tcpSide(t)
	client.Write([]byte("before"))
	urgent(t, client, "!")
	client.Write([]byte("after"))
	if _, err := l.JoinSockets(h, c, Options{}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len("before!after"))
	if _, err := io.ReadFull(server, got); err != nil || string(got) != "before!after" {
		t.Errorf("read %q, %v", got, err)
	}
}

// A read of an AF_UNIX socket is short where descriptors came along, which nobody takes over.
func TestPairUnixRights(t *testing.T) {
	l, _ := running(t)
	h, client := unixSide(t)
	c, server := tcpSide(t)
	rights := unix.UnixRights(0)
	for _, s := range []string{"one", "two", "three"} {
		if _, _, err := client.(*net.UnixConn).WriteMsgUnix([]byte(s), rights, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.JoinSockets(h, c, Options{}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len("onetwothree"))
	if _, err := io.ReadFull(server, got); err != nil || string(got) != "onetwothree" {
		t.Errorf("read %q, %v", got, err)
	}
}

// Beyond maxHeld pairs read less at once.
func TestRests(t *testing.T) {
	l, err := NewLoop()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w, rs := l.workers[0], &l.rests
	kept := make([]rest, maxHeld/mostRead)
	b := pattern(mostRead)
	for i := range kept {
		if n := len(w.buffer(firstRead)); n != firstRead {
			t.Fatalf("%d octets are read after %d rests", n, i)
		}
		rs.keep(&kept[i], b)
	}
	if n := len(w.buffer(firstRead)); n != heldRead {
		t.Errorf("%d octets are read with %d held", n, rs.held.Load())
	}
	if rs.took(&kept[0], 1000); !bytes.Equal(kept[0].octets, b[1000:]) {
		t.Error("a rest has changed")
	}
	if rs.took(&kept[0], mostRead-1000); kept[0].octets != nil || len(w.buffer(firstRead)) != firstRead {
		t.Error("a rest that was taken is still held")
	}
	for i := range kept {
		rs.drop(&kept[i])
	}
	if rs.held.Load() != 0 {
		t.Errorf("%d octets are held in the end", rs.held.Load())
	}
	for _, n := range []int{1, leastRead, leastRead + 1, firstRead, mostRead} {
		var r rest
		if rs.keep(&r, b[:n]); !bytes.Equal(r.octets, b[:n]) || int(rs.held.Load()) > max(4*n, leastRead) {
			t.Errorf("%d octets lent for %d", rs.held.Load(), n)
		}
		rs.drop(&r)
	}
}

// A round trip allocates nothing once the buffer is there, and an idle pair is small.
func TestPairAllocates(t *testing.T) {
	l, _ := running(t)
	client, server, _ := joined(t, l, tcpSide, tcpSide, Options{Count: new(Count)})
	there, back := make([]byte, 64), make([]byte, 64)
	trip := func() {
		for a, b := client, server; ; a, b = b, a {
			if _, err := a.Write(there); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(b, back); err != nil {
				t.Fatal(err)
			}
			if a == server {
				return
			}
		}
	}
	trip()
	if n := testing.AllocsPerRun(500, trip); n != 0 {
		t.Errorf("%v allocations in a round trip", n)
	}

	const pairs = 200
	var before, after runtime.MemStats
	var fds [2 * pairs][2]int
	for i := range fds {
		var err error
		if fds[i], err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[i][1])
	}
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := 0; i < len(fds); i += 2 {
		if _, err := l.JoinSockets(fds[i][0], fds[i+1][0], Options{}); err != nil {
			t.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if each := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / pairs; each > 1024 {
		t.Errorf("an idle pair takes %d octets", each)
	}
}
