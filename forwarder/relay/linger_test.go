package relay

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// restless is a job whose descriptor has another event as soon as it has had one.
type restless struct {
	entry
	fd, pumped int
}

func (r *restless) mark(int, uint32) {}
func (r *restless) finish(error)     {}
func (r *restless) pump() {
	r.pumped++
	stir(r.fd)
}

func stir(fd int) { unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

func eventfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// A worker lingers for as long as events come, but not for ever, and not while something else has an event.
func TestLinger(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	l, err := NewLoop()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w := l.workers[0]
	lingered := func() int {
		t.Helper()
		r := &restless{fd: eventfd(t)}
		r.w, r.job = w, r
		if err := w.add(&r.entry, unix.EPOLLIN, r.fd); err != nil {
			t.Fatal(err)
		}
		stir(r.fd)
		if err := w.linger(); err != nil {
			t.Fatal(err)
		}
		w.remove(&r.entry)
		w.epoll.Remove(r.fd)
		return r.pumped
	}
	a, b, c := eventfd(t), eventfd(t), eventfd(t)
	if err := l.Heed(c); err != nil {
		t.Fatal(err)
	}
	if n := lingered(); n != 0 {
		t.Errorf("%d events without Linger", n)
	}
	if err := l.Linger(a); err != nil {
		t.Fatal(err)
	}
	if err := l.Linger(b); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if n := lingered(); n != maxLinger {
			t.Errorf("%d events in a row, want %d", n, maxLinger)
		}
	}
	if err := l.Heed(c); err != nil {
		t.Fatal(err)
	}
	for _, other := range []int{a, b, c, a} {
		stir(other)
		if n := lingered(); n > 1 {
			t.Errorf("%d events while another descriptor has one", n)
		}
		unix.Read(other, make([]byte, 8))
	}
	if err := w.linger(); err != nil { // nothing happens
		t.Fatal(err)
	}
	if err := l.Heed(a); err != nil {
		t.Error("one that is heeded already:", err)
	}
	if err := l.Heed(-1); err == nil {
		t.Error("no descriptor is taken for one")
	}
}

// Others' events do not make the epoll set readable that whoever serves the Sources looks at.
func TestLingerIsQuietOtherwise(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	l, err := NewLoop()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a := eventfd(t)
	if err := l.Linger(a); err != nil {
		t.Fatal(err)
	}
	stir(a)
	l.Sources(func(fd int, _ func()) {
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); n != 0 || err != nil {
			t.Errorf("poll: %d, %v", n, err)
		}
	})
}

// Where there are more processors others serve what a lingering worker would keep waiting.
func TestNoLingerWithMoreProcessors(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	l, err := NewLoop()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Linger(eventfd(t)); err != nil {
		t.Fatal(err)
	}
	if l.others != 0 {
		t.Error("it lingers")
	}
}

// Pairs work through a lingering worker, whether Run or Sources serve it.
func TestPairLingers(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	l, err := NewLoop()
	if err != nil {
		t.Fatal(err)
	}
	other := eventfd(t)
	if err := l.Linger(other); err != nil {
		t.Fatal(err)
	}
	run(t, l)
	client, server, _ := joined(t, l, tcpSide, tcpSide, Options{})
	b := make([]byte, 1)
	for i := range 500 {
		if i%7 == 0 {
			stir(other)
		}
		if _, err := client.Write(b); err != nil {
			t.Fatal(err)
		}
		if i%3 == 0 {
			l.Sources(func(_ int, serve func()) { serve() })
		}
		if _, err := server.Read(b); err != nil {
			t.Fatal(err)
		}
	}
}
