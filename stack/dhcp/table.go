package dhcp

import (
	"net/netip"
	"time"
)

const (
	// offerTime is how long an offered address waits for its request (RFC 2131 §3.1 leaves it to us): longer
	// than a client takes to choose, shorter than it would notice.
	offerTime = time.Minute

	// declineTime is how long an address that a client found in use is not given out.
	declineTime = 10 * time.Minute
)

// A table is the addresses that there are, each with the client that has it or had it last. The number of addresses
// bounds it: clients are remembered by what they hold, and nowhere else.
type table struct {
	entries []entry // in the order of preference
	lease   time.Duration
}

type entry struct {
	addr     netip.Addr
	client   string    // "" for nobody yet
	until    time.Time // nobody else gets it before
	declined bool      // not even the client does
}

func newTable(addrs []netip.Addr, lease time.Duration) table {
	t := table{lease: lease}
	for _, a := range addrs {
		t.entries = append(t.entries, entry{addr: a})
	}
	return t
}

// free tells whether an entry can go to a client.
func (e *entry) free(client string, now time.Time) bool {
	return !now.Before(e.until) || e.client == client && !e.declined
}

// offer chooses an address: what the client has or had; the first one, which is the container's own; what
// it asks for; one that nobody had; the one that has been free for longest. (RFC 2131 §4.3.1, but for the
// second.)
func (t *table) offer(client string, want netip.Addr, now time.Time) (netip.Addr, bool) {
	best, rank := -1, 0
	for i := range t.entries {
		e := &t.entries[i]
		if !e.free(client, now) {
			continue
		}
		r := 1
		switch {
		case e.client == client && !e.declined:
			r = 5
		case i == 0:
			r = 4
		case e.addr == want:
			r = 3
		case e.client == "":
			r = 2
		}
		if r > rank || r == 1 && rank == 1 && e.until.Before(t.entries[best].until) {
			best, rank = i, r
		}
	}
	if best < 0 {
		return netip.Addr{}, false
	}
	t.hold(&t.entries[best], client, now.Add(offerTime), now)
	return t.entries[best].addr, true
}

// bind gives the client the address for the time of a lease, and reports false where it cannot have it.
func (t *table) bind(client string, addr netip.Addr, now time.Time) bool {
	for i := range t.entries {
		e := &t.entries[i]
		if e.addr != addr {
			continue
		}
		if !e.free(client, now) {
			return false
		}
		t.hold(e, client, now.Add(t.lease), now)
		return true
	}
	return false
}

// hold gives the entry to the client, who then has no other. A lease is never shortened: a client that
// asks again from the start still has it.
func (t *table) hold(e *entry, client string, until, now time.Time) {
	if e.client != client || e.declined || e.until.Before(until) {
		e.until = until
	}
	e.client, e.declined = client, false
	for i := range t.entries {
		if o := &t.entries[i]; o != e && o.client == client && !o.declined {
			o.client = ""
			if now.Before(o.until) {
				o.until = now
			}
		}
	}
}

// forget drops what was offered to a client that chose another server.
func (t *table) forget(client string) {
	for i := range t.entries {
		if e := &t.entries[i]; e.client == client && !e.declined {
			e.client, e.until = "", time.Time{}
		}
	}
}

// decline takes an address that somebody else uses out of service for a while.
func (t *table) decline(client string, addr netip.Addr, now time.Time) {
	for i := range t.entries {
		if e := &t.entries[i]; e.addr == addr && e.client == client {
			e.declined, e.until = true, now.Add(declineTime)
		}
	}
}

// release ends a lease; the client gets the same address again if it comes back in time.
func (t *table) release(client string, addr netip.Addr, now time.Time) {
	for i := range t.entries {
		if e := &t.entries[i]; e.addr == addr && e.client == client && !e.declined && now.Before(e.until) {
			e.until = now
		}
	}
}
