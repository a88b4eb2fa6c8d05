package dns

import (
	"net/netip"
	"sync"
)

// A share divides max places among clients, told apart by their address. One of them may hold as many as are
// free beside it: alone it gets half, of two that want all each gets a third, and
// whoever comes next still finds a place. Nothing needs to know how many clients there are.
type share struct {
	max int

	mu    sync.Mutex
	total int
	held  map[netip.Addr]int
}

func newShare(max int) *share { return &share{max: max, held: map[netip.Addr]int{}} }

// take returns false when the client has its share; else give must follow.
func (s *share) take(client netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[client] >= s.max-s.total {
		return false
	}
	s.held[client]++
	s.total++
	return true
}

func (s *share) give(client netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if s.held[client]--; s.held[client] == 0 {
		delete(s.held, client)
	}
}
