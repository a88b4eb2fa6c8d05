package portdriver

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// AutoConfig publishes what listens in the container, as it appears, and withdraws it as it goes. A port has
// the same number on both sides. A server on the container's loopback alone is published on the host's loopback alone.
type AutoConfig struct {
	Host     netip.Addr // where to publish; zero: on all of the host's addresses
	TCP, UDP bool       // neither: both

	// Ports that are published; none: all, but for UDP those that clients have (see clientPorts).
	Include []PortRange
	Exclude []PortRange // these are not, whatever Include says
}

// A PortRange is the ports from First to Last.
type PortRange struct{ First, Last uint16 }

// ParseAuto reads the argument of -p for what listens in the container:
//
//	[HOST:]auto[:PORT[-END]|^PORT[-END],…][/PROTO]
//
// where ^ leaves ports out, and PROTO is tcp or udp. ok tells whether s is of that form at all; else
// ParseSpec reads it.
func ParseAuto(s string) (a AutoConfig, ok bool, err error) {
	word, proto, hasProto := strings.Cut(s, "/")
	host, items := "", ""
	switch {
	case word == "auto":
	case strings.HasPrefix(word, "auto:"):
		items = word[len("auto:"):]
	default:
		i := strings.Index(word, ":auto")
		if i < 0 || isPath(s) {
			return a, false, nil
		}
		host, items = word[:i], word[i+len(":auto"):]
		if items != "" && items[0] != ':' {
			return a, false, nil
		}
		items = strings.TrimPrefix(items, ":")
	}
	fail := func(err error) (AutoConfig, bool, error) {
		return AutoConfig{}, true, fmt.Errorf("port %q: %w", s, err)
	}
	if strings.HasSuffix(word, ":") {
		return fail(errors.New("a list of ports is missing behind the colon of auto"))
	}
	if host != "" {
		if err := notAddr(host); err != nil {
			return fail(err)
		}
		a.Host = parseAddrOrZero(host)
	}
	switch {
	case !hasProto:
		a.TCP, a.UDP = true, true
	case proto == "tcp":
		a.TCP = true
	case proto == "udp":
		a.UDP = true
	default:
		return fail(fmt.Errorf("protocol %q: it is tcp or udp behind auto", proto))
	}
	if items == "" {
		return a, true, nil
	}
	for item := range strings.SplitSeq(items, ",") {
		ports, out := strings.CutPrefix(item, "^")
		first, last, err := parseRange(ports)
		if err != nil {
			return fail(err)
		}
		if first == 0 {
			return fail(errors.New("port 0: nothing listens there"))
		}
		if out {
			a.Exclude = append(a.Exclude, PortRange{first, last})
		} else {
			a.Include = append(a.Include, PortRange{first, last})
		}
	}
	return a, true, nil
}

// wants tells whether a port of the container's is to be published; ephemeral are those that its kernel picks.
func (a AutoConfig) wants(udp bool, port uint16, ephemeral PortRange) bool {
	switch {
	case a.TCP != a.UDP && a.UDP != udp, within(a.Exclude, port):
		return false
	case len(a.Include) > 0:
		return within(a.Include, port)
	}
	return !udp || !within(clientPorts, port) && !within([]PortRange{ephemeral}, port)
}

// clientPorts are those that a UDP socket without a peer has as a client, beside the ephemeral ones: DHCP's and DHCPv6's.
var clientPorts = []PortRange{{68, 68}, {546, 546}}

func within(ranges []PortRange, port uint16) bool {
	for _, r := range ranges {
		if r.First <= port && port <= r.Last {
			return true
		}
	}
	return false
}
