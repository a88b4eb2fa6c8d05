package portdriver

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"
	"golang.org/x/sys/unix"

	"usernet/forwarder/relay"
	"usernet/tap/inside"
)

func TestConformance(t *testing.T) {
	both(t, func(t *testing.T, path string) {
		l := newLab(t, labConfig{path: path})
		ln := l.listen("tcp4", ":80")
		f := l.add("127.0.0.1:0:80")[0]
		nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
			c1, err = net.Dial("tcp", at(localhost, f))
			if err != nil {
				return nil, nil, nil, err
			}
			if c2, err = ln.Accept(); err != nil {
				c1.Close()
				return nil, nil, nil, err
			}
			return c1, c2, func() { c1.Close(); c2.Close() }, nil
		})
	})
}

// A RST passes in both directions, and half-close does not end the other one.
func TestResetPasses(t *testing.T) {
	both(t, func(t *testing.T, path string) {
		l := newLab(t, labConfig{path: path})
		ln := l.listen("tcp4", ":80")
		f := l.add("127.0.0.1:0:80")[0]
		for _, name := range []string{"the client's", "the server's"} {
			client := dial(t, "tcp", at(localhost, f))
			server, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			a, b := client, server
			if name == "the server's" {
				a, b = b, a
			}
			a.(*net.TCPConn).SetLinger(0)
			a.Close()
			b.SetReadDeadline(time.Now().Add(patience))
			if _, err := b.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s: %v", name, err)
			}
		}
		l.idle(f.ID)
	})
}

func TestRemove(t *testing.T) {
	both(t, func(t *testing.T, path string) {
		l := newLab(t, labConfig{path: path})
		ln := l.listen("tcp4", ":80")
		connect := func(f Forward) (client, server net.Conn) {
			client = dial(t, "tcp", at(localhost, f))
			server, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { server.Close() })
			server.SetDeadline(time.Now().Add(patience))
			return client, server
		}
		wantEcho := func(a, b net.Conn) {
			t.Helper()
			if _, err := io.WriteString(a, "x"); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadFull(b, make([]byte, 1)); err != nil {
				t.Error(err)
			}
		}
		wantRefused := func(f Forward) {
			t.Helper()
			if _, err := net.Dial("tcp", at(localhost, f)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("the port after it was removed: %v", err)
			}
		}

		other := l.add("127.0.0.1:0:80")[0]
		otherClient, otherServer := connect(other)
		f := l.add("127.0.0.1:0:80")[0]
		client, server := connect(f)
		if err := l.driver.Remove(t.Context(), f.ID, false); err != nil {
			t.Fatal(err)
		}
		wantRefused(f)
		for _, c := range []net.Conn{client, server} {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("a connection of a port that was removed: %v", err)
			}
		}
		if _, ok := l.driver.Get(f.ID); ok {
			t.Error("it is listed")
		}

		f = l.add("127.0.0.1:0:80")[0]
		client, server = connect(f)
		client2, server2 := connect(f)
		if err := l.driver.Remove(t.Context(), f.ID, true); err != nil {
			t.Fatal(err)
		}
		wantRefused(f)
		wantEcho(client, server)
		wantEcho(server, client)
		if got, ok := l.driver.Get(f.ID); !ok || !got.Draining || got.Active != 2 {
			t.Errorf("while it drains: %+v, %v", got, ok)
		}
		again, err := l.driver.Add(t.Context(), f.Spec) // its place is free
		if err != nil {
			t.Fatal(err)
		}
		client.Close()
		server.Close()
		until(t, "the first has ended", func() bool { f, _ := l.driver.Get(f.ID); return f.Active == 1 })
		client2.Close()
		server2.Close()
		until(t, "it is forgotten", func() bool { _, ok := l.driver.Get(f.ID); return !ok })

		// One that drains can still be cut off.
		client, _ = connect(again[0])
		for _, drain := range []bool{true, false} {
			if err := l.driver.Remove(t.Context(), again[0].ID, drain); err != nil {
				t.Error(err)
			}
		}
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("cut off: %v", err)
		}
		wantEcho(otherClient, otherServer)
	})
}

// Many clients come at once, and go; the server dies amidst, and returns.
func TestCrowd(t *testing.T) {
	both(t, func(t *testing.T, path string) {
		l := newLab(t, labConfig{path: path})
		f := l.add("0:80")[0]
		const clients = 300
		crowd := func() (served, refused int64) {
			var wg sync.WaitGroup
			var ok, reset atomic.Int64
			for range clients {
				wg.Go(func() {
					c, err := net.DialTimeout("tcp", at(host4, f), patience)
					if err == nil {
						c.SetDeadline(time.Now().Add(patience))
						_, err = io.ReadFull(c, make([]byte, 5))
						c.Close()
					}
					switch {
					case err == nil:
						ok.Add(1)
					case errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
						reset.Add(1)
					default:
						t.Error(err)
					}
				})
			}
			wg.Wait()
			return ok.Load(), reset.Load()
		}
		if ok, reset := crowd(); ok != 0 || reset != clients {
			t.Errorf("without a server: %d served, %d reset", ok, reset)
		}
		ln := l.sayWho("tcp", ":80")
		if ok, _ := crowd(); ok != clients {
			t.Errorf("with a server: %d served", ok)
		}
		l.idle(f.ID)
		ln.Close()
		if ok, reset := crowd(); ok != 0 || reset != clients {
			t.Errorf("when it has gone: %d served, %d reset", ok, reset)
		}
		l.sayWho("tcp", ":80")
		if ok, _ := crowd(); ok != clients {
			t.Errorf("when it is back: %d served", ok)
		}
		l.idle(f.ID)
	})
}

// pair is a client's connection as accept gives it, and the client's end.
func pair(t *testing.T) (accepted int, client int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[1]) })
	return fds[0], fds[1]
}

// ended tells whether the other end of a pair was closed.
func ended(fd int) bool {
	n, err := unix.Read(fd, make([]byte, 1))
	return n == 0 && err == nil
}

var someone = netip.MustParseAddrPort("203.0.113.2:7000")

// hanging is a driver whose container answers nothing, with two forwards; it is for a synctest bubble.
func hanging(t *testing.T, dials int, dial dialFunc) (d *Driver, a, b *forward) {
	t.Helper()
	loop, err := relay.NewLoop()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(loop.Close)
	d, err = New(Config{Loop: loop, Stack: dial, Container4: container4, Gateway4: gateway4})
	if err != nil {
		t.Fatal(err)
	}
	d.limits.Dials = dials
	return d, d.newForward(Spec{Proto: "tcp", ContainerPort: 80}), d.newForward(Spec{Proto: "tcp", ContainerPort: 81})
}

func TestDialHasDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked []netip.AddrPort
		d, f, _ := hanging(t, 10, func(ctx context.Context, src, dst netip.AddrPort) (relay.End, error) {
			asked = append(asked, src, dst)
			return hang(ctx, src, dst)
		})
		fd, client := pair(t)
		f.accepted(fd, someone)
		begun := time.Now()
		time.Sleep(10*time.Second - 1)
		synctest.Wait()
		if ended(client) || d.Info().Dials != 1 {
			t.Errorf("it ended early: %+v", d.Info())
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if !ended(client) || time.Since(begun) != 10*time.Second {
			t.Errorf("it goes on")
		}
		if len(asked) != 2 || asked[0] != someone || asked[1] != netip.AddrPortFrom(container4, 80) {
			t.Errorf("dialled %v", asked)
		}
		if s := f.snapshot(); s.Total != 1 || s.Refused != 1 || s.Active != 0 || d.connections.Load() != 0 || d.Info().Dials != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// A forward where everything hangs makes room for another, down to its share.
func TestDialsHaveShares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, b := hanging(t, 10, hang)
		clients := map[*forward][]int{}
		come := func(f *forward) {
			fd, client := pair(t)
			f.accepted(fd, someone)
			clients[f] = append(clients[f], client)
			synctest.Wait()
		}
		waiting := func(f *forward) (n int) {
			for _, c := range clients[f] {
				if _, err := unix.Read(c, make([]byte, 1)); err == unix.EAGAIN {
					n++
				}
			}
			return n
		}
		for range 12 {
			come(a)
		}
		time.Sleep(placePatience)
		synctest.Wait()
		if n := waiting(a); n != 10 {
			t.Errorf("%d of 12 wait, want 10", n)
		}
		for range 7 {
			come(b)
		}
		time.Sleep(placePatience)
		synctest.Wait()
		if x, y := waiting(a), waiting(b); x != 5 || y != 5 {
			t.Errorf("%d and %d wait, want 5 and 5", x, y)
		}
		if err := a.close(false); err != nil { // as Remove does
			t.Error(err)
		}
		synctest.Wait()
		<-a.idle
		if x, y := waiting(a), waiting(b); x != 0 || y != 5 {
			t.Errorf("after one was removed %d and %d wait", x, y)
		}
		if err := errors.Join(b.close(true), d.Close()); err != nil {
			t.Error(err)
		}
		<-b.idle
		if d.connections.Load() != 0 {
			t.Errorf("%d connections are left", d.connections.Load())
		}
	})
}

// A crowd that comes at once is served in turns, and no forward's waits for another's.
func TestDialsTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dialled := make(map[uint16]int)
		var mu sync.Mutex
		d, a, b := hanging(t, 3, func(ctx context.Context, src, dst netip.AddrPort) (relay.End, error) {
			time.Sleep(100 * time.Millisecond)
			mu.Lock()
			defer mu.Unlock()
			dialled[dst.Port()]++
			return nil, unix.ECONNREFUSED
		})
		for i := range 60 {
			fd, _ := pair(t)
			if f := a; i < 50 {
				f.accepted(fd, someone)
			} else {
				b.accepted(fd, someone)
			}
		}
		// 30 dials, 15 for each forward that still waits; then those of the other alone.
		time.Sleep(1050 * time.Millisecond)
		synctest.Wait()
		mu.Lock()
		if dialled[81] != 10 || dialled[80] < 15 {
			t.Errorf("after a second %v were dialled, want all 10 of port 81", dialled)
		}
		mu.Unlock()
		time.Sleep(time.Second)
		synctest.Wait()
		mu.Lock()
		if dialled[80] != 50 || d.Info().Dials != 0 || d.connections.Load() != 0 {
			t.Errorf("in the end %v were dialled, want all: %+v", dialled, d.Info())
		}
		mu.Unlock()
		if err := errors.Join(a.close(false), b.close(false), d.Close()); err != nil {
			t.Error(err)
		}
	})
}

// A forward whose clients take all that they can get leaves places to the others.
func TestConnectionsOfOneForward(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, b := hanging(t, 100, hang)
		d.limits.Connections = 16
		come := func(f *forward, n int) (taken int) {
			for range n {
				fd, client := pair(t)
				f.accepted(fd, someone)
				synctest.Wait()
				if !ended(client) {
					taken++
				}
			}
			return taken
		}
		if n := come(a, 20); n != 14 {
			t.Errorf("one forward has %d of 16 connections, want 14", n)
		}
		if n := come(b, 4); n != 2 {
			t.Errorf("the other has %d, want the last 2", n)
		}
		if err := errors.Join(a.close(false), b.close(false), d.Close()); err != nil {
			t.Error(err)
		}
		if n := d.connections.Load(); n != 0 {
			t.Errorf("%d are counted at the end", n)
		}
	})
}

func TestConnectionLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, b := hanging(t, 10, hang)
		d.limits.Connections = 2
		var clients []int
		for _, f := range []*forward{a, b, a} {
			fd, client := pair(t)
			f.accepted(fd, someone)
			clients = append(clients, client)
		}
		synctest.Wait()
		if ended(clients[0]) || ended(clients[1]) || !ended(clients[2]) {
			t.Error("not the third one was refused")
		}
		if s := a.snapshot(); s.Refused != 1 || s.Active != 1 {
			t.Errorf("%+v", s)
		}
		for _, f := range []*forward{a, b} {
			f.close(false)
		}
		d.Close()
	})
}

// A client's port that is taken in the stack costs the port, not the address.
func TestPortIsTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked []netip.AddrPort
		d, f, _ := hanging(t, 10, func(_ context.Context, src, _ netip.AddrPort) (relay.End, error) {
			asked = append(asked, src)
			if src.Port() != 0 {
				return nil, unix.EADDRINUSE
			}
			return nil, unix.ECONNREFUSED
		})
		fd, client := pair(t)
		f.accepted(fd, someone)
		synctest.Wait()
		if !ended(client) || len(asked) != 2 || asked[0] != someone || asked[1] != netip.AddrPortFrom(someone.Addr(), 0) {
			t.Errorf("dialled from %v", asked)
		}
		d.Close()
	})
}

// The stack path takes over where a socket cannot be had, or the address is not the container's own.
func TestFallsBack(t *testing.T) {
	elsewhere := netip.MustParseAddr("10.0.2.7")
	for name, c := range map[string]struct {
		kit  *fakeKit
		to   netip.Addr
		note string
	}{
		"no socket":         {&fakeKit{socket: errors.New("the helper is dead")}, loopbackOfOurs, ""},
		"not transparent":   {&fakeKit{transparent: errors.New("no policy routing")}, loopbackOfOurs, "not by the kernel path: no policy routing"},
		"another container": {&fakeKit{}, elsewhere, "not by the kernel path: 10.0.2.7 is not an address of the container itself now"},
	} {
		t.Run(name, func(t *testing.T) {
			dialled := make(chan netip.AddrPort, 1)
			d := bare(t, func(c *Config) {
				c.Stack = dialFunc(func(_ context.Context, src, dst netip.AddrPort) (relay.End, error) {
					dialled <- dst
					return nil, unix.ECONNREFUSED
				})
			})
			d.kit = c.kit
			f := publish(t, d, "203.0.113.1:0:"+c.to.String()+":80")[0]
			wantReset(t, "tcp", at(host4, f))
			if dst := <-dialled; dst != netip.AddrPortFrom(c.to, 80) {
				t.Errorf("dialled %v", dst)
			}
			f, _ = d.Get(f.ID)
			if c.note != "" && (f.Path != PathStack || !strings.Contains(f.Note, c.note)) {
				t.Errorf("%q, %q; want %q", f.Path, f.Note, c.note)
			}
		})
	}
}

// loopbackOfOurs is an address that our own namespace, which fakeKit's sockets belong to, has.
var loopbackOfOurs = host4

// A server that resets what it accepts, sooner than the dial has returned, is not asked again at another address of its own.
func TestResetIsNoRefusal(t *testing.T) {
	for _, errno := range []unix.Errno{unix.ECONNRESET, unix.EPIPE} {
		var dials atomic.Int64
		d := bare(t, func(c *Config) {
			c.Stack = dialFunc(func(context.Context, netip.AddrPort, netip.AddrPort) (relay.End, error) {
				dials.Add(1)
				return nil, errno
			})
		})
		f := publish(t, d, "203.0.113.1:0:80")[0]
		wantReset(t, "tcp", at(host4, f))
		until(t, "the connection has ended", func() bool { f, _ := d.Get(f.ID); return f.Active == 0 })
		if n := dials.Load(); n != 1 {
			t.Errorf("%v: dialled %d times", errno, n)
		}
	}
}

// Where the helper in the namespace is gone it is said that the container's loopback is not reached.
func TestHelperIsGone(t *testing.T) {
	for _, path := range []string{PathAuto, PathKernel} {
		t.Run(path, func(t *testing.T) {
			d := bare(t, func(c *Config) {
				c.Path = path
				c.Stack = dialFunc(hang)
			})
			k := &fakeKit{}
			k.listen(inside.Listening{Proto: "udp", Addr: netip.MustParseAddrPort("127.0.0.1:53")})
			d.kit = k
			fs := publish(t, d, "203.0.113.1:0:80", "0:127.0.0.1:81", "0:53/udp", "0:54/udp", "0:10.0.2.7:55/udp")
			if i := d.Info(); !i.IPv4.Loopback || i.IPv4.WhyNotKernel != "" {
				t.Errorf("before: %+v", i.IPv4)
			}
			k.mu.Lock()
			k.mute = errors.New("the helper is dead")
			k.transparent = k.mute
			k.mu.Unlock()
			const why, not = "the helper is dead", "not reached"
			want := [][3]string{{PathStack, why, not}, {"", why, ""}, {"", why, not}, {PathTAP, "", not}, {PathTAP, "", ""}}
			if path == PathKernel {
				want[0] = [3]string{"", why, ""}
			}
			for i, want := range want {
				f, _ := d.Get(fs[i].ID)
				if f.Path != want[0] || !strings.Contains(f.Note, want[1]) || !strings.Contains(f.Note, want[2]) || want[1] == "" && want[2] == "" && f.Note != "" {
					t.Errorf("%v: path %q, note %q; want %q", f.Spec, f.Path, f.Note, want)
				}
			}
			if i := d.Info(); i.IPv4.Loopback || i.IPv4.WhyNotKernel != why || i.IPv4.Path != want[0][0] {
				t.Errorf("%+v", i.IPv4)
			}
		})
	}
}

func TestNoPath(t *testing.T) {
	d := bare(t, func(c *Config) { c.WhyNoKernel = errors.New("it is forbidden") })
	f := publish(t, d, "203.0.113.1:0:80")[0]
	if f.Path != "" || !strings.Contains(f.Note, "it is forbidden") {
		t.Errorf("%+v", f)
	}
	wantReset(t, "tcp", at(host4, f))
	if i := d.Info(); i.IPv4.Path != "" || i.IPv4.WhyNotKernel != "it is forbidden" || i.Forwards != 1 || i.MaxForwards < minLimit {
		t.Errorf("%+v", i)
	}
	if _, err := New(Config{Loop: d.cfg.Loop, Path: "x"}); err == nil {
		t.Error("a path x is none")
	}
	if _, err := New(Config{}); err == nil {
		t.Error("there is no relay")
	}
}
