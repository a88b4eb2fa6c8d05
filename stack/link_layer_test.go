package stack_test

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"usernet/stack"
	"usernet/tap/taptest"
)

func arpRequest(sender, target netip.Addr, senderMAC []byte) []byte {
	f := append([]byte{255, 255, 255, 255, 255, 255}, containerMAC...)
	f = append(f, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	f = append(append(f, senderMAC...), sender.AsSlice()...)
	return append(append(f, 0, 0, 0, 0, 0, 0), target.AsSlice()...)
}

// neighbour is a neighbour solicitation (135) or advertisement (136) with one link-layer address option.
func neighbour(typ byte, src, dst, target netip.Addr, mac []byte, hopLimit byte) []byte {
	m := make([]byte, 8, 32)
	m[0] = typ
	option := byte(1)
	if typ == 136 {
		m[4], option = 0x60, 2
	}
	m = append(m, target.AsSlice()...)
	if mac != nil {
		m = append(append(m, option, 1), mac...)
	}
	binary.BigEndian.PutUint16(m[2:], onesum(pseudo(src, dst, 58, len(m)), m))
	f := ipFrame(src, dst, 58, m)
	f[21] = hopLimit
	if dst.IsMulticast() {
		b := dst.As16()
		copy(f, []byte{0x33, 0x33, b[12], b[13], b[14], b[15]})
	}
	return f
}

// answers returns a pair whose gateway's ARP replies and neighbour advertisements can be read.
func answers(t *testing.T) (*pair, <-chan string) {
	out := make(chan string, 64)
	p := newPair(t, allOffloads, &handler{}, func(_, _ *stack.Config, gw, _ *taptest.PipeEnd) {
		gw.Lose = func(f []byte) bool {
			f = f[stack.HeaderLen:]
			switch {
			case f[12] == 8 && f[13] == 6 && f[21] == 2:
				out <- netip.AddrFrom4([4]byte(f[28:32])).String()
			case f[12] == 0x86 && f[20] == 58 && f[54] == 136 && f[58]&0x40 != 0: // solicited
				out <- netip.AddrFrom16([16]byte(f[62:78])).String()
			}
			return false
		}
	})
	return p, out
}

// Only for our own addresses and the world's does the gateway answer on the link; who asks whether an
// address is free (RFC 5227) hears of our own only.
func TestLinkAnswers(t *testing.T) {
	zero := netip.IPv4Unspecified()
	guest, guest6 := container4.Addr(), container6.Addr()
	router := netip.MustParseAddr("fd00::3")
	solicited := netip.MustParseAddr("ff02::1:ff00:2")
	none := make([]byte, stack.HeaderLen)
	for _, test := range []struct {
		name   string
		frame  []byte
		answer string
	}{
		{"the gateway", arpRequest(guest, gateway4.Addr(), containerMAC), "10.0.2.2"},
		{"a probe for the gateway", arpRequest(zero, gateway4.Addr(), containerMAC), "10.0.2.2"},
		{"the resolver", arpRequest(guest, netip.MustParseAddr("10.0.2.3"), containerMAC), "10.0.2.3"},
		{"the world", arpRequest(guest, world4, containerMAC), world4.String()},
		{"a probe for the world", arpRequest(zero, world4, containerMAC), ""},
		{"a neighbour", arpRequest(guest, netip.MustParseAddr("10.0.2.50"), containerMAC), ""},
		{"a probe for the container's own", arpRequest(zero, guest, containerMAC), ""},
		{"asked from a group", arpRequest(guest, gateway4.Addr(), []byte{1, 0, 0, 0, 0, 1}), ""},
		{"asked from nobody", arpRequest(guest, gateway4.Addr(), make([]byte, 6)), ""},
		{"IPv6 gateway", neighbour(135, guest6, solicited, gateway6.Addr(), containerMAC, 255), "fd00::2"},
		{"IPv6 resolver", neighbour(135, guest6, netip.MustParseAddr("ff02::1:ff00:3"), router, containerMAC, 255), "fd00::3"},
		{"IPv6 neighbour", neighbour(135, guest6, netip.MustParseAddr("ff02::1:ff00:77"), netip.MustParseAddr("fd00::77"), containerMAC, 255), ""},
		{"IPv6 from afar", neighbour(135, guest6, solicited, gateway6.Addr(), containerMAC, 64), ""},
		{"IPv6 from a group", neighbour(135, guest6, solicited, gateway6.Addr(), []byte{0x13, 0, 0, 0, 0, 0xad}, 255), ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, out := answers(t)
			p.guestEnd.Write([][]byte{none, test.frame})
			p.guestEnd.Write([][]byte{none, arpRequest(guest, netip.MustParseAddr("10.0.2.3"), containerMAC)}) // is answered
			got := within(t, out)
			if test.answer == "" {
				test.answer = "10.0.2.3"
			}
			if got != test.answer {
				t.Errorf("answered for %s, want %s", got, test.answer)
			}
		})
	}
}

// A neighbour advertisement with a group's hardware address must not be believed: what is sent there
// arrives and seems to confirm it, and TCP's answers go to it for ever.
func TestGroupAddressIsNotBelieved(t *testing.T) {
	h, conns := accepting(t)
	p := newPair(t, allOffloads, h, func(_, _ *stack.Config, gw, _ *taptest.PipeEnd) {
		gw.Lose = func(f []byte) bool {
			if f[stack.HeaderLen+14+6] == 6 && f[stack.HeaderLen]&1 != 0 {
				t.Errorf("TCP to a group: % x", f[stack.HeaderLen:stack.HeaderLen+6])
			}
			return false
		}
	})
	c, g := connect(t, p, conns, world6) // the gateway knows the container now
	c.Close()
	g.Close()
	none := make([]byte, stack.HeaderLen)
	group := []byte{0x13, 0, 0, 0, 0, 0xad}
	na := neighbour(136, container6.Addr(), gateway6.Addr(), container6.Addr(), group, 255)
	p.guestEnd.Write([][]byte{none, na})
	hidden := bytes.Clone(na[:54]) // behind a destination options header
	hidden[20] = 60
	hidden = append(append(hidden, 58, 0, 1, 4, 0, 0, 0, 0), na[54:]...)
	binary.BigEndian.PutUint16(hidden[18:], uint16(len(hidden)-54))
	p.guestEnd.Write([][]byte{none, hidden})
	c, g = connect(t, p, conns, world6)
	c.Close()
	g.Close()
}

// A fragment other than the first may begin with any octet: a ping whose payload has a discovery's type there was lost.
func TestFragmentIsNoDiscovery(t *testing.T) {
	got := make(chan []byte, 1)
	p := newPair(t, allOffloads, &handler{echo: func(e stack.Echo) { got <- bytes.Clone(e.Payload) }})
	const size = 1232
	payload := bytes.Repeat([]byte{135}, 3*size-8)
	echo := echoRequest(container6.Addr(), world6, 1, 1, payload)[54:]
	for at := 0; at < len(echo); at += size {
		h := []byte{58, 0, 0, 0, 0, 0, 0, 7}
		binary.BigEndian.PutUint16(h[2:], uint16(at))
		if at+size < len(echo) {
			h[3] |= 1
		}
		p.guestEnd.Write([][]byte{make([]byte, stack.HeaderLen), ipFrame(container6.Addr(), world6, 44, append(h, echo[at:at+size]...))})
	}
	if b := within(t, got); !bytes.Equal(b, payload) {
		t.Errorf("%d octets came, or others", len(b))
	}
}
