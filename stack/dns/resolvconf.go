package dns

import (
	"fmt"
	"net/netip"
	"strings"
)

const (
	maxServers = 3 // MAXNS of resolv.conf(5): the host itself asks no others

	// maxResolvConf is the limit on the file's length, in octets: a thousand times what any has.
	maxResolvConf = 1 << 18
)

// settings are what a resolv.conf says.
type settings struct {
	servers []netip.AddrPort
	search  []string
	options []string
}

// parseResolvConf reads the text of a resolv.conf as glibc does: what it does not understand it leaves out.
func parseResolvConf(text []byte) settings {
	var s settings
	for line := range strings.Lines(string(text)) {
		if line[0] == '#' || line[0] == ';' {
			continue
		}
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		switch words[0] {
		case "nameserver":
			addr, _, _ := strings.Cut(words[1], "#") // a comment may follow the address, at once even
			addr, _, _ = strings.Cut(addr, ";")
			if a, err := netip.ParseAddr(addr); err == nil && len(s.servers) < maxServers {
				s.servers = append(s.servers, netip.AddrPortFrom(a.Unmap(), 53))
			}
		case "search": // the last one counts, and so for domain, its older form
			s.search = words[1:]
		case "domain":
			s.search = words[1:2]
		case "options":
			s.options = append(s.options, words[1:]...)
		}
	}
	if len(s.servers) == 0 {
		s.servers = defaultServers()
	}
	return s
}

// defaultServers are asked where no nameserver is named: "the name server on the local machine".
func defaultServers() []netip.AddrPort {
	return []netip.AddrPort{
		netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 53),
		netip.AddrPortFrom(netip.IPv6Loopback(), 53),
	}
}

// ParseServer reads the address of a name server as a user writes it: an IPv4 or IPv6
// address, with or without brackets around the latter, and ":port" unless it is 53.
func ParseServer(s string) (netip.AddrPort, error) {
	server, err := netip.ParseAddrPort(s)
	if err != nil {
		bare := s
		if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
			bare = s[1 : len(s)-1]
		}
		addr, err := netip.ParseAddr(bare)
		if err != nil || bare != s && addr.Is4() {
			return netip.AddrPort{}, fmt.Errorf("name server %q: not an address; "+
				"write 192.0.2.1, 192.0.2.1:5353, 2001:db8::1 or [2001:db8::1]:5353", s)
		}
		server = netip.AddrPortFrom(addr, 53)
	}
	server = netip.AddrPortFrom(server.Addr().Unmap(), server.Port())
	switch a := server.Addr(); {
	case server.Port() == 0:
		return netip.AddrPort{}, fmt.Errorf("name server %q: port 0 cannot be asked; leave the port out for 53", s)
	case a.IsUnspecified():
		return netip.AddrPort{}, fmt.Errorf("name server %q: not the address of a host; write 127.0.0.1 or ::1 for this one", s)
	case a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return netip.AddrPort{}, fmt.Errorf("name server %q: not the address of one host", s)
	case a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "":
		return netip.AddrPort{}, fmt.Errorf("name server %q: a link-local address needs its interface; "+
			"write %s%%eth0", s, a)
	}
	return server, nil
}
