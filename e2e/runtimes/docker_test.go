package runtimes

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
)

const (
	dockerd    = "/usr/share/docker.io/contrib/dockerd-rootless.sh"
	dockerHost = "unix:///run/user/4242/docker.sock"
)

// A docker is a rootless dockerd that runs below rootlesskit, with usernet for its network as it is found in PATH.
type docker struct {
	*daemon
	lab    *labType
	parent string    // the number of rootlesskit's outer process in the lab
	nets   []process // the processes of usernet that it started
}

// startDocker starts dockerd as Debian's script does with these variables, and waits until it answers.
func startDocker(t *testing.T, lab *labType, env ...string) *docker {
	t.Helper()
	state := lab.user(t, "mktemp", "-d", home+"/docker-XXXXXX")
	t.Cleanup(func() { lab.root(t, "rm", "-rf", state) })
	before := lab.usernets()
	line := append([]string{"env", "DOCKERD_ROOTLESS_ROOTLESSKIT_FLAGS=--state-dir=" + state}, env...)
	d := &docker{daemon: startDaemon(t, lab, append(line, "sh", dockerd)...), lab: lab}
	eventually(t, func() error {
		select {
		case <-d.ended:
			t.Fatalf("dockerd has ended: %v", d.err)
		default:
		}
		_, err := d.try("version")
		return err
	})
	child, err := os.ReadFile(lab.path(state + "/child_pid"))
	if err != nil {
		t.Fatal(err)
	}
	d.parent = lab.statusOf(t, strings.TrimSpace(string(child)), "PPid")
	for _, p := range lab.usernets() {
		if !slices.Contains(before, p) {
			d.nets = append(d.nets, p)
		}
	}
	if len(d.nets) == 0 {
		t.Fatal("no usernet runs")
	}
	// However the test ends: containers are children of processes that outlive dockerd's kill.
	t.Cleanup(func() {
		select {
		case <-d.ended:
		default:
			d.end(t)
		}
	})
	return d
}

// end stops dockerd as systemd does, and expects that nothing of it stays.
func (d *docker) end(t *testing.T) {
	t.Helper()
	d.lab.user(t, "kill", "-TERM", d.parent)
	d.wait(t) // its status is rootlesskit's affair
	d.lab.gone(t, d.nets)
	eventually(t, func() error {
		if left, err := d.lab.try("user", "pgrep", "--list-full", "--uid", fmt.Sprint(uid), "dockerd|containerd|rootlesskit|docker-proxy"); err == nil {
			return errors.New("left behind: " + left)
		}
		return nil
	})
}

// try is docker's client.
func (d *docker) try(args ...string) (string, error) {
	return d.lab.try("user", append([]string{"env", "DOCKER_HOST=" + dockerHost, "DOCKER_BUILDKIT=0", "/usr/bin/docker"}, args...)...)
}

// must is try that must succeed.
func (d *docker) must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := d.try(args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// A web server with a page that says hello, beside a server of UDP that sends everything back.
var helloServers = []string{"sh", "-c", "socat UDP-RECVFROM:53,fork PIPE & exec busybox httpd -f -p 80 -h /www"}

// hello waits until the container's page can be seen from a place.
func hello(t *testing.T, from *place, address string) {
	t.Helper()
	eventually(t, func() error {
		page, err := from.get("http://" + address + "/")
		if err == nil && page != "hello\n" {
			err = fmt.Errorf("%s says %q", address, page)
		}
		return err
	})
}

func TestDocker(t *testing.T) {
	lab := needLab(t)
	lab.outside.serve(t, "tcp", outsideAddr4+":8000")
	lab.host.serve(t, "tcp", "127.0.0.1:8000")
	for _, c := range []struct{ kit, driver string }{{kit1, "builtin"}, {kit1, "slirp4netns"}, {kit3, "builtin"}} {
		t.Run(path.Base(c.kit)+"/"+c.driver, func(t *testing.T) {
			env := []string{"DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER=" + c.driver}
			if c.kit == kit3 {
				// The script prefers the name that docker's own packages give it.
				buildKit3(t, lab)
				dir := lab.user(t, "mktemp", "-d", home+"/bin-XXXXXX")
				t.Cleanup(func() { lab.root(t, "rm", "-rf", dir) })
				lab.user(t, "ln", "-s", kit3, dir+"/docker-rootlesskit")
				env = append(env, "PATH="+dir+":"+lab.user(t, "printenv", "PATH"))
			}
			d := startDocker(t, lab, env...)
			if exe, err := os.Readlink(lab.path("/proc/" + d.parent + "/exe")); err != nil || path.Base(exe) != path.Base(c.kit) {
				t.Errorf("dockerd runs below %s: %v", exe, err)
			}
			d.must(t, "import", "/opt/lab/image.tar", "lab")
			t.Run("published", func(t *testing.T) {
				d.must(t, append([]string{"run", "--detach", "--restart=always", "--stop-signal=KILL", "--name=web", "--publish=8085:80", "--publish=5353:53/udp", "lab"}, helloServers...)...)
				seen := func() {
					t.Helper()
					hello(t, lab.host, "127.0.0.1:8085")
					hello(t, lab.host, hostAddr4+":8085")
					hello(t, lab.outside, hostAddr4+":8085")
					if c.driver == "builtin" { // slirp4netns's driver has no IPv6
						hello(t, lab.host, "[::1]:8085")
						hello(t, lab.outside, "["+hostAddr6+"]:8085")
					}
				}
				seen()
				if got, err := lab.outside.askUDP(hostAddr4+":5353", "there and back"); got != "there and back" {
					t.Errorf("by UDP: %q %v", got, err)
				}
				d.must(t, "stop", "web")
				if err := lab.outside.refused(hostAddr4 + ":8085"); err != nil {
					t.Errorf("after stop: %v", err)
				}
				d.must(t, "start", "web")
				seen()
				d.must(t, "restart", "web")
				seen()
			})
			t.Run("outbound", func(t *testing.T) {
				if got := d.must(t, "run", "--rm", "lab", "curl", "-sS", "http://outside.test:8000/"); got != hostAddr4 {
					t.Errorf("outside sees a client at %q", got)
				}
				// dockerd-rootless.sh shuts the host's loopback.
				if got, err := d.try("run", "--rm", "lab", "curl", "-sS", "http://10.0.2.2:8000/"); err == nil {
					t.Errorf("the host's loopback is open: %q", got)
				}
			})
			t.Run("two containers", func(t *testing.T) {
				d.must(t, "network", "create", "blue")
				t.Cleanup(func() { d.must(t, "network", "rm", "blue") })
				d.must(t, append([]string{"run", "--detach", "--network=blue", "--name=server", "lab"}, helloServers...)...)
				t.Cleanup(func() { d.must(t, "rm", "--force", "server") })
				eventually(t, func() error {
					page, err := d.try("run", "--rm", "--network=blue", "lab", "curl", "-sS", "http://server/")
					if err == nil && page != "hello" {
						err = fmt.Errorf("server says %q", page)
					}
					return err
				})
				// dockerd's own resolver asks ours for what it does not know.
				if got := d.must(t, "run", "--rm", "--network=blue", "lab", "curl", "-sS", "http://outside.test:8000/"); got != hostAddr4 {
					t.Errorf("outside sees a client at %q", got)
				}
			})
			t.Run("build", func(t *testing.T) {
				recipe := "FROM lab\nRUN curl -sS http://outside.test:8000/ >/seen\nCMD [\"cat\", \"/seen\"]\n"
				if out, err := lab.feed("user", recipe, "env", "DOCKER_HOST="+dockerHost, "DOCKER_BUILDKIT=0", "/usr/bin/docker", "build", "--tag=built", "-"); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				if got := d.must(t, "run", "--rm", "built"); got != hostAddr4 {
					t.Errorf("outside saw a client at %q", got)
				}
			})
			t.Run("privileged port", func(t *testing.T) {
				out, err := d.try("run", "--rm", "--publish=81:80", "lab", "true")
				if err == nil || !strings.Contains(err.Error(), "net.ipv4.ip_unprivileged_port_start") {
					t.Errorf("%v %s", err, out)
				}
			})
			t.Run("dockerd again", func(t *testing.T) {
				d.end(t)
				if err := lab.outside.refused(hostAddr4 + ":8085"); err != nil {
					t.Errorf("after the end: %v", err)
				}
				again := startDocker(t, lab, env...)
				hello(t, lab.outside, hostAddr4+":8085")
				again.must(t, "rm", "--force", "web")
				again.end(t)
			})
		})
	}
}
