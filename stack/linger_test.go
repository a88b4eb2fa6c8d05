package stack

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// fdDevice is a Device that has a descriptor to poll.
type fdDevice struct {
	replay
	fd int
}

func (d *fdDevice) FD() int { return d.fd }

func eventfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func signal(t *testing.T, fd int) {
	t.Helper()
	if _, err := unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
}

func TestLinger(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	dev, a, b := eventfd(t), eventfd(t), eventfd(t)
	var order string
	serve := func(name string, fd int, then func()) Source {
		return Source{FD: fd, Serve: func() {
			var buf [8]byte
			unix.Read(fd, buf[:])
			order += name
			then()
		}}
	}
	ran := false
	l := newLingerer(&fdDevice{fd: dev}, []Source{
		serve("a", a, func() {
			go func() { // runs before the next wait, though the reader keeps the only processor
				ran = true
				signal(t, b)
			}()
		}),
		serve("b", b, func() { signal(t, dev) }),
	}, nil)
	if l == nil {
		t.Fatal("no lingerer for a device with a descriptor")
	}
	checks := 0
	check := func() { checks++ }
	if l.wait(check) {
		t.Error("something, though nothing has happened")
	}
	signal(t, a)
	if !l.wait(check) || order != "ab" || !ran || checks != 3 {
		t.Errorf("served %q, goroutine %v, %d checks; want a, then b, then the device", order, ran, checks)
	}
}

// Where others can serve the sources meanwhile, or the device cannot be polled, the reader parks.
func TestNoLinger(t *testing.T) {
	source := []Source{{FD: eventfd(t), Serve: func() {}}}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	if newLingerer(&fdDevice{fd: eventfd(t)}, source, nil) != nil {
		t.Error("a lingerer with two processors")
	}
	runtime.GOMAXPROCS(1)
	if newLingerer(&replay{}, source, nil) != nil {
		t.Error("a lingerer without a descriptor")
	}
	if newLingerer(&fdDevice{fd: eventfd(t)}, nil, nil) != nil {
		t.Error("a lingerer without sources")
	}
}

// Somebody else's event ends it, and is left to him; what has come at the same time is served. Nor do events of one's own keep
// him waiting for ever.
func TestLingerOthers(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	dev, own, other := eventfd(t), eventfd(t), eventfd(t)
	served := 0
	l := newLingerer(&fdDevice{fd: dev}, []Source{{FD: own, Serve: func() {
		var buf [8]byte
		unix.Read(own, buf[:])
		served++
	}}}, []int{other})
	check := func() {}
	signal(t, own)
	signal(t, other)
	if l.wait(check) || served != 1 {
		t.Errorf("served %d, and went on beside somebody else's event", served)
	}
	signal(t, dev)
	if !l.wait(check) {
		t.Error("somebody else's event hides the device's")
	}
	var buf [8]byte
	for _, fd := range []int{dev, other} {
		if n, err := unix.Read(fd, buf[:]); n != len(buf) || err != nil {
			t.Errorf("an event that was nobody's to take: %d, %v", n, err)
		}
	}
	served = 0
	signal(t, own)
	if l.wait(func() { signal(t, own) }) || served != maxLinger {
		t.Errorf("%d events of one's own in a row, wanted %d", served, maxLinger)
	}
}
