package runtimes

import (
	"fmt"
	"strings"
	"testing"
)

// TestStopStartRestart brings the network back each time, and leaves nothing in between.
func TestStopStartRestart(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		for _, handler := range []string{"slirp4netns", "rootlesskit"} {
			p.each(t, handler, func(t *testing.T) {
				p.web(t, "--name web --publish 8080:80 --network slirp4netns:port_handler="+handler)
				wantWeb(t, p.outside, hostAddr4+":8080")
				p.do(t, "stop", "--time", "0", "web")
				refused(t, p.host, "127.0.0.1:8080")
				eventually(t, p.quiet)
				p.do(t, "start", "web")
				wantWeb(t, p.outside, hostAddr4+":8080")
				p.do(t, "restart", "--time", "0", "web")
				wantWeb(t, p.outside, hostAddr4+":8080")
				if got := p.serving(); len(got) != 1 {
					t.Errorf("a container has %d processes of usernet: %q", len(got), got)
				}
			})
		}
	})
}

// quiet is an error as long as a process of usernet runs.
func (p *podman) quiet() error {
	if left := p.processes(); len(left) > 0 {
		return fmt.Errorf("still runs: %q", left)
	}
	return nil
}

// TestContainerDies of its own and by a signal: usernet goes with it, and with conmon.
func TestContainerDies(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		for _, how := range []struct{ name, container, kill string }{
			{"by itself", "true", ""},
			{"killed", "sleep 600", "podman kill -s KILL c"},
			{"conmon killed", "sleep 600", "kill -KILL $(podman inspect --format {{.State.ConmonPid}} c) $(podman inspect --format {{.State.Pid}} c)"},
		} {
			p.each(t, how.name, func(t *testing.T) {
				p.do(t, runArgs("run --detach --name c --publish 8080:80 --network slirp4netns:port_handler=slirp4netns", strings.Fields(how.container)...)...)
				if how.kill != "" {
					p.user(t, "sh", "-c", how.kill)
				}
				eventually(t, p.quiet)
				refused(t, p.host, "127.0.0.1:8080")
				p.try("rm", "--force", "--time", "0", "c") // podman 5 says once that conmon is gone, and removes it the second time
			})
		}
	})
}

// TestPod has two containers that share a loopback, and publishes one of them.
func TestPod(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		for _, handler := range []string{"slirp4netns", "rootlesskit"} {
			p.each(t, handler, func(t *testing.T) {
				p.do(t, "pod", "create", "--name", "pod", "--publish", "8080:80", "--network", "slirp4netns:port_handler="+handler)
				p.web(t, "--pod pod --name web")
				wantWeb(t, p.outside, hostAddr4+":8080")
				if got := p.shell(t, "--pod pod", "curl -sS http://127.0.0.1/"); got != "hello" {
					t.Errorf("the pod's other container sees %q", got)
				}
				p.do(t, "pod", "restart", "pod")
				wantWeb(t, p.outside, hostAddr4+":8080")
				p.do(t, "pod", "stop", "--time", "0", "pod")
				eventually(t, p.quiet)
			})
		}
	})
}

// TestKube writes a pod down and makes it anew of what was written.
func TestKube(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.do(t, "pod", "create", "--name", "pod", "--publish", "8080:80", "--network", "slirp4netns")
		p.web(t, "--pod pod --name web")
		p.do(t, "generate", "kube", "--filename", "pod.yaml", "pod")
		t.Cleanup(func() { p.user(t, "rm", "pod.yaml") })
		wantLines(t, p.user(t, "cat", "pod.yaml"), "hostPort: 8080")
		p.do(t, "pod", "rm", "--force", "--time", "0", "pod")

		for _, network := range []string{"slirp4netns", "slirp4netns:port_handler=slirp4netns", ""} { // "": podman makes a bridge
			p.each(t, strings.ReplaceAll("network "+network, ":", " "), func(t *testing.T) {
				play := []string{"play", "kube", "--replace", "pod.yaml"}
				if network != "" {
					play = append(play, "--network", network)
				}
				p.do(t, play...)
				wantWeb(t, p.host, "127.0.0.1:8080")
				wantWeb(t, p.outside, hostAddr4+":8080")
				p.do(t, "play", "kube", "--down", "pod.yaml")
				eventually(t, p.quiet)
			})
		}
	})
}

// TestBuild is of the steps of a build, which have the network of whatever slirp4netns is in PATH.
func TestBuild(t *testing.T) {
	eachPodman(t, func(t *testing.T, p *podman) {
		p.outside.serve(t, "tcp", outsideAddr4+":8000")
		const file = "FROM " + image + "\nRUN ip -o addr show tap0 && curl -sS http://outside.test:8000/ >/seen\nCMD [\"cat\", \"/seen\"]\n"
		t.Run("podman build", func(t *testing.T) {
			if out, err := p.feed("user", file, "podman", "build", "--no-cache", "--tag", "localhost/built", "-"); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			defer p.do(t, "rmi", "--force", "localhost/built")
			if got := p.do(t, "run", "--rm", "--network", "none", "localhost/built"); got != hostAddr4 && got != hostAddr6 {
				t.Errorf("the build was seen as %q", got)
			}
		})
		t.Run("buildah run", func(t *testing.T) {
			container := p.user(t, "buildah", "from", image)
			defer p.user(t, "buildah", "rm", container)
			if got := p.user(t, "buildah", "run", container, "--", "curl", "-sS", "http://"+outsideAddr4+":8000/"); got != hostAddr4 {
				t.Errorf("buildah run was seen as %q", got)
			}
		})
		eventually(t, p.quiet)
	})
}
