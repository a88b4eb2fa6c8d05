package stack_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/stack"
)

// A segmentEnd is a Device with a container behind it that has one TCP connection, begins it, and costs next to
// nothing: it sends segments as the window allows, acknowledges what comes, and allocates nothing.
type segmentEnd struct {
	mu     sync.Mutex
	cond   sync.Cond
	closed bool

	tcp       int      // offset in a frame of the TCP header, octets
	ack, data []byte   // the frames that it sends, virtio header included
	size      uint32   // of data's payload, octets
	first     [][]byte // the frames with which it begins: who it is, and SYN
	acks      bool     // ack is to be sent now
	todo      int      // how often data is to be sent

	established bool
	next, una   uint32 // sequence numbers: to be sent next, and acknowledged
	window      uint32 // of the other side, octets
	scale       uint8
	expect      uint32 // the other side's next sequence number
	stamp       uint32 // its last timestamp
	received    int    // octets of payload
}

func newSegmentEnd(src, dst netip.AddrPort, payload int) *segmentEnd {
	frame := func(flags byte, payload int, options ...byte) []byte {
		t := make([]byte, 20+len(options)+payload)
		binary.BigEndian.PutUint16(t, src.Port())
		binary.BigEndian.PutUint16(t[2:], dst.Port())
		t[12], t[13] = byte(20+len(options))<<2, flags
		binary.BigEndian.PutUint16(t[14:], 0xffff)
		copy(t[20:], options)
		f := append(make([]byte, stack.HeaderLen), ipFrame(src.Addr(), dst.Addr(), 6, t)...)
		f[0] = 2 // VIRTIO_NET_HDR_F_DATA_VALID: nobody looks at the checksum
		return f
	}
	const ack, syn = 0x10, 0x02
	e := &segmentEnd{
		tcp: stack.HeaderLen + 14 + 20, size: uint32(payload),
		ack:  frame(ack, 0, 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0),
		data: frame(ack, payload, 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0),
	}
	if src.Addr().Is6() {
		e.tcp += 20
	}
	none := make([]byte, stack.HeaderLen)
	if src.Addr().Is4() {
		e.first = append(e.first, append(none, arpRequest(src.Addr(), gateway4.Addr(), containerMAC)...))
	} else {
		solicited := netip.MustParseAddr("ff02::1:ff00:2")
		e.first = append(e.first, append(none, neighbour(135, src.Addr(), solicited, gateway6.Addr(), containerMAC, 255)...))
	}
	// The options of Linux's kernel: MSS, SACK permitted, timestamps, a window scale of 10.
	e.first = append(e.first, frame(syn, 0, 2, 4, 0x05, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 10))
	e.cond.L = &e.mu
	return e
}

// send has data sent n times more.
func (e *segmentEnd) send(n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.todo += n
	e.cond.Broadcast()
}

func (e *segmentEnd) mayLocked() bool {
	return e.established && e.todo > 0 && e.next+e.size-e.una <= e.window
}

func (e *segmentEnd) Wait() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.first) == 0 && !e.acks && !e.mayLocked() && !e.closed {
		e.cond.Wait()
	}
	if e.closed {
		return os.ErrClosed
	}
	return nil
}

func (e *segmentEnd) Read(vec [][]byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var f []byte
	switch {
	case len(e.first) > 0:
		f, e.first = e.first[0], e.first[1:]
	case e.mayLocked(): // and an acknowledgement with it
		f = e.data
	case e.acks:
		f = e.ack
	default:
		return 0, unix.EAGAIN
	}
	if e.established {
		t := f[e.tcp:]
		binary.BigEndian.PutUint32(t[4:], e.next)
		binary.BigEndian.PutUint32(t[8:], e.expect)
		binary.BigEndian.PutUint32(t[20+8:], e.stamp)
		e.acks = false
		if &f[0] == &e.data[0] {
			e.next += e.size
			e.todo--
		}
	}
	n := copy(vec[0], f[:stack.HeaderLen])
	for _, v := range vec[1:] {
		n += copy(v, f[n:])
	}
	return n, nil
}

func (e *segmentEnd) Write(vec [][]byte) error {
	var head [stack.HeaderLen + 14 + 40 + 60]byte
	n, size := 0, 0
	for _, v := range vec {
		n += copy(head[n:], v)
		size += len(v)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	t := head[e.tcp:max(n, e.tcp)]
	if len(t) < 20 || string(t[:2]) != string(e.data[e.tcp+2:e.tcp+4]) {
		return nil // a router advertisement, say
	}
	hlen := int(t[12]>>4) * 4
	seq, payload := binary.BigEndian.Uint32(t[4:]), size-e.tcp-hlen
	for o := t[20:hlen]; len(o) > 1; {
		switch o[0] {
		case 1:
			o = o[1:]
			continue
		case 3:
			e.scale = o[2]
		case 8:
			e.stamp = binary.BigEndian.Uint32(o[2:])
		}
		o = o[o[1]:]
	}
	una, window := binary.BigEndian.Uint32(t[8:]), uint32(binary.BigEndian.Uint16(t[14:]))
	if t[13]&2 != 0 { // SYN, whose window is not scaled
		e.established, e.acks = true, true
		e.next, e.una, e.window, e.expect = una, una, window, seq+1
		e.cond.Broadcast()
		return nil
	}
	if int32(una-e.una) >= 0 { // netstack writes from several goroutines: an older one may come later
		e.una, e.window = una, window<<e.scale
	}
	if payload > 0 {
		e.received += int(seq + uint32(payload) - e.expect)
		e.acks, e.expect = true, seq+uint32(payload)
	}
	e.cond.Broadcast()
	return nil
}

// await returns when n octets have come since the last call.
func (e *segmentEnd) await(n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.received < n {
		e.cond.Wait()
	}
	e.received -= n
}

func (e *segmentEnd) Offloads() uint32 { return allOffloads }

func (e *segmentEnd) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	e.cond.Broadcast()
	return nil
}

// A segmentConn is the gateway's side of such a connection, used as the relay does it.
type segmentConn struct {
	end     *segmentEnd
	conn    *stack.Conn
	in, out chan struct{}
	payload []byte
	drained int
	drain   func([][]byte) (int, error)
	fill    func([]byte) (int, error)
}

func newSegmentConn(t testing.TB, world netip.Addr, payload int) *segmentConn {
	src := container4.Addr()
	if world.Is6() {
		src = container6.Addr()
	}
	c := &segmentConn{
		end: newSegmentEnd(netip.AddrPortFrom(src, 4000), netip.AddrPortFrom(world, 80), payload),
		in:  make(chan struct{}, 1), out: make(chan struct{}, 1),
		payload: make([]byte, payload),
	}
	c.drain = func(pieces [][]byte) (int, error) {
		n := 0
		for _, p := range pieces {
			n += len(p)
		}
		c.drained += n
		return n, nil
	}
	c.fill = func(p []byte) (int, error) { return copy(p, c.payload), nil }
	conns := make(chan *stack.Conn, 1)
	s, err := stack.New(stack.Config{MTU: 65520, MAC: gatewayMAC, Gateway4: gateway4, Gateway6: gateway6},
		[]stack.Device{c.end}, &handler{tcp: func(_ context.Context, r *stack.TCPRequest) {
			conn, err := r.Accept()
			if err != nil {
				t.Error(err)
			}
			conns <- conn
		}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	if c.conn = <-conns; c.conn == nil {
		t.FailNow()
	}
	tell := func(yes bool, ch chan struct{}) {
		if yes {
			select {
			case ch <- struct{}{}:
			default:
			}
		}
	}
	c.conn.OnReady(func(in, out, ended bool) {
		tell(in || ended, c.in)
		tell(out || ended, c.out)
	})
	t.Cleanup(c.conn.Abort)
	return c
}

// inbound has the container send n segments, and takes them. Not more than 64 at a time: netstack counts a segment that
// nobody has read yet as some KiB, whatever it carries, and drops what its buffer has no room for although the window
// is open; nothing is sent again here.
func (c *segmentConn) inbound(t testing.TB, n int) {
	for ; n > 0; n -= 64 {
		want := min(n, 64) * len(c.payload)
		c.drained = 0
		c.end.send(min(n, 64))
		for c.drained < want {
			switch _, err := c.conn.Drain(c.drain); {
			case errors.Is(err, unix.EAGAIN):
				<-c.in
			case err != nil:
				t.Fatal(err)
			}
		}
	}
}

// outbound sends the container n times the payload.
func (c *segmentConn) outbound(t testing.TB, n int) {
	for left := n * len(c.payload); left > 0; {
		sent, err := c.conn.Fill(min(left, len(c.payload)), c.fill)
		left -= sent
		switch {
		case errors.Is(err, unix.EAGAIN):
			<-c.out
		case err != nil:
			t.Fatal(err)
		}
	}
	c.end.await(n * len(c.payload))
}

// raceDetector: it has sync.Pool lose things at random, so that allocations say nothing.
var raceDetector bool

var segmentSizes = []int{1, 1448, 65160}

// A segment costs no allocation once the connection is warm, in either direction. Counted is every allocation of the
// process: the pools grow with the windows, and so the best of some rounds is what a warm connection costs.
func TestSegmentAllocs(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // it would empty the pools
	n, rounds := 256, 20
	if raceDetector {
		n, rounds = 16, 1
	}
	for _, world := range []netip.Addr{world4, world6} {
		for _, size := range segmentSizes {
			for name, way := range map[string]func(*segmentConn, testing.TB, int){"from": (*segmentConn).inbound, "to": (*segmentConn).outbound} {
				t.Run(fmt.Sprintf("%d octets %s the container, %v", size, name, world), func(t *testing.T) {
					c := newSegmentConn(t, world, size)
					best := math.Inf(1)
					for range rounds {
						best = min(best, testing.AllocsPerRun(1, func() { way(c, t, n) }))
					}
					if best > 0 && !raceDetector {
						t.Errorf("%v allocations for %d segments", best, n)
					}
				})
			}
		}
	}
}

func BenchmarkSegmentIn(b *testing.B) { benchmarkSegment(b, (*segmentConn).inbound) }

func BenchmarkSegmentOut(b *testing.B) { benchmarkSegment(b, (*segmentConn).outbound) }

func benchmarkSegment(b *testing.B, way func(*segmentConn, testing.TB, int)) {
	for _, size := range segmentSizes {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			c := newSegmentConn(b, world4, size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			b.ResetTimer()
			way(c, b, b.N)
		})
	}
}
