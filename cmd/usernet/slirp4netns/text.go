package slirp4netns

import (
	"fmt"
	"net/netip"
	"strings"
)

// Callers search the help text for the options that they would like to use, and take none that is not there.
const helpText = `Usage: %s [OPTION]... PID|PATH|FD [TAPNAME]
usernet in the place of slirp4netns: a network for a network namespace, without root.

-c, --configure          bring lo and the TAP up, with address and default route
-e, --exit-fd=FD         end when the other end of this pipe or socket is closed
-r, --ready-fd=FD        write "1" to this descriptor when all works, and close it
-m, --mtu=MTU            largest IP packet in octets (default=1500, max=65521)
-6, --enable-ipv6        IPv6 as well, in fd00::/64
-a, --api-socket=PATH    unix socket at which ports are published
--cidr=CIDR              IPv4 network of the container (default=10.0.2.0/24)
--disable-host-loopback  shut the way to the host's 127.0.0.1 and ::1 by the gateway's address
--netns-type=TYPE        what PID|PATH|FD is ([path|pid|tapfd], default=pid)
--userns-path=PATH       user namespace to enter first; the kernel knows the right one
--enable-sandbox         give up files and capabilities; done in any case, as far as the host lets us
--enable-seccomp         give up system calls; done in any case
--outbound-addr=IPv4     address or interface of the host that IPv4 leaves from
--outbound-addr6=IPv6    address or interface of the host that IPv6 leaves from
--disable-dns            no resolver at 10.0.2.3, or where --cidr moves it
--macaddress=MAC         of the TAP (only with -c)
--target-type=TYPE       a network namespace, or a socket for User-Mode Linux ([netns|bess], default=netns)
-h, --help               print this text
-v, --version            print versions

usernet's own command line is "usernet help".
`

// HelpText is what --help prints.
func HelpText(program string) string { return fmt.Sprintf(helpText, program) }

// speaks is the version of slirp4netns whose command line this is.
const speaks = "1.3.2"

// VersionText is what --version prints. Callers split its lines at "version" and ": ", and look at the number of
// SLIRP_CONFIG_VERSION_MAX: 2 has --outbound-addr, 3 --disable-dns, and with 4 none is without.
func VersionText(usernet string) string {
	return fmt.Sprintf(`slirp4netns version %s+usernet
commit: %s
libslirp: usernet-%[2]s
SLIRP_CONFIG_VERSION_MAX: 4
libseccomp: usernet-%[2]s
`, speaks, usernet)
}

// Plan says who has which address, for the lines at the start.
type Plan struct {
	Network              netip.Prefix
	Gateway, DNS         netip.Addr
	LeaseBegin, LeaseEnd netip.Addr
	Container            netip.Addr
}

// Banner is what is printed at the start.
func (o *Options) Banner(p Plan) string {
	var b strings.Builder
	b.WriteString("Starting slirp\n")
	line := func(name string, value any) { fmt.Fprintf(&b, "* %-16s %v\n", name+":", value) }
	line("MTU", o.MTU)
	line("Network", p.Network.Addr())
	line("Netmask", netmask(p.Network.Bits()))
	line("Gateway", p.Gateway)
	line("DNS", p.DNS)
	line("DHCP begin", p.LeaseBegin)
	line("DHCP end", p.LeaseEnd)
	line("Recommended IP", p.Container)
	if o.APISocket != "" {
		line("API Socket", o.APISocket)
	}
	if !o.DisableLoopback {
		fmt.Fprintf(&b, "WARNING: 127.0.0.1:* on the host is accessible as %s (set --disable-host-loopback to prohibit connecting to 127.0.0.1:*)\n", p.Gateway)
	}
	return b.String()
}

func netmask(bits int) netip.Addr {
	m := ^uint32(0) << (32 - bits)
	return netip.AddrFrom4([4]byte{byte(m >> 24), byte(m >> 16), byte(m >> 8), byte(m)})
}
