package inside_test

import (
	"context"
	"errors"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap/inside"
	"usernet/tap/taptest"
)

func TestStock(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	b.open(t, inside.Config{Batch: 6})
	fd, err := b.Socket(t.Context(), inside.Kind{})
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	// What came with the first lies ready, at the least what is not refilled yet.
	for range 3 {
		fd, ok := b.Ready(inside.Kind{})
		if !ok {
			t.Fatal("nothing is ready after a batch of 6 and one taken")
		}
		unix.Close(fd)
	}
	// A kind that nobody asked for has no stock; it gets one when it is asked for.
	if fd, ok := b.Ready(inside.Kind{Transparent: true}); ok {
		unix.Close(fd)
		t.Error("a socket lay ready of a kind that nobody had asked for")
	}
	waitFor(t, "a socket of the other kind", func() bool {
		fd, ok := b.Ready(inside.Kind{Transparent: true})
		if ok {
			unix.Close(fd)
		}
		return ok
	})
}

func TestManyAtOnce(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	b.open(t, inside.Config{IPv6: true})
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 100 {
				fd, err := b.Socket(t.Context(), inside.Kind{V6: (i+j)%2 == 0, Transparent: i%3 == 0})
				if err != nil {
					t.Error(err)
					return
				}
				unix.Close(fd)
			}
		})
	}
	all.Wait()
}

func TestBatchTooLarge(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	for _, n := range []int{-1, 201} {
		if k, err := inside.Open(t.Context(), b.ns, inside.Config{Batch: n}); err == nil {
			k.Close()
			t.Errorf("batches of %d are possible", n)
		}
	}
}

// Socket ends with its caller's context, and with Run.
func TestSocketEnds(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	k, err := inside.Open(t.Context(), b.ns, inside.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("the client has gone")
	cancel(cause)
	if _, err := k.Socket(ctx, inside.Kind{}); !errors.Is(err, cause) { // there is no Run yet
		t.Errorf("with an ended context: %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := k.Run(ctx); err != nil {
		t.Error(err)
	}
	if _, err := k.Socket(t.Context(), inside.Kind{V6: true}); err == nil {
		t.Error("a socket after Run")
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
	if _, err := k.Listening(t.Context()); err == nil {
		t.Error("a list after Close")
	}
	if err := k.Close(); err != nil {
		t.Error("a second Close:", err)
	}
}

// Descriptors that run out are no reason to lose the helper, which the sandbox would not let us replace.
func TestNoDescriptors(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	b := newBox(t, taptest.OwnerRoot)
	b.open(t, inside.Config{})
	var before, after int
	if _, err := b.ns.Call(t.Context(), testOps, "pid", struct{}{}, &before); err != nil {
		t.Fatal(err)
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	less := limit
	less.Cur = uint64(len(open) + 20) // not enough for a batch
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &less); err != nil {
		t.Fatal(err)
	}
	_, err = b.Socket(t.Context(), inside.Kind{})
	_, again := b.Socket(t.Context(), inside.Kind{})
	if err2 := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err2 != nil {
		t.Fatal(err2)
	}
	if !errors.Is(err, unix.EMFILE) || !errors.Is(again, unix.EMFILE) {
		t.Errorf("without descriptors: %v, %v; want EMFILE", err, again)
	}
	if left, err := os.ReadDir("/proc/self/fd"); err != nil || len(left) > len(open) {
		t.Errorf("%d descriptors are open, were %d, %v", len(left), len(open), err)
	}
	waitFor(t, "a socket", func() bool {
		fd, err := b.Socket(t.Context(), inside.Kind{})
		if err == nil {
			unix.Close(fd)
		}
		return err == nil
	})
	if _, err := b.ns.Call(t.Context(), testOps, "pid", struct{}{}, &after); err != nil || before != after {
		t.Errorf("the helper was process %d and is %d, %v", before, after, err)
	}
}

func BenchmarkSocket(b *testing.B) {
	space := taptest.NewNS(b, taptest.OwnerRoot)
	x := &box{ns: openNS(b, space.PID), within: openNS(b, space.PID)}
	x.do(b, "furnish", struct{}{}, nil)
	x.open(b, inside.Config{IPv6: true})
	b.ReportAllocs()
	for b.Loop() {
		fd, err := x.Socket(b.Context(), inside.Kind{Transparent: true})
		if err != nil {
			b.Fatal(err)
		}
		unix.Close(fd)
	}
}

// Sockets of UDP are made as well, and may be made before anybody asks.
func TestUDPSockets(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	b.open(t, inside.Config{Batch: 3, IPv6: true})
	for _, kind := range []inside.Kind{{UDP: true}, {UDP: true, V6: true}, {UDP: true, Transparent: true}, {UDP: true, V6: true, Transparent: true}} {
		b.Prepare(kind)
		fd := -1
		waitFor(t, "a socket lies ready", func() (ok bool) { fd, ok = b.Ready(kind); return ok })
		typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
		if err != nil || typ != unix.SOCK_DGRAM {
			t.Errorf("%+v: type %d, %v", kind, typ, err)
		}
		family, want := 0, unix.AF_INET
		if kind.V6 {
			want = unix.AF_INET6
		}
		if family, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || family != want {
			t.Errorf("%+v: family %d, %v", kind, family, err)
		}
		if _, _, err := unix.Recvfrom(fd, make([]byte, 1), 0); err != unix.EAGAIN {
			t.Errorf("%+v: reading says %v: does it block?", kind, err)
		}
		mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
		if err != nil || (mark == inside.Mark) != kind.Transparent {
			t.Errorf("%+v: mark %#x, %v", kind, mark, err)
		}
		unix.Close(fd)
	}
}
