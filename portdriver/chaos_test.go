package portdriver

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"usernet/tap/inside"
	"usernet/tap/taptest"
)

// A container that takes the routing away harms the kernel path alone, and gets it back.
func TestRoutingIsTakenAway(t *testing.T) {
	l := newLab(t, labConfig{})
	l.sayWho("tcp4", "0.0.0.0:80")
	f := l.add("203.0.113.1:0:80")[0]
	seenBy(t, dial(t, "tcp", at(host4, f)))
	rules, err := l.space.Command("ip", "rule").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	pref, _, ok := strings.Cut(string(rules[strings.Index(string(rules), "\n")+1:]), ":")
	if !ok || !strings.Contains(string(rules), "fwmark 0x3000") {
		t.Fatalf("no rule of ours: %s", rules)
	}
	if out, err := l.space.Command("ip", "rule", "del", "pref", pref).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if who := seenBy(t, dial(t, "tcp", at(host4, f))); who.Addr() != host4 { // by the stack
		t.Errorf("seen as %v", who)
	}
	until(t, "the rule is back", func() bool {
		rules, err := l.space.Command("ip", "rule").CombinedOutput()
		return err == nil && strings.Contains(string(rules), "fwmark 0x3000")
	})
	if who := seenBy(t, dial(t, "tcp", at(host4, f))); who.Addr() != host4 {
		t.Errorf("seen as %v", who)
	}
}

// A container that takes its lo down for longer than the routing is looked at once gets the kernel path back when it is up again.
func TestLoopbackComesBack(t *testing.T) {
	l := newLab(t, labConfig{})
	l.sayWho("tcp4", "0.0.0.0:80")
	f := l.add("203.0.113.1:0:80")[0]
	set := func(state string) {
		t.Helper()
		if out, err := l.space.Command("ip", "link", "set", "lo", state).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	// Whatever the path, the server sees the client.
	path := func(want string) func() bool {
		return func() bool {
			if who := seenBy(t, dial(t, "tcp", at(host4, f))); who.Addr() != host4 {
				t.Errorf("seen as %v", who)
			}
			f, _ := l.driver.Get(f.ID)
			return f.Path == want
		}
	}
	set("down")
	stack := path(PathStack)
	until(t, "lo is found to be down", func() bool {
		taken := stack() // by a detour, too, before somebody has looked
		f, _ := l.driver.Get(f.ID)
		return taken && strings.Contains(f.Note, "lo is down")
	})
	set("up")
	until(t, "the kernel path is back", path(PathKernel))
}

// An address that the container loses, and one that it gets, are noticed.
func TestAddressMoves(t *testing.T) {
	l := newLab(t, labConfig{})
	// The server waits for no client: one whose address goes hears nothing more, not even a reset.
	ln := l.listen("tcp4", "0.0.0.0:80")
	var served sync.WaitGroup
	served.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(c, c.RemoteAddr())
			c.Close()
		}
	})
	defer served.Wait()
	defer ln.Close()
	f := l.add("203.0.113.1:0:10.0.2.7:80")[0]
	path := func(want string) func() bool {
		return func() bool {
			c, err := net.DialTimeout("tcp", at(host4, f), patience)
			if err == nil {
				c.Close()
			}
			f, _ = l.driver.Get(f.ID)
			return f.Path == want
		}
	}
	until(t, "it is known not to be the container's", path(PathStack))
	if out, err := l.space.Command("ip", "address", "add", "10.0.2.7/24", "dev", "tap0").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	until(t, "it is known to be the container's", path(PathKernel))
	if who, err := io.ReadAll(dial(t, "tcp", at(host4, f))); err != nil || !strings.HasPrefix(string(who), "203.0.113.1:") {
		t.Errorf("seen as %q, %v", who, err)
	}
	if out, err := l.space.Command("ip", "address", "del", "10.0.2.7/24", "dev", "tap0").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	until(t, "it is known to have gone", path(PathStack))
}

// Clients that come while there is no descriptor wait, and are served when there is one.
func TestOutOfFiles(t *testing.T) {
	both(t, func(t *testing.T, path string) {
		l := newLab(t, labConfig{path: path})
		l.sayWho("tcp4", "0.0.0.0:80")
		f := l.add("127.0.0.1:0:80")[0]
		seenBy(t, dial(t, "tcp", at(localhost, f)))
		var clients []int
		for range 20 {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Close(fd) })
			clients = append(clients, fd)
		}
		var was unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
			t.Fatal(err)
		}
		few := was
		few.Cur = 256
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
			t.Fatal(err)
		}
		var filling []int
		free := func() {
			unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
			for _, fd := range filling {
				unix.Close(fd)
			}
			filling = nil
		}
		defer free()
		for {
			fd, err := unix.FcntlInt(uintptr(clients[0]), unix.F_DUPFD_CLOEXEC, 0)
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.EINVAL) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			filling = append(filling, fd)
		}
		for _, fd := range clients {
			if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: localhost.As4(), Port: int(f.Spec.HostPort)}); err != nil {
				t.Fatal(err)
			}
		}
		free()
		for _, fd := range clients {
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience / time.Second)}); err != nil {
				t.Fatal(err)
			}
			if n, err := unix.Read(fd, make([]byte, 100)); n <= 0 {
				t.Errorf("a client that waited: %d, %v", n, err)
			}
		}
	})
}

// The container ends; what is published can still be withdrawn, and clients are told.
func TestContainerEnds(t *testing.T) {
	l := newLab(t, labConfig{})
	f := l.add("203.0.113.1:0:80", "0:53/udp")
	wantReset(t, "tcp", at(host4, f[0]))
	l.space.End()
	wantReset(t, "tcp", at(host4, f[0]))
	for _, f := range f {
		if err := l.driver.Remove(t.Context(), f.ID, false); err != nil {
			t.Error(err)
		}
	}
	wantReset(t, "tcp", at(host4, l.add("203.0.113.1:0:80")[0]))
}

// Whoever owns the namespace, the address is kept.
func TestOwners(t *testing.T) {
	for _, owner := range taptest.Owners {
		t.Run(owner.String(), func(t *testing.T) {
			l := newLab(t, labConfig{path: PathKernel, space: taptest.NewNS(t, owner)})
			l.sayWho("tcp", "[::]:80")
			f := l.add("0:80")[0]
			if f.Path != PathKernel || f.Note != "" {
				t.Errorf("%+v", f)
			}
			for _, client := range []struct{ at, want string }{{at(host4, f), host4.String()}, {at(host6, f), host6.String()}} {
				if who := seenBy(t, dial(t, "tcp", client.at)); who.Addr().String() != client.want {
					t.Errorf("seen as %v, want %s", who, client.want)
				}
			}
		})
	}
}

// A client's port that a server in the container has costs the port, not the address.
func TestClientPortIsTakenInside(t *testing.T) {
	both(t, func(t *testing.T, path string) {
		l := newLab(t, labConfig{path: path})
		l.sayWho("tcp4", "0.0.0.0:80")
		a, b := l.add("203.0.113.1:0:80")[0], l.add("203.0.113.1:0:10.0.2.100:80")[0]
		port := freePorts(t, 1)
		l.listen("tcp4", fmt.Sprintf(":%d", port))
		// Two connections from one port to two forwards of one server, whose number a server has too.
		dialer := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: host4.AsSlice(), Port: port}, Control: reuse}
		for _, f := range []Forward{a, b} {
			c, err := dialer.Dial("tcp", at(host4, f))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			who := make([]byte, len("203.0.113.1:"))
			if _, err := io.ReadFull(c, who); err != nil || string(who) != "203.0.113.1:" {
				t.Errorf("%v: %q, %v", f.Spec, who, err)
			}
		}
	})
}

// reuse lets two sockets have one port.
func reuse(_, _ string, c syscall.RawConn) error {
	var err error
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(cerr, err)
}

var _ kit = (*inside.Kit)(nil)
