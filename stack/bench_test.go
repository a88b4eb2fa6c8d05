package stack

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// replay is a Device that gives the same frame again and again and swallows what is sent.
type replay struct {
	frame []byte
	left  int
}

func (r *replay) Read(vec [][]byte) (int, error) {
	if r.left == 0 {
		return 0, unix.EAGAIN
	}
	r.left--
	n := copy(vec[0], r.frame)
	for _, v := range vec[1:] {
		n += copy(v, r.frame[n:])
	}
	return n, nil
}
func (r *replay) Wait() error          { return os.ErrClosed }
func (r *replay) Write([][]byte) error { return nil }
func (r *replay) Offloads() uint32 {
	return OffloadChecksum | OffloadTSO4 | OffloadTSO6 | OffloadUSO
}
func (r *replay) Close() error { return nil }

type countHandler struct{ datagrams int }

func (h *countHandler) ServeTCP(_ context.Context, r *TCPRequest) { r.Reject(context.Canceled) }
func (h *countHandler) ServeUDP(b []Datagram)                     { h.datagrams += len(b) }
func (h *countHandler) ServeEcho(Echo)                            {}

func replaying(t testing.TB, payload int) (*Stack, *reader, *replay, *countHandler) {
	dev, h := &replay{}, &countHandler{}
	s, err := New(Config{
		MTU: 65520, MAC: []byte{0x52, 0x55, 10, 0, 2, 2}, Gateway4: netip.MustParsePrefix("10.0.2.2/24"),
	}, []Device{dev}, h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s.Run(ctx)
	})
	// A datagram from the container, as the gateway itself would send one.
	w := new(frameWriter)
	d := Datagram{
		Src: netip.MustParseAddrPort("10.0.2.100:4000"), Dst: netip.MustParseAddrPort("203.0.113.7:53"),
		Payload: [][]byte{make([]byte, payload)},
	}
	l4 := s.putIP(w, d.Src.Addr(), d.Dst.Addr(), 17, 64, 0, 8+payload)
	copy(w.header[HeaderLen:], s.mac[:])
	copy(w.header[HeaderLen+6:], []byte{2, 0, 0, 0, 0, 1})
	putUDP(w.header[l4:], &d, payload)
	dev.frame = append(append([]byte(nil), w.header[:l4+8]...), d.Payload[0]...)
	dev.frame[0] = vnetDataValid
	return s, newReader(s, dev), dev, h
}

// The way of a datagram allocates nothing once warm, in either direction.
func TestDatagramAllocs(t *testing.T) {
	s, r, dev, h := replaying(t, 1400)
	const runs = 100
	dev.left = batchLen
	r.drain()
	if n := testing.AllocsPerRun(runs, func() {
		dev.left = batchLen
		r.drain()
	}); n != 0 {
		t.Errorf("%v allocations for %d datagrams from the container", n, batchLen)
	}
	if h.datagrams == 0 {
		t.Fatal("no datagram arrived")
	}
	d := &Datagram{
		Src: netip.MustParseAddrPort("203.0.113.7:53"), Dst: netip.MustParseAddrPort("10.0.2.100:4000"),
		Payload: [][]byte{make([]byte, 1400)},
	}
	if n := testing.AllocsPerRun(runs, func() {
		if err := s.SendUDP(d); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations for a datagram to the container", n)
	}
}

func BenchmarkDatagramIn(b *testing.B) {
	for _, size := range []int{64, 1400} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			_, r, dev, _ := replaying(b, size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			dev.left = b.N
			b.ResetTimer()
			r.drain()
		})
	}
}

func BenchmarkDatagramOut(b *testing.B) {
	for _, size := range []int{64, 1400} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			s, _, _, _ := replaying(b, size)
			d := &Datagram{
				Src: netip.MustParseAddrPort("203.0.113.7:53"), Dst: netip.MustParseAddrPort("10.0.2.100:4000"),
				Payload: [][]byte{make([]byte, size)},
			}
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				if err := s.SendUDP(d); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
