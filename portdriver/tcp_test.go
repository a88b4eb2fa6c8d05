package portdriver

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// both runs a test on either data path.
func both(t *testing.T, f func(t *testing.T, path string)) {
	for _, path := range []string{PathKernel, PathStack} {
		t.Run(path, func(t *testing.T) { f(t, path) })
	}
}

// seenBy asks a sayWho server whom it sees, and checks that the connection carries octets both ways.
func seenBy(t *testing.T, c net.Conn) netip.AddrPort {
	t.Helper()
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		t.Fatalf("%v → %v: %v", c.LocalAddr(), c.RemoteAddr(), err)
	}
	if _, err := io.WriteString(c, "hello"); err != nil {
		t.Fatal(err)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(r)
	if err != nil || string(rest) != "hello" {
		t.Fatalf("%v → %v: %q, %v", c.LocalAddr(), c.RemoteAddr(), rest, err)
	}
	who, err := netip.ParseAddrPort(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	return netip.AddrPortFrom(who.Addr().Unmap(), who.Port())
}

func TestSourceAddress(t *testing.T) {
	both(t, func(t *testing.T, path string) {
		l := newLab(t, labConfig{path: path})
		for _, server := range []struct{ network, address string }{
			{"tcp", "[::]:80"}, {"tcp4", "0.0.0.0:81"}, {"tcp6", "[::]:82"},
			{"tcp4", "10.0.2.100:83"}, {"tcp6", "[fd00::100]:84"},
		} {
			l.sayWho(server.network, server.address)
			port := server.address[strings.LastIndexByte(server.address, ':')+1:]
			f := l.add("0:" + port)[0]
			if f.Path != path {
				t.Errorf("%s: path %q (%s)", server.address, f.Path, f.Note)
			}
			for _, client := range []struct{ host, want4, want6 netip.Addr }{
				{host4, host4, gateway6},
				{host6, gateway4, host6},
				{localhost, gateway4, gateway6},
				{localhost6, gateway4, gateway6},
			} {
				c := dial(t, "tcp", at(client.host, f))
				got := seenBy(t, c)
				want := client.want4
				if server.network == "tcp6" || server.network == "tcp" && !client.host.Is4() {
					want = client.want6
				}
				if got.Addr() != want {
					t.Errorf("%s: the server saw %v for %v, want %v", server.address, got, c.LocalAddr(), want)
				}
				own := c.LocalAddr().(*net.TCPAddr).AddrPort()
				if want == client.host && got.Port() != own.Port() {
					t.Errorf("%s: the server saw %v for %v: another port", server.address, got, own)
				}
			}
		}
		for _, f := range l.driver.List() {
			f = l.idle(f.ID)
			if f.Total != 4 || f.Refused != 0 || f.OctetsIn != 4*5 || f.OctetsOut < 4*5 {
				t.Errorf("counts: %+v", f)
			}
		}
	})
}

// wantReset checks that a connection that was accepted ends with a RST, and without an octet.
func wantReset(t *testing.T, network, address string) {
	t.Helper()
	c, err := net.DialTimeout(network, address, patience)
	if errors.Is(err, unix.ECONNRESET) {
		return // it came before connect had returned
	} else if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	b, err := io.ReadAll(c)
	if !errors.Is(err, unix.ECONNRESET) || len(b) > 0 {
		t.Errorf("%s: read %q, %v; want ECONNRESET", address, b, err)
	}
}

func TestRefusedIsReset(t *testing.T) {
	both(t, func(t *testing.T, path string) {
		l := newLab(t, labConfig{path: path})
		f := l.add("0:80", "127.0.0.1:0:10.0.2.100:81", "[::1]:0:[fd00::100]:81")
		for range 10 {
			wantReset(t, "tcp", at(host4, f[0]))
			wantReset(t, "tcp", at(localhost6, f[0]))
			wantReset(t, "tcp", at(localhost, f[1]))
			wantReset(t, "tcp", at(localhost6, f[2]))
		}
		for i, want := range []uint64{20, 10, 10} {
			got := l.idle(f[i].ID)
			if got.Refused != want || got.Total != want {
				t.Errorf("counts: %+v", got)
			}
		}
		// The server comes up, and dies again.
		ln := l.sayWho("tcp", ":80")
		seenBy(t, dial(t, "tcp", at(host4, f[0])))
		ln.Close()
		wantReset(t, "tcp", at(host4, f[0]))
	})
}

func TestServerOnLoopback(t *testing.T) {
	l := newLab(t, labConfig{})
	l.sayWho("tcp4", "127.0.0.1:80")
	l.sayWho("tcp6", "[::1]:81")
	f := l.add("0:80", "0:81", "0:127.0.0.1:80")
	for _, test := range []struct {
		to   string
		want netip.Addr
	}{
		{at(host4, f[0]), host4},
		{at(localhost, f[0]), gateway4},
		{at(host6, f[0]), gateway4},
		{at(host6, f[1]), host6},
		{at(localhost6, f[1]), gateway6},
		{at(host4, f[1]), gateway6},
		{at(host4, f[2]), host4},
	} {
		if got := seenBy(t, dial(t, "tcp", test.to)); got.Addr() != test.want {
			t.Errorf("%s: seen as %v, want %v", test.to, got, test.want)
		}
	}

	// The stack path does not lead there, and says so.
	l = newLab(t, labConfig{path: PathStack})
	l.sayWho("tcp4", "127.0.0.1:80")
	only := l.add("0:80", "0:127.0.0.1:80")
	wantReset(t, "tcp", at(host4, only[0]))
	wantReset(t, "tcp", at(host4, only[1]))
	if only[1].Path != "" || !strings.Contains(only[1].Note, "does not lead to 127.0.0.1") {
		t.Errorf("%+v", only[1])
	}
	if i := l.driver.Info(); i.IPv4.Loopback || i.IPv4.Path != PathStack || i.IPv4.WhyNotKernel == "" {
		t.Errorf("%+v", i.IPv4)
	}
}
