package network

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// stateVersion changes when an older usernet would misread what a newer one writes.
const stateVersion = 1

// maxNumber has room in the name of an interface, and is far beyond what lowest gives.
const maxNumber = 1 << 20

// A State is what state.json has: all that a new daemon needs to know of networks and members. Whether the members live is not in
// it: see NetNS and Process.
type State struct {
	Version  int       `json:"version"`
	Boot     string    `json:"boot"` // of what BootID was when it was written
	Networks []Network `json:"networks"`
}

// State returns the Set as it is, for the boot that is on.
func (s *Set) State(boot string) State {
	return State{Version: stateVersion, Boot: boot, Networks: s.List()}
}

// ParseState reads what was written in this boot. What is of another is an ErrOtherBoot, whatever else is in it:
// inode numbers and PIDs mean others then, and none of the members lives.
func ParseState(data []byte, boot string) (State, error) {
	var head struct {
		Version int    `json:"version"`
		Boot    string `json:"boot"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return State{}, explain(ErrInvalid, "it is damaged: %v", jsonError(err, len(data)))
	}
	switch {
	case head.Version > stateVersion:
		return State{}, explain(ErrInvalid, "it has version %d, and this usernet reads %d: use the newer usernet that wrote it", head.Version, stateVersion)
	case head.Version != stateVersion:
		return State{}, explain(ErrInvalid, "it has version %d, which no usernet has written", head.Version)
	case head.Boot != boot:
		return State{}, explain(ErrOtherBoot, "it is of another boot (%.40q; now it is %s), and nothing that it names lives any more", head.Boot, boot)
	}
	var st State
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&st); err != nil {
		return State{}, explain(ErrInvalid, "it is damaged: %v", jsonError(err, len(data)))
	}
	return st, nil
}

// jsonError has an end of the data say how much there is.
func jsonError(err error, octets int) error {
	var syntax *json.SyntaxError
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &syntax) && syntax.Offset >= int64(octets) {
		return fmt.Errorf("it ends after %d octets, in the middle", octets)
	}
	return err
}

// Restore makes the Set that a State was taken of. A State that no Set can have been in is an error that says where it
// is wrong; the host's routes are not looked at, as the networks were there first.
func Restore(st State, hosts ...string) (*Set, error) {
	s := New(hosts...)
	numbers := make(map[int]bool)
	for i := range st.Networks {
		r := &st.Networks[i]
		if err := s.restore(r); err != nil {
			return nil, err
		}
		if numbers[r.Number] {
			return nil, conflictf("network %q: another one has its number %d", r.Name, r.Number)
		}
		numbers[r.Number] = true
	}
	numbers = make(map[int]bool)
	for n := range s.ports {
		if numbers[n] {
			return nil, conflictf("two members have the number %d", n)
		}
		numbers[n] = true
	}
	s.publish()
	return s, nil
}

// restore adds a network with its members, by the checks of Create and Join.
func (s *Set) restore(r *Network) error {
	n, err := s.plan(Config{
		Name: r.Name, Subnet: r.Subnet, Subnet6: r.Subnet6, NoIPv6: !r.Subnet6.IsValid(),
		Internal: r.Internal, MTU: r.MTU, Domain: r.Domain, Persist: r.Persist,
	}, nil)
	if err != nil {
		return err
	}
	n.Number = r.Number
	s.networks[n.Name] = n
	if err := s.restoreMembers(n, r); err != nil {
		return fmt.Errorf("network %q: %w", n.Name, err)
	}
	return nil
}

func (s *Set) restoreMembers(n *network, r *Network) error {
	if err := checkNumber(r.Number); err != nil {
		return err
	}
	for i := range r.Members {
		if err := s.restoreMember(n, &r.Members[i]); err != nil {
			return fmt.Errorf("member %.100q: %w", r.Members[i].Name, err)
		}
	}
	if len(r.Former) > maxFormer {
		return invalidf("%d former members, and at most %d are remembered", len(r.Former), maxFormer)
	}
	for _, l := range r.Former {
		if err := n.checkLease(l); err != nil {
			return err
		}
		n.former = append(n.former, l)
	}
	return same(n.snapshot(), r)
}

func (s *Set) restoreMember(n *network, r *Member) error {
	if !r.IPv4.IsValid() {
		return invalidf("it has no IPv4 address")
	}
	if r.MAC == (MAC{}) || r.Ifname == "" {
		return invalidf("it has no MAC or no interface")
	}
	m, err := s.admit(n, Request{
		Name: r.Name, Aliases: r.Aliases, IPv4: r.IPv4, IPv6: r.IPv6, MAC: r.MAC, Ifname: r.Ifname,
		NetNS: r.NetNS, Process: r.Process, Path: r.Path, Ports: r.Ports,
	})
	if err != nil {
		return err
	}
	if err := r.Cable.check(); err != nil {
		return err
	}
	m.Number, m.Cable = r.Number, r.Cable
	if err := checkNumber(r.Number); err != nil {
		return err
	}
	n.members = append(n.members, m)
	return nil
}

func checkNumber(n int) error {
	if n < 1 || n > maxNumber {
		return invalidf("number %d: must be 1 to %d", n, maxNumber)
	}
	return nil
}

// same compares what follows from a record with what it says.
func same(is Network, record *Network) error {
	a, err := json.Marshal(is)
	if err != nil {
		return err
	}
	said := *record
	if said.Members == nil {
		said.Members = []Member{}
	}
	b, err := json.Marshal(said)
	if err != nil {
		return err
	}
	if !bytes.Equal(a, b) {
		return invalidf("what it says does not follow from its subnet and its members: %.400s is expected", a)
	}
	return nil
}
