package inside_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap/inside"
	"usernet/tap/taptest"
)

func TestListening(t *testing.T) {
	for _, owner := range taptest.Owners {
		t.Run(owner.String(), func(t *testing.T) {
			b := newBox(t, owner)
			b.open(t, inside.Config{IPv6: true})
			if l, err := b.Listening(t.Context()); len(l) > 0 || err != nil {
				t.Errorf("with nobody listening: %+v, %v", l, err)
			}
			want := map[string]bool{} // with V6Only
			var ports []*os.File
			for _, c := range []struct {
				server
				v6only bool
			}{
				{server{"tcp4", "0.0.0.0:0"}, false},
				{server{"tcp", "[::]:0"}, false},
				{server{"tcp6", "[::]:0"}, true},
				{server{"tcp4", "127.0.0.1:0"}, false},
				{server{"tcp4", "10.0.2.100:0"}, false},
				{server{"tcp6", "[fd00::100]:0"}, false},
				{server{"udp4", "0.0.0.0:0"}, false},
				{server{"udp", "[::]:0"}, false},
				{server{"udp6", "[::1]:0"}, false},
			} {
				var addr string
				ports = append(ports, b.do(t, "listen", c.server, &addr)...)
				at := netip.MustParseAddrPort(addr)
				v6only := c.v6only || at.Addr().Is6() && !at.Addr().IsUnspecified() && isV6Only(t, ports[len(ports)-1])
				want[fmt.Sprintf("%s %s %t", c.Network[:3], at, v6only)] = true
			}
			// A connection is none of them, nor is a UDP socket that talks to one peer.
			talk := b.do(t, "talk", struct{}{}, nil)
			list, err := b.Listening(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range list {
				key := fmt.Sprintf("%s %s %t", l.Proto, l.Addr, l.V6Only)
				if !want[key] {
					t.Errorf("listed %s, which is not there", key)
				}
				delete(want, key)
			}
			for key := range want {
				t.Errorf("not listed: %s", key)
			}
			for _, f := range append(ports, talk...) {
				f.Close()
			}
			if l, err := b.Listening(t.Context()); len(l) > 0 || err != nil {
				t.Errorf("after the last has closed: %+v, %v", l, err)
			}
		})
	}
}

func isV6Only(t *testing.T, f *os.File) bool {
	t.Helper()
	v, err := unix.GetsockoptInt(int(f.Fd()), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
	if err != nil {
		t.Fatal(err)
	}
	return v != 0
}

// talk returns both ends of a TCP connection, and a connected UDP socket.
func talk(context.Context, struct{}) (_ struct{}, files []*os.File, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return struct{}{}, nil, err
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return struct{}{}, nil, err
	}
	defer a.Close()
	b, err := l.Accept()
	if err != nil {
		return struct{}{}, nil, err
	}
	defer b.Close()
	u, err := net.Dial("udp", "127.0.0.1:53")
	if err != nil {
		return struct{}{}, nil, err
	}
	defer u.Close()
	for _, c := range []interface{ File() (*os.File, error) }{a.(*net.TCPConn), b.(*net.TCPConn), u.(*net.UDPConn)} {
		f, err := c.File()
		if err != nil {
			return struct{}{}, nil, err
		}
		files = append(files, f)
	}
	return struct{}{}, files, nil
}

// An answer in many parts.
func TestListeningMany(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	b.open(t, inside.Config{})
	const count = 3 * 240
	var files []*os.File
	for range count / 240 {
		files = append(files, b.do(t, "many", 240, nil)...)
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for range 3 {
		list, err := b.Listening(t.Context())
		if err != nil || len(list) != count {
			t.Fatalf("%d listed, %v; want %d", len(list), err, count)
		}
		if allocs := testing.AllocsPerRun(10, func() { b.Listening(t.Context()) }); allocs > 60 {
			t.Errorf("%v allocations for a list of %d", allocs, count)
		}
	}
	ports := map[uint16]bool{}
	list, _ := b.Listening(t.Context())
	for _, l := range list {
		ports[l.Addr.Port()] = true
	}
	if len(ports) != count {
		t.Errorf("%d different ports, want %d", len(ports), count)
	}
}

func many(_ context.Context, n int) (_ struct{}, files []*os.File, err error) {
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return struct{}{}, files, err
		}
		files = append(files, os.NewFile(uintptr(fd), "server"))
		if err := unix.Bind(fd, &unix.SockaddrInet4{}); err != nil {
			return struct{}{}, files, err
		}
	}
	return struct{}{}, files, nil
}

func TestEphemeral(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	b.do(t, "range", "20000 20100", nil)
	b.open(t, inside.Config{})
	if low, high := b.Ephemeral(); low != 20000 || high != 20100 {
		t.Errorf("%d to %d", low, high)
	}
}

// message is one socket as the kernel tells it.
func message(family byte, port uint16, v6only bool, seq uint32) []byte {
	b := make([]byte, 16+72)
	binary.NativeEndian.PutUint16(b[4:], 20)
	binary.NativeEndian.PutUint32(b[8:], seq)
	b[16] = family
	binary.BigEndian.PutUint16(b[16+4:], port)
	b[16+8] = 10
	if v6only {
		b = append(b, 5, 0, 11, 0, 1, 0, 0, 0)
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

func done(errno int32, seq uint32) []byte {
	b := make([]byte, 20)
	binary.NativeEndian.PutUint32(b, 20)
	binary.NativeEndian.PutUint16(b[4:], unix.NLMSG_DONE)
	binary.NativeEndian.PutUint32(b[8:], seq)
	binary.NativeEndian.PutUint32(b[16:], uint32(-errno))
	return b
}

func TestParse(t *testing.T) {
	b := slices.Concat(message(unix.AF_INET, 80, false, 6), message(unix.AF_INET, 81, false, 7), message(unix.AF_INET6, 82, true, 7), done(0, 7))
	list, end, err := inside.ParseDiag(b, 7)
	if err != nil || !end || len(list) != 2 || list[0].Addr.String() != "10.0.0.0:81" || list[1].Addr.Port() != 82 || !list[1].V6Only {
		t.Errorf("%+v, %t, %v", list, end, err)
	}
	if _, end, err := inside.ParseDiag(done(2, 7), 7); !end || err != unix.ENOENT {
		t.Errorf("an errno at the end: %t, %v", end, err)
	}
}

// The kernel is trusted; a parser is none the less to end, and to stay within what it was given.
func FuzzParse(f *testing.F) {
	f.Add(slices.Concat(message(unix.AF_INET, 80, false, 7), message(unix.AF_INET6, 80, true, 7)))
	f.Add(done(0, 7))
	f.Add(done(110, 7))
	f.Add(message(unix.AF_INET6, 1, true, 7)[:90])
	f.Fuzz(func(t *testing.T, b []byte) {
		list, _, _ := inside.ParseDiag(b, 7)
		if len(list) > len(b)/88 {
			t.Errorf("%d sockets in %d octets", len(list), len(b))
		}
		for _, l := range list {
			if !l.Addr.Addr().IsValid() {
				t.Errorf("no address: %+v", l)
			}
		}
	})
}

func BenchmarkListening(b *testing.B) {
	space := taptest.NewNS(b, taptest.OwnerRoot)
	x := &box{ns: openNS(b, space.PID), within: openNS(b, space.PID)}
	x.do(b, "furnish", struct{}{}, nil)
	x.open(b, inside.Config{})
	for _, f := range x.do(b, "many", 50, nil) {
		defer f.Close()
	}
	b.ReportAllocs()
	for b.Loop() {
		if l, err := x.Listening(b.Context()); len(l) != 50 || err != nil {
			b.Fatal(len(l), err)
		}
	}
}
