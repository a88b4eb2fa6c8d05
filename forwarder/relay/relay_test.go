package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// memoryEnd is a container's end in memory: Drain takes from sent, Fill appends to received.
type memoryEnd struct {
	mu       sync.Mutex
	cond     sync.Cond
	sent     []byte
	sentEnd  bool // FIN after sent
	received []byte
	room     int // what Fill still takes; below 0 there is no limit
	gotEnd   bool
	closed   bool
	aborted  bool
	err      error
	ready    func(in, out, ended bool)
}

func newMemoryEnd() *memoryEnd {
	e := &memoryEnd{room: -1}
	e.cond.L = &e.mu
	return e
}

func (e *memoryEnd) notify(in, out, ended bool) {
	e.mu.Lock()
	ready := e.ready
	e.mu.Unlock()
	if ready != nil {
		ready(in, out, ended)
	}
}

func (e *memoryEnd) send(b []byte, end bool) {
	e.mu.Lock()
	e.sent = append(e.sent, b...)
	e.sentEnd = end
	e.mu.Unlock()
	e.notify(true, false, false)
}

func (e *memoryEnd) Drain(write func([][]byte) (int, error)) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case len(e.sent) > 0:
		n, err := write([][]byte{e.sent})
		e.sent = e.sent[n:]
		return n, err
	case e.sentEnd:
		return 0, io.EOF
	case e.err != nil:
		return 0, e.err
	}
	return 0, unix.EAGAIN
}

func (e *memoryEnd) Fill(n int, read func([]byte) (int, error)) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer e.cond.Broadcast()
	if e.room == 0 {
		return 0, unix.EAGAIN
	}
	if e.room > 0 {
		n = min(n, e.room)
		e.room -= n
	}
	b := make([]byte, n)
	for got := 0; got < n; {
		m, err := read(b[got:])
		if err != nil {
			return 0, err
		}
		got += m
	}
	e.received = append(e.received, b...)
	return n, nil
}

func (e *memoryEnd) OnReady(f func(in, out, ended bool)) {
	e.mu.Lock()
	e.ready = f
	e.mu.Unlock()
	f(true, true, true)
}

func (e *memoryEnd) Err() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.err
}

func (e *memoryEnd) set(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f()
	e.cond.Broadcast()
}

func (e *memoryEnd) CloseWrite() error { e.set(func() { e.gotEnd = true }); return nil }
func (e *memoryEnd) Close() error      { e.set(func() { e.closed = true }); return nil }
func (e *memoryEnd) Abort()            { e.set(func() { e.aborted = true }) }

// until waits until ok, which is called with e locked.
func (e *memoryEnd) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	late := time.AfterFunc(20*time.Second, func() { e.set(func() {}) })
	defer late.Stop()
	deadline := time.Now().Add(20 * time.Second)
	e.mu.Lock()
	defer e.mu.Unlock()
	for !ok() {
		if !time.Now().Before(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
		e.cond.Wait()
	}
}

// running returns a Loop that runs until stop, which the end of the test calls too.
func running(t testing.TB) (l *Loop, stop func()) {
	t.Helper()
	l, err := NewLoop()
	if err != nil {
		t.Fatal(err)
	}
	return l, run(t, l)
}

// patience is how long a test waits for what must come at once.
const patience = 20 * time.Second

// run runs l until stop, which the end of the test calls too.
func run(t testing.TB, l *Loop) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- l.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run: %v", err)
		}
		l.Close()
	})
	t.Cleanup(stop)
	return stop
}

// hostPair returns a connected socket for Join, and the connection's other end.
func hostPair(t testing.TB) (fd int, peer *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	to := &unix.SockaddrInet4{Port: ln.Addr().(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}
	if err := unix.Connect(fd, to); err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	return fd, c.(*net.TCPConn)
}

func TestJoinPassesBothWays(t *testing.T) {
	l, _ := running(t)
	e := newMemoryEnd()
	fd, peer := hostPair(t)
	done := make(chan error, 1)
	if _, err := l.Join(e, fd, Options{Done: func(err error) { done <- err }}); err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	go func() {
		peer.Write(data)
		peer.CloseWrite()
	}()
	e.send(data, true)
	got, err := io.ReadAll(peer)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("the host read %d octets of %d, %v", len(got), len(data), err)
	}
	e.until(t, "the container has it all", func() bool { return e.gotEnd && e.closed })
	if !bytes.Equal(e.received, data) {
		t.Errorf("the container received %d octets of %d", len(e.received), len(data))
	}
	if err := <-done; err != nil || e.aborted {
		t.Errorf("ended with %v, aborted %v; want an orderly end", err, e.aborted)
	}
	if st := l.Stats(); st.Active != 0 || st.Joined != 1 || st.Aborted != 0 || st.OctetsIn != uint64(len(data)) || st.OctetsOut != uint64(len(data)) {
		t.Errorf("counted %+v", st)
	}
}

// Without room at the container's end nothing is read from the host, and with room it goes on.
func TestJoinWaitsForRoom(t *testing.T) {
	l, _ := running(t)
	e := newMemoryEnd()
	e.room = 5
	fd, peer := hostPair(t)
	if _, err := l.Join(e, fd, Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := peer.Write([]byte("hello, world")); err != nil {
		t.Fatal(err)
	}
	e.until(t, "there is no room", func() bool { return e.room == 0 })
	if string(e.received) != "hello" {
		t.Errorf("received %q", e.received)
	}
	e.set(func() { e.room = -1 })
	e.notify(false, true, false)
	e.until(t, "the rest is there", func() bool { return string(e.received) == "hello, world" })
}

// Small messages are read before it is known that there is room for them. What has none waits, and keeps its place
// before what comes later and before the end.
func TestSmallReadsWaitForRoom(t *testing.T) {
	l, _ := running(t)
	e := newMemoryEnd()
	fd, peer := hostPair(t)
	if _, err := l.Join(e, fd, Options{}); err != nil {
		t.Fatal(err)
	}
	want := ""
	say := func(s string) {
		t.Helper()
		if _, err := peer.Write([]byte(s)); err != nil {
			t.Fatal(err)
		}
		want += s
	}
	received := func() bool { return string(e.received) == want }
	for _, s := range []string{"one", "two"} { // the first is asked for, and makes small reads of the next
		say(s)
		e.until(t, s+" is there", received)
	}
	e.set(func() { e.room = 2 })
	say("three")
	e.until(t, "there is no room", func() bool { return e.room == 0 })
	if string(e.received) != "onetwoth" {
		t.Errorf("received %q", e.received)
	}
	say(strings.Repeat("and so on, ", 1000)) // more than a small read takes
	if err := peer.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	for _, room := range []int{1, 2, 5000, -1} {
		e.set(func() { e.room = room })
		e.notify(false, true, false)
		e.until(t, "the room is used", func() bool { return e.room == 0 || room < 0 && e.gotEnd })
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !received() {
		t.Errorf("%d octets arrived, want %d in order", len(e.received), len(want))
	}
	if held := l.rests.held.Load(); held != 0 {
		t.Errorf("%d octets of rests are held at the end", held)
	}
}

// A reset of the host's while a rest waits gives its buffer back.
func TestResetDropsSmallRest(t *testing.T) {
	l, _ := running(t)
	e := newMemoryEnd()
	fd, peer := hostPair(t)
	done := make(chan error, 1)
	if _, err := l.Join(e, fd, Options{Done: func(err error) { done <- err }}); err != nil {
		t.Fatal(err)
	}
	if _, err := peer.Write([]byte("one")); err != nil {
		t.Fatal(err)
	}
	e.until(t, "one is there", func() bool { return string(e.received) == "one" })
	e.set(func() { e.room = 1 })
	if _, err := peer.Write([]byte("two")); err != nil {
		t.Fatal(err)
	}
	e.until(t, "there is no room", func() bool { return e.room == 0 })
	if err := peer.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	peer.Close()
	if err := <-done; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("ended with %v", err)
	}
	if held := l.rests.held.Load(); held != 0 {
		t.Errorf("%d octets of rests are held", held)
	}
}

func TestJoinAborts(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(e *memoryEnd, peer *net.TCPConn, stop func())
		want error
	}{
		{"the container resets", func(e *memoryEnd, _ *net.TCPConn, _ func()) {
			e.set(func() { e.err = unix.ECONNRESET })
			e.notify(false, false, true)
		}, unix.ECONNRESET},
		{"the host resets", func(_ *memoryEnd, peer *net.TCPConn, _ func()) {
			peer.SetLinger(0)
			peer.Close()
		}, unix.ECONNRESET},
		{"the loop stops", func(_ *memoryEnd, _ *net.TCPConn, stop func()) { stop() }, ErrStopped},
	} {
		t.Run(test.name, func(t *testing.T) {
			l, stop := running(t)
			e := newMemoryEnd()
			fd, peer := hostPair(t)
			done := make(chan error, 1)
			if _, err := l.Join(e, fd, Options{Done: func(err error) { done <- err }}); err != nil {
				t.Fatal(err)
			}
			test.do(e, peer, stop)
			if err := <-done; !errors.Is(err, test.want) {
				t.Errorf("ended with %v, want %v", err, test.want)
			}
			if e.until(t, "the container's end is aborted", func() bool { return e.aborted }); e.closed {
				t.Error("an abort became an orderly end")
			}
			if test.name != "the host resets" {
				if _, err := peer.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the host saw %v, want ECONNRESET", err)
				}
			}
		})
	}
}

// What came before a RST arrives before it: an early answer to a request that the server does not read.
func TestOctetsBeforeResetArrive(t *testing.T) {
	l, _ := running(t)
	for range 50 {
		e := newMemoryEnd()
		fd, peer := hostPair(t)
		done := make(chan error, 1)
		if _, err := l.Join(e, fd, Options{Done: func(err error) { done <- err }}); err != nil {
			t.Fatal(err)
		}
		e.send([]byte("a request that nobody reads"), false)
		if _, err := peer.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if _, err := peer.Write([]byte("413")); err != nil {
			t.Fatal(err)
		}
		peer.Close() // octets are unread, so this is a RST
		if err := <-done; !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			t.Errorf("ended with %v, want a reset", err)
		}
		if string(e.received) != "413" || !e.aborted || e.gotEnd {
			t.Fatalf("received %q, aborted %v, FIN %v", e.received, e.aborted, e.gotEnd)
		}
	}
}

// A container that does not read is not waited for.
func TestResetDoesNotWaitForRoom(t *testing.T) {
	l, _ := running(t)
	e := newMemoryEnd()
	e.room = 1
	fd, peer := hostPair(t)
	done := make(chan error, 1)
	if _, err := l.Join(e, fd, Options{Done: func(err error) { done <- err }}); err != nil {
		t.Fatal(err)
	}
	if _, err := peer.Write([]byte("four")); err != nil {
		t.Fatal(err)
	}
	e.until(t, "there is no room", func() bool { return e.room == 0 })
	peer.SetLinger(0)
	peer.Close()
	if err := <-done; !errors.Is(err, unix.ECONNRESET) || !e.aborted {
		t.Errorf("ended with %v, aborted %v", err, e.aborted)
	}
}

func TestJoinAfterStop(t *testing.T) {
	l, stop := running(t)
	stop()
	e := newMemoryEnd()
	fd, peer := hostPair(t)
	if _, err := l.Join(e, fd, Options{}); !errors.Is(err, ErrStopped) {
		t.Errorf("join: %v", err)
	}
	if !e.aborted {
		t.Error("the container's end still stands")
	}
	if _, err := peer.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the host saw %v, want ECONNRESET", err)
	}
	if err := l.Connect(context.Background(), socket(t), full(t).addr(), time.Minute); !errors.Is(err, ErrStopped) {
		t.Errorf("connect: %v", err)
	}
}

func socket(t *testing.T) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestConnect(t *testing.T) {
	l, stop := running(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := ln.Addr().(*net.TCPAddr).AddrPort()
	if err := l.Connect(context.Background(), socket(t), to, time.Minute); err != nil {
		t.Errorf("a listener: %v", err)
	}
	ln.Close()
	if err := l.Connect(context.Background(), socket(t), to, time.Minute); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a closed port: %v", err)
	}

	sa := full(t)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := l.Connect(ctx, socket(t), sa.addr(), time.Minute); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a black hole: %v", err)
	}
	if err := l.Connect(context.Background(), socket(t), sa.addr(), 50*time.Millisecond); !errors.Is(err, unix.ETIMEDOUT) {
		t.Errorf("a black hole, with a timeout: %v", err)
	}
	hung := make(chan error, 1)
	sa = full(t) // the SYNs of those that have given up would be accepted too
	fd := socket(t)
	go func() { hung <- l.Connect(context.Background(), fd, sa.addr(), time.Minute) }()
	for l.waiting() == 0 {
		time.Sleep(time.Millisecond)
	}
	sa.accept(t) // now there is room, once for each dial that hangs, and SYNs are repeated within a second
	sa.accept(t)
	if err := <-hung; err != nil {
		t.Errorf("a dial that is answered late: %v", err)
	}
	sa = full(t)
	fd = socket(t)
	go func() { hung <- l.Connect(context.Background(), fd, sa.addr(), time.Minute) }()
	for l.waiting() == 0 {
		time.Sleep(time.Millisecond)
	}
	stop()
	if err := <-hung; !errors.Is(err, ErrStopped) {
		t.Errorf("a dial when the loop stops: %v", err)
	}
}

// waiting is how many dials hang.
func (l *Loop) waiting() int {
	n := 0
	for _, w := range l.workers {
		w.mu.Lock()
		n += len(w.dials)
		w.mu.Unlock()
	}
	return n
}

// fullListener is the address of a listener whose accept queue is full: dials to it hang.
type fullListener struct {
	unix.SockaddrInet4
	fd int
}

func full(t *testing.T) *fullListener {
	t.Helper()
	f := &fullListener{fd: socket(t)}
	if err := errors.Join(unix.Bind(f.fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(f.fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(f.fd)
	if err != nil {
		t.Fatal(err)
	}
	f.SockaddrInet4 = *sa.(*unix.SockaddrInet4)
	if err := unix.Connect(socket(t), &f.SockaddrInet4); err != nil && err != unix.EINPROGRESS {
		t.Fatal(err)
	}
	return f
}

func (f *fullListener) addr() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(f.Addr), uint16(f.Port))
}

// accept takes one connection out of the queue.
func (f *fullListener) accept(t *testing.T) {
	t.Helper()
	for {
		fd, _, err := unix.Accept4(f.fd, 0)
		switch err {
		case nil:
			unix.Close(fd)
			return
		case unix.EAGAIN:
			time.Sleep(time.Millisecond)
		default:
			t.Fatal(err)
		}
	}
}

// A read stops before an urgent octet, and what follows it makes no edge of its own.
func TestSmallReadsPassUrgentOctets(t *testing.T) {
	l, _ := running(t)
	e := newMemoryEnd()
	fd, peer := hostPair(t)
	if _, err := l.Join(e, fd, Options{}); err != nil {
		t.Fatal(err)
	}
	raw, err := peer.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	send := func(s string, flags int) {
		t.Helper()
		var serr error
		if err := raw.Control(func(fd uintptr) { serr = unix.Sendto(int(fd), []byte(s), flags, nil) }); err != nil || serr != nil {
			t.Fatal(err, serr)
		}
	}
	send("one ", 0) // is asked for, and makes small reads of the next
	e.until(t, "the first is there", func() bool { return string(e.received) == "one " })
	e.mu.Lock() // the worker waits with this one, so that the next come at once
	send("two ", 0)
	send("before", 0)
	send("!", unix.MSG_OOB)
	send("after", 0)
	e.mu.Unlock()
	e.until(t, "all is there", func() bool { return string(e.received) == "one two before!after" })
}
