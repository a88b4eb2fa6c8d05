package stack

import (
	"net/netip"
	"testing"
)

// What goes to a neighbour that has said nothing yet goes there if we were told where it is, and not to who spoke last.
func TestKnow(t *testing.T) {
	s := &Stack{}
	s.neighbours.init()
	quiet, loud, stranger := netip.MustParseAddr("10.89.0.2"), netip.MustParseAddr("10.89.0.3"), netip.MustParseAddr("10.89.0.4")
	s.Know(quiet, [6]byte{2, 0, 0, 0, 0, 2})
	s.neighbours.learn(loud, hardwareAddr{2, 0, 0, 0, 0, 3})
	for addr, want := range map[netip.Addr]byte{quiet: 2, loud: 3, stranger: 3} {
		if got := s.neighbours.lookup(addr); got[5] != want {
			t.Errorf("%s is at %x, want the one that ends in %d", addr, got, want)
		}
	}
	s.neighbours.learn(quiet, hardwareAddr{2, 0, 0, 0, 0, 9})
	if got := s.neighbours.lookup(quiet); got[5] != 9 {
		t.Errorf("%s has spoken, and is at %x", quiet, got)
	}
}
