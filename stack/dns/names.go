package dns

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Names are the names that the server answers itself. The methods may be called
// concurrently, for each question, and must not block; nobody changes the slices that they return.
type Names interface {
	// Addrs returns the addresses of a name, and whether it is one of ours: a name of ours
	// without an address of the family asked for exists (NODATA), and is never asked elsewhere. The
	// name is in lower case, without a dot at its end.
	Addrs(name string) ([]netip.Addr, bool)

	// Name returns the name that an address has, for PTR.
	Name(addr netip.Addr) (string, bool)

	// Zones returns the domains, each with all names below it, and the networks, each with the names of the PTR records
	// of all its addresses, in which there is nothing but what Addrs and Name know: all else in them is answered NXDOMAIN. An
	// upstream knows nothing of private addresses, and must not learn of them, either (RFC 6303 §1).
	Zones() (domains []string, subnets []netip.Prefix)
}

// nameTTL is the time, in seconds, for which clients may remember a name of ours: short, as
// containers come and go, and asking again costs a round trip inside one machine.
const nameTTL = 10

// StaticNames are names that do not change. An address with several of them has the
// alphabetically first as its name.
func StaticNames(addrs map[string][]netip.Addr) Names {
	n := staticNames{addrs: map[string][]netip.Addr{}, names: map[netip.Addr]string{}}
	for name, list := range addrs {
		name = strings.ToLower(strings.TrimSuffix(name, "."))
		n.addrs[name] = slices.Clone(list)
		for _, a := range list {
			if old, ok := n.names[a]; !ok || name < old {
				n.names[a] = name
			}
		}
	}
	return n
}

type staticNames struct {
	addrs map[string][]netip.Addr
	names map[netip.Addr]string
}

func (n staticNames) Addrs(name string) ([]netip.Addr, bool) {
	list, ok := n.addrs[name]
	return list, ok
}

func (n staticNames) Name(addr netip.Addr) (string, bool) {
	name, ok := n.names[addr]
	return name, ok
}

// Zones returns none: what is not among the names is asked upstream.
func (n staticNames) Zones() ([]string, []netip.Prefix) { return nil, nil }

// local answers a question about a name of ours; nil when it is not one.
func (q *question) local(names Names) []byte {
	if names == nil || q.name == "" || q.qclass != classInternet && q.qclass != classAny {
		return nil
	}
	if addr, ok := reverse(q.name); ok {
		name, ok := names.Name(addr)
		data := packName(name)
		if !ok || data == nil {
			return q.zone(names)
		}
		out := q.authority(rcodeNone)
		if q.qtype == typePTR || q.qtype == typeAny {
			out = appendRecord(out, typePTR, data)
		}
		return q.finish(out)
	}
	addrs, ok := names.Addrs(q.name)
	if !ok {
		return q.zone(names)
	}
	out := q.authority(rcodeNone)
	for _, a := range addrs {
		a = a.Unmap()
		kind := uint16(typeAAAA)
		if a.Is4() {
			kind = typeA
		}
		if q.qtype == kind || q.qtype == typeAny {
			out = appendRecord(out, kind, a.AsSlice())
		}
	}
	return q.finish(out)
}

// zone answers a question about a name that nobody has, if it is in a zone of ours; nil otherwise. There is no SOA
// record with it, so that nobody remembers the answer (RFC 2308 §5): the name may have an owner in a moment.
func (q *question) zone(names Names) []byte {
	domains, subnets := names.Zones()
	for _, d := range domains {
		if rest, ok := strings.CutSuffix(q.name, d); ok && (rest == "" || strings.HasSuffix(rest, ".")) {
			return q.finish(q.authority(rcodeName))
		}
	}
	covers, leaf, ok := reverseZone(q.name)
	if !ok {
		return nil
	}
	for _, n := range subnets {
		if !n.Overlaps(covers) || n.Bits() > covers.Bits() {
			continue // others' addresses are below that name, too
		}
		if leaf {
			return q.finish(q.authority(rcodeName))
		}
		return q.finish(q.authority(rcodeNone)) // an address below it may have a name (RFC 8020 §2)
	}
	return nil
}

func (q *question) authority(rcode int) []byte {
	out := q.header(rcode)
	out[2] |= flagAA
	return out
}

// appendRecord adds an answer to a message that has its question and, so far, answers only. The
// owner is the name asked for, by a pointer to it.
func appendRecord(out []byte, kind uint16, data []byte) []byte {
	binary.BigEndian.PutUint16(out[6:], binary.BigEndian.Uint16(out[6:])+1)
	out = append(out, 0xc0, headerLen)
	out = binary.BigEndian.AppendUint16(out, kind)
	out = binary.BigEndian.AppendUint16(out, classInternet)
	out = binary.BigEndian.AppendUint32(out, nameTTL)
	out = binary.BigEndian.AppendUint16(out, uint16(len(data)))
	return append(out, data...)
}

// packName is nil for what is no name.
func packName(name string) []byte {
	var out []byte
	for label := range strings.SplitSeq(name, ".") {
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

// reverse reads the name under which an address has its PTR record: RFC 1035 §3.5, RFC 3596 §2.5.
func reverse(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		labels := strings.Split(rest, ".")
		slices.Reverse(labels)
		addr, err := netip.ParseAddr(strings.Join(labels, "."))
		return addr, err == nil && addr.Is4()
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(rest) != 63 {
		return netip.Addr{}, false
	}
	text := make([]byte, 0, 39)
	for i := 62; i >= 0; i -= 2 {
		if i < 62 && rest[i+1] != '.' {
			return netip.Addr{}, false
		}
		if i < 62 && (62-i)/2%4 == 0 {
			text = append(text, ':')
		}
		text = append(text, rest[i])
	}
	addr, err := netip.ParseAddr(string(text))
	return addr, err == nil
}

// reverseZone reads a name of the reverse trees: which addresses have their PTR records at it or below. A leaf has none
// below it: it is the name of one address, or it goes on with what is no part of an address, as DNS-SD's does
// (lb._dns-sd._udp.1.89.10.in-addr.arpa), and covers says where it is.
func reverseZone(name string) (covers netip.Prefix, leaf, ok bool) {
	var octets [16]byte
	labels, most, bits, base := strings.TrimSuffix(name, ".in-addr.arpa"), 4, 8, 10
	if labels == name {
		labels, most, bits, base = strings.TrimSuffix(name, ".ip6.arpa"), 32, 4, 16
		if labels == name {
			return netip.Prefix{}, false, false
		}
	}
	n := 0
	for ; labels != "" && n < most; n++ {
		dot := strings.LastIndexByte(labels, '.')
		v, err := strconv.ParseUint(labels[dot+1:], base, bits)
		if err != nil || base == 16 && len(labels)-dot != 2 {
			leaf = true
			break
		}
		if bits == 8 {
			octets[n] = byte(v)
		} else {
			octets[n/2] |= byte(v) << (4 * (1 - n%2))
		}
		labels = labels[:max(dot, 0)]
	}
	addr := netip.AddrFrom16(octets)
	if most == 4 {
		addr = netip.AddrFrom4([4]byte(octets[:4]))
	}
	return netip.PrefixFrom(addr, n*bits), leaf || n == most, true
}
