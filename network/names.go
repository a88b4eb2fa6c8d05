package network

import (
	"net/netip"
	"strings"
)

// A book is what all resolvers answer, made anew at each change and then left as it is: they read it without waiting for anybody.
// For a network with as many members as possible that takes some four milliseconds, and who joins waits for the kernel longer.
type book map[string]*page

// A page is one network's.
type page struct {
	own   *View
	views map[netip.Addr]*View // of members of several networks, by the address from which they ask here
}

// A table is what the members of one network are called.
type table struct {
	addrs   map[string][]netip.Addr
	names   map[netip.Addr]string
	subnets []netip.Prefix
}

// A View is the names that one client sees, and what stack/dns calls Names. Names that two of its networks have mean the
// one that was asked, so that a name in a network means the same to all its members.
type View struct {
	tables  []*table
	subnets []netip.Prefix
}

var zones = []string{Zone}

// Addrs returns the addresses of a name in lower case, and whether it is a member's.
func (v *View) Addrs(name string) ([]netip.Addr, bool) {
	for _, t := range v.tables {
		if addrs, ok := t.addrs[name]; ok {
			return addrs, true
		}
	}
	return nil, false
}

// Name returns the full name of who has an address.
func (v *View) Name(addr netip.Addr) (string, bool) {
	for _, t := range v.tables {
		if name, ok := t.names[addr]; ok {
			return name, true
		}
	}
	return "", false
}

// Zones returns where there is nothing but what Addrs and Name know. The networks' own domains are among it, those
// of the user's choice are not: they may have names elsewhere as well.
func (v *View) Zones() (domains []string, subnets []netip.Prefix) { return zones, v.subnets }

// Names are those of one network as they are at each moment; none if the network is gone.
type Names struct {
	set     *Set
	network string
}

// Names returns those of a network.
func (s *Set) Names(network string) Names { return Names{s, network} }

// For returns what a client sees that asks this network from that address: its network's names, and after
// them those of the other networks that it is on. Zero: the network's alone.
func (n Names) For(client netip.Addr) *View {
	p := (*n.set.book.Load())[n.network]
	if p == nil {
		return &View{}
	}
	if v := p.views[client]; v != nil {
		return v
	}
	return p.own
}

// publish has the resolvers see what has changed.
func (s *Set) publish() {
	b := make(book, len(s.networks))
	type seat struct {
		n *network
		m *Member
	}
	seats := make(map[NetNS][]seat)
	sorted := s.sorted()
	for _, n := range sorted {
		if n.table == nil {
			n.table = s.table(n)
		}
		b[n.Name] = &page{own: &View{[]*table{n.table}, n.table.subnets}}
		for _, m := range n.members {
			seats[m.NetNS] = append(seats[m.NetNS], seat{n, m})
		}
	}
	for _, of := range seats {
		if len(of) < 2 {
			continue
		}
		for i, asked := range of {
			v := &View{}
			for j := range of {
				// The network that was asked, then the others by name.
				k := j
				if j == 0 {
					k = i
				} else if j <= i {
					k = j - 1
				}
				own := b[of[k].n.Name].own
				v.tables = append(v.tables, own.tables...)
				v.subnets = append(v.subnets, own.subnets...)
			}
			p := b[asked.n.Name]
			if p.views == nil {
				p.views = make(map[netip.Addr]*View)
			}
			p.views[asked.m.IPv4] = v
			if asked.m.IPv6.IsValid() {
				p.views[asked.m.IPv6] = v
			}
		}
	}
	s.book.Store(&b)
}

func (s *Set) table(n *network) *table {
	t := &table{addrs: make(map[string][]netip.Addr), names: make(map[netip.Addr]string), subnets: []netip.Prefix{n.Subnet}}
	if n.Subnet6.IsValid() {
		t.subnets = append(t.subnets, n.Subnet6)
	}
	for d, more := n.Domain, true; more && within(d, Zone); _, d, more = strings.Cut(d, ".") {
		t.addrs[d] = nil // it exists (RFC 8020), and has no address
	}
	for _, h := range s.hostNames(n) {
		t.addrs[h] = valid(Host4, n.Host6)
		t.names[Host4] = s.hosts[0]
		t.names[n.Host6] = s.hosts[0] // nobody asks for the zero Addr
	}
	for _, m := range n.members {
		addrs := valid(m.IPv4, m.IPv6)
		for key := range n.keys(m) {
			if had := t.addrs[key]; len(had) == 0 || had[len(had)-1] != addrs[len(addrs)-1] { // an alias may be another with the domain
				t.addrs[key] = append(had, addrs...)
			}
			// a.b.web.usernet.internal has b.web.usernet.internal exist.
			for _, up, _ := strings.Cut(key, "."); within(up, n.Domain) && within(up, Zone); _, up, _ = strings.Cut(up, ".") {
				if _, ok := t.addrs[up]; !ok {
					t.addrs[up] = nil
				}
			}
		}
		for _, a := range addrs {
			t.names[a] = m.Name + "." + n.Domain
		}
	}
	return t
}

// hostNames are those that the network's members have for the host. An internal one leads nowhere.
func (s *Set) hostNames(n *network) []string {
	if n.Internal {
		return nil
	}
	return s.hosts
}

// keys are all names under which a member is found, and whether each is its own alone.
func (n *network) keys(m *Member) func(yield func(key string, own bool) bool) {
	return func(yield func(string, bool) bool) {
		if !yield(m.Name, true) || !yield(m.Name+"."+n.Domain, true) {
			return
		}
		for _, a := range m.Aliases {
			if !yield(a, false) {
				return
			}
			if full := a + "." + n.Domain; len(full) <= maxName && !yield(full, false) {
				return
			}
		}
	}
}

// checkNames refuses a member whose name another one has already, in whatever form. Members may share an alias, and are found
// by it together.
func (s *Set) checkNames(n *network, m *Member) error {
	mine := make(map[string]bool)
	for key, own := range n.keys(m) {
		mine[key] = mine[key] || own
	}
	for _, h := range s.hostNames(n) {
		if _, ok := mine[h]; ok {
			return conflictf("name %q: is the host's in every network: choose another", h)
		}
	}
	if o := n.member(m.Name); o != nil {
		return conflictf("name %q: a member has it: choose another, or detach that with usernet detach %s %s", m.Name, n.Name, m.Name)
	}
	for _, o := range n.members {
		for key, own := range n.keys(o) {
			if my, ok := mine[key]; ok && (my || own) {
				what := "an alias"
				if own {
					what = "the name"
				}
				return conflictf("name %q: is %s of member %q: choose another", key, what, o.Name)
			}
		}
	}
	return nil
}

func valid(addrs ...netip.Addr) []netip.Addr {
	var v []netip.Addr
	for _, a := range addrs {
		if a.IsValid() {
			v = append(v, a)
		}
	}
	return v
}
