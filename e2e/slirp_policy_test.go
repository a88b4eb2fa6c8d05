package e2e

import (
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// The host's loopback is open in this dialect, unless it is shut: with both programs.
func TestSlirpHostLoopback(t *testing.T) {
	loop := lab.host.serveTCP(t, "127.0.0.1:0", tellPeer)
	by := netip.AddrPortFrom(netip.MustParseAddr(gateway4), loop.Port())
	for name, program := range slirps(t) {
		for _, flags := range [][]string{nil, {"--disable-host-loopback"}} {
			c := newContainer(t)
			lab.home.startSlirp(t, program, append(flags, "-c", strconv.Itoa(c.pid), "tap0")...)
			seen, _, err := peerSeen(c.net, by.String())
			if open := flags == nil; open != (err == nil) || open && seen.Addr().String() != "127.0.0.1" {
				t.Errorf("%s %v: the server sees %v, %v", name, flags, seen, err)
			}
		}
	}
}

// The outbound address is what servers see, those of the host's loopback too: with both programs. An interface has its address.
func TestSlirpOutbound(t *testing.T) {
	const second = "203.0.113.77"
	if out, err := at(lab.host, "ip", "addr", "add", second+"/24", "dev", "world"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { at(lab.host, "ip", "addr", "del", second+"/24", "dev", "world") })
	outside := lab.outside.serveTCP(t, outsideAddr4+":0", tellPeer)
	loop := lab.host.serveTCP(t, "127.0.0.1:0", tellPeer)
	loop = netip.AddrPortFrom(netip.MustParseAddr(gateway4), loop.Port())
	for name, program := range slirps(t) {
		for _, test := range []struct{ flag, outside, loopback string }{
			{"--outbound-addr=" + second, second, second},
			{"--outbound-addr=world", hostAddr4, ""}, // on the loopback slirp4netns uses the address, we the loopback's
			{"--outbound-addr=127.0.0.1", "", "127.0.0.1"},
			{"--outbound-addr=lo", "", "127.0.0.1"},
		} {
			c := newContainer(t)
			lab.home.startSlirp(t, program, test.flag, "-c", strconv.Itoa(c.pid), "tap0")
			for _, server := range []struct {
				addr netip.AddrPort
				want string
			}{{outside, test.outside}, {loop, test.loopback}} {
				if server.addr == loop && test.loopback == "" || server.addr == outside && test.outside == "" && name == "slirp4netns" {
					continue // slirp4netns lets the dial hang
				}
				seen, _, err := peerSeen(c.net, server.addr.String())
				if server.want == "" && err == nil || server.want != "" && seen.Addr().String() != server.want {
					t.Errorf("%s %s: %s sees %v, %v; want %q", name, test.flag, server.addr, seen, err, server.want)
				}
			}
		}
	}
	for flag, want := range map[string]string{"--outbound-addr=nosuch0": "no such interface", "--outbound-addr6=10.0.0.1": "not an IPv6 address", "--outbound-addr=x/y": "neither"} {
		got := refuse(t, asSlirp(t), flag, "-c", strconv.Itoa(newContainer(t).pid), "tap0")
		if got.status != 1 {
			t.Errorf("%s: status %d", flag, got.status)
		}
		saysAll(t, got.stderr, want)
	}
}

// The resolver is at +3 unless it is turned off, and moves with the network.
func TestSlirpDNS(t *testing.T) {
	needs(t, "dig")
	serveDNS(t, outsideAddr4)
	for _, test := range []struct {
		flags, resolver string
		answers         bool
	}{{"", resolver4, true}, {"--cidr=10.9.0.0/16", "10.9.0.3", true}, {"--disable-dns", resolver4, false}} {
		c := newContainer(t)
		lab.home.startSlirp(t, asSlirp(t), append(strings.Fields(test.flags), "-c", strconv.Itoa(c.pid), "tap0")...)
		out, status := c.run(t, "dig", "+short", "+time=2", "+tries=1", "@"+test.resolver, "a.test")
		if answered := status == 0 && out != "" && !strings.Contains(out, ";;"); answered != test.answers {
			t.Errorf("%q: status %d, %q", test.flags, status, out)
		}
	}
}

// Who configures the interface by DHCP gets the container's address, the gateway, the resolver and the MTU that was asked for.
func TestSlirpDHCP(t *testing.T) {
	needs(t, "busybox", "ip")
	c := newContainer(t)
	lab.home.startSlirp(t, asSlirp(t), "--mtu=1400", "--cidr=10.9.0.0/16", strconv.Itoa(c.pid), "tap0")
	c.sh(t, "ip link set tap0 up")
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n[ $1 != bound ] || echo got $ip/$mask $router $dns $mtu\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	out := c.must(t, "busybox", "udhcpc", "-a", "-i", "tap0", "-n", "-q", "-f", "-s", script, "-O", "mtu")
	if want := "got 10.9.0.100/16 10.9.0.2 10.9.0.3 1400"; !strings.Contains(out, want) {
		t.Errorf("%q does not have %q", out, want)
	}
}
