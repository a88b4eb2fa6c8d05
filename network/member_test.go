package network

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestJoin(t *testing.T) {
	s := New()
	n := create(t, s, Config{Name: "web", Subnet6: prefix("fd00:1::/64")})
	m := join(t, s, "web", request("db"))
	if m.IPv4 != addr("10.89.0.2") || m.IPv6 != addr("fd00:1::2") || m.MAC != mac("52:56:0a:59:00:02") || m.Ifname != "eth0" || m.Port() != "m1" {
		t.Errorf("%+v", m)
	}
	r := request("app")
	r.IPv4, r.IPv6, r.MAC, r.Ifname = addr("10.89.0.200"), addr("fd00:1::c0de"), mac("02:00:00:00:00:01"), "net0"
	r.Aliases, r.Ports = []string{"www", "app", "www"}, []string{"8080:80", "[::1]:53:53/udp"}
	r.Process, r.Path = Process{}, "/run/netns/x"
	m = join(t, s, "web", r)
	if m.IPv4 != r.IPv4 || m.IPv6 != r.IPv6 || m.MAC != r.MAC || m.Ifname != "net0" || m.Number != 2 || !slices.Equal(m.Aliases, []string{"www"}) {
		t.Errorf("%+v", m)
	}
	want(t, s.SetCable("web", "app", CableTAP), nil)
	want(t, s.SetPorts("web", "app", []string{"80"}), nil)
	m, err := s.Member("web", "app")
	want(t, err, nil)
	if m.Cable != CableTAP || !slices.Equal(m.Ports, []string{"80"}) {
		t.Errorf("%+v", m)
	}
	if got, ok := s.ByMAC("web", r.MAC); !ok || got.Name != "app" {
		t.Error(got, ok)
	}
	if got, ok := s.ByMAC("web", n.GatewayMAC()); ok {
		t.Error(got)
	}
	if got, ok := s.ByMAC("lab", r.MAC); ok {
		t.Error(got)
	}
	if in, got, ok := s.ByPort("m2"); !ok || in != "web" || got.Name != "app" {
		t.Error(in, got, ok)
	}
	if in, got, ok := s.ByPort("m02"); ok {
		t.Error(in, got)
	}
	want(t, s.SetCable("web", "app", "rope"), ErrInvalid, "veth or tap")
	want(t, s.SetCable("web", "nobody", CableTAP), ErrNotFound, "nobody", "inspect web")
	want(t, s.SetPorts("web", "app", []string{""}), ErrInvalid, "-p")
	want(t, s.SetPorts("lab", "app", nil), ErrNotFound, "lab")
	_, err = s.Leave("web", "nobody")
	want(t, err, ErrNotFound, "nobody")
	holds(t, s)
}

func TestJoinRefused(t *testing.T) {
	for _, tt := range []struct {
		name    string
		network string
		change  func(*Request)
		kind    error
		words   []string
	}{
		{"network", "lab", func(*Request) {}, ErrNotFound, []string{"lab"}},
		{"name taken", "web", func(r *Request) { r.Name = "db" }, ErrConflict, []string{`join "db" to network "web"`, "detach web db"}},
		{"name of the rules", "web", func(r *Request) { r.Name = "DB" }, ErrInvalid, []string{`"db"`}},
		{"name is an alias", "web", func(r *Request) { r.Name = "data" }, ErrConflict, []string{`"data"`, "an alias of member"}},
		{"alias is a name", "web", func(r *Request) { r.Aliases = []string{"db"} }, ErrConflict, []string{"the name of member"}},
		{"alias is a full name", "web", func(r *Request) { r.Aliases = []string{"db.web.usernet.internal"} }, ErrConflict, []string{"the name of member"}},
		{"name is the host's", "lan", func(r *Request) { r.Name = "host" }, ErrConflict, []string{"host.containers.internal", "host's"}},
		{"alias is the host's", "web", func(r *Request) { r.Aliases = []string{"host.containers.internal"} }, ErrConflict, []string{"host's"}},
		{"alias of the rules", "web", func(r *Request) { r.Aliases = []string{"a..b"} }, ErrInvalid, []string{"alias"}},
		{"address taken", "web", func(r *Request) { r.IPv4 = addr("10.89.0.2") }, ErrConflict, []string{`"db"`, "has it"}},
		{"IPv6 taken", "web", func(r *Request) { r.IPv6 = addr("fd00:1::2") }, ErrConflict, []string{`"db"`}},
		{"gateway", "web", func(r *Request) { r.IPv4 = addr("10.89.0.1") }, ErrConflict, []string{"the gateway's"}},
		{"gateway 6", "web", func(r *Request) { r.IPv6 = addr("fd00:1::1") }, ErrConflict, []string{"the gateway's"}},
		{"broadcast", "web", func(r *Request) { r.IPv4 = addr("10.89.0.255") }, ErrConflict, []string{"broadcast"}},
		{"network's own", "web", func(r *Request) { r.IPv4 = addr("10.89.0.0") }, ErrConflict, []string{"network's own"}},
		{"host's", "web", func(r *Request) { r.IPv6 = addr("fd00:1::169.254.1.2") }, ErrConflict, []string{"the host's"}},
		{"elsewhere", "web", func(r *Request) { r.IPv4 = addr("10.89.1.5") }, ErrInvalid, []string{"is not in 10.89.0.0/24"}},
		{"wrong family", "web", func(r *Request) { r.IPv4 = addr("fd00:1::5") }, ErrInvalid, []string{"is not in 10.89.0.0/24"}},
		{"mapped", "web", func(r *Request) { r.IPv4 = addr("::ffff:10.89.0.9") }, ErrInvalid, []string{"is not in"}},
		{"scoped", "web", func(r *Request) { r.IPv6 = addr("fd00:1::9%eth0") }, ErrInvalid, []string{"is not in"}},
		{"no IPv6", "lan", func(r *Request) { r.IPv6 = addr("fd00:1::5") }, ErrInvalid, []string{"has no IPv6"}},
		{"MAC taken", "web", func(r *Request) { r.MAC = mac("02:00:00:00:00:01") }, ErrConflict, []string{`"db"`}},
		{"MAC of the gateway", "web", func(r *Request) { r.MAC = mac("52:55:0a:59:00:01") }, ErrInvalid, []string{"own"}},
		{"multicast MAC", "web", func(r *Request) { r.MAC = mac("03:00:00:00:00:01") }, ErrInvalid, []string{"multicast"}},
		{"interface", "web", func(r *Request) { r.Ifname = "a/b" }, ErrInvalid, []string{"15"}},
		{"twice in a network", "web", func(r *Request) { r.NetNS = request("db").NetNS }, ErrConflict, []string{`"db"`, "already"}},
		{"interface of another network's", "lan", func(r *Request) { r.NetNS, r.Ifname = request("db").NetNS, "eth0" }, ErrConflict, []string{"eth0", `"web"`}},
		{"no namespace", "web", func(r *Request) { r.NetNS = NetNS{} }, ErrInvalid, []string{"namespace"}},
		{"no place", "web", func(r *Request) { r.Process = Process{} }, ErrInvalid, []string{"PID", "path"}},
		{"two places", "web", func(r *Request) { r.Path = "/x" }, ErrInvalid, []string{"either"}},
		{"relative", "web", func(r *Request) { r.Process, r.Path = Process{}, "x" }, ErrInvalid, []string{"absolute"}},
		{"PID", "web", func(r *Request) { r.Process.PID = -1 }, ErrInvalid, []string{"positive"}},
		{"port", "web", func(r *Request) { r.Ports = []string{"80\n81"} }, ErrInvalid, []string{"-p"}},
		{"ports", "web", func(r *Request) { r.Ports = make([]string, maxPorts+1) }, ErrExhausted, []string{"1024"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := New("host.containers.internal")
			create(t, s, Config{Name: "web", Subnet6: prefix("fd00:1::/64")})
			create(t, s, Config{Name: "lan", NoIPv6: true, Domain: "containers.internal"})
			db := request("db")
			db.Aliases, db.MAC = []string{"data"}, mac("02:00:00:00:00:01")
			join(t, s, "web", db)
			before := string(text(t, s.State(boot)))
			r := request("app")
			tt.change(&r)
			_, err := s.Join(tt.network, r)
			want(t, err, tt.kind, tt.words...)
			if after := string(text(t, s.State(boot))); after != before {
				t.Errorf("a refused member changed the Set to %s", after)
			}
			holds(t, s)
		})
	}
}

// A name that comes back has its addresses again.
func TestStickyAddresses(t *testing.T) {
	s := New()
	create(t, s, Config{Name: "web", Subnet6: prefix("fd00:1::/64")})
	for _, name := range []string{"a", "b", "c"} {
		join(t, s, "web", request(name))
	}
	leave(t, s, "web", "b")
	leave(t, s, "web", "a")
	if m := join(t, s, "web", request("d")); m.IPv4 != addr("10.89.0.5") || m.IPv6 != addr("fd00:1::5") || m.Port() != "m1" {
		t.Errorf("%+v: not one that nobody has had", m)
	}
	if m := join(t, s, "web", request("b")); m.IPv4 != addr("10.89.0.3") || m.IPv6 != addr("fd00:1::3") || m.MAC != mac("52:56:0a:59:00:03") {
		t.Errorf("%+v: not its own", m)
	}
	// What somebody asks for is his, and no longer remembered.
	e := request("e")
	e.IPv4 = addr("10.89.0.2")
	join(t, s, "web", e)
	if m := join(t, s, "web", request("a")); m.IPv4 != addr("10.89.0.6") {
		t.Errorf("%+v", m)
	}
	// Another address than before is remembered instead.
	leave(t, s, "web", "a")
	a := request("a")
	a.IPv4 = addr("10.89.0.100")
	join(t, s, "web", a)
	leave(t, s, "web", "a")
	if m := join(t, s, "web", request("a")); m.IPv4 != addr("10.89.0.100") {
		t.Errorf("%+v", m)
	}
	n, err := s.Get("web")
	want(t, err, nil)
	if len(n.Former) != 0 {
		t.Error(n.Former)
	}
	holds(t, s)
}

func TestExhausted(t *testing.T) {
	s := New()
	create(t, s, Config{Name: "web", Subnet: prefix("10.0.0.0/29"), Subnet6: prefix("fd00:1::/64")})
	for i := range 5 {
		join(t, s, "web", request(fmt.Sprint("n-", i)))
	}
	_, err := s.Join("web", request("more"))
	want(t, err, ErrExhausted, "10.0.0.0/29", "detach", "--subnet")
	// Who left first loses its address first.
	for _, name := range []string{"n-3", "n-1", "n-2"} {
		leave(t, s, "web", name)
	}
	if m := join(t, s, "web", request("more")); m.IPv4 != addr("10.0.0.5") {
		t.Errorf("%+v", m)
	}
	if m := join(t, s, "web", request("n-2")); m.IPv4 != addr("10.0.0.4") {
		t.Errorf("%+v", m)
	}
	if m := join(t, s, "web", request("n-3")); m.IPv4 != addr("10.0.0.3") {
		t.Errorf("%+v", m)
	}
	_, err = s.Join("web", request("n-1"))
	want(t, err, ErrExhausted)
	holds(t, s)

	create(t, s, Config{Name: "six", Subnet6: prefix("fd00:2::/126")})
	join(t, s, "six", request("a"))
	join(t, s, "six", request("b"))
	_, err = s.Join("six", request("c"))
	want(t, err, ErrExhausted, "fd00:2::/126", "--ipv6")
	holds(t, s)
}

func TestMemberLimit(t *testing.T) {
	s := New()
	create(t, s, Config{Name: "web", Subnet: prefix("10.0.0.0/16")})
	n := s.networks["web"]
	for i := range maxMembers {
		m, err := s.admit(n, request(fmt.Sprint("n-", i)))
		want(t, err, nil)
		m.Number = i + 1
		n.members, n.table = append(n.members, m), nil
	}
	s.publish()
	holds(t, s)
	_, err := s.Join("web", request("more"))
	want(t, err, ErrExhausted, "1023")
	for i := range maxFormer {
		n.remember(Lease{fmt.Sprint("f-", i), Addresses{}})
	}
	n.remember(Lease{"latest", Addresses{}})
	for i := range maxSeats/maxMembers + 1 {
		o := create(t, s, Config{Name: fmt.Sprint("o-", i), NoIPv6: true})
		s.networks[o.Name].members = n.members[:min(maxMembers, maxSeats-s.seats())]
	}
	_, err = s.Join("o-8", request("more"))
	want(t, err, ErrExhausted, "8192")
	if len(n.former) != maxFormer || n.former[0].Name != "f-1" || n.former[maxFormer-1].Name != "latest" {
		t.Errorf("%d former, %v first", len(n.former), n.former[0])
	}
}

// A container on two networks has an interface for each.
func TestTwoNetworks(t *testing.T) {
	s := New()
	create(t, s, Config{Name: "web"})
	create(t, s, Config{Name: "lab"})
	var ifnames []string
	for _, n := range []string{"web", "lab"} {
		ifnames = append(ifnames, join(t, s, n, request("app")).Ifname)
	}
	if got := strings.Join(ifnames, " "); got != "eth0 eth1" {
		t.Error(got)
	}
	leave(t, s, "web", "app")
	if m := join(t, s, "web", request("app")); m.Ifname != "eth0" || m.Number != 1 {
		t.Errorf("%+v", m)
	}
	holds(t, s)
}

// Whatever is asked of a Set, in whatever order, it keeps what it promises; and what it is can be written down and restored.
func FuzzSet(f *testing.F) {
	f.Add([]byte("\x00\x01\x02\x10\x20\x30\x40\x11\x12\x13\x80\x81\x10"))
	f.Add([]byte{0, 4, 0x10, 0x50, 0x90, 0xd0, 0x14, 0x54, 2, 6, 0x11, 0x12, 0x13, 3, 0x15, 0x23})
	f.Fuzz(func(t *testing.T, ops []byte) {
		s := New("host.containers.internal")
		for i := 0; i+1 < min(len(ops), 200); i += 2 {
			op, arg := ops[i], ops[i+1]
			n := string('a' + rune(op>>2&3))
			r := request(string('a' + rune(arg&15)))
			switch op & 3 {
			case 0:
				cfg := Config{Name: n, NoIPv6: arg&1 != 0, Internal: arg&2 != 0}
				if arg&4 != 0 {
					cfg.Subnet = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 89, arg >> 6, 0}), 22+int(arg>>3&7)).Masked()
				}
				s.Create(cfg, nil)
			case 1:
				s.Leave(n, r.Name)
			case 2:
				s.Remove(n)
			case 3:
				if arg&16 != 0 {
					r.IPv4 = netip.AddrFrom4([4]byte{10, 89, arg >> 7, op >> 4})
				}
				if arg&32 != 0 {
					r.Aliases = []string{string('a' + rune(op>>4)), "x"}
				}
				if arg&64 != 0 {
					r.NetNS = NetNS{4, uint64(op >> 6)}
				}
				s.Join(n, r)
			}
			holds(t, s)
		}
		st := s.State(boot)
		data := text(t, st)
		back, err := ParseState(data, boot)
		want(t, err, nil)
		again, err := Restore(back, "host.containers.internal")
		want(t, err, nil)
		holds(t, again)
		if got := text(t, again.State(boot)); string(got) != string(data) {
			t.Fatalf("restored as %s, was %s", got, data)
		}
	})
}

// Joining a network that is nearly full; its names, too, are made anew.
func BenchmarkJoin(b *testing.B) {
	s := New()
	create(b, s, Config{Name: "web", Subnet: prefix("10.0.0.0/16")})
	for i := range maxMembers - 1 {
		join(b, s, "web", request(fmt.Sprint("n-", i)))
	}
	for b.Loop() {
		join(b, s, "web", request("more"))
		leave(b, s, "web", "more")
	}
}
