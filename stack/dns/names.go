package dns

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
)

// Names are the names that the server answers itself. Both methods may be called
// concurrently, once per question, and must not block.
type Names interface {
	// Addrs returns the addresses of a name, and whether it is one of ours: a name of ours
	// without an address of the family asked for exists (NODATA), and is never asked elsewhere. The
	// name is in lower case, without a dot at its end.
	Addrs(name string) ([]netip.Addr, bool)

	// Name returns the name that an address has, for PTR.
	Name(addr netip.Addr) (string, bool)
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

// local answers a question about a name of ours; nil when it is not one.
func (q *question) local(names Names) []byte {
	if names == nil || q.name == "" || q.qclass != classInternet && q.qclass != classAny {
		return nil
	}
	if addr, ok := reverse(q.name); ok {
		name, ok := names.Name(addr)
		data := packName(name)
		if !ok || data == nil {
			return nil
		}
		out := q.authority()
		if q.qtype == typePTR || q.qtype == typeAny {
			out = appendRecord(out, typePTR, data)
		}
		return q.finish(out)
	}
	addrs, ok := names.Addrs(q.name)
	if !ok {
		return nil
	}
	out := q.authority()
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

func (q *question) authority() []byte {
	out := q.header(rcodeNone)
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
