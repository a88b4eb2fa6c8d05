package inside_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap/inside"
	"usernet/tap/taptest"
)

// A server in the container sees the client's own address, whichever address it listens on, and whatever the
// namespace's owner makes of our uid.
func TestSource(t *testing.T) {
	for _, owner := range taptest.Owners {
		t.Run(owner.String(), func(t *testing.T) {
			b := newBox(t, owner)
			b.open(t, inside.Config{IPv6: true})
			b.testSource(t)
		})
	}
}

func TestSourceAsUser(t *testing.T) {
	if taptest.AsUser(t) {
		TestSource(t)
	}
}

// The namespace's owner is the user namespace that we are in, as under podman.
func TestSourceOwnUserNamespace(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		cmd.Wait()
	}()
	b := boxOf(t, cmd.Process.Pid)
	b.open(t, inside.Config{IPv6: true})
	b.testSource(t)
}

func (b *box) testSource(t *testing.T) {
	for i, c := range []struct{ network, listen, client, dial string }{
		{"tcp4", "0.0.0.0:0", "203.0.113.2", "10.0.2.100"},
		{"tcp", "[::]:0", "203.0.113.2", "10.0.2.100"},
		{"tcp", "[::]:0", "2001:db8::2", "fd00::100"},
		{"tcp4", "10.0.2.100:0", "203.0.113.2", "10.0.2.100"},
		{"tcp6", "[fd00::100]:0", "2001:db8::2", "fd00::100"},
		{"tcp4", "127.0.0.1:0", "", "127.0.0.1"},
		{"tcp6", "[::1]:0", "", "::1"},
	} {
		name := fmt.Sprintf("%s on %s from %q", c.network, c.listen, c.client)
		l := b.listen(t, c.network, c.listen)
		dial := netip.AddrPortFrom(netip.MustParseAddr(c.dial), l.Addr().(*net.TCPAddr).AddrPort().Port())
		kind := inside.Kind{V6: dial.Addr().Is6(), Transparent: c.client != ""}
		if kind.Transparent {
			if err := b.Transparent(kind.V6); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		fd, err := b.Socket(t.Context(), kind)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var from netip.AddrPort
		if kind.Transparent {
			from = netip.AddrPortFrom(netip.MustParseAddr(c.client), uint16(40000+i))
			if err := unix.Bind(fd, sockaddr(from)); err != nil {
				t.Fatalf("%s: bind %s: %v", name, from, err)
			}
		}
		if err := connect(fd, dial); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		peer := conn.RemoteAddr().(*net.TCPAddr).AddrPort()
		if seen := netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port()); kind.Transparent && seen != from {
			t.Errorf("%s: the server sees %s, want %s", name, seen, from)
		}
		// Both ways and both ends.
		if err := errors.Join(unix.SetNonblock(fd, false), sendAll(fd, "question")); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got, err := io.ReadAll(conn); string(got) != "question" || err != nil {
			t.Errorf("%s: the server read %q, %v", name, got, err)
		}
		io.WriteString(conn, "answer")
		conn.Close()
		got := make([]byte, 20)
		if n, err := unix.Read(fd, got); string(got[:max(n, 0)]) != "answer" || err != nil {
			t.Errorf("%s: the client read %q, %v", name, got[:max(n, 0)], err)
		}
		unix.Close(fd)
		l.Close()
		// The port is closed now, and says so to the client's own address as well.
		again, err := b.Socket(t.Context(), kind)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if kind.Transparent {
			if err := unix.Bind(again, sockaddr(netip.AddrPortFrom(from.Addr(), uint16(41000+i)))); err != nil {
				t.Fatalf("%s: bind: %v", name, err)
			}
		}
		if err := connect(again, dial); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: where nobody listens any more: %v, want ECONNREFUSED", name, err)
		}
		unix.Close(again)
	}
}

// Two of one kind with one client's port, as a client's two connections to two published ports may have; and what
// a socket is set to.
func TestSocketOptions(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	b.open(t, inside.Config{IPv6: true})
	for _, kind := range []inside.Kind{{}, {V6: true}, {Transparent: true}, {V6: true, Transparent: true}} {
		want := 0
		if kind.Transparent {
			want = 1
		}
		transparent := [2]int{unix.IPPROTO_IP, unix.IP_TRANSPARENT}
		client := netip.MustParseAddrPort("203.0.113.2:777")
		if kind.V6 {
			transparent = [2]int{unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT}
			client = netip.MustParseAddrPort("[2001:db8::2]:7777")
		}
		for range 2 {
			fd, err := b.Socket(t.Context(), kind)
			if err != nil {
				t.Fatalf("%+v: %v", kind, err)
			}
			defer unix.Close(fd)
			for _, o := range [][3]int{
				{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
				{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
				{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
				{transparent[0], transparent[1], want},
				{unix.SOL_SOCKET, unix.SO_REUSEADDR, want},
				{unix.SOL_SOCKET, unix.SO_MARK, want * inside.Mark},
				{unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, want},
			} {
				if is, err := unix.GetsockoptInt(fd, o[0], o[1]); is != o[2] || err != nil {
					t.Errorf("%+v: option %d of level %d is %d, %v; want %d", kind, o[1], o[0], is, err, o[2])
				}
			}
			flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
			closeOnExec, err2 := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
			if flags&unix.O_NONBLOCK == 0 || closeOnExec&unix.FD_CLOEXEC == 0 || err != nil || err2 != nil {
				t.Errorf("%+v: flags %#x and %#x", kind, flags, closeOnExec)
			}
			client = netip.AddrPortFrom(client.Addr(), 7777)
			if err := unix.Bind(fd, sockaddr(client)); kind.Transparent && err != nil {
				t.Errorf("%+v: bind %s: %v", kind, client, err)
			}
		}
	}
}

// listen has a server of the container's.
func (b *box) listen(t *testing.T, network, addr string) net.Listener {
	t.Helper()
	files := b.do(t, "listen", server{network, addr}, nil)
	defer files[0].Close()
	b.do(t, "pid", struct{}{}, nil) // the helper closes its own descriptor before it does the next thing
	l, err := net.FileListener(files[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// connect finishes a non-blocking connect, or says after a while that nothing answers.
func connect(fd int, to netip.AddrPort) error {
	err := unix.Connect(fd, sockaddr(to))
	if !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		n, err := unix.Poll(p, connectPatience)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n == 0 {
			return unix.ETIMEDOUT
		}
		if errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); errno != 0 || err != nil {
			return errors.Join(err, unix.Errno(errno))
		}
		return err
	}
}

// connectPatience is in milliseconds. On lo the answer is there at once.
const connectPatience = 5000

func sendAll(fd int, s string) error {
	_, err := io.Copy(fdWriter(fd), strings.NewReader(s))
	return err
}

type fdWriter int

func (w fdWriter) Write(p []byte) (int, error) { return unix.Write(int(w), p) }
