package runtimes

import (
	"fmt"
	"strings"
	"testing"
)

// TestPublish publishes a web server in every combination of the runtime, the name by which usernet is called, and who
// forwards the port.
func TestPublish(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		for _, runtime := range []string{"crun", "runc"} {
			for _, name := range []string{"usernet", "slirp4netns"} {
				for _, handler := range []string{"slirp4netns", "rootlesskit"} {
					p.each(t, runtime+"/"+name+"/"+handler, func(t *testing.T) {
						p := &podman{labType: p.labType, flags: []string{"--runtime", runtime, "--network-cmd-path", bin + "/" + name}}
						p.web(t, "--name web --publish 8080:80 --network slirp4netns:port_handler="+handler)
						wantWeb(t, p.host, "127.0.0.1:8080", hostAddr4+":8080")
						wantWeb(t, p.outside, hostAddr4+":8080")
						p.do(t, "rm", "--force", "--time", "0", "web")
						refused(t, p.host, "127.0.0.1:8080", hostAddr4+":8080")
					})
				}
			}
		}
	})
}

// TestClientAddress is what slirp4netns's own port handler is chosen for: the server sees who its clients are.
func TestClientAddress(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.do(t, runArgs("run --detach --publish 8080:80 --network slirp4netns:port_handler=slirp4netns",
			"socat", "TCP-LISTEN:80,fork,reuseaddr", `SYSTEM:echo $SOCAT_PEERADDR`)...)
		for _, c := range []struct {
			from *place
			to   string
			want string
		}{
			{p.outside, hostAddr4, outsideAddr4},
			{p.host, "127.0.0.1", "10.0.2.2"},
		} {
			eventually(t, func() error {
				got, err := line(c.from, "tcp", c.to+":8080", "")
				if err == nil && got != c.want {
					err = fmt.Errorf("from %s to %s: the server sees %q, want %s", c.from.name, c.to, got, c.want)
				}
				return err
			})
		}
	})
}

// TestPublishUDP sends datagrams through both port handlers.
func TestPublishUDP(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		for _, handler := range []string{"slirp4netns", "rootlesskit"} {
			p.each(t, handler, func(t *testing.T) {
				p.do(t, runArgs("run --detach --name echo --publish 5353:53/udp --network slirp4netns:port_handler="+handler,
					"socat", "UDP-LISTEN:53,fork", "PIPE")...)
				for _, from := range []*place{p.host, p.outside} {
					eventually(t, func() error {
						got, err := line(from, "udp", hostAddr4+":5353", "ask\n")
						if err == nil && got != "ask" {
							err = fmt.Errorf("the answer is %q", got)
						}
						return err
					})
				}
			})
		}
	})
}

// TestPublishIPv6 publishes at addresses of IPv6, which slirp4netns itself cannot.
func TestPublishIPv6(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.web(t, "--publish [::1]:8080:80 --publish ["+hostAddr6+"]:8081:80 --network slirp4netns:port_handler=slirp4netns")
		wantWeb(t, p.host, "[::1]:8080")
		wantWeb(t, p.outside, "["+hostAddr6+"]:8081")
		refused(t, p.outside, "["+hostAddr6+"]:8080")
	})
}

// TestPublishRange publishes several ports at once, with addresses.
func TestPublishRange(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.web(t, "--publish 8080:80 --publish 127.0.0.1:8081:80 --publish 8082-8084:80-82 --network slirp4netns:port_handler=slirp4netns")
		wantWeb(t, p.outside, hostAddr4+":8080", hostAddr4+":8082")
		wantWeb(t, p.host, "127.0.0.1:8081")
		refused(t, p.outside, hostAddr4+":8081")
	})
}

// TestPortTaken is told of in words that name the port.
func TestPortTaken(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.host.serve(t, "tcp", "0.0.0.0:8080")
		_, err := p.try(runArgs("run --rm --publish 8080:80 --network slirp4netns:port_handler=slirp4netns", "true")...)
		if err == nil || !strings.Contains(err.Error(), "8080") || !strings.Contains(err.Error(), "in use") {
			t.Errorf("publishing a taken port: %v", err)
		}
	})
}
