package e2e

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// containerIn is a container in another, of the same user namespace.
func containerIn(t testing.TB, outer *container) *container {
	t.Helper()
	c := &container{}
	c.process = outer.where.start(t, func(cmd *exec.Cmd) {
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close() })
	}, "unshare", "--net", "sh", "-c", "echo pid $(readlink /proc/self/ns/net); exec cat")
	c.has(t, "]\n")
	_, ns, _ := strings.Cut(strings.TrimSpace(c.out.String()), "pid ")
	c.pid = processIn(t, c.cmd.Process.Pid, ns)
	c.where = lab.root.inside(c.pid)
	c.net = enterNet(t, fmt.Sprintf("/proc/%d/ns/net", c.pid))
	return c
}

// A container that has containers behind a bridge and publishes their ports by DNAT, as docker does: whoever asks sees no difference, from the
// first on, and the list says what it costs.
func TestPortsDNAT(t *testing.T) {
	needs(t, "nft")
	p := publish(t, "-p", "8080:8080", "-p", "8081:8081")
	inner := containerIn(t, p.c)
	p.c.sh(t, fmt.Sprintf(`set -e
ip link add br0 type bridge
ip address add 172.17.0.1/16 dev br0
ip link set br0 up
ip link add veth0 type veth peer name eth0 netns %d
ip link set veth0 master br0 up
echo 1 >/proc/sys/net/ipv4/ip_forward
nft add table ip nat
nft 'add chain ip nat prerouting { type nat hook prerouting priority -100; }'
nft 'add chain ip nat output { type nat hook output priority -100; }'
nft 'add chain ip nat postrouting { type nat hook postrouting priority 100; }'
nft add rule ip nat prerouting fib daddr type local iifname != br0 tcp dport 8080 dnat to 172.17.0.2:80
nft add rule ip nat output ip daddr != 127.0.0.0/8 fib daddr type local tcp dport 8080 dnat to 172.17.0.2:80
nft add rule ip nat postrouting ip saddr 172.17.0.0/16 oifname != br0 masquerade`, inner.pid))
	inner.sh(t, "ip link set lo up && ip address add 172.17.0.2/16 dev eth0 && ip link set eth0 up && ip route add default via 172.17.0.1")
	inner.net.serveTCP(t, "172.17.0.2:80", tellPeer)
	p.c.net.serveOnly(t, "0.0.0.0:8081", tellPeer)
	for range 3 {
		for _, port := range []string{":8080", ":8081"} {
			if seen, _, err := peerSeen(lab.outside, hostAddr4+port); err != nil || seen.Addr().String() != outsideAddr4 {
				t.Errorf("%s: the server sees %v, %v; want %s", port, seen, err, outsideAddr4)
			}
		}
	}
	for _, f := range p.list(t) {
		want := map[uint16]string{8080: "stack", 8081: "kernel"}[f.HostPort]
		if f.Path != want || strings.Contains(f.Note, "DNAT") != (want == "stack") || f.Total != 3 || f.Refused != 0 {
			t.Errorf("%+v, want three connections, and now the %s path", f, want)
		}
	}
	if out := p.mustAsk(t, "info"); !strings.Contains(out, "1 by the stack path for now") {
		t.Errorf("info: %s", out)
	}
	p.idle(t)
}
