package portdriver

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/forwarder/relay"
	"usernet/tap/inside"
)

// bare is a driver without a container, whose paths the test plays.
func bare(t testing.TB, change func(*Config)) *Driver {
	t.Helper()
	if err := hostAddresses(); err != nil {
		t.Fatal(err)
	}
	loop, err := relay.NewLoop()
	if err != nil {
		t.Fatal(err)
	}
	c := Config{
		Loop: loop, UDP: &fakeUDP{},
		Container4: container4, Container6: container6, Gateway4: gateway4, Gateway6: gateway6,
		Subnets: []netip.Prefix{net4, net6}, Log: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&c)
	}
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- loop.Run(ctx) }()
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error("Close:", err)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error("the relay:", err)
		}
		loop.Close()
		if n := d.connections.Load(); n != 0 {
			t.Errorf("%d connections are counted at the end", n)
		}
	})
	return d
}

// publish adds specs and fails the test where they cannot be.
func publish(t testing.TB, d *Driver, specs ...string) []Forward {
	t.Helper()
	l := &lab{t: t, driver: d}
	return l.add(specs...)
}

// fakeUDP publishes nothing, and counts.
type fakeUDP struct {
	open atomic.Int64
	mu   sync.Mutex
	to   [][]netip.AddrPort
	fail error

	through [][]netip.AddrPort
}

func (u *fakeUDP) PublishUDP(fd int, to ...netip.AddrPort) (UDPForward, error) {
	if u.fail != nil {
		unix.Close(fd)
		return nil, u.fail
	}
	u.open.Add(1)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.to = append(u.to, to)
	return &fakeUDPForward{u: u, fd: fd}, nil
}

// TakeUDPPort has no flows that could give way.
func (u *fakeUDP) TakeUDPPort(_ uint16, bind func() error) error { return bind() }

type fakeUDPForward struct {
	u    *fakeUDP
	fd   int
	once sync.Once
}

func (f *fakeUDPForward) Close() error {
	f.once.Do(func() { f.u.open.Add(-1); unix.Close(f.fd) })
	return nil
}

func (f *fakeUDPForward) Through(_ func(bool) (int, error), to ...netip.AddrPort) error {
	f.u.mu.Lock()
	defer f.u.mu.Unlock()
	f.u.through = append(f.u.through, to)
	return nil
}

func (f *fakeUDPForward) Stats() UDPStats {
	return UDPStats{Clients: 1, Total: 2, Dropped: 3, OctetsIn: 4, OctetsOut: 5}
}

// dialFunc is a StackDialer.
type dialFunc func(ctx context.Context, src, dst netip.AddrPort) (relay.End, error)

func (f dialFunc) DialFrom(ctx context.Context, src, dst netip.AddrPort) (relay.End, error) {
	return f(ctx, src, dst)
}

// hang is a container that answers nothing.
func hang(ctx context.Context, _, _ netip.AddrPort) (relay.End, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

// fakeKit is a namespace in which things go wrong.
type fakeKit struct {
	transparent error // that of Transparent
	socket      error // that of Socket; nil: a socket of our own namespace
	mu          sync.Mutex
	mute        error // that of Sockets
	listening   []inside.Listening
	looks       int
	prepared    []inside.Kind
	doubts      atomic.Int64
}

func (k *fakeKit) Ready(inside.Kind) (int, bool) { return -1, false }

func (k *fakeKit) Prepare(kind inside.Kind) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.prepared = append(k.prepared, kind)
}

func (k *fakeKit) Socket(_ context.Context, kind inside.Kind) (int, error) {
	if k.socket != nil {
		return -1, k.socket
	}
	family := unix.AF_INET
	if kind.V6 {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err == nil && kind.Transparent {
		err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1))
	}
	return fd, err
}

func (k *fakeKit) Sockets() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.mute
}

func (k *fakeKit) Transparent(bool) error { return k.transparent }
func (k *fakeKit) Doubt()                 { k.doubts.Add(1) }

func (k *fakeKit) Listening(context.Context) ([]inside.Listening, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.looks++
	return k.listening, nil
}

func (k *fakeKit) Ephemeral() (low, high uint16) { return 32768, 60999 }

func (k *fakeKit) listen(l ...inside.Listening) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.listening = l
}
