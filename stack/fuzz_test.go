package stack_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"usernet/stack"
	"usernet/tap/taptest"
)

// FuzzFrames feeds a live gateway with whatever a container may send: data is a row of
// frames, each behind its length in two octets and its virtio header. Whatever they are, nothing panics,
// every answer is a frame whose lengths fit each other, and a datagram that follows arrives.
func FuzzFrames(f *testing.F) {
	a4, b4 := netip.AddrPortFrom(container4.Addr(), 4000), netip.AddrPortFrom(world4, 53)
	a6, b6 := netip.AddrPortFrom(container6.Addr(), 4000), netip.AddrPortFrom(world6, 53)
	none := make([]byte, stack.HeaderLen)
	seed := func(frames ...[]byte) {
		var row []byte
		for _, fr := range frames {
			row = binary.BigEndian.AppendUint16(row, uint16(len(fr)))
			row = append(append(row, none...), fr...)
		}
		f.Add(row)
	}
	seed(tcpFrame(a4, b4, 1, 0, 0x02), tcpFrame(a4, b4, 2, 1, 0x10), tcpFrame(a4, b4, 2, 1, 0x04))
	seed(tcpFrame(a6, b6, 1, 0, 0x02), tcpFrame(a6, b6, 2, 1, 0x11))
	seed(udpFrame(a4, b4, []byte("x")), udpFrame(a6, b6, []byte("y")))
	seed(echoRequest(a4.Addr(), b4.Addr(), 1, 1, []byte("p")), echoRequest(a6.Addr(), b6.Addr(), 1, 1, nil))
	seed(echoRequest(a4.Addr(), gateway4.Addr(), 1, 1, nil))
	fragment := udpFrame(a4, b4, make([]byte, 64))
	fragment[14+6] = 0x20
	seed(fragment)
	hop := ipFrame(a6.Addr(), b6.Addr(), 0, append([]byte{17, 0, 1, 4, 0, 0, 0, 0}, udpSegment(a6, b6, []byte("z"))...))
	seed(hop)
	arp := append(append([]byte{255, 255, 255, 255, 255, 255}, containerMAC...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	arp = append(append(append(arp, containerMAC...), 10, 0, 2, 100), 0, 0, 0, 0, 0, 0, 10, 0, 2, 2)
	seed(arp)

	gwEnd, guest := taptest.Pipe(allOffloads)
	arrived := make(chan struct{}, 1024)
	marker := []byte("the datagram that follows")
	gw, err := stack.New(stack.Config{
		MTU: 1500, MAC: gatewayMAC, Gateway4: gateway4, Gateway6: gateway6, MaxDials: 64,
		Advertisement: make([]byte, 16), IsSolicitation: func([]byte) bool { return true },
		DHCP: func(b []byte) ([]byte, netip.AddrPort, bool) { return b, a4, len(b)%2 == 0 },
	}, []stack.Device{gwEnd}, &handler{
		tcp: func(_ context.Context, r *stack.TCPRequest) {
			if r.Dst.Port()%2 == 0 {
				r.Reject(unix.EHOSTUNREACH)
				return
			}
			if c, err := r.Accept(); err == nil {
				c.Abort()
			}
		},
		udp: func(batch []stack.Datagram) {
			for _, d := range batch {
				if p := join(d.Payload); bytes.Equal(p, marker) {
					arrived <- struct{}{}
				}
			}
		},
	})
	if err != nil {
		f.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- gw.Run(ctx) }()
	f.Cleanup(func() {
		cancel()
		<-ended
	})
	f.Fuzz(func(t *testing.T, row []byte) {
		for len(row) > 2+stack.HeaderLen {
			n := min(int(binary.BigEndian.Uint16(row)), len(row)-2-stack.HeaderLen)
			frame := row[2 : 2+stack.HeaderLen+n]
			if len(frame) > stack.HeaderLen+12 && frame[stack.HeaderLen+6]&1 == 0 {
				guest.Write([][]byte{frame[:stack.HeaderLen], frame[stack.HeaderLen:]})
			}
			row = row[2+stack.HeaderLen+n:]
		}
		guest.Write([][]byte{none, udpFrame(a4, b4, marker)})
		select {
		case <-arrived:
		case <-time.After(10 * time.Second):
			t.Fatal("the gateway no longer passes datagrams")
		}
		buf := make([]byte, 1<<17)
		for answers := 0; ; answers++ {
			if answers > 10000 {
				t.Fatal("the gateway answers without end")
			}
			n, err := guest.Read([][]byte{buf[:10], buf[10:]})
			if err != nil {
				break
			}
			checkFrame(t, buf[10:n])
		}
	})
}

// checkFrame checks the lengths of a frame that the gateway has sent.
func checkFrame(t *testing.T, f []byte) {
	t.Helper()
	if len(f) < 14 {
		t.Fatalf("frame of %d octets", len(f))
	}
	ip := f[14:]
	switch {
	case f[12] == 0x08 && f[13] == 0x00:
		if len(ip) < 20 || int(binary.BigEndian.Uint16(ip[2:])) != len(ip) || onesum(ip[:int(ip[0]&15)*4]) != 0 {
			t.Fatalf("IPv4 packet % x", ip)
		}
	case f[12] == 0x86 && f[13] == 0xdd:
		if len(ip) < 40 || int(binary.BigEndian.Uint16(ip[4:])) != len(ip)-40 {
			t.Fatalf("IPv6 packet % x", ip)
		}
	case f[12] == 0x08 && f[13] == 0x06:
	default:
		t.Fatalf("frame % x", f[:14])
	}
}
