package dns

import (
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func TestNames(t *testing.T) {
	var asked atomic.Int32
	cfg := with(resolver(t, func(w dns.ResponseWriter, q *dns.Msg) { asked.Add(1); code(dns.RcodeNameError)(w, q) }))
	v4, v6 := netip.MustParseAddr("169.254.1.2"), netip.MustParseAddr("fd00::4")
	cfg.Names = StaticNames(map[string][]netip.Addr{
		"host.docker.internal.":    {v4, v6},
		"Host.Containers.internal": {v4, v6},
		"four.internal":            {netip.MustParseAddr("10.0.2.2")},
		"none.internal":            nil,
	})
	s, addr := serve(t, cfg)
	const (
		v4arpa = "2.1.254.169.in-addr.arpa"
		v6arpa = "4.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa"
	)
	for _, tt := range []struct {
		name    string
		kind    uint16
		class   uint16
		want    []string // the data of the answers
		forward bool
	}{
		{"host.containers.internal", dns.TypeA, 1, []string{"169.254.1.2"}, false},
		{"HOST.containers.INTERNAL", dns.TypeA, 1, []string{"169.254.1.2"}, false},
		{"host.docker.internal", dns.TypeAAAA, 1, []string{"fd00::4"}, false},
		{"host.docker.internal", dns.TypeANY, 1, []string{"169.254.1.2", "fd00::4"}, false},
		{"host.docker.internal", dns.TypeA, 255, []string{"169.254.1.2"}, false},
		{"host.docker.internal", dns.TypeMX, 1, nil, false},
		{"host.docker.internal", dns.TypeHTTPS, 1, nil, false},
		{"four.internal", dns.TypeA, 1, []string{"10.0.2.2"}, false},
		{"four.internal", dns.TypeAAAA, 1, nil, false},
		{"none.internal", dns.TypeA, 1, nil, false},
		{v4arpa, dns.TypePTR, 1, []string{"host.containers.internal."}, false},
		{v6arpa, dns.TypePTR, 1, []string{"host.containers.internal."}, false},
		{v4arpa, dns.TypeA, 1, nil, false},

		{"host.docker.internal", dns.TypeA, 3, nil, true},
		{"a.host.docker.internal", dns.TypeA, 1, nil, true},
		{`host\.docker.internal`, dns.TypeA, 1, nil, true},
		{"internal", dns.TypeA, 1, nil, true},
		{".", dns.TypeNS, 1, nil, true},
		{"3.1.254.169.in-addr.arpa", dns.TypePTR, 1, nil, true},
		{"1.254.169.in-addr.arpa", dns.TypePTR, 1, nil, true},
		{"x" + v6arpa[1:], dns.TypePTR, 1, nil, true},
		{v6arpa[2:], dns.TypePTR, 1, nil, true},
	} {
		for _, network := range []string{"udp", "tcp"} {
			asked.Store(0)
			m := new(dns.Msg).SetQuestion(dns.Fqdn(tt.name), tt.kind)
			m.Question[0].Qclass = tt.class
			m.SetEdns0(1232, true)
			r := exchange(t, network, addr, m)
			if tt.forward != (asked.Load() == 1) {
				t.Errorf("%s %s: asked elsewhere %d times", network, tt.name, asked.Load())
			}
			if tt.forward {
				continue
			}
			if r.Rcode != 0 || !r.Authoritative || !r.RecursionAvailable || r.Question[0] != m.Question[0] {
				t.Errorf("%s %s: %v", network, tt.name, r)
			}
			if opt := r.IsEdns0(); opt == nil || !opt.Do() {
				t.Errorf("%s %s: OPT %v", network, tt.name, opt)
			}
			var got []string
			for _, rr := range r.Answer {
				if h := rr.Header(); h.Name != m.Question[0].Name || h.Ttl != nameTTL {
					t.Errorf("%s: header %v", tt.name, h)
				}
				switch rr := rr.(type) {
				case *dns.A:
					got = append(got, rr.A.String())
				case *dns.AAAA:
					got = append(got, rr.AAAA.String())
				case *dns.PTR:
					got = append(got, rr.Ptr)
				}
			}
			if len(got) != len(tt.want) {
				t.Fatalf("%s %s: %v", network, tt.name, r)
			}
			for i := range got {
				if got[i] != tt.want[i] {
					t.Errorf("%s %s: %v, want %v", network, tt.name, got, tt.want)
				}
			}
		}
	}
	if s.Stats().Failures != 0 {
		t.Errorf("%+v", s.Stats())
	}
}

// Names of ours need no upstream.
func TestNamesWithoutUpstream(t *testing.T) {
	cfg := with()
	cfg.Names = StaticNames(map[string][]netip.Addr{"a.internal": {netip.MustParseAddr("192.0.2.1")}})
	_, addr := serve(t, cfg)
	if got := address(t, query(t, "udp", addr, "a.internal", dns.TypeA)); got != "192.0.2.1" {
		t.Error(got)
	}
}

func TestReverse(t *testing.T) {
	for _, a := range []string{"192.0.2.1", "0.0.0.0", "2001:db8::1:2", "::", "ffff:1234:5678:9abc:def0:1:2:3"} {
		addr := netip.MustParseAddr(a)
		name, err := dns.ReverseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := reverse(name[:len(name)-1]); !ok || got != addr {
			t.Errorf("%s: %v", name, got)
		}
	}
	for _, name := range []string{"in-addr.arpa", ".in-addr.arpa", "1.2.3.4.5.in-addr.arpa", "256.0.0.1.in-addr.arpa", "ip6.arpa", "1.ip6.arpa"} {
		if got, ok := reverse(name); ok {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestPackName(t *testing.T) {
	long := "a123456789a123456789a123456789a123456789a123456789a123456789abc" // 63
	for name, ok := range map[string]bool{
		"a.b": true, long: true, "": false, "a..b": false, long + "d": false,
		long + "." + long + "." + long + "." + long[:61]: true,
		long + "." + long + "." + long + "." + long[:62]: false,
	} {
		got := packName(name)
		if (got != nil) != ok || len(got) > 255 {
			t.Errorf("%q: %d octets", name, len(got))
		}
		if !ok {
			continue
		}
		if back, _, err := dns.UnpackDomainName(got, 0); err != nil || back != name+"." {
			t.Errorf("%q: %q %v", name, back, err)
		}
	}
}

// zoned has names in zones that are all ours.
type zoned struct{ Names }

func (zoned) Zones() ([]string, []netip.Prefix) {
	return []string{"usernet.internal"}, []netip.Prefix{
		netip.MustParsePrefix("10.89.1.0/24"), netip.MustParsePrefix("172.20.0.0/14"), netip.MustParsePrefix("192.0.2.128/25"),
		netip.MustParsePrefix("fd12:3456::/64"),
	}
}

func TestZones(t *testing.T) {
	const known6 = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.5.4.3.2.1.d.f.ip6.arpa"
	unknown6, other6 := "2"+known6[1:], known6[:32]+"1"+known6[33:]
	const elsewhere = "asked elsewhere"
	var asked atomic.Bool
	cfg := with(resolver(t, func(w dns.ResponseWriter, q *dns.Msg) { asked.Store(true); code(dns.RcodeNameError)(w, q) }))
	cfg.Names = zoned{StaticNames(map[string][]netip.Addr{
		"db.web.usernet.internal": {netip.MustParseAddr("10.89.1.2"), netip.MustParseAddr("fd12:3456::1")},
		"web.usernet.internal":    nil,
	})}
	_, addr := serve(t, cfg)
	for _, tt := range []struct {
		name string
		kind uint16
		want string // the rcode, and the data of the answer
	}{
		{"db.web.usernet.internal", dns.TypeA, "NOERROR 10.89.1.2"},
		{"db.web.usernet.internal", dns.TypeMX, "NOERROR"},
		{"web.usernet.internal", dns.TypeA, "NOERROR"},
		{"nobody.web.usernet.internal", dns.TypeA, "NXDOMAIN"},
		{"NOBODY.Web.usernet.internal", dns.TypeAAAA, "NXDOMAIN"},
		{"usernet.internal", dns.TypeSOA, "NXDOMAIN"},
		{"xusernet.internal", dns.TypeA, elsewhere},
		{"internal", dns.TypeA, elsewhere},
		{"nobody", dns.TypeA, elsewhere},

		{"2.1.89.10.in-addr.arpa", dns.TypePTR, "NOERROR db.web.usernet.internal."},
		{"3.1.89.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN"},
		{"3.1.89.10.in-addr.arpa", dns.TypeSOA, "NXDOMAIN"},
		{"03.1.89.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN"},
		{"x.3.1.89.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN"},
		{"lb._dns-sd._udp.0.1.89.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN"},
		{"lb._dns-sd._udp.1.89.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN"},
		{"lb._dns-sd._udp.89.10.in-addr.arpa", dns.TypePTR, elsewhere},
		{"1.89.10.in-addr.arpa", dns.TypeNS, "NOERROR"},
		{"89.10.in-addr.arpa", dns.TypeNS, elsewhere},
		{"in-addr.arpa", dns.TypeNS, elsewhere},
		{"3.2.89.10.in-addr.arpa", dns.TypePTR, elsewhere},
		{"1.1.23.172.in-addr.arpa", dns.TypePTR, "NXDOMAIN"},
		{"1.1.24.172.in-addr.arpa", dns.TypePTR, elsewhere},
		{"23.172.in-addr.arpa", dns.TypeNS, "NOERROR"},
		{"200.2.0.192.in-addr.arpa", dns.TypePTR, "NXDOMAIN"},
		{"100.2.0.192.in-addr.arpa", dns.TypePTR, elsewhere},
		{"2.0.192.in-addr.arpa", dns.TypeNS, elsewhere},

		{known6, dns.TypePTR, "NOERROR db.web.usernet.internal."},
		{unknown6, dns.TypePTR, "NXDOMAIN"},
		{"0." + unknown6, dns.TypePTR, "NXDOMAIN"},
		{unknown6[2:], dns.TypePTR, "NOERROR"},
		{unknown6[32:], dns.TypePTR, "NOERROR"},
		{unknown6[34:], dns.TypePTR, elsewhere},
		{other6, dns.TypePTR, elsewhere},
	} {
		asked.Store(false)
		r := query(t, "udp", addr, tt.name, tt.kind)
		got := dns.RcodeToString[r.Rcode]
		for _, rr := range r.Answer {
			got += " " + dns.Field(rr, 1)
		}
		if asked.Load() {
			got = elsewhere
		}
		if got != tt.want {
			t.Errorf("%s %s: %s, want %s", tt.name, dns.TypeToString[tt.kind], got, tt.want)
		}
		if got != elsewhere && !r.Authoritative {
			t.Errorf("%s: not authoritative", tt.name)
		}
	}
}

// Who asks decides what the names are.
func TestNamesFor(t *testing.T) {
	cfg := with()
	cfg.NamesFor = func(client netip.Addr) Names {
		return StaticNames(map[string][]netip.Addr{"me.internal": {client}})
	}
	_, addr := serve(t, cfg)
	for _, network := range []string{"udp", "tcp"} {
		for _, from := range []string{"127.0.0.1", "127.0.0.2"} {
			var local net.Addr = &net.UDPAddr{IP: net.ParseIP(from)}
			if network == "tcp" {
				local = &net.TCPAddr{IP: net.ParseIP(from)}
			}
			c := dns.Client{Net: network, Dialer: &net.Dialer{LocalAddr: local}, Timeout: 20 * time.Second}
			r, _, err := c.Exchange(new(dns.Msg).SetQuestion("me.internal.", dns.TypeA), addr)
			if err != nil {
				t.Fatal(err)
			}
			if got := address(t, r); got != from {
				t.Errorf("%s from %s: %s", network, from, got)
			}
		}
	}
}
