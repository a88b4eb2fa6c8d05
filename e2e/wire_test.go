package e2e

import (
	encoding "encoding/binary" // binary is the program under test
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// plainWire takes every offload from an interface of a place, as `ethtool -K` does: what passes it is what a
// cable would carry.
func plainWire(t testing.TB, p *place, dev string) {
	t.Helper()
	var err error
	p.do(func() {
		s, e := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if e != nil {
			err = e
			return
		}
		defer unix.Close(s)
		// Without checksums there is no segmentation of any kind either (netdev_fix_features).
		for _, cmd := range []uint32{unix.ETHTOOL_STXCSUM, unix.ETHTOOL_SRXCSUM, unix.ETHTOOL_SSG, unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO, unix.ETHTOOL_SGRO} {
			value := struct{ cmd, data uint32 }{cmd, 0} // struct ethtool_value
			req := struct {                             // struct ifreq
				name [unix.IFNAMSIZ]byte
				data unsafe.Pointer
				_    [16]byte
			}{data: unsafe.Pointer(&value)}
			copy(req.name[:], dev)
			if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); e != 0 {
				err = errors.Join(err, fmt.Errorf("ethtool command %#x: %w", cmd, e))
			}
		}
	})
	if err != nil {
		t.Fatalf("%s: take the offloads from %s: %v", p.name, dev, err)
	}
}

// A wire is what passes an interface, looked at by a packet socket as tcpdump has one. Each packet is checked
// and counted by what it is, such as "from IPv4 SYN" or "to IPv6 datagram CE": from or to the place.
type wire struct {
	mtu  int
	file *os.File
	stop func() // looks at what is left, and no further

	mu        sync.Mutex
	seen      map[string]int // packets of each kind
	wrong     []string
	fragments map[string]*fragments
}

// fragments are those of one packet.
type fragments struct {
	whole []byte
	got   int // octets
	end   int // of the whole; 0 while the last one is missing
}

// watch looks at dev of a place, whose IP MTU is mtu octets, until stop or the end of the test.
func watch(t testing.TB, p *place, dev string, mtu int) *wire {
	t.Helper()
	w := &wire{mtu: mtu, seen: map[string]int{}, fragments: map[string]*fragments{}}
	var err error
	p.do(func() { w.file, err = packetSocket(dev) })
	if err != nil {
		t.Fatalf("%s: watch %s: %v", p.name, dev, err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.run()
	}()
	w.stop = sync.OnceFunc(func() {
		w.file.SetReadDeadline(time.Unix(1, 0))
		<-ended
		w.file.Close()
	})
	t.Cleanup(w.stop)
	return w
}

func packetSocket(dev string) (*os.File, error) {
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), dev)
	const room = 64 << 20
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room) != nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, room) // what the machine lets a plain user have
	}
	req, e := unix.NewIfreq(dev)
	if err = errors.Join(err, e); err == nil {
		err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req)
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: int(req.Uint32())})
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (w *wire) run() {
	raw, err := w.file.SyscallConn()
	if err != nil {
		w.blame("the packet socket: %v", err)
		return
	}
	frame := make([]byte, 1<<17)
	// one looks at one frame and returns false when there is none.
	one := func(fd uintptr) bool {
		var n int
		var from unix.Sockaddr
		if n, from, err = unix.Recvfrom(int(fd), frame, 0); err != nil {
			return !errors.Is(err, unix.EAGAIN)
		}
		w.frame(frame[:n], from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING)
		return true
	}
	for {
		e := raw.Read(one)
		switch {
		case errors.Is(e, os.ErrDeadlineExceeded): // stop
			for err = nil; err == nil; {
				raw.Control(func(fd uintptr) { one(fd) })
			}
			return
		case e != nil || err != nil:
			w.blame("the packet socket: %v", errors.Join(e, err))
			return
		}
	}
}

func (w *wire) blame(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.wrong) < 10 {
		w.wrong = append(w.wrong, fmt.Sprintf(format, args...))
	}
}

// frame checks what IP says of itself, and hands the rest on when it is whole.
func (w *wire) frame(f []byte, outgoing bool) {
	way := "to"
	if outgoing {
		way = "from"
	}
	ip := f[14:]
	switch encoding.BigEndian.Uint16(f[12:]) {
	case unix.ETH_P_IP:
		ihl, length := int(ip[0]&15)*4, int(encoding.BigEndian.Uint16(ip[2:]))
		kind := way + " IPv4 "
		if !w.length(kind, ip, length) {
			return
		}
		if onesum(ip[:ihl]) != 0xffff {
			w.blame("%spacket with a wrong header checksum: % x", kind, ip[:ihl])
		}
		payload := ip[ihl:length]
		pseudo := slices.Concat(ip[12:20], []byte{0, ip[9]})
		if at := encoding.BigEndian.Uint16(ip[6:]); at&0x3fff != 0 {
			id := string(slices.Concat(ip[4:6], ip[9:10], ip[12:20]))
			w.count(kind + "fragment")
			if ip[9] == unix.IPPROTO_TCP {
				w.blame("%sfragment of TCP, whose segments have no reason to be cut", kind)
			}
			if payload = w.gather(id, payload, int(at&0x1fff)*8, at&0x2000 != 0); payload == nil {
				return
			}
		}
		w.transport(kind, ip[1]&3, ip[9], pseudo, payload)
	case unix.ETH_P_IPV6:
		length := 40 + int(encoding.BigEndian.Uint16(ip[4:]))
		kind := way + " IPv6 "
		if !w.length(kind, ip, length) {
			return
		}
		proto, payload := ip[6], ip[40:length]
		switch proto {
		case 0: // hop-by-hop options: of the kernel's multicast listener reports
			return
		case 44:
			proto = payload[0]
			at := encoding.BigEndian.Uint16(payload[2:])
			w.count(kind + "fragment")
			if proto == unix.IPPROTO_TCP {
				w.blame("%sfragment of TCP, whose segments have no reason to be cut", kind)
			}
			if payload = w.gather(string(payload[4:8])+string(ip[8:40]), payload[8:], int(at&^7), at&1 != 0); payload == nil {
				return
			}
		}
		w.transport(kind, ip[1]>>4&3, proto, slices.Concat(ip[8:40], []byte{0, proto}), payload)
	}
}

// length checks that a packet is as long as it says and as the wire takes.
func (w *wire) length(kind string, ip []byte, length int) bool {
	if length == len(ip) && length <= w.mtu {
		return true
	}
	w.blame("%spacket of %d octets that says %d, at an MTU of %d", kind, len(ip), length, w.mtu)
	return false
}

// gather returns the whole payload with its last missing fragment, and nil before. No fragment in the lab is lost,
// doubled, or overlaps.
func (w *wire) gather(id string, part []byte, at int, more bool) []byte {
	f := w.fragments[id]
	if f == nil {
		f = &fragments{whole: make([]byte, 1<<16)}
		w.fragments[id] = f
	}
	f.got += copy(f.whole[at:], part)
	if !more {
		f.end = at + len(part)
	}
	if f.end == 0 || f.got < f.end {
		return nil
	}
	delete(w.fragments, id)
	return f.whole[:f.end]
}

var ecnNames = [...]string{"", " ECT(1)", " ECT(0)", " CE"}

// transport checks the checksum of TCP, UDP and ICMP; pseudo is the pseudo-header without the length.
func (w *wire) transport(kind string, ecn, proto byte, pseudo, b []byte) {
	pseudo = encoding.BigEndian.AppendUint32(pseudo, uint32(len(b)))
	what, checksum := "", true
	switch proto {
	case unix.IPPROTO_TCP:
		what = segmentKind(b)
	case unix.IPPROTO_UDP:
		what = "datagram"
		if n := int(encoding.BigEndian.Uint16(b[4:])); n != len(b) {
			w.blame("%sdatagram of %d octets that says %d", kind, len(b), n)
		}
		checksum = encoding.BigEndian.Uint16(b[6:]) != 0 // none is sent by nobody here
	case unix.IPPROTO_ICMP:
		pseudo = nil
		what = map[byte]string{0: "echo reply", 8: "echo request", 3: "ICMP error", 11: "ICMP error"}[b[0]]
	case unix.IPPROTO_ICMPV6:
		switch {
		case b[0] == 128:
			what = "echo request"
		case b[0] == 129:
			what = "echo reply"
		case b[0] < 128:
			what = "ICMP error"
		default:
			what = "neighbour discovery"
		}
	default:
		w.blame("%spacket of protocol %d", kind, proto)
		return
	}
	if !checksum || onesum(pseudo, b) != 0xffff {
		w.blame("%s%s of %d octets with a wrong checksum: % x", kind, what, len(b), b[:min(len(b), 60)])
	}
	w.count(kind + what + ecnNames[ecn])
}

// segmentKind names a segment by its flags. ECN is said of the handshake only when it is asked for or granted.
func segmentKind(b []byte) string {
	const fin, syn, rst, ack, ece, cwr = 1, 2, 4, 16, 64, 128
	switch flags := b[13]; {
	case flags&(syn|ack|ece|cwr) == syn|ece|cwr:
		return "SYN for ECN"
	case flags&(syn|ack|ece) == syn|ack|ece:
		return "SYN-ACK for ECN"
	case flags&(syn|ack) == syn|ack:
		return "SYN-ACK"
	case flags&syn != 0:
		return "SYN"
	case flags&rst != 0:
		return "RST"
	case flags&fin != 0:
		return "FIN"
	case len(b) > int(b[12]>>4)*4:
		return "segment"
	}
	return "ACK"
}

// onesum is the sum of RFC 1071 over pieces, all but the last of even length; 0xffff is what is right.
func onesum(pieces ...[]byte) uint16 {
	var sum uint64
	for _, b := range pieces {
		for ; len(b) > 1; b = b[2:] {
			sum += uint64(b[0])<<8 | uint64(b[1])
		}
		if len(b) > 0 {
			sum += uint64(b[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

func (w *wire) count(kind string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen[kind]++
}

// saw tells whether each of the kinds was seen.
func (w *wire) saw(kinds []string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !slices.ContainsFunc(kinds, func(k string) bool { return w.seen[k] == 0 })
}

// right stops looking, fails the test for what was wrong, and for each of the kinds that was not seen. It returns
// how many of each were.
func (w *wire) right(t testing.TB, kinds ...string) map[string]int {
	t.Helper()
	// The last of a connection's segments may be on their way when its ends have been closed.
	for end := time.Now().Add(5 * time.Second); !w.saw(kinds) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	w.stop()
	for _, s := range w.wrong {
		t.Error(s)
	}
	for _, k := range kinds {
		if w.seen[k] == 0 {
			t.Errorf("no %s was seen", k)
		}
	}
	var all []string
	for _, k := range slices.Sorted(maps.Keys(w.seen)) {
		all = append(all, fmt.Sprintf("%d %s", w.seen[k], k))
	}
	t.Logf("seen: %s", strings.Join(all, ", "))
	return w.seen
}
