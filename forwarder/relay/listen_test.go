package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// listener returns a non-blocking listening socket, and where it is.
func listener(t testing.TB, network, address string) (int, net.Addr) {
	t.Helper()
	ln, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	if u, ok := ln.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	defer ln.Close()
	f, err := ln.(interface {
		SyscallConn() (syscall.RawConn, error)
	}).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd := -1
	if err := f.Control(func(from uintptr) { fd, err = unix.FcntlInt(from, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || fd < 0 {
		t.Fatal(err)
	}
	return fd, ln.Addr()
}

func TestListen(t *testing.T) {
	l, _ := running(t)
	for _, test := range []struct{ network, address, dial string }{
		{"tcp4", "127.0.0.1:0", "tcp4"},
		{"tcp6", "[::1]:0", "tcp6"},
		{"tcp", "[::]:0", "tcp4"},
		{"tcp", "[::]:0", "tcp6"},
		{"unix", filepath.Join(t.TempDir(), "socket"), "unix"},
	} {
		fd, at := listener(t, test.network, test.address)
		type arrival struct {
			fd   int
			from netip.AddrPort
		}
		arrived := make(chan arrival, 1)
		ln, err := l.Listen(fd, func(fd int, from netip.AddrPort) { arrived <- arrival{fd, from} })
		if err != nil {
			t.Fatal(err)
		}
		to := at.String()
		if a, ok := at.(*net.TCPAddr); ok && a.IP.IsUnspecified() {
			to = map[string]string{"tcp4": "127.0.0.1", "tcp6": "[::1]"}[test.dial] + ":" + to[len("[::]:"):]
		}
		for range 3 {
			c, err := net.Dial(test.dial, to)
			if err != nil {
				t.Fatal(err)
			}
			got := <-arrived
			var want netip.AddrPort
			if a, ok := c.LocalAddr().(*net.TCPAddr); ok {
				want = a.AddrPort()
			}
			if got.from != want {
				t.Errorf("%v: from %v, want %v", test, got.from, want)
			}
			flags, err := unix.FcntlInt(uintptr(got.fd), unix.F_GETFL, 0)
			fdFlags, err2 := unix.FcntlInt(uintptr(got.fd), unix.F_GETFD, 0)
			if err != nil || err2 != nil || flags&unix.O_NONBLOCK == 0 || fdFlags&unix.FD_CLOEXEC == 0 {
				t.Errorf("%v: flags %#x, %#x; want O_NONBLOCK and FD_CLOEXEC", test, flags, fdFlags)
			}
			Reset(got.fd)
			c.Close()
		}
		if err := errors.Join(ln.Close(), ln.Close()); err != nil {
			t.Error(err)
		}
		if c, err := net.Dial(test.dial, to); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%v: dial after Close: %v, %v", test, c, err)
		}
	}
}

// plainListener returns a socket that was prepared before it listened, and its port. It is of TCP, where Go's are of MPTCP.
func plainListener(t *testing.T, sa unix.Sockaddr) (fd int, port uint16) {
	t.Helper()
	family := unix.AF_INET
	if _, v6 := sa.(*unix.SockaddrInet6); v6 {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		t.Fatal(err)
	}
	if !Prepare(fd) {
		t.Error("a socket of TCP is not known for one")
	}
	if err := errors.Join(unix.Bind(fd, sa), unix.Listen(fd, 16)); err != nil {
		t.Fatal(err)
	}
	switch at, _ := unix.Getsockname(fd); at := at.(type) {
	case *unix.SockaddrInet4:
		return fd, uint16(at.Port)
	case *unix.SockaddrInet6:
		return fd, uint16(at.Port)
	}
	t.Fatal("the listener has no port")
	return -1, 0
}

// Options.Prepared relies on it.
func TestAssumeAcceptedInherits(t *testing.T) {
	for name, sa := range map[string]unix.Sockaddr{
		"127.0.0.1": &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}},
		"::1":       &unix.SockaddrInet6{Addr: netip.IPv6Loopback().As16()},
		"::":        &unix.SockaddrInet6{},
	} {
		fd, port := plainListener(t, sa)
		defer unix.Close(fd)
		host := name
		if name == "::" {
			host = "127.0.0.1"
		}
		c, err := net.Dial("tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		accepted, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(accepted)
		for _, o := range [][2]int{{unix.IPPROTO_TCP, unix.TCP_NODELAY}, {unix.SOL_SOCKET, unix.SO_OOBINLINE}, {unix.SOL_SOCKET, unix.SO_KEEPALIVE}} {
			if is, err := unix.GetsockoptInt(accepted, o[0], o[1]); is == 0 || err != nil {
				t.Errorf("%s: option %d of level %d is %d, %v", name, o[1], o[0], is, err)
			}
		}
	}
}

// A client's urgent octets that come while the container is dialled stay in their places, the first of two as well.
func TestUrgentBeforeTheJoin(t *testing.T) {
	l, _ := running(t)
	fd, port := plainListener(t, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	accepted := make(chan int, 1)
	ln, err := l.Listen(fd, func(fd int, _ netip.AddrPort) { accepted <- fd })
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	h := <-accepted
	urgent(t, client, "1")
	urgent(t, client, "2")
	if _, err := client.Write([]byte("rest")); err != nil {
		t.Fatal(err)
	}
	c, server := tcpSide(t)
	if _, err := l.JoinSockets(h, c, Options{Prepared: true}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len("12rest"))
	if _, err := io.ReadFull(server, got); err != nil || string(got) != "12rest" {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestPeerWithZone(t *testing.T) {
	var sa unix.RawSockaddrAny
	in := unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: swapped(80), Addr: netip.MustParseAddr("fe80::1").As16(), Scope_id: 7}
	*(*unix.RawSockaddrInet6)(unsafe.Pointer(&sa)) = in
	if got, want := peerOf(&sa, unix.SizeofSockaddrInet6), netip.MustParseAddrPort("[fe80::1%7]:80"); got != want {
		t.Errorf("read %v, want %v", got, want)
	}
	if got := peerOf(&sa, 0); got.IsValid() {
		t.Errorf("read %v of nothing", got)
	}
}

func TestListenAfterStop(t *testing.T) {
	l, stop := running(t)
	fd, at := listener(t, "tcp", "127.0.0.1:0")
	none := func(fd int, _ netip.AddrPort) { t.Error("accepted"); Reset(fd) }
	ln, err := l.Listen(fd, none)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	late, alsoAt := listener(t, "tcp", "127.0.0.1:0")
	if _, err := l.Listen(late, none); !errors.Is(err, ErrStopped) {
		t.Errorf("listen: %v", err)
	}
	for _, at := range []net.Addr{at, alsoAt} {
		if _, err := net.Dial("tcp", at.String()); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("dial: %v, want ECONNREFUSED", err)
		}
	}
}

// forward accepts at a port and joins each with a connection of its own to another, as a published port does.
func forward(t testing.TB, l *Loop, to netip.AddrPort, o Options) (at string) {
	t.Helper()
	fd, addr := listener(t, "tcp", "127.0.0.1:0")
	ln, err := l.Listen(fd, func(fd int, _ netip.AddrPort) {
		c, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Error(err)
			Reset(fd)
			return
		}
		join := func() {
			if _, err := l.JoinSockets(fd, c, o); err != nil && !errors.Is(err, ErrStopped) {
				t.Error(err)
			}
		}
		switch done, err := l.StartConnect(c, to); {
		case !done:
			go func() {
				if err := l.AwaitConnect(context.Background(), c, patience); err != nil {
					t.Error(err)
				}
				join()
			}()
		case err != nil:
			Reset(fd)
			Reset(c)
		default:
			join()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return addr.String()
}

// echo is a server of TCP.
func echo(t testing.TB) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				var b [512]byte // and io.Copy would splice
				for {
					n, err := c.Read(b[:])
					if err != nil {
						return
					}
					if _, err := c.Write(b[:n]); err != nil {
						return
					}
				}
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// A refused port is a RST with not one octet before it, and harms nobody else.
func TestRefusedTarget(t *testing.T) {
	l, _ := running(t)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	at := forward(t, l, closed.Addr().(*net.TCPAddr).AddrPort(), Options{})
	for range 20 {
		c, err := net.Dial("tcp", at)
		if errors.Is(err, unix.ECONNRESET) {
			continue // before connect had returned
		}
		if err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("read %d, %v; want ECONNRESET", n, err)
		}
		c.Close()
	}
}

func TestManyClientsAtOnce(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	// A connection has four sockets here: the client's, the pair's, and the server's.
	clients := min(5000, (int(limit.Cur)-200)/4)
	if clients < 200 {
		t.Skipf("RLIMIT_NOFILE is %d, which leaves room for %d clients only", limit.Cur, clients)
	}
	t.Logf("%d clients", clients)
	l, stop := running(t)
	var ended atomic.Int64
	at := forward(t, l, echo(t), Options{Done: func(err error) {
		if err == nil {
			ended.Add(1)
		}
	}})
	var up, wg sync.WaitGroup
	up.Add(clients)
	for range clients {
		wg.Go(func() {
			c, err := net.Dial("tcp", at)
			if err == nil {
				defer c.Close()
				_, err = c.Write([]byte("hello"))
			}
			b := make([]byte, 5)
			if err == nil {
				_, err = io.ReadFull(c, b)
			}
			if err != nil || string(b) != "hello" {
				t.Errorf("%q, %v", b, err)
			}
			up.Done()
			up.Wait() // all of them stand at once
			if err != nil {
				return
			}
			if err := c.(*net.TCPConn).CloseWrite(); err != nil {
				t.Error(err)
			}
			if n, err := c.Read(b); err != io.EOF {
				t.Errorf("read %d, %v; want the end", n, err)
			}
		})
	}
	wg.Wait()
	until(t, "all have ended", func() bool { return l.Stats().Active == 0 })
	if n := ended.Load(); int(n) != clients {
		t.Errorf("%d of %d ended in order", n, clients)
	}
	stop()
}

// Without a descriptor for it a connection waits in the kernel's queue. It is accepted when another has ended,
// or after a while.
func TestListenPausesWithoutFiles(t *testing.T) {
	for _, what := range []string{"a connection ends", "time passes"} {
		t.Run(what, func(t *testing.T) {
			l, _ := running(t)
			_, _, j := joined(t, l, tcpSide, tcpSide, Options{})
			fd, at := listener(t, "tcp", "127.0.0.1:0")
			arrived := make(chan int, 1)
			ln, err := l.Listen(fd, func(fd int, _ netip.AddrPort) { arrived <- fd })
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			c := socket(t)
			restore := noFiles(t)
			defer restore()
			port := at.(*net.TCPAddr).Port
			if err := unix.Connect(c, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil && err != unix.EINPROGRESS {
				t.Fatal(err)
			}
			until(t, "accepting pauses", l.paused)
			select {
			case <-arrived:
				t.Fatal("accepted without a file")
			default:
			}
			restore()
			if what == "a connection ends" {
				ln.w.pumping.Lock()
				ln.retry.Stop() // so that nothing else can wake it
				ln.w.pumping.Unlock()
				l.pauses.add(ln) // as it was, if the timer was faster
				j.Abort()
			}
			Reset(<-arrived)
		})
	}
}

// A listener that pauses can be closed, and no timer of it goes on.
func TestCloseOfPausedListener(t *testing.T) {
	l, _ := running(t)
	fd, at := listener(t, "tcp", "127.0.0.1:0")
	ln, err := l.Listen(fd, func(fd int, _ netip.AddrPort) { t.Error("accepted"); Reset(fd) })
	if err != nil {
		t.Fatal(err)
	}
	c := socket(t)
	defer noFiles(t)()
	if err := unix.Connect(c, &unix.SockaddrInet4{Port: at.(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}); err != nil && err != unix.EINPROGRESS {
		t.Fatal(err)
	}
	until(t, "accepting pauses", l.paused)
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	if l.paused() {
		t.Error("a closed listener still waits")
	}
}

// paused tells whether a listener waits for a descriptor.
func (l *Loop) paused() bool {
	l.pauses.mu.Lock()
	defer l.pauses.mu.Unlock()
	return len(l.pauses.waiting) > 0
}

// noFiles takes the right to open files from this process.
func noFiles(t *testing.T) (restore func()) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	return sync.OnceFunc(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	})
}

func TestStartConnect(t *testing.T) {
	l, _ := running(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := ln.Addr().(*net.TCPAddr).AddrPort()
	if done, err := l.StartConnect(socket(t), to); !done || err != nil {
		t.Errorf("a listener: %v, %v", done, err)
	}
	ln.Close()
	if done, err := l.StartConnect(socket(t), to); !done || !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a closed port: %v, %v", done, err)
	}
	f, fd := full(t), socket(t)
	if done, err := l.StartConnect(fd, f.addr()); done || err != nil {
		t.Errorf("a full queue: %v, %v", done, err)
	}
	f.accept(t)
	f.accept(t)
	if err := l.AwaitConnect(context.Background(), fd, patience); err != nil {
		t.Errorf("a dial that is answered late: %v", err)
	}
}
