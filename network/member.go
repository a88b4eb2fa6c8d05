package network

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A Cable is what joins a member to the bridge.
type Cable string

// The cables. Empty: there is none yet.
const (
	CableVeth Cable = "veth" // one pair of interfaces, and the kernel does the rest
	CableTAP  Cable = "tap"  // two TAPs, and usernet carries the frames
)

// A Request is what is said of a new member.
type Request struct {
	Name    string     `json:"name"`
	Aliases []string   `json:"aliases,omitempty"`
	IPv4    netip.Addr `json:"ipv4,omitzero"`    // zero: from the pool
	IPv6    netip.Addr `json:"ipv6,omitzero"`    // zero: from the pool
	MAC     MAC        `json:"mac,omitzero"`     // zero: derived from the IPv4 address
	Ifname  string     `json:"ifname,omitempty"` // empty: eth0, or the next that the container does not have by us
	NetNS   NetNS      `json:"netns"`            // which namespace it is
	Process Process    `json:"process,omitzero"` // where it is found: at /proc/PID/ns/net,
	Path    string     `json:"path,omitempty"`   // or at this path; one of the two
	Ports   []string   `json:"ports,omitempty"`  // published ones, in the words of -p
}

// A Member as inspect shows it and state.json has it: a copy, as a Network is.
type Member struct {
	Number  int      `json:"number"` // of its port of the bridge; no other member of any network has it
	Name    string   `json:"name"`
	Aliases []string `json:"aliases,omitempty"`
	Addresses
	MAC     MAC      `json:"mac"`
	Ifname  string   `json:"ifname"`
	Cable   Cable    `json:"cable,omitempty"`
	NetNS   NetNS    `json:"netns"`
	Process Process  `json:"process,omitzero"`
	Path    string   `json:"path,omitempty"`
	Ports   []string `json:"ports,omitempty"`
}

// Port is the name of the member's interface at the bridge.
func (m *Member) Port() string { return "m" + strconv.Itoa(m.Number) }

func (m *Member) clone() Member {
	c := *m
	c.Aliases, c.Ports = slices.Clone(m.Aliases), slices.Clone(m.Ports)
	return c
}

// Join makes a member. Its names are answered from now on.
func (s *Set) Join(name string, r Request) (Member, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.find(name)
	if err != nil {
		return Member{}, err
	}
	m, err := s.admit(n, r)
	if err != nil {
		return Member{}, fmt.Errorf("join %q to network %q: %w", r.Name, name, err)
	}
	m.Number = lowest(s.ports)
	n.forget(m.Name, m.Addresses)
	n.members, n.table = append(n.members, m), nil
	s.publish()
	return m.clone(), nil
}

// seats counts the members of all networks.
func (s *Set) seats() (all int) {
	for _, n := range s.networks {
		all += len(n.members)
	}
	return all
}

// ports goes through the numbers of all members.
func (s *Set) ports(yield func(int) bool) {
	for _, n := range s.networks {
		for _, m := range n.members {
			if !yield(m.Number) {
				return
			}
		}
	}
}

// admit makes a member of a request that n can take, and changes nothing.
func (s *Set) admit(n *network, r Request) (*Member, error) {
	if len(n.members) >= maxMembers {
		return nil, exhaustedf("it has %d members, and a bridge no more ports: make another network", maxMembers)
	}
	if all := s.seats(); all >= maxSeats {
		return nil, exhaustedf("all networks have %d members together, and no more are possible: detach one", all)
	}
	m := &Member{Name: r.Name, NetNS: r.NetNS, Process: r.Process, Path: r.Path}
	if err := checkName("name", r.Name); err != nil {
		return nil, err
	}
	if err := m.checkWhere(); err != nil {
		return nil, err
	}
	var err error
	if m.Aliases, err = checkAliases(r.Name, r.Aliases); err != nil {
		return nil, err
	}
	if m.Ports, err = checkPorts(r.Ports); err != nil {
		return nil, err
	}
	if err := s.checkNames(n, m); err != nil {
		return nil, err
	}
	if m.Ifname, err = s.chooseIfname(n, m, r.Ifname); err != nil {
		return nil, err
	}
	if m.IPv4, err = n.choose(ipv4, r.Name, r.IPv4); err != nil {
		return nil, err
	}
	if m.IPv6, err = n.choose(ipv6, r.Name, r.IPv6); err != nil {
		return nil, err
	}
	m.MAC = r.MAC
	if m.MAC == (MAC{}) {
		m.MAC = macOf(memberOUI, m.IPv4)
	}
	return m, n.checkMAC(m)
}

// checkWhere looks at how the namespace is found again.
func (m *Member) checkWhere() error {
	if m.NetNS == (NetNS{}) {
		return invalidf("no network namespace is given")
	}
	switch byPath := m.Path != ""; {
	case byPath == (m.Process != Process{}):
		return invalidf("give either the PID of a process or the path of a namespace")
	case byPath && (!strings.HasPrefix(m.Path, "/") || len(m.Path) > maxText || strings.ContainsRune(m.Path, 0)):
		return invalidf("path %q: must be absolute and at most %d octets long", m.Path, maxText)
	case !byPath && m.Process.PID <= 0:
		return invalidf("PID %d: must be positive", m.Process.PID)
	}
	return nil
}

// checkAliases returns them without the name itself and without those that are there twice.
func checkAliases(name string, aliases []string) ([]string, error) {
	var list []string
	for _, a := range aliases {
		if err := checkDotted("alias", a, maxName); err != nil {
			return nil, err
		}
		if a != name && !slices.Contains(list, a) {
			list = append(list, a)
		}
	}
	if len(list) > maxAliases {
		return nil, exhaustedf("%d aliases: at most %d are possible", len(list), maxAliases)
	}
	return list, nil
}

// checkPorts looks at texts whose meaning is others'.
func checkPorts(ports []string) ([]string, error) {
	if len(ports) > maxPorts {
		return nil, exhaustedf("%d ports: at most %d are possible; a range counts as one", len(ports), maxPorts)
	}
	for _, p := range ports {
		if p == "" || len(p) > maxText || !utf8.ValidString(p) || strings.ContainsFunc(p, unicode.IsControl) {
			return nil, invalidf("port %q: write it as -p has it", p)
		}
	}
	return slices.Clone(ports), nil
}

// chooseIfname finds the name of the interface in the container. What the container has besides is not known here.
func (s *Set) chooseIfname(n *network, m *Member, want string) (string, error) {
	used := make(map[string]string) // of this container, on which network
	for _, o := range s.networks {
		for _, other := range o.members {
			if other.NetNS != m.NetNS {
				continue
			}
			if o == n {
				return "", conflictf("its network namespace is a member already, as %q: detach that before, or give %q an alias", other.Name, other.Name)
			}
			used[other.Ifname] = o.Name
		}
	}
	if want == "" {
		for i := 0; ; i++ {
			if name := "eth" + strconv.Itoa(i); used[name] == "" {
				return name, nil
			}
		}
	}
	if err := checkIfname(want); err != nil {
		return "", err
	}
	if by := used[want]; by != "" {
		return "", conflictf("interface %q: joins the container to network %q: choose another, or none to get a free one", want, by)
	}
	return want, nil
}

func (n *network) checkMAC(m *Member) error {
	if err := m.MAC.check(m.IPv4); err != nil {
		return err
	}
	for _, o := range n.members {
		if o.MAC == m.MAC {
			return conflictf("MAC %s: member %q has it: choose another, or none to have one derived", m.MAC, o.Name)
		}
	}
	return nil
}

// Leave ends a membership and returns what it was. Its names are gone at once; its number goes to the next who joins, so the
// port has to be removed before.
func (s *Set) Leave(in, member string) (Member, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, m, err := s.findMember(in, member)
	if err != nil {
		return Member{}, err
	}
	n.members, n.table = slices.DeleteFunc(n.members, func(o *Member) bool { return o == m }), nil
	n.remember(Lease{m.Name, m.Addresses})
	s.publish()
	return m.clone(), nil
}

// Member returns one member.
func (s *Set) Member(in, member string) (Member, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, m, err := s.findMember(in, member)
	if err != nil {
		return Member{}, err
	}
	return m.clone(), nil
}

// ByMAC returns the member that has a MAC, for who answers its DHCP requests.
func (s *Set) ByMAC(in string, mac MAC) (Member, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.networks[in]; n != nil {
		for _, m := range n.members {
			if m.MAC == mac {
				return m.clone(), true
			}
		}
	}
	return Member{}, false
}

// ByPort returns the member whose interface at the bridge has a name, and its network, for who hears that the interface is gone.
func (s *Set) ByPort(port string) (network string, m Member, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.networks {
		for _, m := range n.members {
			if m.Port() == port {
				return n.Name, m.clone(), true
			}
		}
	}
	return "", Member{}, false
}

// SetCable records by which cable a member has been joined.
func (s *Set) SetCable(in, member string, c Cable) error {
	if err := c.check(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, m, err := s.findMember(in, member)
	if err == nil {
		m.Cable = c
	}
	return err
}

func (c Cable) check() error {
	switch c {
	case "", CableVeth, CableTAP:
		return nil
	}
	return invalidf("cable %q: is %s or %s", string(c), CableVeth, CableTAP)
}

// SetPorts records which ports a member has published now, in the words of -p.
func (s *Set) SetPorts(in, member string, ports []string) error {
	ports, err := checkPorts(ports)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, m, err := s.findMember(in, member)
	if err == nil {
		m.Ports = ports
	}
	return err
}

func (s *Set) findMember(in, member string) (*network, *Member, error) {
	n, err := s.find(in)
	if err != nil {
		return nil, nil, err
	}
	if m := n.member(member); m != nil {
		return n, m, nil
	}
	return nil, nil, explain(ErrNotFound, "network %q: has no member %q: see usernet network inspect %s", in, member, in)
}

func (n *network) member(name string) *Member {
	for _, m := range n.members {
		if m.Name == name {
			return m
		}
	}
	return nil
}
