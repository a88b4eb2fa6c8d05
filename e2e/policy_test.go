package e2e

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// reaches dials and says whether the other end is there: an octet comes back.
func reaches(p *place, addr netip.AddrPort) error {
	conn, err := p.dial("tcp", addr.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	return ping(conn)
}

// The host's loopback is shut, and the host's own addresses are not.
func TestHostLoopback(t *testing.T) {
	loop4 := lab.host.serveTCP(t, "127.0.0.1:0", echo)
	loop6 := lab.host.serveTCP(t, "[::1]:0", echo)
	loopUDP := lab.host.serveUDP(t, "127.0.0.1:0", same)
	own4 := lab.host.serveTCP(t, hostAddr4+":0", echo)
	own6 := lab.host.serveTCP(t, "["+hostAddr6+"]:0", echo)
	all := lab.host.serveTCP(t, "[::]:0", echo)
	at := func(addr string, port uint16) netip.AddrPort {
		return netip.AddrPortFrom(netip.MustParseAddr(addr), port)
	}
	shut, open := connected(t), connected(t, "--host-loopback")
	for _, test := range []struct {
		name             string
		addr             netip.AddrPort
		inShut, inOpened bool
	}{
		{"loopback by the gateway", at(gateway4, loop4.Port()), false, true},
		{"loopback by the gateway IPv6", at(gateway6, loop6.Port()), false, true},
		{"all addresses by the gateway", at(gateway4, all.Port()), false, true},
		{"loopback by the alias", at(alias4, loop4.Port()), false, false},
		{"loopback by the alias IPv6", at(alias6, loop6.Port()), false, false},
		{"own address by the alias", at(alias4, own4.Port()), true, true},
		{"own address by the alias IPv6", at(alias6, own6.Port()), true, true},
		{"all addresses by the alias", at(alias4, all.Port()), true, true},
		{"own address by itself", own4, true, true},
		{"own address by itself IPv6", own6, true, true},
		{"loopback by the resolver", at(resolver4, loop4.Port()), false, false},
		{"mapped", at("::ffff:127.0.0.1", loop4.Port()), false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, c := range []struct {
				name string
				net  *place
				want bool
			}{{"shut", shut.net, test.inShut}, {"open", open.net, test.inOpened}} {
				if err := reaches(c.net, test.addr); (err == nil) != c.want {
					t.Errorf("loopback %s: %s reached %v (%v), want %v", c.name, test.addr, err == nil, err, c.want)
				} else if err != nil && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EHOSTUNREACH) && !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EACCES) {
					t.Errorf("loopback %s: %s: %v, want it refused", c.name, test.addr, err)
				}
			}
		})
	}
	t.Run("datagrams", func(t *testing.T) {
		if got := ask(t, open.net, at(gateway4, loopUDP.Port()), "x"); got != "x" {
			t.Errorf("got %q", got)
		}
		if err := sendError(t, shut.net, at(gateway4, loopUDP.Port()).String()); err == nil {
			t.Error("the host's loopback answers a datagram")
		}
	})
}

// The network of the host may change: new flows follow it.
func TestHostChanges(t *testing.T) {
	c := connected(t)
	peers := make(chan string, 1)
	server := lab.outside.serveTCP(t, outsideAddr4+":0", func(conn *net.TCPConn) { peers <- conn.RemoteAddr().String() })
	from := func() string {
		c.net.connect(t, "tcp", server.String())
		return netip.MustParseAddrPort(<-peers).Addr().String()
	}
	if got := from(); got != hostAddr4 {
		t.Fatalf("came from %s, want %s", got, hostAddr4)
	}
	const other = "203.0.113.99"
	change := func(del, add string) {
		lab.root.sh(t, "ip addr del "+del+"/24 dev world; ip addr add "+add+"/24 dev world; ip route replace default via "+outsideAddr4)
	}
	change(hostAddr4, other)
	t.Cleanup(func() { change(other, hostAddr4) })
	if got := from(); got != other {
		t.Errorf("came from %s after the change, want %s", got, other)
	}
	alias := lab.host.serveTCP(t, other+":0", echo)
	eventually(t, "the host's alias follows the host's address", func() bool {
		return reaches(c.net, netip.AddrPortFrom(netip.MustParseAddr(alias4), alias.Port())) == nil
	})
}
