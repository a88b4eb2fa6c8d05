package network

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func TestCreateDefaults(t *testing.T) {
	n := create(t, New(), Config{Name: "web"})
	if n.Number != 1 || n.Bridge() != "b1" || n.Uplink() != "u1" || n.MTU != 65520 || n.Internal {
		t.Errorf("%+v", n)
	}
	if n.Subnet != prefix("10.89.0.0/24") || n.Gateway != addr("10.89.0.1") || n.Domain != "web.usernet.internal" {
		t.Errorf("%+v", n)
	}
	// Golden: it is the same wherever the network is made again.
	if n.Subnet6 != prefix("fd94:7656:ce7b:a38a::/64") || n.Gateway6 != n.Subnet6.Addr().Next() || n.Host6 != addr("fd94:7656:ce7b:a38a::169.254.1.2") {
		t.Errorf("%s %s %s", n.Subnet6, n.Gateway6, n.Host6)
	}
	if n.GatewayMAC() != mac("52:55:0a:59:00:01") || n.BridgeMAC() != mac("52:57:0a:59:00:01") {
		t.Error(n.GatewayMAC(), n.BridgeMAC())
	}
}

func TestCreate(t *testing.T) {
	web := Config{Name: "web", Subnet: prefix("10.89.7.0/24"), Subnet6: prefix("fd00:7::/64")}
	for _, tt := range []struct {
		name  string
		cfg   Config
		host  []netip.Prefix
		kind  error
		words []string
	}{
		{"both given", Config{Name: "a", Subnet: prefix("192.168.5.0/30"), Subnet6: prefix("2001:db8::/126"), Internal: true, MTU: 1280, Domain: "lab"}, nil, nil, nil},
		{"IPv4 alone", Config{Name: "a", NoIPv6: true, MTU: 576}, nil, nil, nil},
		{"name", Config{Name: "A"}, nil, ErrInvalid, []string{`network "A"`, `"a"`}},
		{"taken", Config{Name: "web"}, nil, ErrConflict, []string{`network "web"`, "network rm web"}},
		{"overlap", Config{Name: "a", Subnet: prefix("10.89.0.0/16")}, nil, ErrConflict, []string{"10.89.0.0/16 overlaps 10.89.7.0/24", `"web"`, "--subnet"}},
		{"overlap of IPv6", Config{Name: "a", Subnet6: prefix("fd00:7::/80")}, nil, ErrConflict, []string{"overlaps fd00:7::/64", "--ipv6"}},
		{"host address", Config{Name: "a", Subnet: prefix("192.168.5.0/24")}, prefixes("192.168.5.20/32"), ErrConflict, []string{"192.168.5.20/32", "host"}},
		{"host route", Config{Name: "a", Subnet: prefix("192.168.5.0/24")}, prefixes("0.0.0.0/0", "192.168.5.0/24"), ErrConflict, []string{"192.168.5.0/24, which"}},
		{"host address of IPv6", Config{Name: "a", Subnet6: prefix("fd01::/64")}, prefixes("fd01::5/128"), ErrConflict, []string{"fd01::5/128"}},
		{"within a VPN's", Config{Name: "a", Subnet: prefix("10.5.0.0/24")}, prefixes("10.0.0.0/8"), nil, nil},
		{"default routes", Config{Name: "a", Subnet: prefix("10.5.0.0/24")}, prefixes("0.0.0.0/0", "0.0.0.0/1", "::/0", "200::/7"), nil, nil},
		{"host bits", Config{Name: "a", Subnet: prefix("10.5.0.1/24")}, nil, ErrInvalid, []string{"did you mean 10.5.0.0/24?"}},
		{"short", Config{Name: "a", Subnet: prefix("10.5.0.0/31")}, nil, ErrInvalid, []string{"/8 to /30"}},
		{"long", Config{Name: "a", Subnet: prefix("10.0.0.0/7")}, nil, ErrInvalid, []string{"/8 to /30"}},
		{"family", Config{Name: "a", Subnet: prefix("fd00::/64")}, nil, ErrInvalid, []string{"IPv4"}},
		{"family 6", Config{Name: "a", Subnet6: prefix("10.5.0.0/24")}, nil, ErrInvalid, []string{"IPv6"}},
		{"mapped", Config{Name: "a", Subnet6: prefix("::ffff:0:0/96")}, nil, ErrInvalid, []string{"IPv6"}},
		{"broken", Config{Name: "a", Subnet: netip.PrefixFrom(addr("10.0.0.0"), 40)}, nil, ErrInvalid, nil},
		{"loopback", Config{Name: "a", Subnet: prefix("127.5.0.0/16")}, nil, ErrInvalid, []string{"127.0.0.0/8", "loopback"}},
		{"multicast", Config{Name: "a", Subnet: prefix("224.5.0.0/16")}, nil, ErrInvalid, []string{"multicast"}},
		{"the host's alias", Config{Name: "a", Subnet: prefix("169.254.1.0/24")}, nil, ErrInvalid, []string{"link-local"}},
		{"link-local", Config{Name: "a", Subnet6: prefix("fe80::/64")}, nil, ErrInvalid, []string{"link-local"}},
		{"both ways", Config{Name: "a", NoIPv6: true, Subnet6: prefix("fd01::/64")}, nil, ErrInvalid, []string{"IPv6 off"}},
		{"MTU", Config{Name: "a", MTU: 1279}, nil, ErrInvalid, []string{"1280 (without IPv6: 576) to 65520"}},
		{"MTU 4", Config{Name: "a", MTU: 575, NoIPv6: true}, nil, ErrInvalid, []string{"must be 576 to 65520"}},
		{"large MTU", Config{Name: "a", MTU: 65521}, nil, ErrInvalid, []string{"65520"}},
		{"negative MTU", Config{Name: "a", MTU: -1}, nil, ErrInvalid, []string{"-1"}},
		{"domain", Config{Name: "a", Domain: "a.local"}, nil, ErrInvalid, []string{`network "a"`, "a.local"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := New()
			create(t, s, web)
			before := string(text(t, s.State(boot)))
			n, err := s.Create(tt.cfg, tt.host)
			want(t, err, tt.kind, tt.words...)
			if err == nil {
				if got, err := s.Get(tt.cfg.Name); err != nil || n.Name != tt.cfg.Name || got.Number != 2 {
					t.Errorf("%+v %v", got, err)
				}
			} else if after := string(text(t, s.State(boot))); after != before {
				t.Errorf("a refused network changed the Set to %s", after)
			}
			holds(t, s)
		})
	}
}

func TestFree4(t *testing.T) {
	s := New()
	for i, tt := range []struct {
		host []netip.Prefix
		want string
	}{
		{nil, "10.89.0.0/24"},
		{prefixes("10.89.1.77/32", "10.89.2.0/23", "0.0.0.0/0"), "10.89.4.0/24"},
		{nil, "10.89.1.0/24"},
		// All of the pool is within a VPN's: a part of that is the lesser evil, but not where the host is itself.
		{prefixes("10.0.0.0/8", "10.89.2.9/32"), "10.89.3.0/24"},
		{prefixes("10.0.0.0/8", "10.89.0.0/17"), "10.89.128.0/24"},
	} {
		n, err := s.Create(Config{Name: fmt.Sprint("n-", i)}, tt.host)
		want(t, err, nil)
		if n.Subnet != prefix(tt.want) {
			t.Errorf("%d: %s, want %s", i, n.Subnet, tt.want)
		}
	}
	holds(t, s)
	create(t, s, Config{Name: "all", Subnet: prefix("10.89.192.0/18")})
	_, err := s.Create(Config{Name: "none"}, prefixes("10.89.0.0/18", "10.89.64.0/18", "10.89.128.0/18"))
	want(t, err, ErrExhausted, "10.89.0.0/16", "--subnet")
}

func TestDerive6(t *testing.T) {
	s := New()
	a, err := s.derive6("a", prefix("10.89.0.0/24"), nil)
	want(t, err, nil)
	b, err := s.derive6("b", prefix("10.89.0.0/24"), nil)
	want(t, err, nil)
	if a == b || !prefix("fd00::/8").Overlaps(a) || a.Bits() != 64 || a.Masked() != a {
		t.Error(a, b)
	}
	again, err := s.derive6("a", prefix("10.89.0.0/24"), []netip.Prefix{a})
	want(t, err, nil)
	if again == a {
		t.Error("the host's own was given")
	}
	within, err := s.derive6("a", prefix("10.89.0.0/24"), prefixes("fd00::/8"))
	want(t, err, nil)
	if within != a {
		t.Error(within)
	}
}

func TestNetworkLimit(t *testing.T) {
	s := New()
	for i := range maxNetworks {
		create(t, s, Config{Name: fmt.Sprint("n", i, "x"), NoIPv6: true})
	}
	_, err := s.Create(Config{Name: "more", Subnet: prefix("192.168.0.0/24")}, nil)
	want(t, err, ErrExhausted, "256")
	want(t, s.Remove("n5x"), nil)
	n := create(t, s, Config{Name: "more"})
	if n.Number != 6 || n.Subnet != prefix("10.89.5.0/24") {
		t.Errorf("%+v", n)
	}
	holds(t, s)
}

func TestRemove(t *testing.T) {
	s := New()
	create(t, s, Config{Name: "web"})
	join(t, s, "web", request("db"))
	want(t, s.Remove("web"), ErrConflict, "1 members", `"db"`)
	want(t, s.Remove("lab"), ErrNotFound, "lab", "network create")
	leave(t, s, "web", "db")
	want(t, s.Remove("web"), nil)
	_, err := s.Get("web")
	want(t, err, ErrNotFound, "web")
	if _, ok := s.Names("web").For(netip.Addr{}).Addrs("db"); ok {
		t.Error("a name outlived its network")
	}
	if l := s.List(); len(l) != 0 {
		t.Error(l)
	}
}

func TestList(t *testing.T) {
	s := New()
	var names []string
	for _, n := range []string{"web", "a", "lab"} {
		create(t, s, Config{Name: n})
	}
	join(t, s, "web", request("db"))
	for _, n := range s.List() {
		names = append(names, n.Name)
	}
	if got := strings.Join(names, " "); got != "a lab web" {
		t.Error(got)
	}
	// It is a copy.
	l := s.List()
	l[2].Members[0].Name, l[2].Name = "x", "y"
	holds(t, s)
	if m, err := s.Member("web", "db"); err != nil || m.Name != "db" {
		t.Error(m, err)
	}
}

func TestLast(t *testing.T) {
	for p, want := range map[string]string{
		"10.89.1.0/24": "10.89.1.255", "10.0.0.0/8": "10.255.255.255", "10.0.0.128/30": "10.0.0.131", "10.0.0.128/25": "10.0.0.255",
		"172.20.0.0/14": "172.23.255.255", "fd00::/126": "fd00::3", "fd00::/64": "fd00::ffff:ffff:ffff:ffff",
	} {
		if got := last(prefix(p)); got != addr(want) {
			t.Errorf("%s: %s", p, got)
		}
	}
}
