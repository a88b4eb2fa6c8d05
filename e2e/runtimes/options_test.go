package runtimes

import (
	"strings"
	"testing"
)

// wantLines checks that each of some texts is in what a command printed.
func wantLines(t *testing.T, got string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
}

// TestDefaults is what a container without options finds: slirp4netns's addresses, both families, names.
func TestDefaults(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.outside.serve(t, "tcp", "[::]:8000")
		got := p.shell(t, "--network slirp4netns", `
			ip -4 -o addr show tap0; ip route; ip -o link show tap0; cat /etc/resolv.conf
			curl -sS http://outside.test:8000/; echo
			dig +short host.test
			dig +tcp +short host.test`)
		wantLines(t, got, "inet 10.0.2.100/24", "default via 10.0.2.2", "mtu 65520", "nameserver 10.0.2.3\n", hostAddr4+"\n"+hostAddr4)
		if !strings.Contains(got, "\n"+hostAddr4+"\n") && !strings.Contains(got, "\n"+hostAddr6+"\n") {
			t.Errorf("outside saw another client than the host:\n%s", got)
		}
	})
}

// TestCIDR moves the network: all addresses of it, and the container's files, follow.
func TestCIDR(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.outside.serve(t, "tcp", outsideAddr4+":8000")
		got := p.shell(t, "--network slirp4netns:cidr=10.9.8.0/24", `
			ip -4 -o addr show tap0; ip route; cat /etc/resolv.conf
			dig +short outside.test A
			curl -sS http://outside.test:8000/`)
		wantLines(t, got, "10.9.8.100/24", "default via 10.9.8.2", "nameserver 10.9.8.3\n", "\n"+outsideAddr4+"\n", "\n"+hostAddr4)

		p.web(t, "--publish 8080:80 --network slirp4netns:cidr=10.9.8.0/24,port_handler=slirp4netns")
		wantWeb(t, p.outside, hostAddr4+":8080")
	})
}

func TestMTU(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		wantLines(t, p.shell(t, "--network slirp4netns:mtu=1400", "ip link show tap0"), " mtu 1400 ")
	})
}

// TestHostLoopback reaches a server on the host's loopback by the gateway's address, if and only if that is asked for.
func TestHostLoopback(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.host.serve(t, "tcp", "127.0.0.1:8000")
		if got := p.shell(t, "--network slirp4netns:allow_host_loopback=true", "curl -sS http://10.0.2.2:8000/"); got != "127.0.0.1" {
			t.Errorf("the host's server answers %q", got)
		}
		got := p.shell(t, "--network slirp4netns", "curl -sS http://10.0.2.2:8000/ || echo no")
		if got != "no" {
			t.Errorf("the host's loopback is open to every container: %q", got)
		}
		if got := p.shell(t, "--network slirp4netns:allow_host_loopback=false", "curl -sS http://10.0.2.2:8000/ || echo no"); got != "no" {
			t.Errorf("the host's loopback is open although that was forbidden: %q", got)
		}
	})
}

// TestIPv6 is there unless it is turned off.
func TestIPv6(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.outside.serve(t, "tcp", "["+outsideAddr6+"]:8000")
		// The address comes with the first router advertisement, and works once the kernel has looked for another owner.
		script := `
			until ip -6 -o addr show dev tap0 scope global -tentative | grep -q fd00:; do sleep 0.05; done
			ip -6 -o addr show dev tap0 scope global
			curl -sS http://[` + outsideAddr6 + `]:8000/`
		wantLines(t, p.shell(t, "--network slirp4netns:enable_ipv6=true", script), "inet6 fd00::", "\n"+hostAddr6)
		wantLines(t, p.shell(t, "--network slirp4netns", script), "inet6 fd00::", "\n"+hostAddr6)

		got := p.shell(t, "--network slirp4netns:enable_ipv6=false", "ip -6 route show default; curl -sS http://["+outsideAddr6+"]:8000/ || echo no")
		if got != "no" {
			t.Errorf("IPv6 is there although it was turned off:\n%s", got)
		}
	})
}

// TestOutboundAddr chooses by what address of the host its containers are seen: by number and by interface.
func TestOutboundAddr(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		const second = "203.0.113.9"
		p.root(t, "ip", "addr", "add", second+"/24", "dev", "up0")
		t.Cleanup(func() { p.root(t, "ip", "addr", "del", second+"/24", "dev", "up0") })
		p.root(t, "ip", "addr", "add", "192.0.2.9/32", "dev", "lo")
		t.Cleanup(func() { p.root(t, "ip", "addr", "del", "192.0.2.9/32", "dev", "lo") })
		p.outside.serve(t, "tcp", outsideAddr4+":8000")
		p.outside.serve(t, "tcp", "["+outsideAddr6+"]:8000")
		p.outside.serveEcho(t, outsideAddr4+":8000")
		ask := "curl -sS http://" + outsideAddr4 + ":8000/; echo; socat UDP:" + outsideAddr4 + ":8000 SYSTEM:'echo ask; head -c 16 >&2' 2>&1"
		got := p.shell(t, "--network slirp4netns:outbound_addr="+second, ask)
		wantLines(t, got, second+"\n", "ask\n"+second+":")
		wantLines(t, p.shell(t, "--network slirp4netns:outbound_addr=up0", ask), hostAddr4)
		got = p.shell(t, "--network slirp4netns:outbound_addr6="+hostAddr6, `
			until ip -6 -o addr show dev tap0 scope global -tentative | grep -q fd00:; do sleep 0.05; done
			curl -sS http://[`+outsideAddr6+`]:8000/`)
		if got != hostAddr6 {
			t.Errorf("outside sees %q", got)
		}
	})
}

// TestUserns gives the container a user namespace of its own, below podman's or beside it.
func TestUserns(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.outside.serve(t, "tcp", outsideAddr4+":8000")
		for _, mode := range []string{"keep-id", "auto", "nomap"} {
			p.each(t, mode, func(t *testing.T) {
				if got := p.shell(t, "--userns "+mode+" --network slirp4netns", "curl -sS http://outside.test:8000/"); got != hostAddr4 && got != hostAddr6 {
					t.Errorf("outside sees %q", got)
				}
				p.web(t, "--name web --userns "+mode+" --user 0 --publish 8080:80 --network slirp4netns:port_handler=slirp4netns")
				wantWeb(t, p.outside, hostAddr4+":8080")
			})
		}
	})
}

// TestInfo is how podman shows what it uses.
func TestInfo(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		const format = "{{.Host.Slirp4NetNS.Executable}} {{.Host.Slirp4NetNS.Version}}"
		wantLines(t, p.do(t, "info", "--format", format), bin+"/usernet usernet ")
		p.flags = []string{"--network-cmd-path", bin + "/slirp4netns"}
		wantLines(t, p.do(t, "info", "--format", format), bin+"/slirp4netns slirp4netns version ", "commit: ", "libslirp: ", "SLIRP_CONFIG_VERSION_MAX: ")
	})
}
