package network

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
)

// What stack/dns asks for; this package does not import it.
var _ interface {
	Addrs(name string) ([]netip.Addr, bool)
	Name(addr netip.Addr) (string, bool)
	Zones() (domains []string, subnets []netip.Prefix)
} = (*View)(nil)

// answer is what a view says of a name: its addresses, "-" for none of them, "" if it is nobody's.
func answer(v *View, name string) string {
	addrs, ok := v.Addrs(name)
	if !ok {
		return ""
	}
	if len(addrs) == 0 {
		return "-"
	}
	return strings.Trim(fmt.Sprint(addrs), "[]")
}

func TestNames(t *testing.T) {
	s := New("host.containers.internal", "host.docker.internal")
	create(t, s, Config{Name: "web", Subnet6: prefix("fd00:1::/64")})
	create(t, s, Config{Name: "lab", Domain: "lab.example.org", NoIPv6: true, Internal: true})
	long := strings.Repeat("a", 63)
	long = long + "." + long + "." + long + "." + long[:50] // no room for the domain
	for _, r := range []struct {
		network, name string
		aliases       []string
	}{
		{"web", "db", []string{"data", "data.web.usernet.internal", "db.web.usernet.internal", long}},
		{"web", "db2", []string{"data", "x.y.z"}},
		{"lab", "db", []string{"data"}},
	} {
		q := request(r.network + r.name)
		q.Name, q.Aliases = r.name, r.aliases
		join(t, s, r.network, q)
	}
	web, lab := s.Names("web").For(netip.Addr{}), s.Names("lab").For(addr("10.89.1.2"))
	for _, tt := range []struct{ name, web, lab string }{
		{"db", "10.89.0.2 fd00:1::2", "10.89.1.2"},
		{"db.web.usernet.internal", "10.89.0.2 fd00:1::2", ""},
		{"db.lab.example.org", "", "10.89.1.2"},
		{"db2", "10.89.0.3 fd00:1::3", ""},
		{"data", "10.89.0.2 fd00:1::2 10.89.0.3 fd00:1::3", "10.89.1.2"},
		{"data.web.usernet.internal", "10.89.0.2 fd00:1::2 10.89.0.3 fd00:1::3", ""},
		{"data.lab.example.org", "", "10.89.1.2"},
		{long, "10.89.0.2 fd00:1::2", ""},
		{"x.y.z", "10.89.0.3 fd00:1::3", ""},
		{"x.y.z.web.usernet.internal", "10.89.0.3 fd00:1::3", ""},
		{"y.z.web.usernet.internal", "-", ""},
		{"z.web.usernet.internal", "-", ""},
		{"web.usernet.internal", "-", ""},
		{"usernet.internal", "-", ""},
		{"internal", "", ""},
		{"lab.example.org", "", ""},
		{"web", "", ""},
		{"nobody", "", ""},
		{"host.containers.internal", "169.254.1.2 fd00:1::a9fe:102", ""},
		{"host.docker.internal", "169.254.1.2 fd00:1::a9fe:102", ""},
	} {
		if got := answer(web, tt.name); got != tt.web {
			t.Errorf("web: %s: %q, want %q", tt.name, got, tt.web)
		}
		if got := answer(lab, tt.name); got != tt.lab {
			t.Errorf("lab: %s: %q, want %q", tt.name, got, tt.lab)
		}
	}
	for _, tt := range []struct{ addr, web, lab string }{
		{"10.89.0.2", "db.web.usernet.internal", ""},
		{"fd00:1::3", "db2.web.usernet.internal", ""},
		{"10.89.1.2", "", "db.lab.example.org"},
		{"169.254.1.2", "host.containers.internal", ""},
		{"fd00:1::a9fe:102", "host.containers.internal", ""},
		{"10.89.0.1", "", ""},
		{"10.89.0.9", "", ""},
	} {
		if got, _ := web.Name(addr(tt.addr)); got != tt.web {
			t.Errorf("web: %s: %q", tt.addr, got)
		}
		if got, _ := lab.Name(addr(tt.addr)); got != tt.lab {
			t.Errorf("lab: %s: %q", tt.addr, got)
		}
	}
	domains, subnets := web.Zones()
	if !slices.Equal(domains, []string{"usernet.internal"}) || !slices.Equal(subnets, prefixes("10.89.0.0/24", "fd00:1::/64")) {
		t.Error(domains, subnets)
	}

	// Changes are seen from now on, and what was seen before stays as it was.
	leave(t, s, "web", "db")
	if got := answer(s.Names("web").For(netip.Addr{}), "data"); got != "10.89.0.3 fd00:1::3" {
		t.Error(got)
	}
	if got := answer(s.Names("web").For(netip.Addr{}), "db"); got != "" {
		t.Error(got)
	}
	if got := answer(web, "db"); got != "10.89.0.2 fd00:1::2" {
		t.Error(got)
	}
}

// A member of several networks sees the names of all of them, wherever it asks, and nobody else does.
func TestNamesOfSeveralNetworks(t *testing.T) {
	s := New()
	for i, n := range []string{"c", "a", "b", "other"} {
		create(t, s, Config{Name: n, Subnet: prefix(fmt.Sprintf("10.%d.0.0/24", i+1)), Subnet6: prefix(fmt.Sprintf("fd00:%d::/64", i+1))})
		r := request("srv" + n)
		r.Aliases = []string{"srv"}
		join(t, s, n, r)
	}
	for _, n := range []string{"a", "b", "c"} {
		join(t, s, n, request("app"))
	}
	for _, tt := range []struct{ network, client, name, want string }{
		{"a", "10.2.0.3", "srva", "10.2.0.2 fd00:2::2"},
		{"a", "10.2.0.3", "srvb", "10.3.0.2 fd00:3::2"},
		{"a", "fd00:2::3", "srvc", "10.1.0.2 fd00:1::2"},
		{"a", "10.2.0.3", "srvc.c.usernet.internal", "10.1.0.2 fd00:1::2"},
		{"a", "10.2.0.3", "srv", "10.2.0.2 fd00:2::2"}, // that of the network that is asked
		{"b", "10.3.0.3", "srv", "10.3.0.2 fd00:3::2"},
		{"c", "10.1.0.3", "srv", "10.1.0.2 fd00:1::2"},
		{"c", "10.1.0.3", "app", "10.1.0.3 fd00:1::3"},
		{"a", "10.2.0.3", "srvother", ""},
		{"a", "10.2.0.2", "srvb", ""},
		{"a", "10.3.0.3", "srvb", ""}, // that is no address of a
		{"other", "10.4.0.2", "srva", ""},
		{"gone", "10.4.0.2", "srva", ""},
	} {
		if got := answer(s.Names(tt.network).For(addr(tt.client)), tt.name); got != tt.want {
			t.Errorf("%s asks %s for %s: %q, want %q", tt.client, tt.network, tt.name, got, tt.want)
		}
	}
	v := s.Names("b").For(addr("10.3.0.3"))
	if _, subnets := v.Zones(); !slices.Equal(subnets, prefixes("10.3.0.0/24", "fd00:3::/64", "10.2.0.0/24", "fd00:2::/64", "10.1.0.0/24", "fd00:1::/64")) {
		t.Error(subnets)
	}
	if got, _ := v.Name(addr("10.1.0.2")); got != "srvc.c.usernet.internal" {
		t.Error(got)
	}
	leave(t, s, "a", "app")
	if got := answer(s.Names("b").For(addr("10.3.0.3")), "srva"); got != "" {
		t.Error(got)
	}
}

// Resolvers read while members come and go; the race detector looks on.
func TestNamesConcurrent(t *testing.T) {
	s := New()
	create(t, s, Config{Name: "web"})
	join(t, s, "web", request("db"))
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				v := s.Names("web").For(addr("10.89.0.2"))
				if got := answer(v, "db"); !strings.HasPrefix(got, "10.89.0.2 ") {
					t.Errorf("db is %q", got)
					return
				}
				// A name and its PTR come and go together.
				if _, ok := v.Addrs("app"); ok {
					if got, _ := v.Name(addr("10.89.0.3")); got != "app.web.usernet.internal" {
						t.Errorf("10.89.0.3 is %q", got)
						return
					}
				}
			}
		})
	}
	for range 500 {
		join(t, s, "web", request("app"))
		leave(t, s, "web", "app")
	}
	close(done)
	wg.Wait()
}

func TestNamesAllocateNothing(t *testing.T) {
	s := New()
	for _, n := range []string{"web", "lab"} {
		create(t, s, Config{Name: n})
		join(t, s, n, request("app"))
	}
	names, client := s.Names("web"), addr("10.89.0.2")
	if n := testing.AllocsPerRun(100, func() {
		v := names.For(client)
		v.Addrs("app")
		v.Addrs("nobody")
		v.Name(client)
		v.Zones()
	}); n != 0 {
		t.Errorf("%v allocations for a question", n)
	}
}
