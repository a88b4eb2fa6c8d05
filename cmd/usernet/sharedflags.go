package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"usernet/api"
	"usernet/network"
	"usernet/portdriver"
)

// An order is what an entry of the shared mode asks of the daemon.
type order struct {
	verb    string // "network create", "network ls", "network inspect", "network rm", "attach", "detach", "netns exec"
	names   []string
	config  network.Config    // network create
	request api.AttachRequest // attach
	argv    []string          // netns exec
	json    bool
}

// network is the one that the order is about.
func (o *order) network() string { return o.names[0] }

// A membership is what run and attach say of who joins.
type membership struct {
	name, mac, ifname     string
	aliases, ips, publish []string
}

// add defines the flags of a membership.
func (m *membership) add(set *pflag.FlagSet) {
	set.StringVar(&m.name, "name", "", "`NAME` under which the other members find it")
	set.StringArrayVar(&m.aliases, "alias", nil, "a further `NAME`, which several members may share; may be repeated")
	set.StringArrayVar(&m.ips, "ip", nil, "`ADDR` of the network's IPv4 or IPv6 subnet, once for each (default: the one that the name had before, else a free one)")
	set.StringVar(&m.ifname, "ifname", "", "`NAME` of the interface inside (default: eth0, or eth1 of a container's second network, and so on)")
}

// request checks what argv can tell.
func (m *membership) request() (r api.AttachRequest, err error) {
	if m.name == "" {
		return r, errors.New("which name is it to have? give it with --name")
	}
	r = api.AttachRequest{Name: m.name, Aliases: m.aliases, Ifname: m.ifname}
	for _, s := range m.ips {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" || a.Is4In6() {
			return r, fmt.Errorf("--ip %s: is no IPv4 or IPv6 address", s)
		}
		to := &r.IPv4
		if a.Is6() {
			to = &r.IPv6
		}
		if to.IsValid() {
			return r, fmt.Errorf("--ip %s and %s: a member has one address of each family", *to, a)
		}
		*to = a
	}
	if m.mac != "" {
		if r.MAC, err = network.ParseMAC(m.mac); err != nil {
			return r, fmt.Errorf("--mac: %w", err)
		}
	}
	for _, s := range m.publish {
		if _, auto, err := portdriver.ParseAuto(s); err != nil {
			return r, fmt.Errorf("--publish: %w", err)
		} else if !auto {
			if _, err := portdriver.ParseSpec(s); err != nil {
				return r, fmt.Errorf("--publish: %w", err)
			}
		}
	}
	r.Publish, err = whereTyped(m.publish)
	return r, err
}

// newOrderFlags defines those of one verb, beside --help.
func newOrderFlags(verb string, o *order, m *membership, where *string) *pflag.FlagSet {
	set := pflag.NewFlagSet("usernet", pflag.ContinueOnError)
	set.SortFlags = false
	set.Usage = func() {}
	switch verb {
	case "network create":
		set.String("subnet", "", "IPv4 `PREFIX`, /8 to /30 (default: a free /24 of 10.89.0.0/16)")
		set.String("ipv6", "", "IPv6 `PREFIX`, /16 to /126 (default: a /64 of fd00::/8 that follows from the name)")
		set.BoolVar(&o.config.NoIPv6, "no-ipv6", false, "IPv4 only")
		set.BoolVar(&o.config.Internal, "internal", false, "no way out of the network, nor into it: its members reach each other alone")
		set.IntVar(&o.config.MTU, "mtu", network.DefaultMTU, "largest IP packet in `OCTETS`")
		set.StringVar(&o.config.Domain, "dns-domain", "", "`DOMAIN` of the members' full names (default: NAME."+network.Zone+")")
		set.BoolVar(&o.config.Persist, "persist", false, "serve it also while nobody is a member")
	case "attach":
		m.add(set)
		set.StringVar(where, "netns-path", "", "network namespace by its `PATH`, instead of a PID")
		set.StringVar(&m.mac, "mac", "", "`MAC` address of the interface inside (default: follows from the IPv4 address)")
		set.StringArrayVarP(&m.publish, "publish", "p", nil, "publish a port on the host by a `SPEC`, as of run; may be repeated")
	case "netns exec":
		set.SetInterspersed(false)
	}
	switch verb {
	case "network create", "network ls", "attach":
		set.BoolVar(&o.json, "json", false, "the answer as JSON")
	}
	return set
}

// orderVerbs are the second words of those commands that have one.
var orderVerbs = map[string][]string{
	"network": {"create", "ls", "inspect", "rm"},
	"netns":   {"exec"},
}

// parseOrder reads a command of the shared mode.
func parseOrder(args []string) (*options, error) {
	verb, args := args[0], args[1:]
	if verbs := orderVerbs[verb]; verbs != nil {
		all := strings.Join(verbs, ", ")
		if len(args) == 0 {
			return nil, fmt.Errorf("%s what? %s", verb, all)
		}
		word := args[0]
		switch word {
		case "-h", "--help", "help":
			return &options{command: cmdHelp}, nil
		case "list":
			word = "ls"
		case "remove":
			word = "rm"
		}
		known := false
		for _, v := range verbs {
			known = known || v == word
		}
		if !known {
			return nil, fmt.Errorf("%s %s: must be %s", verb, args[0], all)
		}
		verb, args = verb+" "+word, args[1:]
	}
	o, m, where := &order{verb: verb}, &membership{}, ""
	set := newOrderFlags(verb, o, m, &where)
	help := set.BoolP("help", "h", false, "print usernet's help")
	if err := set.Parse(args); err != nil {
		return nil, err
	}
	if *help {
		return &options{command: cmdHelp}, nil
	}
	if err := o.read(set, m, where); err != nil {
		return nil, err
	}
	return &options{command: cmdOrder, order: o}, nil
}

// read takes what stands beside flags, and the flags that need a look.
func (o *order) read(set *pflag.FlagSet, m *membership, where string) (err error) {
	rest := set.Args()
	need := func(n int, what string) error {
		switch {
		case len(rest) < n:
			return fmt.Errorf("usage: usernet %s %s", o.verb, what)
		case len(rest) > n:
			return fmt.Errorf("unexpected argument %q", rest[n])
		}
		return nil
	}
	o.names = rest
	switch o.verb {
	case "network create":
		if err := need(1, "NAME"); err != nil {
			return err
		}
		o.config.Name = rest[0]
		for flag, to := range map[string]*netip.Prefix{"subnet": &o.config.Subnet, "ipv6": &o.config.Subnet6} {
			f := set.Lookup(flag)
			if !f.Changed {
				continue
			}
			if *to, err = netip.ParsePrefix(f.Value.String()); err != nil {
				return fmt.Errorf("--%s %s: must be a network such as %s", flag, f.Value, map[string]string{"subnet": "10.89.1.0/24", "ipv6": "fd12:3456:789a:1::/64"}[flag])
			}
		}
	case "network ls":
		return need(0, "")
	case "network inspect":
		return need(1, "NAME")
	case "network rm":
		if len(rest) == 0 {
			return need(1, "NAME...")
		}
	case "detach":
		return need(2, "NETWORK NAME")
	case "netns exec":
		if len(rest) < 2 {
			return need(2, "NETWORK -- COMMAND [ARG...]")
		}
		o.names, o.argv = rest[:1], rest[1:]
		if o.argv[0] == "--" {
			o.argv = o.argv[1:]
		}
		if len(o.argv) == 0 || o.argv[0] == "" {
			return errors.New("netns exec: which command?")
		}
	case "attach":
		if o.request, err = m.request(); err != nil {
			return err
		}
		if set.Changed("netns-path") {
			if where == "" {
				return errors.New("--netns-path is empty")
			}
			if o.request.Path, err = absolute(where); err != nil {
				return err
			}
			return need(1, "NETWORK --netns-path PATH --name NAME")
		}
		if err := need(2, "NETWORK PID --name NAME"); err != nil {
			return err
		}
		if o.request.PID, err = parsePID(rest[1]); err != nil {
			return err
		}
	}
	return nil
}

// parsePID reads one. The kernel's end at 2^22 (PID_MAX_LIMIT); what does not fit 31 bits is a slip.
func parsePID(s string) (int, error) {
	pid, err := strconv.ParseInt(s, 10, 32)
	if err != nil || pid < 1 || !digits(s) {
		return 0, fmt.Errorf("%s is not a PID: for a path there is --netns-path", s)
	}
	return int(pid), nil
}

// absolute is meant where it is typed: the daemon is somewhere else.
func absolute(path string) (string, error) {
	if filepath.IsAbs(path) {
		return path, nil
	}
	dir, err := os.Getwd()
	return filepath.Join(dir, path), err
}
