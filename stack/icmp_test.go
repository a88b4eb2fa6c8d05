package stack_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"usernet/stack"
	"usernet/tap/taptest"
)

func echoRequest(src, dst netip.Addr, id, seq uint16, payload []byte) []byte {
	m := make([]byte, 8, 8+len(payload))
	m[0] = 8
	binary.BigEndian.PutUint16(m[4:], id)
	binary.BigEndian.PutUint16(m[6:], seq)
	m = append(m, payload...)
	if src.Is6() {
		m[0] = 128
		binary.BigEndian.PutUint16(m[2:], onesum(pseudo(src, dst, 58, len(m)), m))
		return ipFrame(src, dst, 58, m)
	}
	binary.BigEndian.PutUint16(m[2:], onesum(m))
	return ipFrame(src, dst, 1, m)
}

// icmpFrom lets a test read the ICMP messages that the gateway sends.
func icmpFrom(out chan<- []byte) pairOption {
	return func(_, _ *stack.Config, gw, _ *taptest.PipeEnd) {
		gw.Lose = func(f []byte) bool {
			f = f[stack.HeaderLen:]
			switch {
			case f[12] == 0x08 && f[13] == 0 && f[14+9] == 1:
				out <- bytes.Clone(f[14:])
			case f[12] == 0x86 && f[14+6] == 58 && f[54] < 133:
				out <- bytes.Clone(f[14:])
			}
			return false
		}
	}
}

func TestEcho(t *testing.T) {
	for _, test := range []struct{ src, dst netip.Addr }{{container4.Addr(), world4}, {container6.Addr(), world6}} {
		for _, size := range []int{0, 56, 1000, 5000} {
			t.Run(fmt.Sprintf("%v/%d", test.dst, size), func(t *testing.T) {
				echoes, out := make(chan stack.Echo, 1), make(chan []byte, 16)
				p := newPair(t, allOffloads, &handler{echo: func(e stack.Echo) {
					e.Payload = bytes.Clone(e.Payload)
					echoes <- e
				}}, icmpFrom(out))
				payload := bytes.Repeat([]byte("ping"), size/4)
				p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), echoRequest(test.src, test.dst, 7, 9, payload)})
				e := within(t, echoes)
				if e.Src != test.src || e.Dst != test.dst || e.ID != 7 || e.Seq != 9 || !bytes.Equal(e.Payload, payload) || e.TTL != 64 {
					t.Errorf("got %+v", e)
				}
				if len(out) != 0 {
					t.Error("the gateway answered for the world")
				}
				e.Src, e.Dst, e.TTL = e.Dst, e.Src, 55
				if err := p.gateway.SendEchoReply(e); err != nil {
					t.Fatal(err)
				}
				ip := within(t, out)
				l4, typ, ttl, sum := ip[20:], byte(0), ip[8], uint16(0)
				if test.src.Is6() {
					l4, typ, ttl = ip[40:], 129, ip[7]
					sum = onesum(pseudo(test.dst, test.src, 58, len(l4)), l4)
				} else {
					sum = onesum(l4)
				}
				if l4[0] != typ || ttl != 55 || sum != 0 || !bytes.Equal(l4[8:], payload) || binary.BigEndian.Uint16(l4[4:]) != 7 {
					t.Errorf("reply type %d TTL %d checksum rest %#x", l4[0], ttl, sum)
				}
			})
		}
	}
}

// The gateway's own addresses answer by themselves.
func TestEchoToGateway(t *testing.T) {
	for _, dst := range []netip.Addr{gateway4.Addr(), gateway6.Addr(), netip.MustParseAddr("10.0.2.3"), netip.MustParseAddr("fd00::3")} {
		t.Run(dst.String(), func(t *testing.T) {
			out := make(chan []byte, 16)
			p := newPair(t, allOffloads, &handler{echo: func(stack.Echo) { t.Error("reached the handler") }}, icmpFrom(out))
			src := container4.Addr()
			if dst.Is6() {
				src = container6.Addr()
			}
			p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), echoRequest(src, dst, 1, 1, []byte("payload"))})
			ip := within(t, out)
			if !bytes.HasSuffix(ip, []byte("payload")) {
				t.Errorf("answer % x", ip)
			}
		})
	}
}

func TestICMPError(t *testing.T) {
	router4, router6 := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:1::1")
	for _, test := range []struct {
		from, src, dst netip.Addr
		want           netip.Addr // who appears to say it
		max            int
	}{
		{router4, container4.Addr(), world4, router4, 576},
		{netip.Addr{}, container4.Addr(), world4, gateway4.Addr(), 576},
		{router6, container6.Addr(), world6, router6, 1280},
		{router4, container6.Addr(), world6, gateway6.Addr(), 1280},
	} {
		t.Run(fmt.Sprintf("%v from %v", test.dst, test.from), func(t *testing.T) {
			out := make(chan []byte, 16)
			p := newPair(t, allOffloads, &handler{}, icmpFrom(out))
			segment := udpSegment(netip.AddrPortFrom(test.src, 5), netip.AddrPortFrom(test.dst, 6), make([]byte, 3000))
			err := p.gateway.SendICMP(&stack.ICMPError{
				From: test.from, Type: 3, Code: 4, Info: 1400, Protocol: 17, Src: test.src, Dst: test.dst, Transport: segment,
			})
			if err != nil {
				t.Fatal(err)
			}
			ip := within(t, out)
			ipLen, who, sum := 20, netip.AddrFrom4([4]byte(ip[12:16])), onesum(ip[20:])
			if test.src.Is6() {
				ipLen, who = 40, netip.AddrFrom16([16]byte(ip[8:24]))
				sum = onesum(pseudo(who, test.src, 58, len(ip)-40), ip[40:])
			}
			l4 := ip[ipLen:]
			quoted := l4[8+ipLen:]
			if who != test.want || sum != 0 || l4[0] != 3 || l4[1] != 4 || binary.BigEndian.Uint32(l4[4:]) != 1400 {
				t.Errorf("from %v, type %d code %d, checksum rest %#x", who, l4[0], l4[1], sum)
			}
			if len(ip) != test.max || !bytes.HasPrefix(segment, quoted) {
				t.Errorf("%d octets long, want %d and a quote of the datagram", len(ip), test.max)
			}
		})
	}
}
