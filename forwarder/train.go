package forwarder

const (
	// maxSegments is the most datagrams of a train: UDP_MAX_SEGMENTS before Linux 6.9.
	maxSegments = 64

	// maxTrain is the most octets of one: with its headers it fits an IPv4 packet.
	maxTrain = 65507
)

// A train is a run of datagrams between the same two ends that crosses the kernel, or the TAP, in
// one piece: all have segment octets, the last one 1 to segment. The zero train is empty.
type train struct {
	segment, octets, count int
	short                  bool // the last one is shorter; no other can follow
}

// add appends a datagram, or with segment > 0 a train, of so many octets, and tells whether that
// was possible. An empty train takes anything.
func (t *train) add(octets, segment int) bool {
	if segment <= 0 || segment > octets {
		segment = octets
	}
	count := 1
	if segment > 0 {
		count = (octets + segment - 1) / segment
	}
	if t.count == 0 {
		*t = train{segment: segment, octets: octets, count: count, short: octets < count*segment || octets == 0}
		return true
	}
	fits := !t.short && octets > 0 && t.octets+octets <= maxTrain && t.count+count <= maxSegments &&
		(segment == t.segment || count == 1 && octets < t.segment)
	if fits {
		t.octets += octets
		t.count += count
		t.short = octets < count*t.segment
	}
	return fits
}
