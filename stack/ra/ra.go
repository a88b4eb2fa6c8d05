// Package ra makes IPv6 router advertisements and recognises the solicitations that they answer: RFC 4861 for
// the message, RFC 8106 for name servers in it. It neither sends nor receives.
package ra

import (
	"encoding/binary"
	"math"
	"net/netip"
	"strings"
	"time"
)

// Interval is how often an advertisement is sent unasked: the default of MaxRtrAdvInterval (RFC 4861 §6.2.1).
const Interval = 600 * time.Second

const (
	routerLifetime = 3 * Interval       // AdvDefaultLifetime: RFC 4861 §6.2.1
	prefixValid    = 24 * time.Hour     // AdvValidLifetime, by default 30 days: addresses here live no longer than their container
	prefixPrefer   = prefixValid / 2    //
	serverLifetime = 3 * Interval       // RFC 8106 §5.1
	maxLifetime    = 9000 * time.Second // of a router: RFC 4861 §6.2.1
	maxServers     = (255*8 - 8) / 16   // that fit into one option
	maxSearch      = 255*8 - 8          // octets, likewise
	minMTU         = 1280               // RFC 8200 §5
)

const (
	typeSolicitation  = 133
	typeAdvertisement = 134

	optionSource  = 1  // RFC 4861 §4.6.1
	optionPrefix  = 3  // §4.6.2
	optionMTU     = 5  // §4.6.4
	optionServers = 25 // RFC 8106 §5.1
	optionSearch  = 31 // §5.2
)

// Config says what an advertisement tells. Each field that is zero is left out, unless it says otherwise.
type Config struct {
	// Prefix is on the link. Hosts make addresses of their own in it if it is a /64 (RFC 4862 §5.5.3); of another
	// length they learn only that it is on the link. Its host bits are ignored.
	Prefix netip.Prefix

	MTU      int          // of IPv6 packets, in octets; below 1280 it is left out
	DNS      []netip.Addr // IPv6 ones are told, 127 of them at most
	Search   []string     // search domains; those that are no names are left out
	LinkAddr [6]byte      // the router's MAC

	// Static keeps hosts from making addresses of their own: somebody else gives them out.
	Static bool

	// NoRouter tells hosts not to take us for a default router.
	NoRouter bool

	// Lifetime is how long hosts may take us for a default router without hearing from us again; zero is 30
	// minutes, and more than 9000 s counts as that.
	Lifetime time.Duration
}

// Advertisement returns the ICMPv6 message, with a checksum of 0: the sender fills it in. It goes from a
// link-local address with a hop limit of 255 (RFC 4861 §6.1.2).
func Advertisement(cfg Config) []byte {
	router, servers, prefer := cfg.Lifetime, time.Duration(serverLifetime), time.Duration(prefixPrefer)
	if router == 0 {
		router = routerLifetime
	}
	if cfg.NoRouter {
		router = 0
	}

	// RFC 4861 §4.2: type · code · checksum · hop limit · flags (no DHCPv6) · router lifetime ·
	// reachable and retransmission time, which we leave to the host.
	m := make([]byte, 16, 128)
	m[0] = typeAdvertisement
	m[4] = 64
	binary.BigEndian.PutUint16(m[6:], uint16(seconds(min(router, maxLifetime))))

	if cfg.LinkAddr != [6]byte{} {
		m = append(m, optionSource, 1)
		m = append(m, cfg.LinkAddr[:]...)
	}
	if cfg.MTU >= minMTU && cfg.MTU <= math.MaxUint32 {
		m = append(m, optionMTU, 1, 0, 0)
		m = binary.BigEndian.AppendUint32(m, uint32(cfg.MTU))
	}
	m = appendPrefix(m, cfg.Prefix, prefer, !cfg.Static)
	m = appendServers(m, cfg.DNS, servers)
	return appendSearch(m, cfg.Search, servers)
}

func appendPrefix(m []byte, p netip.Prefix, prefer time.Duration, autonomous bool) []byte {
	p = p.Masked()
	if !p.IsValid() || !p.Addr().Is6() {
		return m
	}
	flags := byte(0x80) // on-link
	if p.Bits() == 64 && autonomous {
		flags |= 0x40
	}
	m = append(m, optionPrefix, 4, byte(p.Bits()), flags)
	m = binary.BigEndian.AppendUint32(m, seconds(prefixValid))
	m = binary.BigEndian.AppendUint32(m, seconds(prefer))
	m = append(m, 0, 0, 0, 0)
	return append(m, p.Addr().AsSlice()...)
}

func appendServers(m []byte, servers []netip.Addr, lifetime time.Duration) []byte {
	start, n := len(m), 0
	m = append(m, optionServers, 0, 0, 0)
	m = binary.BigEndian.AppendUint32(m, seconds(lifetime))
	for _, a := range servers {
		if a.Is6() && !a.Is4In6() && n < maxServers {
			m = append(m, a.AsSlice()...)
			n++
		}
	}
	m[start+1] = byte(1 + 2*n)
	if n == 0 {
		return m[:start]
	}
	return m
}

func appendSearch(m []byte, domains []string, lifetime time.Duration) []byte {
	start := len(m)
	m = append(m, optionSearch, 0, 0, 0)
	m = binary.BigEndian.AppendUint32(m, seconds(lifetime))
	names := len(m)
	for _, d := range domains {
		if name := encode(d); len(m)-names+len(name) <= maxSearch {
			m = append(m, name...)
		}
	}
	if len(m) == names {
		return m[:start]
	}
	for (len(m)-start)%8 != 0 {
		m = append(m, 0)
	}
	m[start+1] = byte((len(m) - start) / 8)
	return m
}

// encode returns a name as RFC 1035 §3.1 has it; nil for what is no name.
func encode(domain string) []byte {
	var out []byte
	for label := range strings.SplitSeq(strings.TrimSuffix(domain, "."), ".") {
		if label == "" || len(label) > 63 {
			return nil
		}
		out = append(out, byte(len(label)))
		out = append(out, label...)
	}
	if len(out) > 254 {
		return nil
	}
	return append(out, 0)
}

// seconds is a lifetime as it goes over the wire.
func seconds(d time.Duration) uint32 { return uint32(max(d, 0) / time.Second) }

// IsSolicitation tells whether an ICMPv6 message is a valid router solicitation, as far as the message itself shows it
// (RFC 4861 §6.1.1). Its checksum and its hop limit, which must be 255, the caller has verified.
func IsSolicitation(icmp []byte) bool {
	if len(icmp) < 8 || icmp[0] != typeSolicitation || icmp[1] != 0 {
		return false
	}
	for options := icmp[8:]; len(options) > 0; {
		if len(options) < 2 {
			return false
		}
		n := int(options[1]) * 8
		if n == 0 || n > len(options) {
			return false
		}
		options = options[n:]
	}
	return true
}
