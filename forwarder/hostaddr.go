package forwarder

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// HostAddrs are the addresses that the host would use toward the world; a family that
// it lacks has the zero Addr.
type HostAddrs struct{ V4, V6 netip.Addr }

// of is the host's address of a's family.
func (h HostAddrs) of(a netip.Addr) netip.Addr {
	if a.Is4() {
		return h.V4
	}
	return h.V6
}

// hostAddrsAge is how long an answer about the host's network is kept: short enough that a
// laptop that changes its network is not noticed, long enough that asking costs nothing.
const hostAddrsAge = time.Second

// HostAddresses finds the host's own addresses. The host's network may change at any
// time; answers are at most a second old. The zero value is ready for use, by any number of goroutines.
type HostAddresses struct {
	mu    sync.Mutex
	asked time.Time
	now   HostAddrs
	local map[netip.Addr]bool // since asked
}

// Now returns the host's addresses.
func (h *HostAddresses) Now() HostAddrs {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refreshLocked()
	return h.now
}

func (h *HostAddresses) refreshLocked() {
	if !h.asked.IsZero() && time.Since(h.asked) < hostAddrsAge {
		return
	}
	// Addresses for documentation (RFC 5737, RFC 3849) stand for the world: a route that
	// is not the default rarely leads to them, and connect sends nothing.
	h.now = HostAddrs{
		V4: sourceToward(netip.MustParseAddr("198.51.100.1")),
		V6: sourceToward(netip.MustParseAddr("2001:db8::1")),
	}
	if !h.now.V4.IsValid() || !h.now.V6.IsValid() {
		h.now = orInterfaces(h.now)
	}
	h.asked = time.Now()
	clear(h.local)
}

// maxLocalAnswers bounds what Local remembers within a second.
const maxLocalAnswers = 4096

// Local tells whether a is an address of the host itself, so that packets to it never
// leave by an interface.
func (h *HostAddresses) Local(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refreshLocked()
	yes, known := h.local[a]
	if !known {
		if h.local == nil || len(h.local) >= maxLocalAnswers {
			h.local = make(map[netip.Addr]bool)
		}
		yes = isLocal(a)
		h.local[a] = yes
	}
	return yes
}

// sourceToward is the global address from which the host would send to dst; the zero Addr
// where it has no route or no such address.
func sourceToward(dst netip.Addr) netip.Addr {
	fd, err := unix.Socket(family(dst), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return netip.Addr{}
	}
	defer unix.Close(fd)
	if unix.Connect(fd, sockaddr(netip.AddrPortFrom(dst, 9))) != nil {
		return netip.Addr{}
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.Addr{}
	}
	var a netip.Addr
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		a = netip.AddrFrom4(sa.Addr)
	case *unix.SockaddrInet6:
		a = netip.AddrFrom16(sa.Addr)
	}
	if !a.IsGlobalUnicast() {
		return netip.Addr{}
	}
	return a
}

// orInterfaces fills what is missing in h with the first global address of an interface
// that is up: a host without a default route still has neighbours.
func orInterfaces(h HostAddrs) HostAddrs {
	all, err := net.Interfaces()
	if err != nil {
		return h
	}
	for _, i := range all {
		if i.Flags&net.FlagUp == 0 || i.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, addr := range addrs {
			prefix, err := netip.ParsePrefix(addr.String())
			if err != nil || !prefix.Addr().IsGlobalUnicast() {
				continue
			}
			if a := prefix.Addr(); a.Is4() && !h.V4.IsValid() {
				h.V4 = a
			} else if a.Is6() && !h.V6.IsValid() {
				h.V6 = a
			}
		}
	}
	return h
}

// isLocal asks the kernel whether a socket could be bound to a.
func isLocal(a netip.Addr) bool {
	fd, err := unix.Socket(family(a), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.Bind(fd, sockaddr(netip.AddrPortFrom(a, 0))) == nil
}

// family is the address family of a for socket.
func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// sockaddr is ap for the calls of package unix.
func sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}
