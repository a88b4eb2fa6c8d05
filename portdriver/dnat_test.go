package portdriver

import (
	"strconv"
	"strings"
	"testing"

	"usernet/tap/taptest"
)

// shell runs commands in a namespace.
func shell(t *testing.T, in *taptest.Namespace, commands ...string) {
	t.Helper()
	text := strings.Join(append([]string{"PATH=$PATH:/usr/sbin:/sbin"}, commands...), "\n")
	if out, err := in.Command("sh", "-ec", text).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", text, err, out)
	}
}

func needNFT(t *testing.T, l *lab) {
	t.Helper()
	if l.space.Command("sh", "-c", "PATH=$PATH:/usr/sbin:/sbin; command -v nft").Run() != nil {
		t.Skip("no nft (nftables) here")
	}
}

// dnat puts a container into l's container, behind a bridge, with a sayWho server on port 80, to which port 8080 is led as docker and
// kube-proxy do it.
func dnat(t *testing.T, l *lab) {
	t.Helper()
	needNFT(t, l)
	inner := taptest.NewNSIn(t, l.space, false)
	shell(t, l.space,
		"ip link add br0 type bridge", "ip address add 172.17.0.1/16 dev br0", "ip address add fd17::1/64 dev br0 nodad", "ip link set br0 up",
		"ip link add veth0 type veth peer name eth0 netns "+strconv.Itoa(inner.PID), "ip link set veth0 master br0 up",
		"echo 1 >/proc/sys/net/ipv4/ip_forward", "echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
	shell(t, inner,
		"ip link set lo up", "ip address add 172.17.0.2/16 dev eth0", "ip address add fd17::2/64 dev eth0 nodad", "ip link set eth0 up",
		"ip route add default via 172.17.0.1", "ip route add default via fd17::1")
	for _, to := range []struct{ family, notLo, server string }{{"ip", "127.0.0.0/8", "172.17.0.2:80"}, {"ip6", "::1", "[fd17::2]:80"}} {
		shell(t, l.space,
			"nft add table "+to.family+" nat",
			"nft 'add chain "+to.family+" nat prerouting { type nat hook prerouting priority -100; }'",
			"nft 'add chain "+to.family+" nat output { type nat hook output priority -100; }'",
			"nft add rule "+to.family+" nat prerouting fib daddr type local tcp dport 8080 dnat to "+to.server,
			"nft add rule "+to.family+" nat output "+to.family+" daddr != "+to.notLo+" fib daddr type local tcp dport 8080 dnat to "+to.server)
	}
	// The bridge looks for neighbours of IPv6 once it knows its own address to be its alone.
	shell(t, l.space, "ping -c 1 -w 20 172.17.0.2", "ping -c 1 -w 20 fd17::2")
	(&lab{t: t, ns: inner.Open(t), driver: l.driver}).sayWho("tcp", "[::]:80")
}

// What DNAT in the container leads away takes the stack path, under the client's own address, and is not tried over lo
// by each client; when the DNAT is gone the kernel path is back.
func TestDNATInTheContainer(t *testing.T) {
	l := newLab(t, labConfig{})
	dnat(t, l)
	f4, f6 := l.add("203.0.113.1:0:8080")[0], l.add("[2001:db8:1::1]:0:8080")[0]
	for range 3 {
		if who := seenBy(t, dial(t, "tcp", at(host4, f4))); who.Addr() != host4 {
			t.Errorf("seen as %v", who)
		}
		if who := seenBy(t, dial(t, "tcp", at(host6, f6))); who.Addr() != host6 {
			t.Errorf("seen as %v", who)
		}
	}
	for _, f := range []Forward{f4, f6} {
		if f, _ := l.driver.Get(f.ID); f.Path != PathStack || !strings.Contains(f.Note, errLedAway.Error()) || f.Refused != 0 {
			t.Errorf("%+v", f)
		}
	}
	if i := l.driver.Info(); i.IPv4.Path != PathKernel || i.IPv4.Detours != 1 || i.IPv6.Path != PathKernel || i.IPv6.Detours != 1 {
		t.Errorf("%+v, %+v", i.IPv4, i.IPv6)
	}
	shell(t, l.space, "nft delete table ip nat", "nft delete table ip6 nat")
	l.sayWho("tcp", "[::]:8080")
	for addr, f := range map[string]Forward{at(host4, f4): f4, at(host6, f6): f6} {
		until(t, "the kernel path is back", func() bool {
			seenBy(t, dial(t, "tcp", addr))
			f, _ := l.driver.Get(f.ID)
			return f.Path == PathKernel && f.Note == ""
		})
	}
	if i := l.driver.Info(); i.IPv4.Detours != 0 || i.IPv6.Detours != 0 {
		t.Errorf("%+v, %+v", i.IPv4, i.IPv6)
	}
}

// A firewall in the container that trusts no foreign address on lo costs the kernel path, and no client its connection.
func TestFirewallOnLo(t *testing.T) {
	l := newLab(t, labConfig{})
	needNFT(t, l)
	l.sayWho("tcp4", "0.0.0.0:80")
	f := l.add("203.0.113.1:0:80")[0]
	shell(t, l.space, "nft add table ip wall", "nft 'add chain ip wall input { type filter hook input priority 0; }'",
		"nft add rule ip wall input iifname lo ip saddr != 127.0.0.0/8 drop")
	for range 2 {
		if who := seenBy(t, dial(t, "tcp", at(host4, f))); who.Addr() != host4 {
			t.Errorf("seen as %v", who)
		}
	}
	if f, _ := l.driver.Get(f.ID); f.Path != PathStack || !strings.Contains(f.Note, errLedAway.Error()) {
		t.Errorf("%+v", f)
	}
}

// A server on the loopback alone is reached where a firewall drops what comes by the TAP: the look there after the refusal is short, and rare.
func TestFirewallOnTAP(t *testing.T) {
	l := newLab(t, labConfig{})
	needNFT(t, l)
	l.sayWho("tcp4", "127.0.0.1:80")
	id := l.add("203.0.113.1:0:80")[0].ID
	shell(t, l.space, "nft add table ip wall", "nft 'add chain ip wall input { type filter hook input priority 0; }'",
		"nft add rule ip wall input iifname tap0 drop")
	f, _ := l.driver.Get(id)
	for range 3 {
		seenBy(t, dial(t, "tcp", at(host4, f)))
	}
	fw := l.driver.all()[0]
	fw.mu.Lock()
	defer fw.mu.Unlock()
	if pause := fw.detours[0].pause; pause < 2*askTime {
		t.Errorf("after silence the stack is asked again in %v", pause)
	}
}
