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

// When to send, for whoever does: RFC 4861 §6.2.1, §6.2.4 and §10.
const (
	MinInterval = 200 * time.Second // MinRtrAdvInterval: between unsolicited ones, at least
	MaxInterval = 600 * time.Second // MaxRtrAdvInterval; the interval is random between the two

	InitialCount    = 3                      // MAX_INITIAL_RTR_ADVERTISEMENTS: so many are sent
	InitialInterval = 16 * time.Second       // MAX_INITIAL_RTR_ADVERT_INTERVAL: no farther apart than this
	MaxDelay        = 500 * time.Millisecond // MAX_RA_DELAY_TIME: an answer to a solicitation waits at most this long
	MinGap          = 3 * time.Second        // MIN_DELAY_BETWEEN_RAS: between two to all nodes
)

// HopLimit is what every message of this protocol must leave and arrive with, as a proof that no router
// passed it on (RFC 4861 §6.1).
const HopLimit = 255

const (
	routerLifetime = 3 * MaxInterval    // AdvDefaultLifetime: RFC 4861 §6.2.1
	prefixValid    = 24 * time.Hour     // AdvValidLifetime, by default 30 days: addresses here live no longer than their container
	prefixPrefer   = prefixValid / 2    //
	serverLifetime = 3 * MaxInterval    // RFC 8106 §5.1
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

// AllNodes and AllRouters are where unsolicited advertisements and solicitations go.
var (
	AllNodes   = netip.MustParseAddr("ff02::1")
	AllRouters = netip.MustParseAddr("ff02::2")
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

	// Lifetime is how long hosts may take us for a default router without hearing from us again; zero is 30
	// minutes, and more than 9000 s counts as that.
	Lifetime time.Duration

	// Final takes it all back: lifetimes are 0 for the router, the name servers and the preference
	// of the prefix (RFC 4861 §6.2.5).
	Final bool
}

// Advertisement returns the ICMPv6 message, with a checksum of 0: SetChecksum fills it in where the sender
// does not. It goes from a link-local address with HopLimit.
func Advertisement(cfg Config) []byte {
	router, servers, prefer := cfg.Lifetime, time.Duration(serverLifetime), time.Duration(prefixPrefer)
	if router == 0 {
		router = routerLifetime
	}
	if cfg.Final {
		router, servers, prefer = 0, 0, 0
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
	m = appendPrefix(m, cfg.Prefix, prefer)
	m = appendServers(m, cfg.DNS, servers)
	return appendSearch(m, cfg.Search, servers)
}

func appendPrefix(m []byte, p netip.Prefix, prefer time.Duration) []byte {
	p = p.Masked()
	if !p.IsValid() || !p.Addr().Is6() {
		return m
	}
	flags := byte(0x80) // on-link
	if p.Bits() == 64 {
		flags |= 0x40 // autonomous
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
// (RFC 4861 §6.1.1). Its checksum and its hop limit, which must be HopLimit, the caller has verified.
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

// SetChecksum fills in the checksum of an ICMPv6 message from src to dst: RFC 4443 §2.3.
func SetChecksum(icmp []byte, src, dst netip.Addr) {
	icmp[2], icmp[3] = 0, 0
	pseudo := make([]byte, 0, 40)
	pseudo = append(pseudo, src.AsSlice()...)
	pseudo = append(pseudo, dst.AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(icmp)))
	pseudo = append(pseudo, 0, 0, 0, 58)
	sum := add(add(0, pseudo), icmp)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(icmp[2:], ^uint16(sum))
}

func add(sum uint32, b []byte) uint32 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	return sum
}
