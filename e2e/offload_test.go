package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The addresses of a leaf and of the container at its cable.
const (
	leafAddr4, leafAddr6 = "10.9.0.2", "fd09::2"
	leafGate4, leafGate6 = "10.9.0.1", "fd09::1"
)

// newLeaf makes a place behind a container, which forwards for it:
//
//	leaf ── up0 ═ veth ═ down0 ── container ── tap0 ══ usernet
//
// The cable has no offloads, so that everything that usernet left to the container's kernel has been done when it gets
// there: segments, checksums. mtu is the cable's.
func newLeaf(t testing.TB, c *container, mtu int, ipv6 bool) *place {
	t.Helper()
	leaf, err := newPlace("leaf", func() error { return unix.Unshare(unix.CLONE_NEWNET) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(leaf.close)
	step := func(p *place, args ...string) {
		t.Helper()
		if out, err := at(p, args...); err != nil {
			t.Fatalf("%s: %v: %v: %s", p.name, args, err, out)
		}
	}
	set := func(p *place, name, value string) {
		t.Helper()
		if err := sysctl(p, name, value); err != nil {
			t.Fatal(err)
		}
	}
	set(leaf, "ipv6/conf/default/dad_transmits", "0")
	set(c.net, "ipv6/conf/default/dad_transmits", "0")
	step(leaf, "ip", "link", "set", "lo", "up")
	step(leaf, "ip", "link", "add", "up0", "mtu", strconv.Itoa(mtu), "type", "veth", "peer", "name", "down0", "mtu", strconv.Itoa(mtu), "netns", c.net.pid)
	plainWire(t, leaf, "up0")
	plainWire(t, c.net, "down0")
	for _, end := range []struct {
		p         *place
		dev, a, b string
	}{{leaf, "up0", leafAddr4, leafAddr6}, {c.net, "down0", leafGate4, leafGate6}} {
		step(end.p, "ip", "addr", "add", end.a+"/24", "dev", end.dev)
		if ipv6 {
			step(end.p, "ip", "addr", "add", end.b+"/64", "dev", end.dev, "nodad")
		}
		step(end.p, "ip", "link", "set", end.dev, "up")
	}
	step(leaf, "ip", "route", "add", "default", "via", leafGate4)
	set(c.net, "ipv4/ip_forward", "1")
	// usernet's gateway takes the leaf for a neighbour, as everything is behind one link for it.
	set(c.net, "ipv4/conf/tap0/proxy_arp", "1")
	if ipv6 {
		step(leaf, "ip", "route", "add", "default", "via", leafGate6)
		set(c.net, "ipv6/conf/all/forwarding", "1")
		set(c.net, "ipv6/conf/tap0/proxy_ndp", "1")
		step(c.net, "ip", "neigh", "add", "proxy", leafAddr6, "dev", "tap0")
	}
	return leaf
}

// mtus and kernels are what the offloads have to cope with. Each MTU is that of the TAP and of the cable.
var (
	offloadMTUs = []int{576, 1280, 1500, 9000, 65520}
	kernels     = []struct {
		name  string
		flags []string
	}{
		{"with all", nil},
		{"without USO", []string{"--no-uso"}},
		{"without the header", []string{"--no-offload"}},
	}
)

// around are sizes at which something happens for some of the limits, up to most octets.
func around(most int, limits ...int) []int {
	sizes := []int{1, 2, 3, 7, 8, 100, most - 1, most}
	for _, l := range limits {
		sizes = append(sizes, l-1, l, l+1, 2*l-1, 2*l, 2*l+1)
	}
	slices.Sort(sizes)
	sizes = slices.Compact(sizes)
	return slices.DeleteFunc(sizes, func(n int) bool { return n < 1 || n > most })
}

// What leaves the container on a wire without offloads is right to the last checksum, whatever size it has, at each
// MTU and with each kind of kernel; and what comes from there gets to the host.
func TestOffloadsOnTheWire(t *testing.T) {
	needs(t, "ip", "ping")
	for _, k := range kernels {
		for _, mtu := range offloadMTUs {
			if k.flags != nil && mtu != 1500 && mtu != 65520 {
				continue
			}
			t.Run(fmt.Sprintf("%s, MTU %d", k.name, mtu), func(t *testing.T) {
				ipv6 := mtu >= 1280
				flags := append([]string{"--mtu", strconv.Itoa(mtu)}, k.flags...)
				if !ipv6 {
					flags = append(flags, "--no-ipv6")
				}
				leaf := newLeaf(t, connected(t, flags...), mtu, ipv6)
				w := watch(t, leaf, "up0", mtu)
				var kinds []string
				for _, f := range families {
					if f.name == "IPv6" && !ipv6 {
						continue
					}
					t.Run(f.name, func(t *testing.T) {
						t.Run("TCP", func(t *testing.T) { tcpSizes(t, leaf, f.outside, mtu) })
						t.Run("UDP", func(t *testing.T) { udpSizes(t, leaf, f.outside, mtu) })
						t.Run("trains", func(t *testing.T) { udpTrains(t, leaf, f.outside, mtu) })
						t.Run("ICMP", func(t *testing.T) { icmpSizes(t, leaf, f.flag, f.outside, mtu) })
						t.Run("refused", func(t *testing.T) {
							if _, err := leaf.dial("tcp", net.JoinHostPort(f.outside, "9")); !errors.Is(err, unix.ECONNREFUSED) {
								t.Errorf("TCP: %v, want ECONNREFUSED", err)
							}
							if err := sendError(t, leaf, net.JoinHostPort(f.outside, "9")); !errors.Is(err, unix.ECONNREFUSED) {
								t.Errorf("UDP: %v, want ECONNREFUSED", err)
							}
						})
					})
					for _, what := range []string{"SYN-ACK", "segment", "ACK", "FIN", "RST", "datagram", "echo reply", "ICMP error"} {
						kinds = append(kinds, "to "+f.name+" "+what)
					}
					for _, what := range []string{"SYN", "segment", "datagram", "echo request"} {
						kinds = append(kinds, "from "+f.name+" "+what)
					}
					kinds = append(kinds, "to "+f.name+" fragment", "from "+f.name+" fragment")
				}
				w.right(t, kinds...)
			})
		}
	}
}

// A TAP that takes 64 KiB and a cable behind it that takes 1500: the super-segments that come are as the leaf's own MSS
// asks, and datagrams of IPv4 are cut by the container.
func TestOffloadsBeforeASmallerMTU(t *testing.T) {
	needs(t, "ip")
	for _, k := range kernels {
		t.Run(k.name, func(t *testing.T) {
			const mtu = 1500
			leaf := newLeaf(t, connected(t, k.flags...), mtu, true)
			w := watch(t, leaf, "up0", mtu)
			tcpSizes(t, leaf, outsideAddr4, mtu)
			tcpSizes(t, leaf, outsideAddr6, mtu)
			udpSizes(t, leaf, outsideAddr4, mtu)
			udpTrains(t, leaf, outsideAddr4, mtu)
			udpTrains(t, leaf, outsideAddr6, mtu)
			w.right(t, "to IPv4 segment", "to IPv6 segment", "to IPv4 fragment", "to IPv4 datagram", "to IPv6 datagram")
		})
	}
}

// The ECN bits of datagrams survive both ways. A client whose kernel asks for ECN gets a connection without it, and
// then marks nothing (RFC 3168 §6.1.1); one that forwards for it and has offloads of its own does as well.
func TestECN(t *testing.T) {
	needs(t, "ip")
	for _, k := range kernels {
		t.Run(k.name, func(t *testing.T) {
			const mtu = 1500
			c := connected(t, k.flags...)
			leaf := newLeaf(t, c, mtu, true)
			for _, p := range []*place{leaf, c.net} {
				if err := sysctl(p, "ipv4/tcp_ecn", "1"); err != nil {
					t.Fatal(err)
				}
			}
			w := watch(t, leaf, "up0", mtu)
			for _, f := range families {
				t.Run(f.name, func(t *testing.T) {
					for ecn := range 4 {
						ecnEcho(t, leaf, f.outside, ecn, 1, 0)
						ecnEcho(t, leaf, f.outside, ecn, 10_000, 1000)
					}
					tcpSizes(t, leaf, f.outside, mtu)
					tcpSizes(t, c.net, f.outside, mtu)
				})
			}
			seen := w.right(t, "from IPv4 SYN for ECN", "from IPv6 SYN for ECN",
				"to IPv4 datagram ECT(0)", "to IPv4 datagram ECT(1)", "to IPv4 datagram CE", "to IPv4 datagram",
				"to IPv6 datagram ECT(0)", "to IPv6 datagram ECT(1)", "to IPv6 datagram CE", "to IPv6 datagram")
			for _, f := range families {
				for _, way := range []string{"to", "from"} {
					for _, mark := range ecnNames[1:] {
						kind := way + " " + f.name + " segment" + mark
						if seen[kind] > 0 && seen["to "+f.name+" SYN-ACK for ECN"] == 0 {
							t.Errorf("%d %s, and ECN was not agreed upon", seen[kind], kind)
						}
					}
				}
			}
		})
	}
}

// ecnEcho sends total octets with ECN bits and has them answered with the same, in datagrams of segment octets, or one
// if that is 0.
func ecnEcho(t *testing.T, leaf *place, outside string, ecn, total, segment int) {
	t.Helper()
	server := lab.outside.listenUDP(t, net.JoinHostPort(outside, "0"))
	server.SetDeadline(time.Now().Add(patience))
	conn := leaf.connect(t, "udp", server.LocalAddr().String()).(*net.UDPConn)
	level, send, receive := unix.SOL_IP, unix.IP_TOS, unix.IP_RECVTOS
	if server.LocalAddr().(*net.UDPAddr).IP.To4() == nil {
		level, send, receive = unix.SOL_IPV6, unix.IPV6_TCLASS, unix.IPV6_RECVTCLASS
	}
	for _, c := range []*net.UDPConn{server, conn} {
		raw, err := c.SyscallConn()
		if err == nil {
			raw.Control(func(fd uintptr) {
				err = errors.Join(
					unix.SetsockoptInt(int(fd), level, send, ecn),
					unix.SetsockoptInt(int(fd), level, receive, 1),
					unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment))
			})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	see := func(who string, c *net.UDPConn) (from netip.AddrPort) {
		t.Helper()
		b, oob := make([]byte, 65536), make([]byte, 64)
		for at := 0; at < total; {
			n, oobn, _, a, err := c.ReadMsgUDPAddrPort(b, oob)
			if err != nil {
				t.Fatal(err)
			}
			messages, err := unix.ParseSocketControlMessage(oob[:oobn])
			if err != nil || len(messages) != 1 || len(messages[0].Data) == 0 {
				t.Fatalf("%s: control messages %v, %v; want one", who, messages, err)
			}
			if got := int(messages[0].Data[0]); got != ecn {
				t.Errorf("%s sees TOS %#x, want %#x", who, got, ecn)
			}
			at, from = at+n, a
		}
		return from
	}
	if _, err := conn.Write(pattern[:total]); err != nil {
		t.Fatal(err)
	}
	from := see("the server", server)
	if _, err := server.WriteToUDPAddrPort(pattern[:total], from); err != nil {
		t.Fatal(err)
	}
	see("the leaf", conn)
}

// tcpSizes writes pieces of many sizes to an echo server, one at a time and all at once.
func tcpSizes(t *testing.T, leaf *place, outside string, mtu int) {
	server := lab.outside.serveTCP(t, net.JoinHostPort(outside, "0"), echo)
	conn := leaf.connect(t, "tcp", server.String()).(*net.TCPConn)
	// Segments with timestamps, without, and those of IPv6.
	sizes := around(65535, mtu-40, mtu-52, mtu-60, mtu-72, 1448, 1460, 1472, 65483)
	got := make([]byte, 65535)
	total := 0
	for _, size := range sizes {
		total += size
		if _, err := conn.Write(pattern[size : 2*size]); err != nil {
			t.Fatalf("%d octets: %v", size, err)
		}
		if _, err := io.ReadFull(conn, got[:size]); err != nil || !bytes.Equal(got[:size], pattern[size:2*size]) {
			t.Fatalf("%d octets: %v, or others", size, err)
		}
	}
	sent := make(chan error, 1)
	const much = 4 << 20
	go func() {
		err := writePattern(conn, much)
		sent <- errors.Join(err, conn.CloseWrite())
	}()
	all, err := io.ReadAll(conn)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	writePattern(&want, much)
	if !bytes.Equal(all, want.Bytes()) {
		t.Errorf("of %d octets %d came back, or others", much, len(all))
	}
}

// udpSizes has datagrams of many sizes echoed.
func udpSizes(t *testing.T, leaf *place, outside string, mtu int) {
	server := lab.outside.serveUDP(t, net.JoinHostPort(outside, "0"), same)
	most := 65507 // RFC 791: 65535 less the headers
	if server.Addr().Is6() {
		most = 65527
	}
	conn := leaf.connect(t, "udp", server.String())
	got := make([]byte, 65536)
	for _, size := range append([]int{0}, around(most, mtu-28, mtu-48, 1472, 1452, 32768, 65487, 65507)...) {
		want := pattern[size : 2*size]
		if _, err := conn.Write(want); err != nil {
			t.Fatalf("%d octets: %v", size, err)
		}
		if n, err := conn.Read(got); err != nil || !bytes.Equal(got[:n], want) {
			t.Fatalf("%d octets: %d came back, or others: %v", size, n, err)
		}
	}
}

// udpTrains has datagrams leave both ends in trains (UDP_SEGMENT), of which one is a super-segment on the TAP where there
// is USO.
func udpTrains(t *testing.T, leaf *place, outside string, mtu int) {
	server := lab.outside.listenUDP(t, net.JoinHostPort(outside, "0"))
	conn := leaf.connect(t, "udp", server.LocalAddr().String()).(*net.UDPConn)
	server.SetDeadline(time.Now().Add(patience))
	overhead := 28
	if netip.MustParseAddr(outside).Is6() {
		overhead = 48
	}
	train := func(c *net.UDPConn, segment int) {
		t.Helper()
		raw, err := c.SyscallConn()
		if err == nil {
			raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment) })
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	receive := func(c *net.UDPConn, segment, total int) (from netip.AddrPort) {
		t.Helper()
		got := make([]byte, 65536)
		for at := 0; at < total; {
			n, a, err := c.ReadFromUDPAddrPort(got)
			if want := pattern[at:min(at+segment, total)]; err != nil || !bytes.Equal(got[:n], want) {
				t.Fatalf("%d octets in datagrams of %d: at %d %d octets came, or others: %v", total, segment, at, n, err)
			}
			at += n
			from = a
		}
		return from
	}
	// The host's link to outside takes 1500: a train of longer ones is none.
	for _, segment := range []int{1, 2, 99, 548, 1200, min(mtu, 1500) - overhead} {
		if segment+overhead > mtu {
			continue
		}
		for _, total := range []int{segment, segment + 1, 2*segment - 1, 10 * segment, 30*segment + 1} {
			if total == segment+1 && segment == 1 {
				continue
			}
			train(conn, segment)
			if _, err := conn.Write(pattern[:total]); err != nil {
				t.Fatalf("%d octets in datagrams of %d: %v", total, segment, err)
			}
			from := receive(server, segment, total)
			train(server, segment)
			if _, err := server.WriteToUDPAddrPort(pattern[:total], from); err != nil {
				t.Fatalf("%d octets in datagrams of %d: %v", total, segment, err)
			}
			receive(conn, segment, total)
		}
	}
}

// icmpSizes pings.
func icmpSizes(t *testing.T, leaf *place, family, outside string, mtu int) {
	for _, size := range []int{0, 1, 56, 57, 1472, 1473, mtu - 28, mtu - 27, 8000, 65507} {
		if family == "-6" && size == 65507 {
			size = 65487 // ping's own limit
		}
		if size > 65507 || size < 0 {
			continue
		}
		if out, err := at(leaf, "ping", family, "-n", "-c", "1", "-W", "10", "-s", strconv.Itoa(size), outside); err != nil {
			t.Fatalf("ping of %d octets: %v: %s", size, err, out)
		}
	}
}
