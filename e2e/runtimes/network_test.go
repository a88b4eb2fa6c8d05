package runtimes

import (
	"fmt"
	"testing"
)

// TestNetwork has two containers on a network that podman makes: they talk by address and by name, and publish
// ports. podman's bridge lies in a namespace of its own, whose way out usernet is.
func TestNetwork(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.outside.serve(t, "tcp", outsideAddr4+":8000")
		p.do(t, "network", "create", "usernet")
		p.web(t, "--name a --network usernet --publish 8080:80")
		p.web(t, "--name b --network usernet --publish 8081:80")
		wantWeb(t, p.host, "127.0.0.1:8080", "127.0.0.1:8081")
		wantWeb(t, p.outside, hostAddr4+":8080", hostAddr4+":8081")

		address := p.do(t, "inspect", "--format", "{{.NetworkSettings.Networks.usernet.IPAddress}}", "a")
		for _, to := range []string{address, "a", "a.dns.podman"} {
			if got := p.do(t, "exec", "b", "curl", "-sS", "http://"+to+"/"); got != "hello" {
				t.Errorf("b gets %q from %s", got, to)
			}
		}
		if got := p.do(t, "exec", "b", "curl", "-sS", "http://outside.test:8000/"); got != hostAddr4 {
			t.Errorf("outside sees the members as %q", got)
		}
		if got := p.serving(); len(got) != 1 {
			t.Errorf("two members have %d ways out: %q", len(got), got)
		}

		// The other stays as it was.
		p.do(t, "rm", "--force", "--time", "0", "a")
		refused(t, p.host, "127.0.0.1:8080")
		wantWeb(t, p.outside, hostAddr4+":8081")
		p.do(t, "rm", "--force", "--time", "0", "b")
		eventually(t, p.quiet)
	})
}

// TestUnshareRootlessNetns is a command in the namespace that holds podman's bridges.
func TestUnshareRootlessNetns(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.outside.serve(t, "tcp", outsideAddr4+":8000")
		wantLines(t, p.do(t, "unshare", "--rootless-netns", "ip", "-4", "-o", "addr", "show"), "10.0.2.100/24")
		if got := p.do(t, "unshare", "--rootless-netns", "curl", "-sS", "http://outside.test:8000/"); got != hostAddr4 && got != hostAddr6 {
			t.Errorf("outside sees %q", got)
		}
		// podman takes the namespace away, and its way out, with the last container on a bridge and not before.
		p.do(t, runArgs("run --rm --network podman", "true")...)
		eventually(t, p.quiet)
	})
}

// TestTutorialWeb is a web server of a container as three others see it: the host, another machine, and a second rootless
// container that knows the host's address.
func TestTutorialWeb(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		for _, handler := range []string{"slirp4netns", "rootlesskit"} {
			p.each(t, handler, func(t *testing.T) {
				p.web(t, "--name web --publish 8080:80 --network slirp4netns:port_handler="+handler)
				wantWeb(t, p.host, "127.0.0.1:8080", hostAddr4+":8080")
				wantWeb(t, p.outside, hostAddr4+":8080")
				if got := p.shell(t, "--network slirp4netns", "curl -sS http://"+hostAddr4+":8080/"); got != "hello" {
					t.Errorf("the second container sees %q", got)
				}
			})
		}
	})
}

// TestTutorialLowPort is refused below 1024 with the remedy in the error, and the remedy works.
func TestTutorialLowPort(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		const options = "--publish 80:80 --network slirp4netns:port_handler=slirp4netns"
		_, err := p.try(runArgs("run --rm "+options, "true")...)
		if err == nil {
			t.Fatal("an ordinary user publishes port 80")
		}
		wantLines(t, err.Error(), "net.ipv4.ip_unprivileged_port_start=80")
		p.sysctl(t, "net/ipv4/ip_unprivileged_port_start", "80")
		p.web(t, "--name web "+options)
		wantWeb(t, p.outside, hostAddr4+":80")
	})
}

// TestTutorialPing needs the user's group in the host's ping_group_range, and works at once when it is there.
func TestTutorialPing(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		// The container is allowed to ping; whether the host is decides.
		ping := []string{"run", "--rm", "--network", "slirp4netns", "--sysctl", "net.ipv4.ping_group_range=0 0", image, "ping", "-c", "1", "-W", "5"}
		p.sysctl(t, "net/ipv4/ping_group_range", "1 0") // nobody
		if out, err := p.try(append(ping, outsideAddr4)...); err == nil {
			t.Errorf("ping is answered although nobody may ping:\n%s", out)
		}
		p.sysctl(t, "net/ipv4/ping_group_range", fmt.Sprint(uid, uid))
		wantLines(t, p.do(t, append(ping, outsideAddr4)...), " 0% packet loss")
	})
}

// TestTutorialIsolation: two containers with networks of their own cannot reach each other, though they have the same address.
func TestTutorialIsolation(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.web(t, "--name web --network slirp4netns")
		if got := p.do(t, "exec", "web", "curl", "-sS", "http://10.0.2.100/"); got != "hello" {
			t.Errorf("the container itself sees %q", got)
		}
		if got := p.shell(t, "--network slirp4netns", "curl -sS http://10.0.2.100/ || echo no"); got != "no" {
			t.Errorf("another container sees %q", got)
		}
		refused(t, p.host, "127.0.0.1:80", hostAddr4+":80")
	})
}
