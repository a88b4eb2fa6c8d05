package network

import (
	"net"
	"net/netip"
)

// A MAC is the address of an Ethernet interface. Its text is what ip(8) prints; the zero MAC's is empty.
type MAC [6]byte

// The beginnings of the MACs that usernet hands out; an IPv4 address follows. All are locally administered and unicast.
// No member chooses one of them, so that a derived MAC is nobody else's.
var (
	gatewayOUI = [2]byte{0x52, 0x55} // the stack, as in the private mode
	memberOUI  = [2]byte{0x52, 0x56}
	bridgeOUI  = [2]byte{0x52, 0x57}
)

// macOf derives a MAC from an IPv4 address: neighbour tables stay right when whoever had it comes back.
func macOf(oui [2]byte, addr netip.Addr) MAC {
	a := addr.As4()
	return MAC{oui[0], oui[1], a[0], a[1], a[2], a[3]}
}

// ParseMAC reads six octets in hexadecimal.
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		return MAC{}, invalidf("MAC %q: write six octets such as 02:00:00:00:00:01", s)
	}
	return MAC(hw), nil
}

// HardwareAddr is m as package net has it.
func (m MAC) HardwareAddr() net.HardwareAddr { return net.HardwareAddr(m[:]) }

func (m MAC) String() string {
	if m == (MAC{}) {
		return ""
	}
	return m.HardwareAddr().String()
}

// MarshalText returns what String does.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what ParseMAC does, and nothing as the zero MAC.
func (m *MAC) UnmarshalText(text []byte) (err error) {
	if len(text) == 0 {
		*m = MAC{}
		return nil
	}
	*m, err = ParseMAC(string(text))
	return err
}

// check refuses what a member at addr cannot have.
func (m MAC) check(addr netip.Addr) error {
	if m == macOf(memberOUI, addr) {
		return nil
	}
	if m[0]&1 != 0 {
		return invalidf("MAC %s: is a multicast address: make the first octet even", m)
	}
	if m == (MAC{}) {
		return invalidf("MAC 00:00:00:00:00:00: is no interface's: choose another, or none to have one derived")
	}
	switch [2]byte(m[:2]) {
	case gatewayOUI, memberOUI, bridgeOUI:
		return invalidf("MAC %s: 52:55 to 52:57 are usernet's own: choose another, such as %s", m, MAC{2, m[1], m[2], m[3], m[4], m[5]})
	}
	return nil
}
