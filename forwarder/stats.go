package forwarder

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A dropReason says why a datagram or echo went no further.
type dropReason uint8

const (
	dropPolicy   dropReason = iota // the Policy drops such packets
	dropRefused                    // the Policy refuses it; the container was told
	dropFiltered                   // from somebody whom the container has not spoken to
	dropBusy                       // the host's socket or interface was full
	dropFiles                      // no file or port left for a new flow
	dropError                      // the host's kernel would not send it
	dropStack                      // the stack would not take it
	dropGroup                      // to a multicast or broadcast address of the host
	dropNoName                     // the container could not be told who it is from
	dropStopped                    // before Bind, or after Run
	dropReasons
)

var dropNames = [dropReasons]string{"policy", "refused", "filtered", "busy", "files", "error", "stack", "group", "no name", "stopped"}

// A counter counts one protocol's datagrams or echoes.
type counter struct {
	flows                    atomic.Int64
	opened, evicted          atomic.Uint64
	sent, sentOctets         atomic.Uint64
	received, receivedOctets atomic.Uint64
	errors                   atomic.Uint64
	drops                    [dropReasons]atomic.Uint64
}

func (c *counter) drop(why dropReason, n int) { c.drops[why].Add(uint64(n)) }

// sentOr counts n datagrams of so many octets together as sent, or as dropped where e is not 0.
func (c *counter) sentOr(n, octets int, e unix.Errno) (sent bool) {
	switch e {
	case 0:
		c.sent.Add(uint64(n))
		c.sentOctets.Add(uint64(octets))
		return true
	case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
		c.drop(dropBusy, n)
	default:
		c.drop(dropError, n)
	}
	return false
}

// receivedSome counts n datagrams of so many octets together as received.
func (c *counter) receivedSome(n, octets int) {
	c.received.Add(uint64(n))
	c.receivedOctets.Add(uint64(octets))
}

// add adds what c has counted, but for the flows that there are.
func (sum *counter) add(c *counter) {
	for _, p := range [...]struct{ to, from *atomic.Uint64 }{
		{&sum.opened, &c.opened}, {&sum.evicted, &c.evicted}, {&sum.errors, &c.errors},
		{&sum.sent, &c.sent}, {&sum.sentOctets, &c.sentOctets},
		{&sum.received, &c.received}, {&sum.receivedOctets, &c.receivedOctets},
	} {
		p.to.Add(p.from.Load())
	}
	for i := range c.drops {
		sum.drops[i].Add(c.drops[i].Load())
	}
}

// FlowStats are the counts of one protocol. Octets are payload.
type FlowStats struct {
	Flows                    int    // now
	Opened, Evicted          uint64 // since the start
	Sent, SentOctets         uint64 // datagrams or echoes, container to host
	Received, ReceivedOctets uint64 // host to container
	Errors                   uint64 // ICMP errors given to the container
	Drops                    map[string]uint64
}

func (c *counter) snapshot() FlowStats {
	s := FlowStats{
		Flows:  int(c.flows.Load()),
		Opened: c.opened.Load(), Evicted: c.evicted.Load(),
		Sent: c.sent.Load(), SentOctets: c.sentOctets.Load(),
		Received: c.received.Load(), ReceivedOctets: c.receivedOctets.Load(),
		Errors: c.errors.Load(),
		Drops:  make(map[string]uint64, dropReasons),
	}
	for i := range c.drops {
		s.Drops[dropNames[i]] = c.drops[i].Load()
	}
	return s
}
