package network

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
)

const (
	// maxNetworks is what pool4 has room for. Each is a bridge, a TAP and a stack.
	maxNetworks = 256

	// maxMembers of one network: a bridge of Linux has 1024 ports (BR_MAX_PORTS), one of them is the uplink's.
	maxMembers = 1023

	// maxSeats is how many members all networks have together: each is an interface of the one shared namespace, a record and a few
	// names, and all records are written and all names sorted anew whenever one of them changes.
	maxSeats = 8192

	maxAliases = 64   // of a member; each is two names of the resolver's
	maxPorts   = 1024 // recorded texts of a member; each may be a range
	maxText    = 4096 // octets of one, and of a path (PATH_MAX)

	// DefaultMTU is the private mode's: a super-segment passes whole anyway, and a larger MTU spares the
	// programs that send datagrams some fragments.
	DefaultMTU = 65520

	maxMTU  = 65520 // a frame of a TAP has at most 65535 octets
	minMTU  = 576   // what every IPv4 host takes: RFC 1122 §3.3.2
	minMTU6 = 1280  // RFC 8200 §5
)

// Host4 is where a container meets the host at its own addresses, as in the private mode. In IPv6 it is Network.Host6.
var Host4 = netip.AddrFrom4([4]byte{169, 254, 1, 2})

// Config is what a user says of a new network.
type Config struct {
	Name     string       `json:"name"`
	Subnet   netip.Prefix `json:"subnet,omitzero"`  // IPv4; zero: a free /24 of 10.89.0.0/16
	Subnet6  netip.Prefix `json:"subnet6,omitzero"` // zero: a derived /64 of fd00::/8
	NoIPv6   bool         `json:"no_ipv6,omitempty"`
	Internal bool         `json:"internal,omitempty"` // no way out
	MTU      int          `json:"mtu,omitempty"`      // of IP packets, octets; 0: DefaultMTU
	Domain   string       `json:"domain,omitempty"`   // empty: NAME.usernet.internal
	Persist  bool         `json:"persist,omitempty"`  // it is served also while nobody is a member
}

// A Network as inspect shows it and state.json has it: a copy, whose changes change nothing.
type Network struct {
	Number   int          `json:"number"`
	Name     string       `json:"name"`
	Subnet   netip.Prefix `json:"subnet"`
	Gateway  netip.Addr   `json:"gateway"`
	Subnet6  netip.Prefix `json:"subnet6,omitzero"` // zero, as those below: no IPv6
	Gateway6 netip.Addr   `json:"gateway6,omitzero"`
	Host6    netip.Addr   `json:"host6,omitzero"` // zero, too, where the subnet is longer than /96
	Internal bool         `json:"internal"`
	MTU      int          `json:"mtu"`
	Domain   string       `json:"domain"`
	Persist  bool         `json:"persist,omitempty"`

	Members []Member `json:"members"` // in the order of joining
	Former  []Lease  `json:"former,omitempty"`
}

// Bridge and Uplink are interfaces of the shared namespace. They have numbers, as 15 octets are too few for names of users' choice.
func (n *Network) Bridge() string { return "b" + strconv.Itoa(n.Number) }

// Uplink is the TAP at which usernet is.
func (n *Network) Uplink() string { return "u" + strconv.Itoa(n.Number) }

// GatewayMAC is the stack's.
func (n *Network) GatewayMAC() MAC { return macOf(gatewayOUI, n.Gateway) }

// BridgeMAC is another than the stack's: a bridge keeps frames that are for its own.
func (n *Network) BridgeMAC() MAC { return macOf(bridgeOUI, n.Gateway) }

// A Set is all networks of one user, and who is a member of them. Its methods may be called concurrently.
type Set struct {
	hosts []string

	mu       sync.Mutex
	networks map[string]*network

	book atomic.Pointer[book] // for Names, which must not wait
}

// A network is one of a Set. Its Members is nil, as members has them.
type network struct {
	Network
	members []*Member
	former  []Lease // the longest gone first
	table   *table  // for the book; nil: the members are others than when it was made
}

// New makes a Set without networks. hosts are the names under which containers meet the host, in every network with a way out.
func New(hosts ...string) *Set {
	s := &Set{hosts: slices.Clone(hosts), networks: make(map[string]*network)}
	s.publish()
	return s
}

// Create makes a network. host are the host's routes and addresses, an address as a prefix of full length: they are
// in the way of a subnet.
func (s *Set) Create(cfg Config, host []netip.Prefix) (Network, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.plan(cfg, host)
	if err != nil {
		return Network{}, err
	}
	n.Number = lowest(func(yield func(int) bool) {
		for _, o := range s.networks {
			if !yield(o.Number) {
				return
			}
		}
	})
	s.networks[n.Name] = n
	s.publish()
	return n.snapshot(), nil
}

// plan makes a network that the Set does not have yet.
func (s *Set) plan(cfg Config, host []netip.Prefix) (*network, error) {
	if err := checkName("network", cfg.Name); err != nil {
		return nil, err
	}
	if s.networks[cfg.Name] != nil {
		return nil, conflictf("network %q: is there already: choose another name, or remove it with usernet network rm %s", cfg.Name, cfg.Name)
	}
	if len(s.networks) >= maxNetworks {
		return nil, exhaustedf("network %q: there are %d already, and no more are possible: remove one", cfg.Name, maxNetworks)
	}
	n := &network{Network: Network{
		Name: cfg.Name, Internal: cfg.Internal, Persist: cfg.Persist,
		MTU:    cmp.Or(cfg.MTU, DefaultMTU),
		Domain: cmp.Or(cfg.Domain, cfg.Name+"."+Zone),
	}}
	if err := checkDomain(n.Name, n.Domain); err != nil {
		return nil, fmt.Errorf("network %q: %w", n.Name, err)
	}
	if err := s.planSubnets(n, cfg, host); err != nil {
		return nil, err
	}
	least, with := minMTU, ""
	if n.Subnet6.IsValid() {
		least, with = minMTU6, " (without IPv6: 576)"
	}
	if n.MTU < least || n.MTU > maxMTU {
		return nil, invalidf("network %q: MTU %d: must be %d%s to %d", n.Name, n.MTU, least, with, maxMTU)
	}
	return n, nil
}

func (s *Set) planSubnets(n *network, cfg Config, host []netip.Prefix) (err error) {
	n.Subnet = cfg.Subnet
	if n.Subnet == (netip.Prefix{}) {
		if n.Subnet, err = s.free4(host); err != nil {
			return err
		}
	} else if err := s.checkSubnet(ipv4, n, n.Subnet, host); err != nil {
		return err
	}
	n.Gateway = offset(n.Subnet, 1)
	if cfg.NoIPv6 {
		if cfg.Subnet6 != (netip.Prefix{}) {
			return invalidf("network %q: an IPv6 subnet %s, and IPv6 off: choose one of them", n.Name, cfg.Subnet6)
		}
		return nil
	}
	n.Subnet6 = cfg.Subnet6
	if n.Subnet6 == (netip.Prefix{}) {
		if n.Subnet6, err = s.derive6(n.Name, n.Subnet, host); err != nil {
			return err
		}
	} else if err := s.checkSubnet(ipv6, n, n.Subnet6, host); err != nil {
		return err
	}
	n.Gateway6 = offset(n.Subnet6, 1)
	if n.Subnet6.Bits() <= 96 {
		low := Host4.As4()
		n.Host6 = offset(n.Subnet6, uint32(low[0])<<24|uint32(low[1])<<16|uint32(low[2])<<8|uint32(low[3]))
	}
	return nil
}

// checkSubnet looks at one that the user has chosen.
func (s *Set) checkSubnet(f family, n *network, p netip.Prefix, host []netip.Prefix) error {
	if err := f.check(p); err != nil {
		return fmt.Errorf("network %q: %w", n.Name, err)
	}
	if o := s.overlapping(p); o != nil {
		other := o.Subnet
		if !other.Overlaps(p) {
			other = o.Subnet6
		}
		return conflictf("network %q: subnet %s overlaps %s of network %q: choose another with %s, or none to get a free one", n.Name, p, other, o.Name, f.flag)
	}
	if by, met := meets(p, host, p.Bits()); met {
		return conflictf("network %q: subnet %s overlaps %s, which is this host's own address or route: choose another with %s, or none to get a free one", n.Name, p, by, f.flag)
	}
	return nil
}

// Remove removes a network that has no members any more. Their addresses are forgotten.
func (s *Set) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.find(name)
	if err != nil {
		return err
	}
	if len(n.members) > 0 {
		return conflictf("network %q: has %d members, %q first: detach them before", name, len(n.members), n.members[0].Name)
	}
	delete(s.networks, name)
	s.publish()
	return nil
}

// Get returns one network.
func (s *Set) Get(name string) (Network, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.find(name)
	if err != nil {
		return Network{}, err
	}
	return n.snapshot(), nil
}

// List returns all networks by name.
func (s *Set) List() []Network {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Network, 0, len(s.networks))
	for _, n := range s.sorted() {
		list = append(list, n.snapshot())
	}
	return list
}

func (s *Set) sorted() []*network {
	list := make([]*network, 0, len(s.networks))
	for _, n := range s.networks {
		list = append(list, n)
	}
	slices.SortFunc(list, func(a, b *network) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

func (s *Set) find(name string) (*network, error) {
	if n := s.networks[name]; n != nil {
		return n, nil
	}
	return nil, explain(ErrNotFound, "network %q: there is none of that name: see usernet network ls, or make it with usernet network create", name)
}

func (n *network) snapshot() Network {
	c := n.Network
	c.Members = make([]Member, 0, len(n.members))
	for _, m := range n.members {
		c.Members = append(c.Members, m.clone())
	}
	c.Former = slices.Clone(n.former)
	return c
}

// lowest is the smallest number, from 1, that is not among those in use.
func lowest(used func(yield func(int) bool)) int {
	taken := make(map[int]bool)
	for n := range used {
		taken[n] = true
	}
	n := 1
	for taken[n] {
		n++
	}
	return n
}
