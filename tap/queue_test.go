package tap_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap"
	"usernet/tap/netns"
	"usernet/tap/taptest"
)

const (
	ethLen = 14
	udpLen = ethLen + 20 + 8

	needsChecksum = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	gsoUDP        = 5 // VIRTIO_NET_HDR_GSO_UDP_L4
)

var (
	container = netip.MustParseAddr("10.0.2.100")
	gateway   = netip.MustParseAddr("10.0.2.2")
	everybody = netip.MustParseAddr("10.0.2.255")
)

// quiet is config without IPv6, whose host says much by itself.
func quiet() tap.Config {
	cfg := config()
	cfg.IPv6, cfg.Gateway6 = netip.Prefix{}, netip.Addr{}
	return cfg
}

// socket is a UDP socket of the container.
func socket(t testing.TB, n *netns.NS, addr string) *net.UDPConn {
	t.Helper()
	files := call(t, n, "udp", addr, nil)
	c, err := net.FilePacketConn(files[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UDPConn)
}

// next reads frames until one is UDP over IPv4, and returns its header and itself.
func next(t testing.TB, q *tap.Queue) (header, frame []byte) {
	t.Helper()
	a, b, c := bytes.Repeat([]byte{0xee}, 10), make([]byte, 40), make([]byte, 65536)
	for {
		n, err := q.Read([][]byte{a, b, c})
		if errors.Is(err, unix.EAGAIN) {
			if err := q.Wait(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		frame = append(append([]byte{}, b...), c...)[:n-10]
		if len(frame) > udpLen && binary.BigEndian.Uint16(frame[12:]) == 0x0800 && frame[ethLen+9] == unix.IPPROTO_UDP {
			return a, frame
		}
	}
}

// frameTo builds header and frame of a UDP datagram from the gateway to the container; segment 0 is
// one datagram.
func frameTo(d *tap.Device, payload []byte, segment int) []byte {
	b := make([]byte, 10+udpLen, 10+udpLen+len(payload))
	h, eth := b[:10], b[10:]
	copy(eth, d.MAC())
	copy(eth[6:], []byte{2, 0, 0, 0, 0, 1})
	binary.BigEndian.PutUint16(eth[12:], 0x0800)
	ip, udp := eth[ethLen:ethLen+20], eth[ethLen+20:]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(28+len(payload)))
	copy(ip[12:], gateway.AsSlice())
	copy(ip[16:], container.AsSlice())
	binary.BigEndian.PutUint16(ip[10:], ^sum(0, ip))
	binary.BigEndian.PutUint16(udp, 53)
	binary.BigEndian.PutUint16(udp[2:], 1000)
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(payload)))
	pseudo := sum(uint32(unix.IPPROTO_UDP+8+len(payload)), ip[12:20])
	if segment > 0 {
		h[0], h[1] = needsChecksum, gsoUDP
		binary.LittleEndian.PutUint16(h[2:], udpLen)
		binary.LittleEndian.PutUint16(h[4:], uint16(segment))
		binary.LittleEndian.PutUint16(h[6:], ethLen+20)
		binary.LittleEndian.PutUint16(h[8:], 6)
		binary.BigEndian.PutUint16(udp[6:], pseudo)
	} else {
		binary.BigEndian.PutUint16(udp[6:], ^sum(uint32(sum(uint32(pseudo), udp)), payload))
	}
	return append(b, payload...)
}

// sum is the sum of RFC 1071, folded, of an even number of octets and perhaps one more.
func sum(s uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) > 0 {
		s += uint32(b[0]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// kernels are what the kernel may lack, and what is left then.
var kernels = []struct {
	name         string
	noOff, noUSO bool
	offloads     uint32
	train        bool // a train of datagrams comes up as one frame
}{
	{"all", false, false, 0x67, true},
	{"no USO", false, true, 0x07, false},
	{"no header", true, false, 0, false},
}

func TestUp(t *testing.T) {
	for _, k := range kernels {
		n := newNS(t)
		cfg := quiet()
		cfg.NoOffload, cfg.NoUSO = k.noOff, k.noUSO
		d := open(t, n, cfg)
		q := d.Queues()[0]
		if q.Offloads() != k.offloads {
			t.Errorf("%s: offloads %#x, want %#x", k.name, q.Offloads(), k.offloads)
		}
		c := socket(t, n, "10.0.2.100:1000")
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, 100) })
		if err != nil {
			t.Fatal(err)
		}
		payload := make([]byte, 250)
		for i := range payload {
			payload[i] = byte(i)
		}
		if _, err := c.WriteToUDPAddrPort(payload, netip.AddrPortFrom(everybody, 9)); err != nil {
			t.Fatal(err)
		}
		want := [][]byte{payload[:100], payload[100:200], payload[200:]}
		if k.train {
			want = [][]byte{payload}
		}
		for i, p := range want {
			h, f := next(t, q)
			if !bytes.Equal(f[udpLen:], p) {
				t.Errorf("%s: frame %d has %x", k.name, i, f[udpLen:])
			}
			udp := f[ethLen+20:]
			switch {
			case k.train:
				if h[0] != needsChecksum || h[1] != gsoUDP || binary.LittleEndian.Uint16(h[4:]) != 100 || binary.LittleEndian.Uint16(h[6:]) != ethLen+20 {
					t.Errorf("header of a train: %x", h)
				}
			case k.noOff:
				whole := sum(uint32(unix.IPPROTO_UDP+len(udp)), f[ethLen+12:ethLen+20])
				if !bytes.Equal(h, make([]byte, 10)) || sum(uint32(whole), udp) != 0xffff {
					t.Errorf("without a header: %x, checksum %x", h, udp[6:8])
				}
			default:
				if h[1] != 0 {
					t.Errorf("%s: header %x", k.name, h)
				}
			}
		}
	}
}

func TestDown(t *testing.T) {
	for _, k := range kernels {
		n := newNS(t)
		cfg := quiet()
		cfg.NoOffload, cfg.NoUSO = k.noOff, k.noUSO
		d := open(t, n, cfg)
		q := d.Queues()[0]
		c := socket(t, n, "10.0.2.100:1000")
		payload := bytes.Repeat([]byte("0123456789"), 25)
		one := frameTo(d, payload, 0)
		// Whole, and in pieces that part the header.
		for _, vec := range [][][]byte{{one}, {one[:10], one[10:52], one[52:]}, {one[:3], nil, one[3:11], one[11:]}} {
			if err := q.Write(vec); err != nil {
				t.Fatal(k.name, err)
			}
		}
		want := [][]byte{payload, payload, payload}
		if k.train {
			if err := q.Write([][]byte{frameTo(d, payload, 100)}); err != nil {
				t.Fatal(err)
			}
			want = append(want, payload[:100], payload[100:200], payload[200:])
		}
		for i, p := range want {
			buf := make([]byte, 1000)
			size, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil || !bytes.Equal(buf[:size], p) || from.String() != "10.0.2.2:53" {
				t.Errorf("%s: datagram %d: %q from %s, %v", k.name, i, buf[:size], from, err)
			}
		}
	}
}

// More pieces than are described on the stack, and more than the kernel takes.
func TestManyPieces(t *testing.T) {
	n := newNS(t)
	d := open(t, n, quiet())
	c := socket(t, n, "10.0.2.100:1000")
	payload := bytes.Repeat([]byte("abc"), 300)
	var vec [][]byte
	for frame := frameTo(d, payload, 0); len(frame) > 0; frame = frame[1:] {
		vec = append(vec, frame[:1])
	}
	if err := d.Queues()[0].Write(vec); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1000)
	if size, err := c.Read(buf); err != nil || !bytes.Equal(buf[:size], payload) {
		t.Errorf("%q, %v", buf[:size], err)
	}
	if err := d.Queues()[0].Write(make([][]byte, 1025)); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("1025 pieces: %v, want EMSGSIZE", err)
	}
}

// A frame longer than the reader's buffers is cut off, and the next is whole.
func TestReadCutsOff(t *testing.T) {
	for _, noOffload := range []bool{false, true} {
		n := newNS(t)
		cfg := quiet()
		cfg.NoOffload = noOffload
		q := open(t, n, cfg).Queues()[0]
		c := socket(t, n, "10.0.2.100:1000")
		for range 2 {
			if _, err := c.WriteToUDPAddrPort(make([]byte, 1000), netip.AddrPortFrom(everybody, 9)); err != nil {
				t.Fatal(err)
			}
		}
		if err := q.Wait(); err != nil {
			t.Fatal(err)
		}
		small := make([]byte, 10+ethLen)
		size, err := q.Read([][]byte{small})
		for err == nil && binary.BigEndian.Uint16(small[22:]) != 0x0800 {
			size, err = q.Read([][]byte{small})
		}
		if size != len(small) || err != nil {
			t.Errorf("%d octets, %v; want %d", size, err, len(small))
		}
		if _, f := next(t, q); len(f) != udpLen+1000 {
			t.Errorf("the next frame has %d octets", len(f))
		}
	}
}

func TestQueueClose(t *testing.T) {
	n := newNS(t)
	d := open(t, n, quiet())
	q := d.Queues()[0]
	done := make(chan error)
	go func() {
		for {
			if err := q.Wait(); err != nil {
				done <- err
				return
			}
			for {
				if _, err := q.Read([][]byte{make([]byte, 65536)}); err != nil {
					break
				}
			}
		}
	}()
	for range 2 {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("the Wait that was under way: %v", err)
	}
	_, err := q.Read([][]byte{make([]byte, 100)})
	for i, err := range []error{err, q.Write([][]byte{make([]byte, 100)}), q.Wait()} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("call %d after Close: %v", i, err)
		}
	}
	if err := d.Close(); err != nil { // removes it nevertheless
		t.Error(err)
	}
	if s := see(t, n); s.Found {
		t.Errorf("%+v", s)
	}
}

// Writers and a reader while the queue is closed; the race detector and the descriptors' numbers look on.
func TestCloseUnderLoad(t *testing.T) {
	n := newNS(t)
	d := open(t, n, quiet())
	q := d.Queues()[0]
	frame := frameTo(d, make([]byte, 100), 0)
	var wg sync.WaitGroup
	started := make(chan struct{}, 4)
	for range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				if err := q.Write([][]byte{frame}); errors.Is(err, os.ErrClosed) {
					return
				} else if err != nil {
					t.Error(err)
					return
				}
				if i == 10 {
					started <- struct{}{}
				}
			}
		})
	}
	wg.Go(func() {
		for q.Wait() == nil {
			q.Read([][]byte{make([]byte, 65536)})
		}
	})
	for range 4 {
		<-started
	}
	if err := q.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

func TestWaitSeesDeletion(t *testing.T) {
	n := newNS(t)
	d := open(t, n, quiet())
	q := d.Queues()[0]
	done := make(chan error, 1)
	go func() {
		err := q.Wait()
		for err == nil {
			for err == nil {
				_, err = q.Read([][]byte{make([]byte, 65536)})
			}
			if err = q.Wait(); err != nil {
				break
			}
		}
		done <- err
	}()
	call(t, n, "change", wish{Name: "tap0", Delete: true}, nil)
	if err := <-done; !errors.Is(err, unix.ENODEV) {
		t.Errorf("Wait on a deleted TAP: %v, want ENODEV", err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("Close of a deleted TAP: %v", err)
	}
}

func TestQueues(t *testing.T) {
	n := newNS(t)
	cfg := quiet()
	cfg.Queues = 3
	d := open(t, n, cfg)
	if len(d.Queues()) != 3 {
		t.Fatalf("%d queues", len(d.Queues()))
	}
	c := socket(t, n, "10.0.2.100:1000")
	buf := make([]byte, 100)
	for i, q := range d.Queues() { // each one writes to the same container
		if q.Offloads() != 0x67 {
			t.Errorf("queue %d: offloads %#x", i, q.Offloads())
		}
		if err := q.Write([][]byte{frameTo(d, []byte{byte(i)}, 0)}); err != nil {
			t.Fatal(err)
		}
		if size, err := c.Read(buf); err != nil || size != 1 || buf[0] != byte(i) {
			t.Errorf("queue %d: %x, %v", i, buf[:size], err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if s := see(t, n); s.Found {
		t.Errorf("%+v", s)
	}
}

func TestFramesAllocateNothing(t *testing.T) {
	for _, noOffload := range []bool{false, true} {
		n := newNS(t)
		cfg := quiet()
		cfg.NoOffload = noOffload
		d := open(t, n, cfg)
		q := d.Queues()[0]
		frame := frameTo(d, make([]byte, 1000), 0)
		down := [][]byte{frame[:10], frame[10:52], frame[52:]}
		up := [][]byte{make([]byte, 10), make([]byte, 2048), make([]byte, 65536)}
		// Nobody listens on the port: each datagram is answered by an ICMP error or, when they become many, not.
		got := testing.AllocsPerRun(200, func() {
			if err := q.Write(down); err != nil {
				t.Error(err)
			}
			for {
				if _, err := q.Read(up); err != nil {
					break
				}
			}
		})
		if got != 0 {
			t.Errorf("%v allocations for a frame (no header: %v)", got, noOffload)
		}
	}
}

// How fast Wait is: a datagram from the container and one back, the container being a thread that blocks in
// the kernel and not in Go's netpoller.
func BenchmarkWait(b *testing.B) {
	n := newNS(b)
	d := open(b, n, silent())
	q := d.Queues()[0]
	fd := int(call(b, n, "udp", "10.0.2.100:1000", nil)[0].Fd())
	if err := unix.SetNonblock(fd, false); err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() { // each datagram that comes up is answered by one that goes down
		defer close(done)
		answer := frameTo(d, []byte("x"), 0)
		up := [][]byte{make([]byte, 10), make([]byte, 2048), make([]byte, 65536)}
		for q.Wait() == nil {
			for {
				if _, err := q.Read(up); err != nil {
					break
				}
				if up[1][ethLen+9] == unix.IPPROTO_UDP {
					q.Write([][]byte{answer})
				}
			}
		}
	}()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	buf := make([]byte, 100)
	to := &unix.SockaddrInet4{Port: 9, Addr: everybody.As4()}
	for b.Loop() {
		if err := unix.Sendto(fd, []byte("x"), 0, to); err != nil {
			b.Fatal(err)
		}
		if _, _, err := unix.Recvfrom(fd, buf, 0); err != nil {
			b.Fatal(err)
		}
	}
	q.Close()
	<-done
}

// What this package knows of the kernel, one fact each.

// assume runs f in a fresh network namespace, as its root, with /dev/net/tun at hand.
func assume(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	taptest.NeedTUN(t)
	if taptest.Inside(t) {
		f(t)
	}
}

const tapFlags = unix.IFF_TAP | unix.IFF_NO_PI

func attached(t *testing.T, name string, flags uint16) int {
	t.Helper()
	fd, err := attach(name, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func flagsOf(t *testing.T, fd int) uint16 {
	t.Helper()
	req, err := unix.NewIfreq("x")
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.TUNGETIFF, req)
	}
	if err != nil {
		t.Fatal(err)
	}
	return req.Uint16()
}

func TestAssumeHeaderIgnoredWhileAttached(t *testing.T) {
	assume(t, func(t *testing.T) {
		attached(t, "t0", tapFlags|unix.IFF_MULTI_QUEUE)
		second := attached(t, "t0", tapFlags|unix.IFF_MULTI_QUEUE|unix.IFF_VNET_HDR)
		if flagsOf(t, second)&unix.IFF_VNET_HDR != 0 {
			t.Error("VNET_HDR took effect while another queue was attached")
		}
	})
}

func TestAssumeHeaderSizeOutlivesClose(t *testing.T) {
	assume(t, func(t *testing.T) {
		fd := attached(t, "t0", tapFlags|unix.IFF_VNET_HDR)
		if err := errors.Join(unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1), unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, 12)); err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		size, err := unix.IoctlGetInt(attached(t, "t0", tapFlags|unix.IFF_VNET_HDR), unix.TUNGETVNETHDRSZ)
		if err != nil || size != 12 {
			t.Errorf("header size %d, %v; want the 12 of before", size, err)
		}
	})
}

func TestAssumeOneQueueRefusesMulti(t *testing.T) {
	assume(t, func(t *testing.T) {
		fd := attached(t, "t0", tapFlags)
		if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
			t.Fatal(err)
		}
		if _, err := attach("t0", tapFlags); !errors.Is(err, unix.EBUSY) {
			t.Errorf("while attached: %v, want EBUSY", err)
		}
		unix.Close(fd)
		if _, err := attach("t0", tapFlags|unix.IFF_MULTI_QUEUE); !errors.Is(err, unix.EINVAL) {
			t.Errorf("MULTI_QUEUE on a device of one queue: %v, want EINVAL", err)
		}
	})
}

func TestAssumeUSONeedsBothAndChecksum(t *testing.T) {
	assume(t, func(t *testing.T) {
		fd := attached(t, "t0", tapFlags|unix.IFF_VNET_HDR)
		for mask, ok := range map[int]bool{
			unix.TUN_F_CSUM | unix.TUN_F_USO4 | unix.TUN_F_USO6: true,
			unix.TUN_F_USO4 | unix.TUN_F_USO6:                   false,
			unix.TUN_F_CSUM | unix.TUN_F_USO4:                   false,
		} {
			if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, mask); (err == nil) != ok {
				t.Errorf("offloads %#x: %v", mask, err)
			}
		}
	})
}

// The container's end does not end the device: netns.Watch is needed.
func TestAssumeReadOutlivesContainer(t *testing.T) {
	taptest.NeedTUN(t)
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	n := ns.Open(t)
	q := open(t, n, quiet()).Queues()[0]
	ns.End()
	buf := make([]byte, 65536)
	for {
		_, err := q.Read([][]byte{buf})
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Close runs in a process that has given up every right.
func TestAssumePersistNeedsNoCapability(t *testing.T) {
	if !taptest.AsUser(t) { // root has them all
		return
	}
	n := newNS(t)
	d := open(t, n, quiet())
	if err := unix.IoctlSetInt(d.Control(), unix.TUNSETPERSIST, 0); err != nil {
		t.Error(err)
	}
	if err := unix.IoctlSetInt(d.Control(), unix.TUNSETOFFLOAD, 0); err != nil {
		t.Error(err)
	}
}
