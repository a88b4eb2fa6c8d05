package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// link is what `ip -json addr` says of the TAP.
type link struct {
	MTU      int
	Address  string
	AddrInfo []struct{ Local string } `json:"addr_info"`
}

func tapOf(t testing.TB, c *container) link {
	t.Helper()
	var links []link
	unmarshal(t, c.must(t, "ip", "-d", "-json", "addr", "show", "dev", "tap0"), &links)
	return links[0]
}

func (l link) has(addr string) bool {
	for _, a := range l.AddrInfo {
		if a.Local == addr {
			return true
		}
	}
	return false
}

func TestConfigured(t *testing.T) {
	needs(t, "ip")
	for _, test := range []struct {
		name     string
		flags    []string
		mtu      int
		mac      string
		has      []string
		hasNot   []string
		route4   string
		resolver string
	}{
		{"by default", nil, 65520, "", []string{container4, container6}, nil, gateway4, resolver4},
		{"mtu and mac", []string{"--mtu", "1400", "--mac", "02:00:5e:10:00:01"}, 1400, "02:00:5e:10:00:01", []string{container4}, nil, gateway4, resolver4},
		{"another plan", []string{"--cidr", "10.77.0.0/16", "--cidr6", "fd77::/64"}, 65520, "", []string{"10.77.0.100", "fd77::100"}, []string{container4, container6}, "10.77.0.2", "10.77.0.3"},
		{"no IPv6", []string{"--no-ipv6", "--mtu", "576"}, 576, "", []string{container4}, []string{container6}, gateway4, resolver4},
	} {
		t.Run(test.name, func(t *testing.T) {
			serveDNS(t, outsideAddr4)
			c := connected(t, test.flags...)
			l := tapOf(t, c)
			if l.MTU != test.mtu || test.mac != "" && l.Address != test.mac {
				t.Errorf("mtu %d, mac %s; want %d, %s", l.MTU, l.Address, test.mtu, test.mac)
			}
			for _, a := range test.has {
				if !l.has(a) {
					t.Errorf("no address %s", a)
				}
			}
			for _, a := range test.hasNot {
				if l.has(a) {
					t.Errorf("address %s", a)
				}
			}
			if out := c.must(t, "ip", "route"); !strings.Contains(out, "default via "+test.route4+" dev tap0") {
				t.Errorf("no default route by %s: %s", test.route4, out)
			}
			c.must(t, "ping", "-c", "1", "-W", "10", "127.0.0.1") // lo is up
			if out := c.must(t, "dig", "+short", "+time=10", "@"+test.resolver, "a.test"); out != "198.51.100.9\n" {
				t.Errorf("the resolver says %q", out)
			}
			works(t, c.net, echoServers(t)[:1])
		})
	}
}

// Networks of the host that the container's own hide are said, and no others.
func TestShadowedNetworks(t *testing.T) {
	for flags, want := range map[string]string{
		"--cidr 203.0.113.0/25": "203.0.113.0/24 of world",
		"--cidr6 2001:db8::/64": "2001:db8::/64 of world",
		"--cidr 10.99.0.0/16":   "",
	} {
		out := lab.home.must(t, runLine(append(strings.Fields(flags), "true")...)...)
		if n := strings.Count(out, "shadowed:"); want == "" && n != 0 || want != "" && (n != 1 || !strings.Contains(out, want)) {
			t.Errorf("%s: %q, want %q once", flags, out, want)
		}
	}
}

// IPv6 works in the first second: no duplicate address detection holds it up.
func TestIPv6AtOnce(t *testing.T) {
	servers := echoServers(t)
	c := connected(t)
	if out := c.must(t, "ip", "-6", "addr", "show", "dev", "tap0", "tentative"); strings.Contains(out, container6) {
		t.Errorf("tentative: %s", out)
	}
	works(t, c.net, servers)
}

func TestQueues(t *testing.T) {
	needs(t, "ip")
	c := connected(t, "--queues", "2")
	if out := c.must(t, "ip", "-details", "link", "show", "dev", "tap0"); !strings.Contains(out, " numqueues 2 ") {
		t.Errorf("want 2 queues: %s", out)
	}
	servers := echoServers(t)
	for range 20 {
		works(t, c.net, servers)
	}
}

// A container that configures itself: addresses by DHCP and by router advertisements.
func TestSelfConfigured(t *testing.T) {
	needs(t, "busybox", "ip")
	servers := echoServers(t)
	c := connected(t, "--no-configure")
	if l := tapOf(t, c); l.has(container4) || l.has(container6) {
		t.Fatalf("--no-configure: %+v", l)
	}
	t.Run("DHCP", func(t *testing.T) {
		script := filepath.Join(t.TempDir(), "script")
		if err := os.WriteFile(script, []byte(`#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip link set $interface mtu $mtu
ip route add default via $router
echo "lease $lease dns $dns"
`), 0o755); err != nil {
			t.Fatal(err)
		}
		c.sh(t, "ip link set lo up; ip link set tap0 up")
		// With -a it asks by ARP whether somebody has the address already: nobody may answer.
		out := c.must(t, "busybox", "udhcpc", "-a", "-i", "tap0", "-n", "-q", "-f", "-s", script, "-O", "mtu")
		if !strings.Contains(out, "dns "+resolver4) {
			t.Errorf("no resolver in the lease: %s", out)
		}
		if l := tapOf(t, c); !l.has(container4) || l.MTU != 65520 {
			t.Errorf("after DHCP: %+v", l)
		}
		works(t, c.net, servers[:1])
	})
	t.Run("router advertisement", func(t *testing.T) {
		c.sh(t, "echo 1 >/proc/sys/net/ipv6/conf/tap0/accept_ra; ip link set tap0 down; ip link set tap0 up")
		eventually(t, "an address and a route come by router advertisement", func() bool {
			return strings.Contains(c.must(t, "ip", "-6", "addr", "show", "dev", "tap0", "-tentative"), "inet6 fd00::") &&
				strings.Contains(c.must(t, "ip", "-6", "route"), "default via fe80:")
		})
		works(t, c.net, servers[1:])
	})
}
