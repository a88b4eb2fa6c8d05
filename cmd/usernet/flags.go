package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"usernet/forwarder"
	"usernet/portdriver"
	"usernet/stack/dns"
	"usernet/tap/capture"
)

const (
	defaultTAP = "tap0"

	// maxMTU: a frame of a TAP has at most 65535 octets and 14 of them are the Ethernet header
	// (drivers/net/tun.c); the last octet more would buy nothing, so that it is slirp4netns's 65520.
	maxMTU = 65520

	// minMTU4 is what every IPv4 host takes (RFC 1122 §3.3.2), minMTU6 what IPv6 demands (RFC 8200 §5).
	minMTU4 = 576
	minMTU6 = 1280

	// maxQueues: a queue costs a thread and helps where cores are idle; Linux allows 256.
	maxQueues = 16
)

var logLevels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
}

// flags are the values as pflag leaves them, and the groups in which help shows them.
type flags struct {
	set    *pflag.FlagSet
	groups []group

	help, version bool

	netnsPath, usernsPath, tapName string
	mtu, queues                    int
	mac                            string
	cidr, cidr6                    string
	ipv6, configure                bool
	noOffload, noUSO               bool
	hostLoopback                   bool
	outbound4, outbound6           string
	dns                            []string
	noDNS                          bool
	readyFD, exitFD                int
	pidFile                        string
	logLevel, logFormat            string
	pcap                           string
	pcapSize                       size
	noSandbox                      bool
	publish                        []string
	portPath, apiSocket            string
	pprof                          bool
	network                        string
	member                         membership
}

// A group is a headline of help and the flags below it.
type group struct {
	title string
	set   *pflag.FlagSet
}

// newFlags defines the flags of "usernet run" or of the attach form.
func newFlags(run bool) *flags {
	f := &flags{set: pflag.NewFlagSet("usernet", pflag.ContinueOnError), ipv6: true, configure: true, pcapSize: capture.DefaultLimit}
	f.set.SortFlags = false

	if !run {
		g := f.group("Namespace")
		g.StringVar(&f.netnsPath, "netns-path", "", "network namespace, such as /proc/1234/ns/net or /run/netns/blue, instead of PID|`PATH`")
		g.StringVar(&f.usernsPath, "userns-path", "", "user namespace to enter it from, by `PATH`; the kernel knows the right one, so this is rarely needed, and not looked at where a thread may enter directly, as root's")
	}

	if run {
		g := f.group("Shared network")
		g.StringVar(&f.network, "network", "", "join the shared network of that `NAME`; the flags of this group, --mac, --publish and those of Life and Watching go with it")
		f.member.add(g)
	}

	g := f.group("Interface")
	g.StringVar(&f.tapName, "tap-name", "", "`NAME` of the TAP, at most 15 octets (default "+defaultTAP+")")
	g.IntVar(&f.mtu, "mtu", maxMTU, "largest IP packet in `OCTETS`, 576 (1280 with IPv6) to 65520")
	g.StringVar(&f.mac, "mac", "", "the TAP's `MAC` address (default: the kernel chooses)")
	negatable(g, &f.configure, "configure", "bring lo and the TAP up, with addresses and routes", "only create the TAP: the container configures it, by DHCP and router advertisements if it likes")
	g.IntVar(&f.queues, "queues", 1, "`NUMBER` of queues of the TAP, 1 to 16, each read by its own thread")
	g.BoolVar(&f.noOffload, "no-offload", false, "one frame at a time, with its checksum, as on a kernel without the virtio-net header")
	g.BoolVar(&f.noUSO, "no-uso", false, "one datagram at a time, as on a kernel before Linux 6.2")

	g = f.group("Addresses")
	g.StringVar(&f.cidr, "cidr", defaultCIDR, "IPv4 `PREFIX`, /8 to /25: gateway at +2, DNS at +3, container at +100")
	g.StringVar(&f.cidr6, "cidr6", defaultCIDR6, "IPv6 `PREFIX`, /16 to /112: gateway ::2, DNS ::3, the host ::4, container ::100")
	negatable(g, &f.ipv6, "ipv6", "IPv6 inside", "IPv4 only")

	g = f.group("Policy")
	g.BoolVar(&f.hostLoopback, "host-loopback", false, "let the container reach the host's 127.0.0.1 and ::1 through the gateway's address (default: shut)")
	g.StringVar(&f.outbound4, "outbound-addr", "", "IPv4 `ADDR|INTERFACE` of the host that TCP and UDP leave from")
	g.StringVar(&f.outbound6, "outbound-addr6", "", "IPv6 `ADDR|INTERFACE` of the host that TCP and UDP leave from")

	g = f.group("Ports")
	g.StringArrayVarP(&f.publish, "publish", "p", nil, "publish a port of the container's on the host by a `SPEC`, may be repeated: [ADDR:]PORT[-END]:[ADDR:]PORT[-END][/PROTO], the host's "+
		"side first, PROTO tcp unless it is tcp4, tcp6, udp, udp4 or udp6; PORT alone is the same on both sides, host port 0 any; PATH:PORT for a unix socket; [ADDR:]auto[:PORT[-END]|^PORT[-END],...][/PROTO] for whatever listens inside, ^ leaves ports out")
	g.StringVar(&f.portPath, "port-path", portdriver.PathAuto, "data `PATH` of published TCP: kernel goes from socket to socket of host and container, stack passes the TAP, auto takes the kernel's where it can be had")
	g.StringVar(&f.apiSocket, "api-socket", "", "`FILE` of the control socket, or none (default: usernet/PID.sock in $XDG_RUNTIME_DIR)")
	g.BoolVar(&f.pprof, "pprof", false, "profiles of usernet itself on the control socket, below /v1/usernet/debug/pprof/")

	g = f.group("Names")
	g.StringArrayVar(&f.dns, "dns", nil, "resolver to ask, `ADDR[:PORT]`, may be repeated (default: those of the host's resolv.conf, followed as it changes)")
	g.BoolVar(&f.noDNS, "no-dns", false, "no resolver inside; the command of run sees the host's resolv.conf")

	g = f.group("Life")
	g.IntVar(&f.readyFD, "ready-fd", -1, "descriptor `FD`, 3 or more, that gets \"1\" and is closed once everything works")
	g.IntVar(&f.exitFD, "exit-fd", -1, "descriptor `FD`, 3 or more, of a pipe or socket: when its other end is closed, usernet ends, and run kills its command and all that this has started")
	for _, fd := range []string{"ready-fd", "exit-fd"} {
		g.Lookup(fd).DefValue = "0" // pflag shows a default unless it is zero, and -1 is none
	}
	g.StringVar(&f.pidFile, "pid-file", "", "`FILE` to write the PID to; removed at the end")
	g.BoolVar(&f.noSandbox, "no-sandbox", false, "keep every right that usernet was started with")

	g = f.group("Watching")
	// A command's terminal is its own: of run only what went wrong is worth a line there.
	level := "info"
	if run {
		level = "warn"
	}
	g.StringVar(&f.logLevel, "log-level", level, "least `LEVEL` that is logged: debug, info, warn or error; of run by default warn")
	g.StringVar(&f.logFormat, "log-format", "text", "`FORMAT` of the log on standard error: text or json")
	g.StringVar(&f.pcap, "pcap", "", "`FILE` to write every frame to (pcapng, for wireshark or tcpdump -r)")
	g.Var(&f.pcapSize, "pcap-size", "`SIZE` in octets (K, M, G: binary) at which the capture stops")

	g = f.group("Help")
	g.BoolVarP(&f.help, "help", "h", false, "print this text")
	g.BoolVar(&f.version, "version", false, "print version, compiler and platform")

	for _, g := range f.groups {
		f.set.AddFlagSet(g.set)
	}
	return f
}

func (f *flags) group(title string) *pflag.FlagSet {
	set := pflag.NewFlagSet(title, pflag.ContinueOnError)
	set.SortFlags = false
	f.groups = append(f.groups, group{title, set})
	return set
}

// parse reads args. It returns options when there is nothing else to do than to print help or version.
func (f *flags) parse(args []string) (*options, error) {
	f.set.Usage = func() {} // usage is printed by main, to the right place
	if err := f.set.Parse(args); err != nil {
		return nil, err
	}
	switch {
	case f.help:
		return &options{command: cmdHelp}, nil
	case f.version:
		return &options{command: cmdVersion}, nil
	}
	return nil, nil
}

// options checks what stands for itself and fills what both forms share.
func (f *flags) options() (*options, error) {
	o := &options{
		tapFD: -1,
		mtu:   f.mtu, configure: f.configure, queues: f.queues, noOffload: f.noOffload, noUSO: f.noUSO,
		hostLoopback: f.hostLoopback,
		dns:          !f.noDNS, readyFD: f.readyFD, exitFD: f.exitFD, pidFile: f.pidFile,
		logFormat: f.logFormat, pcap: f.pcap, pcapSize: int64(f.pcapSize), sandbox: !f.noSandbox,
	}
	var err error
	if o.plan, err = newPlan(f.cidr, f.cidr6, f.ipv6); err != nil {
		return nil, err
	}
	if !f.ipv6 && f.set.Changed("cidr6") {
		return nil, errors.New("--cidr6 and --no-ipv6 contradict each other")
	}
	least, with := minMTU4, ""
	if f.ipv6 {
		least, with = minMTU6, " (with --no-ipv6: 576)"
	}
	if f.mtu < least || f.mtu > maxMTU {
		return nil, fmt.Errorf("--mtu %d: must be %d%s to %d", f.mtu, least, with, maxMTU)
	}
	if f.queues < 1 || f.queues > maxQueues {
		return nil, fmt.Errorf("--queues %d: must be 1 to %d", f.queues, maxQueues)
	}
	if f.set.Changed("mac") {
		if o.mac, err = parseMAC(f.mac, o.plan.gatewayMAC()); err != nil {
			return nil, err
		}
	}
	if f.noDNS && len(f.dns) > 0 {
		return nil, errors.New("--dns and --no-dns contradict each other")
	}
	for _, s := range f.dns {
		ap, err := dns.ParseServer(s)
		if err != nil {
			return nil, fmt.Errorf("--dns: %w", err)
		}
		o.upstreams = append(o.upstreams, ap)
	}
	for _, fd := range []string{"ready-fd", "exit-fd"} {
		if n, _ := f.set.GetInt(fd); f.set.Changed(fd) && n < 3 {
			return nil, fmt.Errorf("--%s %d: must be 3 or more; 0, 1 and 2 are standard input, output and error", fd, n)
		}
	}
	if o.readyFD >= 0 && o.readyFD == o.exitFD {
		return nil, fmt.Errorf("--ready-fd and --exit-fd are both %d: one is closed when usernet is ready, the other must stay open", o.readyFD)
	}
	for _, name := range []string{"pid-file", "pcap", "tap-name", "userns-path", "outbound-addr", "outbound-addr6"} {
		if fl := f.set.Lookup(name); fl != nil && fl.Changed && fl.Value.String() == "" {
			return nil, fmt.Errorf("--%s is empty", name)
		}
	}
	if f.set.Changed("pcap-size") && f.pcap == "" {
		return nil, errors.New("--pcap-size without --pcap")
	}
	if o.outbound, err = forwarder.ParseOutbound(f.outbound4, f.outbound6); err != nil {
		return nil, err
	}
	if err = f.ports(o); err != nil {
		return nil, err
	}
	var known bool
	if o.logLevel, known = logLevels[f.logLevel]; !known {
		return nil, fmt.Errorf("--log-level %s: must be debug, info, warn or error", f.logLevel)
	}
	if o.logFormat != "text" && o.logFormat != "json" {
		return nil, fmt.Errorf("--log-format %s: must be text or json", o.logFormat)
	}
	return o, nil
}

// apiNone is the --api-socket that there is not.
const apiNone = "none"

// ports checks what is published, and how it can be asked for.
func (f *flags) ports(o *options) error {
	o.portPath, o.apiSocket, o.pprof = f.portPath, f.apiSocket, f.pprof
	if !slices.Contains([]string{portdriver.PathAuto, portdriver.PathKernel, portdriver.PathStack}, f.portPath) {
		return fmt.Errorf("--port-path %s: must be auto, kernel or stack", f.portPath)
	}
	if f.set.Changed("api-socket") && f.apiSocket == "" {
		return errors.New("--api-socket is empty; \"none\" is for none")
	}
	if f.pprof && f.apiSocket == apiNone {
		return errors.New("--pprof and --api-socket=none contradict each other")
	}
	for _, s := range f.publish {
		if auto, is, err := portdriver.ParseAuto(s); err != nil {
			return fmt.Errorf("--publish: %w", err)
		} else if is {
			o.auto = append(o.auto, auto)
			continue
		}
		specs, err := portdriver.ParseSpec(s)
		if err != nil {
			return fmt.Errorf("--publish: %w", err)
		}
		o.publish = append(o.publish, specs...)
	}
	return nil
}

// parseMAC reads a unicast MAC address that is not the gateway's.
func parseMAC(s string, gateway net.HardwareAddr) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(s)
	switch {
	case err != nil || len(mac) != 6:
		return nil, fmt.Errorf("--mac %s: must be six octets such as 02:00:5e:10:00:01", s)
	case mac[0]&1 != 0:
		return nil, fmt.Errorf("--mac %s: is a group address (its first octet is odd); an interface needs its own", s)
	case mac.String() == "00:00:00:00:00:00":
		return nil, fmt.Errorf("--mac %s: is no address", s)
	case mac.String() == gateway.String():
		return nil, fmt.Errorf("--mac %s: is the gateway's", s)
	}
	return mac, nil
}

// negatable defines --name and --no-name for one variable; the later of the two counts.
func negatable(set *pflag.FlagSet, v *bool, name, usage, negative string) {
	set.BoolVar(v, name, *v, usage)
	fl := set.VarPF((*negation)(v), "no-"+name, "", negative)
	fl.NoOptDefVal = "true"
}

// negation is a boolean flag whose variable is the opposite of what is written.
type negation bool

func (n *negation) String() string   { return strconv.FormatBool(!bool(*n)) }
func (n *negation) Type() string     { return "bool" }
func (n *negation) IsBoolFlag() bool { return true }

func (n *negation) Set(s string) error {
	v, err := strconv.ParseBool(s)
	*n = negation(!v)
	return err
}

// size is a number of octets with an optional binary suffix.
type size int64

func (s *size) Type() string { return "size" }

func (s *size) String() string {
	for shift, suffix := range map[int]string{30: "G", 20: "M", 10: "K"} {
		if v := int64(*s); v > 0 && v%(1<<shift) == 0 && v>>shift < 1024 {
			return strconv.FormatInt(v>>shift, 10) + suffix
		}
	}
	return strconv.FormatInt(int64(*s), 10)
}

func (s *size) Set(text string) error {
	shift, number := 0, text
	if n := len(text); n > 0 {
		if i := strings.IndexByte("KMG", text[n-1]&^0x20); i >= 0 {
			shift, number = 10*(i+1), text[:n-1]
		}
	}
	v, err := strconv.ParseUint(number, 10, 62-shift)
	if err != nil {
		return errors.New("must be a number of octets such as 1048576, 500K, 100M or 2G")
	}
	// Below that not even the file's head and one full frame fit.
	if v<<shift < 128<<10 {
		return errors.New("must be 128K or more, so that a frame fits")
	}
	*s = size(v << shift)
	return nil
}
