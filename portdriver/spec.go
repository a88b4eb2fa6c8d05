package portdriver

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"usernet/portdriver/sockfile"
)

// A Spec says what is published where. It is comparable.
type Spec struct {
	// Proto is tcp, tcp4, tcp6, udp, udp4 or udp6. A number limits the host's side to that family; tcp and udp without
	// Host listen on both.
	Proto string

	Host     netip.Addr // of the host; zero: all of them. 0.0.0.0 is IPv4 alone and :: is IPv6 alone.
	HostPort uint16     // 0: the kernel picks one

	// HostPath is a unix socket that takes the place of Host and HostPort; tcp only. It begins with / or ./.
	HostPath string

	// Container is an address in the container or in its network. Zero: the container's own, of the client's family
	// first, then its loopback.
	Container     netip.Addr
	ContainerPort uint16
}

// specForm is what a user is told to write.
const specForm = "write [HOST:]HOSTPORT[-END]:[CONTAINER:]PORT[-END][/PROTO], with IPv6 addresses in brackets, or PATH:PORT for a unix socket"

// ParseSpec reads the argument of -p:
//
//	[HOST:]HOSTPORT[-END]:[CONTAINER:]PORT[-END][/PROTO]
//	PORT[-END][/PROTO]          the same port on both sides
//	PATH:[CONTAINER:]PORT       PATH begins with / or ./
//
// An empty HOSTPORT behind a HOST is 0. A range becomes one Spec for each port.
func ParseSpec(s string) ([]Spec, error) {
	specs, err := parseSpec(s)
	if err != nil {
		return nil, fmt.Errorf("port %q: %w", s, err)
	}
	return specs, nil
}

func parseSpec(s string) ([]Spec, error) {
	rest, ports, proto, both := cutLast(s)
	spec := Spec{Proto: proto}
	if isPath(s) && !both {
		return nil, errors.New("a path is followed by :PORT")
	}
	first, last, err := parseRange(ports)
	if err != nil {
		return nil, err
	}
	if isPath(s) {
		spec.HostPath, spec.Container = cutContainer(rest)
		spec.ContainerPort = first
		if first != last {
			return nil, errors.New("a unix socket leads to one port, not to a range")
		}
		return []Spec{spec}, spec.check()
	}
	hostFirst, hostLast := first, last
	if both {
		pieces, err := split(rest)
		if err != nil {
			return nil, err
		}
		host := ""
		switch n := len(pieces); {
		case n == 1: // HOSTPORT
		case n == 2 && isAddr(pieces[0]): // HOST:HOSTPORT
			host, pieces = pieces[0], pieces[1:]
		case n == 2 && !isAddr(pieces[1]) && isRange(pieces[1]): // NAME:HOSTPORT
			err = notAddr(pieces[0])
		case n == 2: // HOSTPORT:CONTAINER
			pieces, spec.Container, err = pieces[:1], parseAddrOrZero(pieces[1]), notAddr(pieces[1])
		case n == 3: // HOST:HOSTPORT:CONTAINER
			host, spec.Container, err = pieces[0], parseAddrOrZero(pieces[2]), notAddr(pieces[2])
			pieces = pieces[1:2]
		default:
			err = errors.New(specForm)
		}
		if err != nil {
			return nil, err
		}
		if host != "" {
			if err := notAddr(host); err != nil {
				return nil, err
			}
			spec.Host = parseAddrOrZero(host)
		}
		switch {
		case host != "" && pieces[0] == "":
			hostFirst, hostLast = 0, 0
		case isAddr(pieces[0]):
			return nil, fmt.Errorf("a host's address is followed by two ports: %s:%s:%s, say", pieces[0], ports, ports)
		default:
			if hostFirst, hostLast, err = parseRange(pieces[0]); err != nil {
				return nil, err
			}
		}
	}
	if hostLast-hostFirst != last-first {
		return nil, fmt.Errorf("%d ports of the host for %d of the container's: both ranges need the same length", int(hostLast-hostFirst)+1, int(last-first)+1)
	}
	specs := make([]Spec, 0, int(last-first)+1)
	for i := 0; i <= int(last-first); i++ {
		spec.HostPort, spec.ContainerPort = hostFirst+uint16(i), first+uint16(i)
		if err := spec.check(); err != nil {
			return nil, err
		}
		specs = append(specs, spec)
	}
	return specs, nil
}

func isPath(s string) bool { return strings.HasPrefix(s, "/") || strings.HasPrefix(s, "./") }

// cutLast takes the last port or range and the protocol off s; both: there is something before.
func cutLast(s string) (rest, ports, proto string, both bool) {
	ports = s
	if i := strings.LastIndexByte(s, ':'); i >= 0 && !strings.Contains(s[i:], "]") {
		rest, ports, both = s[:i], s[i+1:], true
	}
	ports, proto, found := strings.Cut(ports, "/")
	if !found {
		proto = "tcp"
	}
	return rest, ports, proto, both
}

// cutContainer takes a container's address off the end of a path.
func cutContainer(s string) (path string, container netip.Addr) {
	i := strings.LastIndexByte(s, ':')
	if strings.HasSuffix(s, "]") {
		i = strings.LastIndex(s, ":[")
	}
	if i > 0 && isAddr(s[i+1:]) {
		return s[:i], parseAddrOrZero(s[i+1:])
	}
	return s, netip.Addr{}
}

// split splits at the colons outside brackets.
func split(s string) ([]string, error) {
	var pieces []string
	for {
		end := strings.IndexByte(s, ':')
		if strings.HasPrefix(s, "[") {
			end = strings.IndexByte(s, ']') + 1
			if end == 0 {
				return nil, errors.New("a bracket is not closed")
			}
			if end == len(s) {
				end = -1
			} else if s[end] != ':' {
				return nil, errors.New(specForm)
			}
		}
		if end < 0 {
			return append(pieces, s), nil
		}
		pieces, s = append(pieces, s[:end]), s[end+1:]
	}
}

func isAddr(s string) bool { return parseAddrOrZero(s).IsValid() }

func notAddr(s string) error {
	if isAddr(s) {
		return nil
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Is6() {
		return fmt.Errorf("%s needs brackets: [%s]", s, s)
	}
	return fmt.Errorf("%q is no address; %s", s, specForm)
}

// parseAddrOrZero reads an IPv4 address or an IPv6 one in brackets; zero: neither.
func parseAddrOrZero(s string) netip.Addr {
	inner, bracket := strings.CutPrefix(s, "[")
	if bracket {
		inner, bracket = strings.CutSuffix(inner, "]")
		if !bracket {
			return netip.Addr{}
		}
	}
	a, err := netip.ParseAddr(inner)
	if err != nil || a.Is6() != bracket {
		return netip.Addr{}
	}
	return a.Unmap()
}

// parseRange reads PORT or PORT-END; 0 stands only alone.
func parseRange(s string) (first, last uint16, err error) {
	a, b, isRange := strings.Cut(s, "-")
	if first, err = parsePort(a); err != nil {
		return 0, 0, err
	}
	if !isRange {
		return first, first, nil
	}
	if last, err = parsePort(b); err != nil {
		return 0, 0, err
	}
	if first == 0 || last < first {
		return 0, 0, fmt.Errorf("%s is no range of ports: it goes from the lower to the higher, 1 to 65535", s)
	}
	return first, last, nil
}

func isRange(s string) bool {
	_, _, err := parseRange(s)
	return err == nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	switch {
	case s == "":
		return 0, errors.New("a port is missing; " + specForm)
	case errors.Is(err, strconv.ErrRange):
		return 0, fmt.Errorf("port %s is beyond 65535", s)
	case err != nil:
		return 0, fmt.Errorf("%q is no port; %s", s, specForm)
	}
	return uint16(n), nil
}

// check says what is wrong with a Spec by itself.
func (s Spec) check() error {
	_, v4, v6 := s.families()
	switch {
	case !v4 && !v6:
		return fmt.Errorf("protocol %q: it is tcp, tcp4, tcp6, udp, udp4 or udp6", s.Proto)
	case s.ContainerPort == 0:
		return errors.New("the container's port is 1 to 65535")
	case s.Container.IsValid() && (s.Container.IsUnspecified() || s.Container.IsMulticast() || s.Container.Zone() != ""):
		return fmt.Errorf("%v is no address of a container", s.Container)
	case s.Container.Is4In6() || s.Host.Is4In6():
		return errors.New("an IPv4 address is not written as an IPv6 one")
	case s.HostPath != "":
		switch {
		case s.Proto != "tcp":
			return fmt.Errorf("a unix socket leads to a tcp port, not to %s", s.Proto)
		case s.Host.IsValid() || s.HostPort != 0:
			return errors.New("a forward has a unix socket or an address, not both")
		case !isPath(s.HostPath): // an @, say, would be a name without a file, open to everybody
			return fmt.Errorf("%q is no path of a unix socket: it begins with / or ./", s.HostPath)
		case len(s.HostPath) > sockfile.MaxPath:
			return fmt.Errorf("the path of a unix socket has at most %d octets", sockfile.MaxPath)
		case strings.ContainsRune(s.HostPath, 0):
			return errors.New("a path has no octet 0")
		}
		return nil
	case s.Host.IsMulticast():
		return fmt.Errorf("%v is a multicast address: nothing can be published there", s.Host)
	case s.Host.IsValid() && s.Host.Is4() && !v4:
		return fmt.Errorf("%s does not go with %v: it is an IPv4 address", s.Proto, s.Host)
	case s.Host.IsValid() && !s.Host.Is4() && !v6:
		return fmt.Errorf("%s does not go with %v: it is an IPv6 address", s.Proto, s.Host)
	}
	return nil
}

// checkTarget refuses addresses at which there can be no server of the container's: clients would be connected
// to us, or to nobody. The zero Addr is its own.
func (c *Config) checkTarget(a netip.Addr) error {
	switch a {
	case netip.Addr{}:
		return nil
	case c.Gateway4, c.Gateway6:
		return fmt.Errorf("%v is the gateway, which is usernet itself: nothing in the container listens there; leave it out for the container's own address", a)
	}
	for _, n := range c.Subnets {
		if !a.Is4() || !n.Contains(a) || n.Bits() > 30 {
			continue
		}
		if a == n.Masked().Addr() {
			return fmt.Errorf("%v is the network %v and no address of a container", a, n)
		}
		if a == broadcast(n) {
			return fmt.Errorf("%v is the broadcast address of %v and no container's", a, n)
		}
	}
	if a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return fmt.Errorf("%v is the broadcast address and no container's", a)
	}
	return nil
}

// broadcast is the last address of an IPv4 network.
func broadcast(n netip.Prefix) netip.Addr {
	a := n.Addr().As4()
	for bit := n.Bits(); bit < 32; bit++ {
		a[bit/8] |= 0x80 >> (bit % 8)
	}
	return netip.AddrFrom4(a)
}

// families are those that the host's side listens on.
func (s Spec) families() (transport string, v4, v6 bool) {
	switch s.Proto {
	case "tcp", "udp":
		transport, v4, v6 = s.Proto, true, true
	case "tcp4", "udp4":
		transport, v4 = s.Proto[:3], true
	case "tcp6", "udp6":
		transport, v6 = s.Proto[:3], true
	}
	return transport, v4, v6
}

func (s Spec) udp() bool { return strings.HasPrefix(s.Proto, "udp") }

// dual tells whether one socket serves both families.
func (s Spec) dual() bool {
	return !s.Host.IsValid() && s.HostPath == "" && (s.Proto == "tcp" || s.Proto == "udp")
}

// String is the form that ParseSpec reads.
func (s Spec) String() string {
	var b strings.Builder
	if s.HostPath != "" {
		b.WriteString(s.HostPath)
	} else {
		if s.Host.IsValid() {
			b.WriteString(bracketed(s.Host) + ":")
		}
		b.WriteString(strconv.Itoa(int(s.HostPort)))
	}
	if s.Container.IsValid() {
		b.WriteString(":" + bracketed(s.Container))
	}
	return b.String() + ":" + strconv.Itoa(int(s.ContainerPort)) + "/" + s.Proto
}

func bracketed(a netip.Addr) string {
	if a.Is4() {
		return a.String()
	}
	return "[" + a.String() + "]"
}
