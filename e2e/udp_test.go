package e2e

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ask sends a datagram from a place and returns the answer. A datagram may be lost: it is not sent again, because
// nothing in the lab loses one.
func ask(t testing.TB, p *place, to netip.AddrPort, question string) string {
	t.Helper()
	conn := p.connect(t, "udp", to.String())
	if _, err := conn.Write([]byte(question)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 65536)
	n, err := conn.Read(b)
	if err != nil {
		t.Fatalf("%d octets to %s: %v", len(question), to, err)
	}
	return string(b[:n])
}

// Datagrams of every size come back whole, the largest in fragments on the wire.
func TestUDPEcho(t *testing.T) {
	for _, mtu := range []string{"65520", "1500"} {
		c := connected(t, "--mtu", mtu)
		for _, f := range families {
			t.Run(f.name+" mtu "+mtu, func(t *testing.T) {
				server := lab.outside.serveUDP(t, net.JoinHostPort(f.outside, "0"), same)
				for _, size := range []int{0, 1, 100, 1472, 1473, 9000, 40000, 65507} {
					want := string(pattern[:size])
					if got := ask(t, c.net, server, want); got != want {
						t.Errorf("%d octets: %d came back, or others", size, len(got))
					}
				}
			})
		}
	}
}

// The server sees the container's port, where the host has it free.
func TestUDPPortKept(t *testing.T) {
	c := connected(t)
	server := lab.outside.serveUDP(t, outsideAddr4+":0", func(from netip.AddrPort, _ []byte) []byte { return []byte(from.String()) })
	conn := c.net.listenUDP(t, container4+":45678")
	peer := func() string {
		conn.WriteToUDPAddrPort([]byte("?"), server)
		b := make([]byte, 64)
		n, _, err := conn.ReadFromUDPAddrPort(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	if got, want := peer(), hostAddr4+":45678"; got != want {
		t.Errorf("the server saw %s, want %s", got, want)
	}
	// Endpoint-independent mapping: another server sees the same (RFC 4787 §4.1).
	other := lab.outside.serveUDP(t, moreAddr4+":0", func(from netip.AddrPort, _ []byte) []byte { return []byte(from.String()) })
	server = other
	if got, want := peer(), hostAddr4+":45678"; got != want {
		t.Errorf("another server saw %s, want %s", got, want)
	}

	taken := lab.host.listenUDP(t, "0.0.0.0:45679")
	defer taken.Close()
	conn = c.net.listenUDP(t, container4+":45679")
	if got := peer(); strings.HasSuffix(got, ":45679") || !strings.HasPrefix(got, hostAddr4+":") {
		t.Errorf("with the port taken on the host the server saw %s, want %s and another port", got, hostAddr4)
	}
}

// Only who was written to may answer (address and port dependent filtering).
func TestUDPFilter(t *testing.T) {
	c := connected(t)
	asked := lab.outside.listenUDP(t, outsideAddr4+":0")
	stranger := lab.outside.listenUDP(t, outsideAddr4+":0")
	// An unconnected socket in the container would take anything that came in.
	all := c.net.listenUDP(t, container4+":45680")
	all.WriteToUDPAddrPort([]byte("?"), netip.MustParseAddrPort(asked.LocalAddr().String()))
	b := make([]byte, 64)
	_, from, err := asked.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatal(err)
	}
	stranger.WriteToUDPAddrPort([]byte("stranger"), from)
	asked.WriteToUDPAddrPort([]byte("asked"), from)
	n, err := all.Read(b)
	if err != nil || string(b[:n]) != "asked" {
		t.Errorf("got %q, %v; want what the asked one said", b[:n], err)
	}
}

// sendError sends a datagram from a place and returns the error that ICMP brings back. IP_RECVERR shows those
// too that the kernel calls soft.
func sendError(t testing.TB, p *place, addr string) error {
	t.Helper()
	conn := p.connect(t, "udp", addr).(*net.UDPConn)
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if netip.MustParseAddrPort(addr).Addr().Is4() {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVERR, 1)
		} else {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVERR, 1)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	// More than one, because a router tells so only once a second (net.ipv4.route.error_cost).
	for deadline := time.Now().Add(patience); ; {
		if _, err := conn.Write([]byte("?")); err != nil {
			return err
		}
		conn.SetReadDeadline(time.Now().Add(time.Second))
		if _, err = conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(deadline) {
			return err
		}
	}
}

// A datagram that nobody takes comes back as the error that the host's socket has.
func TestUDPErrors(t *testing.T) {
	c := connected(t)
	for _, test := range []struct {
		name, addr string
		want       error
	}{
		{"refused", outsideAddr4 + ":9", unix.ECONNREFUSED},
		{"refused IPv6", "[" + outsideAddr6 + "]:9", unix.ECONNREFUSED},
		{"host unreachable", badAddr4 + ":9", unix.EHOSTUNREACH},
		{"no route IPv6", "[" + badAddr6 + "]:9", unix.ENETUNREACH},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := sendError(t, c.net, test.addr); !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
		})
	}
	t.Run("and the next is sent", func(t *testing.T) {
		server := lab.outside.serveUDP(t, outsideAddr4+":0", same)
		conn := c.net.listenUDP(t, container4+":0")
		for range 3 {
			conn.WriteToUDPAddrPort([]byte("lost"), netip.MustParseAddrPort(outsideAddr4+":9"))
			conn.WriteToUDPAddrPort([]byte("found"), server)
			b := make([]byte, 64)
			n, err := conn.Read(b)
			if err != nil || string(b[:n]) != "found" {
				t.Errorf("%q, %v", b[:n], err)
			}
		}
	})
}

// A path with a smaller MTU is told to a sender that forbids fragments (RFC 1191).
func TestPathMTU(t *testing.T) {
	narrow := func(mtu string) {
		t.Helper()
		for p, dev := range map[*place]string{lab.outside: "far0", lab.far: "near0"} {
			if out, err := at(p, "ip", "link", "set", dev, "mtu", mtu); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
	}
	narrow("1000")
	t.Cleanup(func() {
		narrow("1500")
		lab.root.must(t, "ip", "route", "flush", "cache")
	})
	c := connected(t)
	conn := c.net.connect(t, "udp", farAddr4+":9").(*net.UDPConn)
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "a datagram of 1200 octets is too long for the path", func() bool {
		_, err := conn.Write(pattern[:1200])
		return errors.Is(err, unix.EMSGSIZE)
	})
	var mtu int
	raw.Control(func(fd uintptr) { mtu, err = unix.GetsockoptInt(int(fd), unix.SOL_IP, unix.IP_MTU) })
	if err != nil || mtu != 1000 {
		t.Errorf("the container knows a path MTU of %d, %v; want 1000", mtu, err)
	}
}
