package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"usernet/api"
	"usernet/forwarder"
	"usernet/portdriver"
	"usernet/stack/dns"
	"usernet/tap"
)

// A command is what argv asks for.
type command int

const (
	cmdAttach command = iota
	cmdRun
	cmdAsk
	cmdOrder
	cmdVersion
	cmdHelp
)

// options is argv, parsed and checked as far as argv alone can tell.
type options struct {
	command command

	// Where to: one of pid and path, for cmdAttach.
	pid        int
	path       string
	usernsPath string // "" asks the kernel

	// In the place of a namespace, as slirp4netns's dialect alone has it: no namespace is opened, and none is watched.
	tapFD int    // the TAP, open already, by an inherited descriptor; -1: none
	bess  string // path of a SOCK_SEQPACKET listener, one frame to a message; "": none

	// Of a shared network, whose daemon makes these options itself: the link that it opens, who has which name and address.
	uplink   func(context.Context) (*link, error) // nil: none
	others   []int                                // readable when another part of this process has something to do; of a shared network
	internal bool                                 // no way out
	domain   string                               // the first of the search list
	namesFor func(client netip.Addr) dns.Names    // nil: the host's names alone
	lease    func(client net.HardwareAddr) (netip.Addr, bool)

	joins string             // the shared network that cmdRun's command joins; "": none
	join  *api.AttachRequest // as whom; nil: it has a network of its own

	question *question // for cmdAsk
	order    *order    // for cmdOrder

	// argv of the command to run, for cmdRun; never empty then.
	argv []string

	tapName   string
	mtu       int  // IP MTU, octets
	mtuAgreed bool // with configure off: whoever configures the interface gives it this MTU, whatever it has now
	mac       net.HardwareAddr
	configure bool
	queues    int
	noOffload bool // of the TAP
	noUSO     bool
	plan      plan

	keepIPv6Off bool // where a sysctl of the namespace has turned it off

	hostLoopback bool
	outbound     forwarder.Outbound

	publish   []portdriver.Spec
	auto      []portdriver.AutoConfig
	portPath  string
	apiSocket string // "" is the default's, apiNone is none
	pprof     bool

	dns       bool
	upstreams []netip.AddrPort // empty: those of the host's resolv.conf

	readyFD, exitFD int    // -1: none
	looseFDs        bool   // as slirp4netns takes them: 0, 1 and 2 too, and a readyFD that cannot be used is nobody's mistake
	banner          string // printed on standard output when all works
	pidFile         string

	logLevel  slog.Level
	logFormat string
	pcap      string
	pcapSize  int64 // octets
	sandbox   bool
}

// A usageError is the user's mistake on the command line.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// parse turns argv, without the program's name, into options. But for the directory in which paths are meant it asks nothing of the
// system; env looks up the environment. Its errors are of type usageError.
func parse(args []string, env func(string) string) (*options, error) {
	o, err := parseCommand(args, env)
	if err != nil {
		return nil, usageError{err}
	}
	return o, nil
}

// ownCommands are the words that are no namespace.
var ownCommands = []string{"run", "network", "attach", "detach", "netns", "port", "info", "version", "help"}

func parseCommand(args []string, env func(string) string) (*options, error) {
	if len(args) == 0 {
		return nil, errors.New("which namespace? give its PID or path, or: usernet run COMMAND")
	}
	switch args[0] {
	case "help":
		return &options{command: cmdHelp}, nil
	case "version":
		if len(args) > 1 {
			return nil, fmt.Errorf("version takes no arguments, not %q", args[1])
		}
		return &options{command: cmdVersion}, nil
	case "run":
		return parseRun(args[1:], env)
	case "network", "attach", "detach", "netns":
		return parseOrder(args)
	case "port", "info":
		return parseQuestion(args, env)
	}
	return parseAttach(args)
}

func parseRun(args []string, env func(string) string) (*options, error) {
	f := newFlags(true)
	f.set.SetInterspersed(false)
	if done, err := f.parse(args); done != nil || err != nil {
		return done, err
	}
	o, err := f.options()
	if err != nil {
		return nil, err
	}
	o.command = cmdRun
	if err := f.joining(o); err != nil {
		return nil, err
	}
	o.tapName = or(f.tapName, defaultTAP)
	o.argv = f.set.Args()
	if len(o.argv) == 0 {
		o.argv = []string{or(env("SHELL"), "/bin/sh")}
	}
	if o.argv[0] == "" {
		return nil, errors.New("the command's name is empty")
	}
	return o, checkTAPName(o.tapName)
}

// withNetwork are flags of run that mean something beside --network. The others say what a network is like, and that one is there.
var withNetwork = []string{
	"network", "name", "alias", "ip", "ifname", "mac", "publish", "ready-fd", "exit-fd", "pid-file", "no-sandbox", "log-level", "log-format",
}

// joining reads the flags of a shared network.
func (f *flags) joining(o *options) error {
	if !f.set.Changed("network") {
		for _, name := range []string{"name", "alias", "ip", "ifname"} {
			if f.set.Changed(name) {
				return fmt.Errorf("--%s is for a member of a shared network: name that with --network", name)
			}
		}
		return nil
	}
	if f.network == "" {
		return errors.New("--network is empty")
	}
	var wrong error
	f.set.Visit(func(fl *pflag.Flag) {
		if !slices.Contains(withNetwork, fl.Name) {
			wrong = fmt.Errorf("--%s and --network contradict each other: what a shared network is like is said when it is created", fl.Name)
		}
	})
	if wrong != nil {
		return wrong
	}
	f.member.mac, f.member.publish = f.mac, f.publish
	r, err := f.member.request()
	o.joins, o.join = f.network, &r
	return err
}

func parseAttach(args []string) (*options, error) {
	f := newFlags(false)
	if done, err := f.parse(args); done != nil || err != nil {
		return done, err
	}
	o, err := f.options()
	if err != nil {
		return nil, err
	}
	rest := f.set.Args()
	where := f.netnsPath
	if !f.set.Changed("netns-path") {
		if len(rest) == 0 {
			return nil, errors.New("which namespace? give its PID or path, or --netns-path")
		}
		where, rest = rest[0], rest[1:]
		if slices.Contains(ownCommands, where) {
			return nil, fmt.Errorf("%q comes before every flag: usernet %[1]s ...; for a file of that name write ./%[1]s", where)
		}
		if digits(where) {
			// The kernel's PIDs end at 2^22 (PID_MAX_LIMIT); what does not fit 31 bits is a slip.
			pid, err := strconv.ParseInt(where, 10, 32)
			if err != nil || pid < 1 {
				return nil, fmt.Errorf("%s is not a PID", where)
			}
			o.pid = int(pid)
		}
	}
	if o.pid == 0 {
		if where == "" {
			return nil, errors.New("the namespace's path is empty")
		}
		o.path = where
	}
	o.usernsPath = f.usernsPath
	name := f.tapName
	if len(rest) > 0 {
		if name != "" && name != rest[0] {
			return nil, fmt.Errorf("two names for the TAP: --tap-name %s and %s", name, rest[0])
		}
		name, rest = rest[0], rest[1:]
		if name == "" {
			return nil, errors.New("the TAP's name is empty")
		}
	}
	if len(rest) > 0 {
		return nil, fmt.Errorf("unexpected argument %q", rest[0])
	}
	o.tapName = or(name, defaultTAP)
	return o, checkTAPName(o.tapName)
}

func checkTAPName(name string) error {
	if name == "lo" {
		return errors.New("the TAP cannot be called lo: that is the loopback interface")
	}
	return tap.CheckName(name)
}

func digits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// or returns the first string that is not empty.
func or(ss ...string) string {
	for _, s := range ss {
		if s != "" {
			return s
		}
	}
	return ""
}
