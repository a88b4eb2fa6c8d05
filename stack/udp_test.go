package stack_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"usernet/stack"
	"usernet/tap/taptest"
)

func join(pieces [][]byte) []byte { return bytes.Join(pieces, nil) }

// collect returns a handler that copies datagrams out.
func collect() (*handler, <-chan stack.Datagram) {
	c := make(chan stack.Datagram, 4096)
	return &handler{udp: func(batch []stack.Datagram) {
		for _, d := range batch {
			d.Payload = [][]byte{join(d.Payload)}
			c <- d
		}
	}}, c
}

func within[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatal("nothing arrived")
		panic("unreachable")
	}
}

// Every size arrives whole both ways, through fragments where it must.
func TestDatagramSizes(t *testing.T) {
	sizes := []int{0, 1, 2, 7, 8, 9, 511, 512, 1231, 1232, 1233, 1451, 1452, 1453, 1471, 1472, 1473, 1999, 2000, 2001, 2005, 2006, 2007, 2008, 2009, 2010, 4096, 16383, 32768, 65000, 65479, 65480, 65507}
	for _, offloads := range []uint32{0, allOffloads} {
		for _, size := range []int{1500, 65520} {
			for _, dst := range []netip.Addr{world4, world6} {
				t.Run(fmt.Sprintf("offloads=%#x/mtu=%d/%v", offloads, size, dst), func(t *testing.T) {
					h, got := collect()
					p := newPair(t, offloads, h, mtu(size))
					local := netip.AddrPortFrom(container4.Addr(), 4000)
					if dst.Is6() {
						local = netip.AddrPortFrom(container6.Addr(), 4000)
					}
					pc, err := p.container.ListenPacket(local)
					if err != nil {
						t.Fatal(err)
					}
					defer pc.Close()
					remote := netip.AddrPortFrom(dst, 53)
					buf := make([]byte, 1<<16)
					for _, n := range sizes {
						data := make([]byte, n)
						rand.NewChaCha8([32]byte{byte(n)}).Read(data)
						if n > 65507-20 && dst.Is6() && size == 65520 {
							// netstack in the container's place refuses what IPv6 could carry.
							continue
						}
						if _, err := pc.WriteTo(data, net.UDPAddrFromAddrPort(remote)); err != nil {
							t.Fatalf("%d octets: %v", n, err)
						}
						d := within(t, got)
						if d.Src != local || d.Dst != remote || !bytes.Equal(d.Payload[0], data) || d.Segment != 0 {
							t.Fatalf("sent %d octets %v → %v, arrived %d octets %v → %v", n, local, remote, len(d.Payload[0]), d.Src, d.Dst)
						}
						// And back, in two pieces.
						err := p.gateway.SendUDP(&stack.Datagram{Src: remote, Dst: local, Payload: [][]byte{data[:n/3], data[n/3:]}})
						if err != nil {
							t.Fatalf("%d octets back: %v", n, err)
						}
						pc.SetReadDeadline(time.Now().Add(20 * time.Second))
						m, from, err := pc.ReadFrom(buf)
						if err != nil || from.String() != remote.String() || !bytes.Equal(buf[:m], data) {
							t.Fatalf("%d octets back: %d from %v, %v", n, m, from, err)
						}
					}
				})
			}
		}
	}
}

// A train leaves as one frame with USO, and as single datagrams without; its parts arrive alike.
func TestTrains(t *testing.T) {
	for _, test := range []struct {
		offloads uint32
		frames   int
	}{{allOffloads, 1}, {allOffloads &^ stack.OffloadUSO, 5}, {0, 5}} {
		t.Run(fmt.Sprintf("offloads=%#x", test.offloads), func(t *testing.T) {
			var mu sync.Mutex
			var frames [][]byte
			p := newPair(t, test.offloads, &handler{}, mtu(1500), func(_, _ *stack.Config, gw, _ *taptest.PipeEnd) {
				gw.Lose = func(f []byte) bool {
					if f[stack.HeaderLen+12] == 0x08 && f[stack.HeaderLen+13] == 0 && f[stack.HeaderLen+14+9] == 17 {
						mu.Lock()
						frames = append(frames, bytes.Clone(f))
						mu.Unlock()
					}
					return false
				}
			})
			data := make([]byte, 4*1000+37)
			rand.NewChaCha8([32]byte{1}).Read(data)
			err := p.gateway.SendUDP(&stack.Datagram{
				Src: netip.AddrPortFrom(world4, 53), Dst: netip.AddrPortFrom(container4.Addr(), 4000),
				Payload: [][]byte{data[:10], data[10:1500], data[1500:]}, Segment: 1000,
			})
			if err != nil {
				t.Fatal(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if len(frames) != test.frames {
				t.Fatalf("%d frames, want %d", len(frames), test.frames)
			}
			var all []byte
			for _, f := range frames {
				all = append(all, f[stack.HeaderLen+14+28:]...)
			}
			if !bytes.Equal(all, data) {
				t.Error("the payload changed on the way")
			}
			h := frames[0]
			if size := binary.LittleEndian.Uint16(h[4:]); test.frames == 1 && (h[1] != 5 || size != 1000) {
				t.Errorf("gso_type %d, gso_size %d; want 5 (UDP_L4) and 1000", h[1], size)
			}
			if test.offloads == 0 && !bytes.Equal(h[:stack.HeaderLen], make([]byte, stack.HeaderLen)) {
				t.Errorf("header % x for a device without offloads", h[:stack.HeaderLen])
			}
			if test.offloads == 0 {
				for _, f := range frames {
					u := f[stack.HeaderLen+14+20:]
					if onesum(pseudo(world4, container4.Addr(), 17, len(u)), u) != 0 {
						t.Error("a datagram left with a wrong checksum")
					}
				}
			}
		})
	}
}

// A super-datagram of the container's arrives as a train.
func TestTrainFromContainer(t *testing.T) {
	h, got := collect()
	p := newPair(t, allOffloads, h)
	a, b := netip.AddrPortFrom(container4.Addr(), 4000), netip.AddrPortFrom(world4, 53)
	f := udpFrame(a, b, make([]byte, 2500))
	hdr := []byte{1, 5, 42, 0, 0xe8, 0x03, 34, 0, 6, 0} // NEEDS_CSUM, UDP_L4, segments of 1000
	p.guestEnd.Write([][]byte{hdr, f})
	if d := within(t, got); d.Segment != 1000 || d.Len() != 2500 {
		t.Errorf("segment %d, %d octets; want a train of 1000 in 2500", d.Segment, d.Len())
	}
}

// A longer one than a Datagram may be arrives as several, nothing lost and nothing out of place.
func TestLongTrainFromContainer(t *testing.T) {
	a, b := netip.AddrPortFrom(container4.Addr(), 4000), netip.AddrPortFrom(world4, 53)
	for _, test := range []struct{ size, n int }{{1, 65}, {500, 100}, {200, 128}, {31, 300}, {1400, 46}} {
		t.Run(fmt.Sprintf("%d of %d", test.n, test.size), func(t *testing.T) {
			h, got := collect()
			p := newPair(t, allOffloads, h)
			data := make([]byte, test.size*test.n-test.size/2)
			rand.NewChaCha8([32]byte{}).Read(data)
			hdr := []byte{1, 5, 42, 0, byte(test.size), byte(test.size >> 8), 34, 0, 6, 0}
			p.guestEnd.Write([][]byte{hdr, udpFrame(a, b, data)})
			var all []byte
			for len(all) < len(data) {
				d := within(t, got)
				if d.Len() > 64*test.size || d.Segment != test.size && d.Len() > test.size || len(all)%test.size != 0 {
					t.Fatalf("a train of %d octets in segments of %d at %d", d.Len(), d.Segment, len(all))
				}
				all = append(all, d.Payload[0]...)
			}
			if !bytes.Equal(all, data) {
				t.Error("the payload changed on the way")
			}
		})
	}
}

// What a container must not send is dropped and counted, and what follows it arrives.
func TestBadFrames(t *testing.T) {
	a, b := netip.AddrPortFrom(container4.Addr(), 4000), netip.AddrPortFrom(world4, 53)
	good := udpFrame(a, b, []byte("good"))
	bent := func(at int, to ...byte) []byte { f := bytes.Clone(good); copy(f[at:], to); return f }
	none := make([]byte, stack.HeaderLen)
	for _, test := range []struct {
		name  string
		hdr   []byte
		frame []byte
		count func(stack.Stats) uint64
	}{
		{"short Ethernet", none, good[:13], func(s stack.Stats) uint64 { return s.Malformed }},
		{"no IP header", none, good[:20], func(s stack.Stats) uint64 { return s.Malformed }},
		{"IP version 5", none, bent(14, 0x55), func(s stack.Stats) uint64 { return s.Malformed }},
		{"IP header shorter than 20", none, bent(14, 0x44), func(s stack.Stats) uint64 { return s.Malformed }},
		{"IP longer than frame", none, bent(16, 0xff, 0xff), func(s stack.Stats) uint64 { return s.Malformed }},
		{"IP header checksum", none, bent(24, 0xde, 0xad), func(s stack.Stats) uint64 { return s.BadChecksum }},
		{"UDP checksum", none, bent(40, 0xde, 0xad), func(s stack.Stats) uint64 { return s.BadChecksum }},
		{"UDP longer than IP", []byte{2, 0, 0, 0, 0, 0, 0, 0, 0, 0}, bent(38, 0xff, 0xff), func(s stack.Stats) uint64 { return s.Malformed }},
		{"checksum outside", []byte{1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0}, good, func(s stack.Stats) uint64 { return s.BadChecksum }},
		{"train without a size", []byte{1, 5, 42, 0, 0, 0, 34, 0, 6, 0}, good, func(s stack.Stats) uint64 { return s.Malformed }},
		{"another MAC", none, bent(0, 2, 2, 2, 2, 2, 2), func(s stack.Stats) uint64 { return s.NotForUs }},
		{"a VLAN", none, bent(12, 0x81, 0x00), func(s stack.Stats) uint64 { return s.NotForUs }},
		{"from a multicast MAC", none, bent(6, 1), func(s stack.Stats) uint64 { return s.Malformed }},
		{"from loopback", none, udpFrame(netip.MustParseAddrPort("127.0.0.1:1"), b, nil), func(s stack.Stats) uint64 { return s.Malformed }},
		{"from the gateway", none, udpFrame(netip.AddrPortFrom(gateway4.Addr(), 1), b, nil), func(s stack.Stats) uint64 { return s.Malformed }},
	} {
		t.Run(test.name, func(t *testing.T) {
			h, got := collect()
			p := newPair(t, allOffloads, h)
			p.guestEnd.Write([][]byte{test.hdr, test.frame})
			p.guestEnd.Write([][]byte{none, good})
			if d := within(t, got); string(d.Payload[0]) != "good" {
				t.Errorf("a bad frame arrived: %q", d.Payload[0])
			}
			if n := test.count(p.gateway.Stats()); n != 1 {
				t.Errorf("counted %d times: %+v", n, p.gateway.Stats())
			}
		})
	}
}

// UDP without a checksum is legal in IPv4 only (RFC 768, RFC 8200 §8.1).
func TestNoChecksum(t *testing.T) {
	h, got := collect()
	p := newPair(t, allOffloads, h)
	none := make([]byte, stack.HeaderLen)
	a6, b6 := netip.AddrPortFrom(container6.Addr(), 4000), netip.AddrPortFrom(world6, 53)
	f := udpFrame(a6, b6, []byte("six"))
	f[14+40+6], f[14+40+7] = 0, 0
	p.guestEnd.Write([][]byte{none, f})
	a4, b4 := netip.AddrPortFrom(container4.Addr(), 4000), netip.AddrPortFrom(world4, 53)
	f = udpFrame(a4, b4, []byte("four"))
	f[14+20+6], f[14+20+7] = 0, 0
	p.guestEnd.Write([][]byte{none, f})
	if d := within(t, got); string(d.Payload[0]) != "four" {
		t.Errorf("arrived %q", d.Payload[0])
	}
}

func TestDHCPIsAsked(t *testing.T) {
	asked := make(chan string, 1)
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), 68)
	answered := make(chan []byte, 4)
	p := newPair(t, allOffloads, &handler{udp: func([]stack.Datagram) { t.Error("DHCP reached the handler") }},
		func(gw, _ *stack.Config, gwEnd, _ *taptest.PipeEnd) {
			gw.DHCP = func(b []byte) ([]byte, netip.AddrPort, bool) {
				asked <- string(b)
				return []byte("offer"), to, true
			}
			gwEnd.Lose = func(f []byte) bool {
				if bytes.HasSuffix(f, []byte("offer")) {
					answered <- bytes.Clone(f[stack.HeaderLen:])
				}
				return false
			}
		})
	f := udpFrame(netip.MustParseAddrPort("0.0.0.0:68"), netip.MustParseAddrPort("255.255.255.255:67"), []byte("discover"))
	copy(f, []byte{255, 255, 255, 255, 255, 255})
	p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), f})
	if got := within(t, asked); got != "discover" {
		t.Errorf("asked %q", got)
	}
	if f := within(t, answered); !bytes.Equal(f[:6], []byte{255, 255, 255, 255, 255, 255}) || !bytes.Equal(f[26:30], gateway4.Addr().AsSlice()) {
		t.Errorf("answered % x", f)
	}
}

func TestRouterSolicitation(t *testing.T) {
	adverts := make(chan []byte, 16)
	p := newPair(t, allOffloads, &handler{}, func(gw, _ *stack.Config, gwEnd, _ *taptest.PipeEnd) {
		gw.IsSolicitation = func(m []byte) bool { return m[0] == 133 && m[1] == 0 }
		gw.Advertisement = []byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}
		gwEnd.Lose = func(f []byte) bool {
			if f = f[stack.HeaderLen:]; len(f) > 54 && f[12] == 0x86 && f[20] == 58 && f[54] == 134 {
				adverts <- bytes.Clone(f)
			}
			return false
		}
	})
	first := within(t, adverts) // unasked
	if first[21] != 255 || !bytes.Equal(first[:6], []byte{0x33, 0x33, 0, 0, 0, 1}) {
		t.Errorf("hop limit %d to % x; want 255 to all nodes", first[21], first[:6])
	}
	rs := make([]byte, 8)
	rs[0] = 133
	src, dst := netip.MustParseAddr("fe80::100"), netip.MustParseAddr("ff02::2")
	binary.BigEndian.PutUint16(rs[2:], onesum(pseudo(src, dst, 58, len(rs)), rs))
	f := ipFrame(src, dst, 58, rs)
	copy(f, []byte{0x33, 0x33, 0, 0, 0, 2})
	p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), f}) // hop limit 64: forged from afar
	f = slices.Clone(f)
	f[21] = 255
	p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), f})
	within(t, adverts)
	if len(adverts) != 0 {
		t.Error("a solicitation from beyond the link was answered")
	}
}
