package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"

	"usernet/cmd/usernet/slirp4netns"
	"usernet/forwarder"
	"usernet/portdriver"
)

// slirpName is the name by which usernet speaks slirp4netns's command line: as that of the program, or as its first argument.
const slirpName = "slirp4netns"

// slirpArgv is what slirp4netns's main would see, if this is to be slirp4netns.
func slirpArgv(argv []string) ([]string, bool) {
	switch {
	case filepath.Base(argv[0]) == slirpName:
		return argv, true
	case len(argv) > 1 && argv[1] == slirpName:
		return argv[1:], true
	case meansSlirp(argv[1:]):
		return argv, true
	}
	return nil, false
}

// slirp is the dialect's main: other words for the options of attach. It returns the exit status.
func slirp(argv []string) int {
	s, err := slirp4netns.Parse(argv, exists)
	if err != nil {
		if text := err.Error(); text != "" {
			fmt.Fprintln(os.Stderr, text)
		}
		var e *slirp4netns.Error
		if errors.As(err, &e) && e.Usage {
			fmt.Print(slirp4netns.HelpText(argv[0]))
		}
		return statusFailure
	}
	switch s.Command {
	case slirp4netns.Help:
		fmt.Print(slirp4netns.HelpText(argv[0]))
		return 0
	case slirp4netns.Version:
		fmt.Print(slirp4netns.VersionText(ourVersion()))
		return 0
	}
	o, err := slirpOptions(s)
	if err == nil {
		log := newLog(o)
		for _, w := range s.Warnings {
			log.Warn(w)
		}
		err = attach(o, log)
	}
	if err != nil {
		at := slirp4netns.Attaching
		if errors.As(err, new(controlError)) {
			at = slirp4netns.Listening
		}
		fmt.Fprint(os.Stderr, s.Failure(err, at))
		return statusFailure
	}
	return 0
}

func exists(path string) error {
	_, err := os.Stat(path)
	return err
}

// slirpOptions says the same in usernet's own terms.
func slirpOptions(s *slirp4netns.Options) (*options, error) {
	o := &options{
		command: cmdAttach, pid: s.PID, path: s.Path, usernsPath: s.UsernsPath, tapFD: s.TapFD, bess: s.Bess,
		tapName: s.TapName, mtu: s.MTU, mtuAgreed: true, mac: s.MAC, configure: s.Configure, queues: 1,
		hostLoopback: !s.DisableLoopback,
		keepIPv6Off:  true, // callers ask for IPv6 as a matter of course, and it is the user who turns it off
		portPath:     portdriver.PathAuto, apiSocket: or(s.APISocket, apiNone),
		dns:     !s.DisableDNS,
		readyFD: s.ReadyFD, exitFD: s.ExitFD, looseFDs: true,
		logLevel: slog.LevelWarn, logFormat: "text",
		sandbox: true, // --enable-sandbox and --enable-seccomp ask for less than what there is anyway
	}
	if !s.Configure {
		// A network that another one sets up, as rootlesskit has dockerd do, has that one's rules: published ports are led on to
		// bridges by DNAT in there, and the answers to a connection that came over lo leave by tap0 then.
		o.portPath = portdriver.PathStack
	}
	var err error
	if o.outbound, err = slirpOutbound(s); err != nil {
		return nil, err
	}
	if o.mac != nil && o.mac.String() == planOf(s.CIDR, netip.Prefix{}).gatewayMAC().String() {
		return nil, fmt.Errorf("cannot set MAC address: %s is the gateway's", o.mac)
	}
	// Not every MTU that slirp4netns takes can carry IPv6; those who turn it on as a matter of course get the other family.
	ipv6 := s.IPv6 && s.MTU >= minMTU6
	if s.IPv6 && !ipv6 {
		s.Warnings = append(s.Warnings, fmt.Sprintf("no IPv6: it needs an MTU of at least %d octets", minMTU6))
	}
	var net6 netip.Prefix
	if ipv6 {
		net6 = netip.MustParsePrefix(defaultCIDR6)
	}
	if err := checkReserved("--cidr", s.CIDR); err != nil {
		return nil, err
	}
	o.plan = planOf(s.CIDR, net6)
	if err := checkTAPName(o.tapName); err != nil {
		return nil, err
	}
	o.banner = s.Banner(slirp4netns.Plan{
		Network: o.plan.net4, Gateway: o.plan.gateway4, DNS: o.plan.dns4, Container: o.plan.container4,
		LeaseBegin: offset(o.plan.net4, 15), LeaseEnd: offset(o.plan.net4, 30),
	})
	return o, nil
}

// slirpOutbound takes what usernet's own flags refuse: the loopback, from which nothing leaves the host. There are those who
// mean just that, for it leaves the host's own servers within reach.
func slirpOutbound(s *slirp4netns.Options) (forwarder.Outbound, error) {
	lo4, to4 := loopback(s.Outbound4, netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	lo6, to6 := loopback(s.Outbound6, netip.IPv6Loopback())
	if _, err := forwarder.ParseOutbound(to4, ""); err != nil {
		return forwarder.Outbound{}, fmt.Errorf("outbound-addr has to be valid ipv4 address or interface name: %w", err)
	}
	o, err := forwarder.ParseOutbound(to4, to6)
	if err != nil {
		return o, fmt.Errorf("outbound-addr6 has to be valid ipv6 address or interface name: %w", err)
	}
	if lo4.IsValid() {
		o.Addr4 = lo4
	}
	if lo6.IsValid() {
		o.Addr6 = lo6
	}
	o.ToLoopback = true
	return o, nil
}

// loopback reads a loopback address of lo's family, or the name lo; all else it returns as it is.
func loopback(s string, lo netip.Addr) (netip.Addr, string) {
	if s == "lo" {
		return lo, ""
	}
	if a, err := netip.ParseAddr(s); err == nil && a.IsLoopback() && a.Is4() == lo.Is4() && !a.Is4In6() {
		return a, ""
	}
	return netip.Addr{}, s
}
