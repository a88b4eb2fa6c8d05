package main

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A published port's server should see the address of its client. Whether it does is asked of a server in the
// container, which answers a client's first octet with the address that it came from.

// seenParams ask such a server.
type seenParams struct {
	To    netip.AddrPort
	Proto string // tcp or udp
	Wait  time.Duration
}

// seenResult is the client's address as it knows it itself, and as the server saw it.
type seenResult struct{ Own, Seen netip.AddrPort }

// opSeen asks again until there is an answer: an IPv6 address of a new container is not usable at once.
func opSeen(ctx context.Context, p seenParams, _ func(), _ <-chan struct{}) (any, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for end := time.Now().Add(p.Wait); ; {
		r, err := askWho(p, time.Until(end))
		if err == nil || time.Now().After(end) || ctx.Err() != nil {
			return r, err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// askWho speaks first, as clients do: not every peer carries a server's words before its client's.
func askWho(p seenParams, left time.Duration) (r seenResult, err error) {
	kind, wait := unix.SOCK_STREAM, max(left, 50*time.Millisecond)
	if p.Proto == "udp" {
		kind, wait = unix.SOCK_DGRAM, 100*time.Millisecond
	}
	fd, err := dialWithin(kind, p.To, wait)
	if err != nil {
		return r, err
	}
	defer unix.Close(fd)
	own, err := unix.Getsockname(fd)
	if err != nil {
		return r, err
	}
	r.Own = addrPort(own)
	buf := make([]byte, 64) // an address and a port in one write
	for end := time.Now().Add(left); ; {
		n := 0
		if _, err = write(fd, []byte{0}); err == nil {
			n, err = read(fd, buf)
		}
		if err == nil {
			r.Seen, err = netip.ParseAddrPort(string(buf[:n]))
			return r, err
		}
		// A datagram may be lost: again from the same port, so that it is the same flow.
		if kind != unix.SOCK_DGRAM || !errors.Is(err, unix.EAGAIN) || time.Now().After(end) {
			return r, err
		}
	}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// keeps is 1 where the server that an axis speaks to sees the client's own address and port, and 0 where another, or where no
// answer comes: slirp4netns loses those of a UDP port that has had several clients, and carries a load all the same.
func (c *contender) keeps(ctx context.Context, proto string) (float64, error) {
	var r seenResult
	err := c.client.do(ctx, "seen", seenParams{To: netip.AddrPortFrom(c.addr, c.port(whoPort)), Proto: proto, Wait: time.Second}, &r)
	if err != nil || r.Seen != r.Own {
		return 0, ctx.Err()
	}
	return 1, nil
}

// A sighting is whom a server in the container sees when a client speaks to a published port.
type sighting struct {
	Contender string `json:"contender"`
	Proto     string `json:"proto"`
	From      string `json:"from"`
	Client    string `json:"client"`         // its address
	Seen      string `json:"seen,omitempty"` // the address that the server saw; empty: it saw nobody
	Kept      bool   `json:"kept"`           // the address and the port
}

// Where clients of published ports are, and by what they reach them.
var vantages = []struct {
	name    string
	outside bool
	addr    netip.Addr
}{
	{"outside, IPv4", true, hostIP},
	{"outside, IPv6", true, netip.MustParseAddr("2001:db8::1")},
	{"the host's own address, IPv4", false, hostIP},
	{"the host's own address, IPv6", false, netip.MustParseAddr("2001:db8::1")},
	{"the host's loopback, IPv4", false, loopbackIP},
	{"the host's loopback, IPv6", false, netip.IPv6Loopback()},
}

// sightings asks from everywhere at once, since what a peer does not do costs the whole wait.
func (in *instance) sightings(ctx context.Context, l *lab, p *peer) ([]sighting, error) {
	protos := []string{"tcp", "udp"}
	if p.streams {
		protos = protos[:1]
	}
	all := make([]sighting, len(protos)*len(vantages))
	var wg sync.WaitGroup
	for i, proto := range protos {
		for j, v := range vantages {
			s := &all[i*len(vantages)+j]
			s.Contender, s.Proto, s.From = p.name, proto, v.name
			client := l.host
			if v.outside {
				client = l.outside
			}
			wg.Go(func() {
				var r seenResult
				if client.do(ctx, "seen", seenParams{To: netip.AddrPortFrom(v.addr, whoPort+p.shift), Proto: proto, Wait: 1500 * time.Millisecond}, &r) == nil {
					s.Client, s.Seen, s.Kept = r.Own.Addr().String(), r.Seen.Addr().String(), r.Own == r.Seen
				}
			})
		}
	}
	wg.Wait()
	return all, errors.Join(ctx.Err())
}
