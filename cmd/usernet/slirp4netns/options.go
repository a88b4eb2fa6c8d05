package slirp4netns

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

const (
	defaultMTU  = 1500
	maxMTU      = 65521 // a frame of a TAP has at most 65535 octets, and 14 of them are the Ethernet header
	defaultCIDR = "10.0.2.0/24"
	defaultTAP  = "tap0"

	// maxName is how many octets of the TAP's name count: the kernel's IFNAMSIZ, with its final zero, is 16.
	maxName = 15
)

// A Command is what argv asks for.
type Command int

const (
	Serve Command = iota
	Help
	Version
)

// Options is argv, parsed and checked as far as argv and the existence of paths can tell.
type Options struct {
	Command Command
	Program string // argv[0], for Help

	// Where to. One of the four is set, for Serve.
	PID   int
	Path  string
	TapFD int    // -1: none
	Bess  string // path of a SOCK_SEQPACKET listener

	TapName string // 1 to 15 octets

	UsernsPath string // "": nobody said

	Configure       bool
	MTU             int // IP MTU, octets
	MAC             net.HardwareAddr
	CIDR            netip.Prefix
	IPv6            bool
	DisableLoopback bool // of the host
	DisableDNS      bool
	Outbound4       string // address or interface, "": none
	Outbound6       string
	ExitFD, ReadyFD int    // -1: none
	APISocket       string // "": none
	Sandbox         bool
	Seccomp         bool

	Warnings []string // what was taken otherwise than it was written
}

// An Error is a mistake in argv, in slirp4netns's words, which may be none.
type Error struct {
	Text  string
	Usage bool // the help text goes to standard output as well
}

func (e *Error) Error() string { return e.Text }

func wrong(format string, args ...any) error {
	return &Error{Text: fmt.Sprintf(format, args...), Usage: true}
}

// refused is an error that slirp4netns finds after it has read all of argv, and that does not print its help.
func refused(format string, args ...any) error { return &Error{Text: fmt.Sprintf(format, args...)} }

// A parser holds what stays text until all of argv is read.
type parser struct {
	*Options
	cidr, mac, netnsType, targetType string
	given                            map[string]bool
}

// errDone ends the reading of argv early, for help and version.
var errDone = errors.New("done")

// Parse reads argv, whose first element is the program's name. stat returns an error where a path leads nowhere. The
// error is an *Error.
func Parse(argv []string, stat func(path string) error) (*Options, error) {
	p := parser{
		Options: &Options{Program: argv[0], TapFD: -1, ExitFD: -1, ReadyFD: -1, MTU: defaultMTU, TapName: defaultTAP},
		cidr:    defaultCIDR, netnsType: "pid", targetType: "netns", given: map[string]bool{},
	}
	rest, err := getopt(argv[0], argv[1:], p.option)
	if errors.Is(err, errDone) {
		return p.Options, nil
	}
	if err == nil {
		err = p.target(rest, stat)
	}
	if err == nil {
		err = p.values()
	}
	if err != nil && !errors.As(err, new(*Error)) {
		err = &Error{Text: err.Error(), Usage: true}
	}
	if err != nil {
		return nil, err
	}
	return p.Options, nil
}

// option takes one option.
func (p *parser) option(name, value string) (err error) {
	p.given[name] = true
	switch name {
	case "configure":
		p.Configure = true
	case "exit-fd":
		p.ExitFD, err = descriptor(name, value)
	case "ready-fd":
		p.ReadyFD, err = descriptor(name, value)
	case "mtu":
		var ok bool
		if p.MTU, ok = number(value, 1, maxMTU); !ok {
			return wrong("MTU must be a positive integer (< %d)", maxMTU+1)
		}
	case "cidr":
		p.cidr = value
	case "disable-host-loopback", "no-host-loopback":
		p.DisableLoopback = true
	case "netns-type":
		p.netnsType = value
	case "userns-path":
		p.UsernsPath = value
	case "api-socket":
		p.APISocket = value
	case "enable-ipv6":
		p.IPv6 = true
	case "enable-sandbox", "create-sandbox":
		p.Sandbox = true
	case "enable-seccomp":
		p.Seccomp = true
	case "outbound-addr":
		p.Outbound4 = value
	case "outbound-addr6":
		p.Outbound6 = value
	case "disable-dns":
		p.DisableDNS = true
	case "macaddress":
		p.mac = value
	case "target-type":
		p.targetType = value
	case "help":
		p.Command, err = Help, errDone
	case "version":
		p.Command, err = Version, errDone
	}
	return err
}

func descriptor(name, value string) (int, error) {
	fd, ok := number(value, 0, 1<<31-1)
	if !ok {
		return -1, wrong("%s must be a non-negative integer", name)
	}
	return fd, nil
}

// number reads as strtol(3) does, but that no digits are no number: white space before it, a sign, decimal digits.
func number(s string, least, most int) (int, bool) {
	s = strings.TrimLeft(s, " \t\n\v\f\r")
	n, err := strconv.ParseInt(s, 10, 64)
	return int(n), err == nil && n >= int64(least) && n <= int64(most)
}

// target says where to, from what is no option.
func (p *parser) target(rest []string, stat func(string) error) error {
	if len(rest) == 0 {
		return wrong("")
	}
	if p.targetType == "bess" && len(rest) > 1 {
		return wrong("too many arguments") // a socket has no name inside
	}
	if len(rest) > 2 {
		p.Warnings = append(p.Warnings, "too many arguments")
	}
	if len(rest) > 1 {
		p.TapName = rest[1]
	}
	if len(p.TapName) > maxName {
		p.TapName = p.TapName[:maxName]
		p.Warnings = append(p.Warnings, fmt.Sprintf("the name of an interface has at most %d octets: it is %s", maxName, p.TapName))
	}
	switch p.targetType {
	case "netns":
	case "bess":
		for _, conflict := range []string{"configure", "netns-type", "userns-path"} {
			if p.given[conflict] {
				return wrong("--%s conflicts with --target-type=bess", conflict)
			}
		}
	default:
		return wrong(`--target-type must be either "netns" or "bess"`)
	}
	if p.given["macaddress"] && !p.Configure {
		return wrong("--macaddr cannot be specified when --configure or -c is not specified")
	}
	if p.given["userns-path"] && stat(p.UsernsPath) != nil {
		return wrong("userns path doesn't exist: %s", p.UsernsPath)
	}
	return p.where(rest[0], stat)
}

func (p *parser) where(where string, stat func(string) error) error {
	if p.targetType == "bess" {
		if p.Bess = where; where == "" {
			return wrong("the path of the socket is empty")
		}
		return nil
	}
	var ok bool
	switch p.netnsType {
	case "pid":
		if p.PID, ok = number(where, 1, 1<<31-1); !ok {
			return wrong("PID must be a positive integer")
		}
	case "tapfd":
		if p.TapFD, ok = number(where, 0, 1<<31-1); !ok {
			return wrong("tapfd must be a non-negative integer")
		}
		// It would have to enter a namespace, and there is none.
		if p.Configure {
			return wrong("--configure conflicts with --netns-type=tapfd")
		}
	default: // "path", and whatever else is written
		if err := stat(where); err != nil {
			return wrong("existing path expected when --netns-type=path: %s", Reason(err))
		}
		p.Path = where
	}
	return nil
}

// values reads what argv gives as text.
func (p *parser) values() (err error) {
	if p.CIDR, err = parseCIDR(p.cidr); err != nil {
		return err
	}
	for _, o := range []struct{ name, value string }{{"outbound-addr", p.Outbound4}, {"outbound-addr6", p.Outbound6}} {
		if p.given[o.name] && o.value == "" {
			return refused("%s has to be valid %s address or interface name.", o.name, map[string]string{"outbound-addr": "ipv4", "outbound-addr6": "ipv6"}[o.name])
		}
	}
	if p.given["macaddress"] {
		if p.MAC, err = parseMAC(p.mac); err != nil {
			return err
		}
	}
	return nil
}

// parseCIDR reads an IPv4 network in which the container's address, at +100, and that of the last lease fit.
func parseCIDR(s string) (netip.Prefix, error) {
	address, length, slash := strings.Cut(s, "/")
	bits, err := strconv.ParseUint(length, 10, 8)
	if !slash || err != nil || len(length) > 2 || !dotted(address) {
		return netip.Prefix{}, refused("invalid CIDR: %s", s)
	}
	a, err := netip.ParseAddr(address)
	if err != nil {
		return netip.Prefix{}, refused("invalid network address: %s", address)
	}
	if bits < 1 || bits > 25 {
		return netip.Prefix{}, refused("prefix length needs to be 1-25")
	}
	n := netip.PrefixFrom(a, int(bits))
	if n.Masked() != n {
		return netip.Prefix{}, refused("CIDR needs to be a network address like %s, not like %s", n.Masked(), s)
	}
	return n, nil
}

// dotted tells whether s has the form of an IPv4 address, whatever its numbers are.
func dotted(s string) bool {
	parts := strings.Split(s, ".")
	for _, part := range parts {
		if len(part) < 1 || len(part) > 3 || strings.Trim(part, "0123456789") != "" {
			return false
		}
	}
	return len(parts) == 4
}

// parseMAC reads six octets, each of one or two digits.
func parseMAC(s string) (net.HardwareAddr, error) {
	const form = "macaddress has to be a valid MAC address (hex string, 6 bytes, each byte separated by a ':')."
	mac := make(net.HardwareAddr, 0, 6)
	for octet := range strings.SplitSeq(s, ":") {
		n, err := strconv.ParseUint(octet, 16, 8)
		if err != nil || len(octet) > 2 || len(mac) == 6 {
			return nil, refused("%q is an invalid MAC address.\n%s", s, form)
		}
		mac = append(mac, byte(n))
	}
	switch {
	case len(mac) != 6:
		return nil, refused("%q is an invalid MAC address.\n%s", s, form)
	case mac[0]&1 != 0:
		return nil, refused("cannot set MAC address: %s is a group address (its first octet is odd), and an interface needs its own", s)
	case bytes.Equal(mac, make([]byte, 6)):
		return nil, refused("cannot set MAC address: %s is no address", s)
	}
	return mac, nil
}
