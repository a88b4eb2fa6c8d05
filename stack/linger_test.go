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
	})
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
	if newLingerer(&fdDevice{fd: eventfd(t)}, source) != nil {
		t.Error("a lingerer with two processors")
	}
	runtime.GOMAXPROCS(1)
	if newLingerer(&replay{}, source) != nil {
		t.Error("a lingerer without a descriptor")
	}
	if newLingerer(&fdDevice{fd: eventfd(t)}, nil) != nil {
		t.Error("a lingerer without sources")
	}
}
