package stack

import "sync/atomic"

// counters are what a Stack counts while it runs.
type counters struct {
	FramesIn, FramesOut       atomic.Uint64
	OctetsIn                  atomic.Uint64
	FramesOutDropped          atomic.Uint64
	Malformed, BadChecksum    atomic.Uint64
	NotForUs                  atomic.Uint64
	DatagramsIn, DatagramsOut atomic.Uint64
	ICMPErrorsOut             atomic.Uint64
	SYNs, SYNsOverLimit       atomic.Uint64
	Accepted, Rejected        atomic.Uint64
}

// Stats is a snapshot of what a Stack has counted since it was made. In and Out
// are seen from usernet: in comes from the container.
type Stats struct {
	FramesIn, FramesOut       uint64 // a super-segment is one frame
	OctetsIn                  uint64 // of Ethernet frames
	FramesOutDropped          uint64 // the device did not take them
	Malformed, BadChecksum    uint64 // dropped
	NotForUs                  uint64 // dropped: another hardware address or protocol
	DatagramsIn, DatagramsOut uint64 // UDP; a train counts once
	ICMPErrorsOut             uint64
	SYNs, SYNsOverLimit       uint64 // the latter were dropped, the container repeats them
	Accepted, Rejected        uint64 // TCP connections
	TCPRetransmits            uint64
}

// Stats returns what has been counted so far. Any goroutine may call it.
func (s *Stack) Stats() Stats {
	c := &s.stats
	return Stats{
		FramesIn: c.FramesIn.Load(), FramesOut: c.FramesOut.Load(),
		OctetsIn:         c.OctetsIn.Load(),
		FramesOutDropped: c.FramesOutDropped.Load(),
		Malformed:        c.Malformed.Load(), BadChecksum: c.BadChecksum.Load(),
		NotForUs:    c.NotForUs.Load(),
		DatagramsIn: c.DatagramsIn.Load(), DatagramsOut: c.DatagramsOut.Load(),
		ICMPErrorsOut: c.ICMPErrorsOut.Load(),
		SYNs:          c.SYNs.Load(), SYNsOverLimit: c.SYNsOverLimit.Load(),
		Accepted: c.Accepted.Load(), Rejected: c.Rejected.Load(),
		TCPRetransmits: s.ns.Stats().TCP.Retransmits.Value(),
	}
}
