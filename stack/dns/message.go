package dns

import "encoding/binary"

// RFC 1035 §4.1.1: ID · flags · QDCOUNT · ANCOUNT · NSCOUNT · ARCOUNT
const headerLen = 12

// In the third and fourth octet of the header.
const (
	flagQR = 0x80 // third: a response
	flagAA = 0x04 // third: authoritative
	flagTC = 0x02 // third: truncated
	flagRD = 0x01 // third: recursion desired
	flagRA = 0x80 // fourth: recursion available
	flagCD = 0x10 // fourth: checking disabled (RFC 4035 §3.2.2)
)

// IANA, "Domain Name System (DNS) Parameters".
const (
	rcodeNone     = 0
	rcodeFormat   = 1
	rcodeFailure  = 2
	rcodeName     = 3
	rcodeNotImpl  = 4
	rcodeRefused  = 5
	typeA         = 1
	typePTR       = 12
	typeAAAA      = 28
	typeOPT       = 41
	typeIXFR      = 251
	typeAXFR      = 252
	typeAny       = 255
	classInternet = 1
	classAny      = 255
)

const (
	minSize = 512 // what a client takes by UDP without EDNS (RFC 1035 §4.2.1)

	// What we say we take ourselves, in answers that we make: the size that crosses
	// every path without fragments (RFC 9715 §3.1, appendix A of it has 1232).
	ownSize = 1232
)

// drop is what parse says of a message that deserves no answer.
const drop = -1

// A question is one message of a client.
type question struct {
	wire []byte // as it came; belongs to the question
	end  int    // where the question section ends in wire

	// name is in lower case and without the last dot; "" for the root and for a
	// name that has octets other than letters, digits, '-' and '_' in it.
	name          string
	qtype, qclass uint16

	edns bool // it has an OPT record
	do   bool // with the DO bit (RFC 3225)
	size int  // the longest answer that it takes by UDP, in octets
}

// parse reads a question. The second result is rcodeNone for one that can be answered, drop,
// or the code to refuse it with; end is headerLen then.
func parse(msg []byte) (question, int) {
	q := question{wire: msg, end: headerLen, size: minSize}
	if len(msg) < headerLen || msg[2]&flagQR != 0 {
		return q, drop // an answer to a response would be the start of a loop
	}
	// UPDATE and NOTIFY would reach a resolver that trusts the host's own address.
	if msg[2]>>3&0xf != 0 {
		return q, rcodeNotImpl
	}
	if binary.BigEndian.Uint16(msg[4:]) != 1 { // RFC 9619 §4
		return q, rcodeFormat
	}
	end, ok := q.readName(headerLen)
	if !ok || len(msg) < end+4 {
		return q, rcodeFormat
	}
	q.qtype = binary.BigEndian.Uint16(msg[end:])
	q.qclass = binary.BigEndian.Uint16(msg[end+2:])
	end += 4

	records := 0
	for i := 6; i < headerLen; i += 2 {
		records += int(binary.BigEndian.Uint16(msg[i:]))
	}
	for off := end; records > 0; records-- { // each takes 11 octets or ends the loop
		fixed, ok := skipName(msg, off)
		if !ok || len(msg) < fixed+10 {
			return q, rcodeFormat
		}
		if binary.BigEndian.Uint16(msg[fixed:]) == typeOPT { // RFC 6891 §6.1.2
			q.edns = true
			q.size = max(minSize, int(binary.BigEndian.Uint16(msg[fixed+2:])))
			q.do = msg[fixed+6]&0x80 != 0
		}
		off = fixed + 10 + int(binary.BigEndian.Uint16(msg[fixed+8:]))
		if off > len(msg) {
			return q, rcodeFormat
		}
	}
	q.end = end
	// A zone transfer is many messages, and business with the zone's own server.
	if q.qtype == typeAXFR || q.qtype == typeIXFR {
		return q, rcodeRefused
	}
	return q, rcodeNone
}

// readName sets q.name from the name at off and returns where it ends. The first name
// of a message has nothing to point at, so that a compressed one is malformed.
func (q *question) readName(off int) (int, bool) {
	name, plain, start := make([]byte, 0, 64), true, off
	for {
		if off >= len(q.wire) {
			return 0, false
		}
		n := int(q.wire[off])
		off++
		if n == 0 {
			break
		}
		if n > 63 || off+n > len(q.wire) {
			return 0, false
		}
		if len(name) > 0 {
			name = append(name, '.')
		}
		for _, c := range q.wire[off : off+n] {
			c = lower(c)
			plain = plain && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_')
			name = append(name, c)
		}
		off += n
	}
	if plain {
		q.name = string(name)
	}
	return off, off-start <= 255 // RFC 1035 §2.3.4
}

// skipName returns where the name at off ends.
func skipName(msg []byte, off int) (int, bool) {
	for off < len(msg) {
		switch n := int(msg[off]); {
		case n == 0:
			return off + 1, true
		case n >= 0xc0: // a pointer ends the name (RFC 1035 §4.1.4)
			return off + 2, off+2 <= len(msg)
		case n > 63:
			return 0, false
		default:
			off += 1 + n
		}
	}
	return 0, false
}

// answeredBy tells whether msg answers the question as it was sent with id: the ID and the question are the
// only proof that a datagram is no forgery (RFC 5452 §9.1).
func (q *question) answeredBy(msg []byte, id uint16) bool {
	if len(msg) < headerLen || binary.BigEndian.Uint16(msg) != id || msg[2]&flagQR == 0 || msg[2]>>3&0xf != 0 {
		return false
	}
	switch binary.BigEndian.Uint16(msg[4:]) {
	case 0:
		// Some servers refuse without saying what.
		switch msg[3] & 0xf {
		case rcodeFormat, rcodeFailure, rcodeNotImpl, rcodeRefused:
			return binary.BigEndian.Uint16(msg[6:]) == 0
		}
		return false
	case 1:
		if len(msg) < q.end {
			return false
		}
		class := q.end - 4
		for i := headerLen; i < class; i++ {
			if lower(msg[i]) != lower(q.wire[i]) { // no length octet is a letter
				return false
			}
		}
		return string(msg[class:q.end]) == string(q.wire[class:q.end])
	}
	return false
}

// header begins an answer of ours: ID and question repeated, no record yet.
func (q *question) header(rcode int) []byte {
	out := make([]byte, headerLen, q.end+64)
	copy(out, q.wire[:2])
	out[2] = flagQR | q.wire[2]&(0xf<<3|flagRD)
	out[3] = flagRA | q.wire[3]&flagCD | byte(rcode)
	if q.end > headerLen {
		out[5] = 1
		out = append(out, q.wire[headerLen:q.end]...)
	}
	return out
}

// finish ends an answer of ours: a question with EDNS has one with EDNS (RFC 6891 §6.1.1).
func (q *question) finish(out []byte) []byte {
	if !q.edns {
		return out
	}
	out[11]++
	var do byte
	if q.do {
		do = 0x80
	}
	return append(out, 0, 0, typeOPT, ownSize>>8, ownSize&0xff, 0, 0, do, 0, 0, 0)
}

// refuse is the answer that has nothing but a code.
func (q *question) refuse(rcode int) []byte { return q.finish(q.header(rcode)) }

// truncate is what a client gets in place of an answer that is longer than it takes: the question, what
// the header said, and TC. Parts of a record set help nobody (RFC 2181 §9).
func (q *question) truncate(answer []byte) []byte {
	out := q.header(0)
	out[2] = answer[2] | flagTC
	out[3] = answer[3]
	return q.finish(out)
}

// lower is for ASCII only: RFC 4343 §3.
func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}
