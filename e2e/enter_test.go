package e2e

import (
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// echoServers are servers outside for works.
func echoServers(t testing.TB) []netip.AddrPort {
	return []netip.AddrPort{
		lab.outside.serveTCP(t, outsideAddr4+":0", echo),
		lab.outside.serveTCP(t, "["+outsideAddr6+"]:0", echo),
	}
}

func works(t testing.TB, p *place, servers []netip.AddrPort) {
	t.Helper()
	for _, s := range servers {
		if err := reaches(p, s); err != nil {
			t.Errorf("from the container to %s: %v", s, err)
		}
	}
}

// makers are the ways in which namespaces come to be: with owners that map our user to root, to itself, and
// not at all, and nested ones, where /proc/PID/ns/user is not the owner of the network namespace.
func makers() map[string][]string {
	m := map[string][]string{
		"root mapped":  rootMapped,
		"keep-id":      {"unshare", "--user", "--map-current-user", "--net", "--mount"},
		"unmapped":     {"unshare", "--user", "--net", "--mount"},
		"bwrap":        {"bwrap", "--unshare-user", "--unshare-net", "--bind", "/", "/", "--dev", "/dev", "--proc", "/proc"},
		"bwrap as 12":  {"bwrap", "--unshare-user", "--uid", "12", "--gid", "12", "--unshare-net", "--dev-bind", "/", "/", "--dev", "/dev"},
		"userns below": {"unshare", "--user", "--map-root-user", "--net", "--mount", "unshare", "--user", "--map-root-user"},
		"two deep":     {"unshare", "--user", "--map-root-user", "unshare", "--user", "--map-root-user", "--net", "--mount"},
	}
	if realRoot {
		m["no user namespace"] = []string{"unshare", "--net", "--mount"}
		m["of another user"] = append([]string{"setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups"}, rootMapped...)
	}
	return m
}

func TestEnter(t *testing.T) {
	needs(t, "bwrap", "setpriv")
	servers := echoServers(t)
	for name, maker := range makers() {
		t.Run(name, func(t *testing.T) {
			c := newContainerBy(t, maker...)
			u := attach(t, c)
			works(t, c.net, servers)
			u.end(t)
			if hasInterface(t, c, "tap0") {
				t.Error("the TAP is still there after a clean end")
			}
		})
	}
}

// hasInterface asks in the container's network namespace only: where its user is not mapped, nothing can be executed with rights.
func hasInterface(t testing.TB, c *container, name string) bool {
	t.Helper()
	found := false
	c.net.do(func() {
		text, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			t.Error(err)
		}
		found = strings.Contains(string(text), name+":")
	})
	return found
}

// The namespace can be named in every way that the usage tells.
func TestForms(t *testing.T) {
	servers := echoServers(t)
	for _, test := range []struct {
		name, tap string
		args      func(pid string) []string
	}{
		{"PID", "tap0", func(pid string) []string { return []string{pid} }},
		{"PID TAPNAME", "net0", func(pid string) []string { return []string{pid, "net0"} }},
		{"PATH", "tap0", func(pid string) []string { return []string{"/proc/" + pid + "/ns/net"} }},
		{"--netns-path", "tap0", func(pid string) []string { return []string{"--netns-path", "/proc/" + pid + "/ns/net"} }},
		{"--netns-path TAPNAME", "net0", func(pid string) []string { return []string{"--netns-path=/proc/" + pid + "/ns/net", "net0"} }},
		{"--tap-name", "fifteenletters0", func(pid string) []string { return []string{"--tap-name", "fifteenletters0", pid} }},
		{"--userns-path", "tap0", func(pid string) []string { return []string{"--userns-path", "/proc/" + pid + "/ns/user", pid} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newContainer(t)
			u := launch(t, test.args(strconv.Itoa(c.pid))...)
			if !hasInterface(t, c, test.tap) {
				t.Errorf("no interface %s", test.tap)
			}
			works(t, c.net, servers)
			u.end(t)
		})
	}
}

// What does not work says why and what to do about it.
func TestEnterErrors(t *testing.T) {
	needs(t, "ip")
	served := newContainer(t)
	serving := strconv.Itoa(attach(t, served).cmd.Process.Pid)
	pid := strconv.Itoa(served.pid)

	c := newContainer(t)
	other := strconv.Itoa(c.pid)
	c.must(t, "ip", "link", "add", "veth9", "type", "veth", "peer", "name", "veth8")
	openTAP(t, c, "theirs")
	for _, test := range []struct {
		name string
		args []string
		want []string // all of them
		code int
	}{
		{"no such process", []string{"4194301"}, []string{"no such process"}, 1},
		{"no such path", []string{"/nonexistent/netns"}, []string{"/nonexistent/netns", "no such file"}, 1},
		{"not a namespace", []string{"/dev/null"}, []string{"/dev/null", "not a", "name a network namespace"}, 1},
		{"another namespace", []string{"/proc/" + pid + "/ns/user"}, []string{"not a network namespace"}, 1},
		{"name too long", []string{pid, "sixteen-letters0"}, []string{"sixteen-letters0", "15"}, 2},
		{"served already", []string{pid}, []string{"busy", "another usernet serves it", "process " + serving + ")"}, 1},
		{"in use", []string{other, "theirs"}, []string{"theirs is busy", "choose another name", "/proc/*/fdinfo/*"}, 1},
		{"no TAP", []string{other, "veth9"}, []string{"veth9 is no TAP", "choose another name"}, 1},
		{"no argument", nil, []string{"PID"}, 2},
		{"unknown flag", []string{"--nonsense", pid}, []string{"--nonsense"}, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			out, code := lab.home.run(t, append([]string{binary}, test.args...)...)
			if code != test.code {
				t.Errorf("status %d, want %d", code, test.code)
			}
			saysAll(t, out, test.want...)
		})
	}
}

// openTAP opens a TAP in the container as some other program would.
func openTAP(t testing.TB, c *container, name string) {
	t.Helper()
	var err error
	c.net.do(func() {
		var fd int
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			return
		}
		t.Cleanup(func() { unix.Close(fd) })
		var request *unix.Ifreq
		if request, err = unix.NewIfreq(name); err != nil {
			return
		}
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	})
	if err != nil {
		t.Fatalf("open a TAP: %v", err)
	}
}

func saysAll(t testing.TB, out string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(strings.ToLower(out), strings.ToLower(w)) {
			t.Errorf("%q does not say %q", strings.TrimSpace(out), w)
		}
	}
}

// withMounts is home behind a mount namespace in which a script ran first.
func withMounts(script string) where {
	return where{place: lab.host, prefix: append([]string{"unshare", "--mount", "sh", "-ec", script + `; exec "$@"`, "sh"}, lab.home.prefix...)}
}

func TestNoTun(t *testing.T) {
	c := newContainer(t)
	for _, form := range [][]string{{strconv.Itoa(c.pid)}, {"run", "--", "true"}} {
		out, code := withMounts("mount -t tmpfs none /dev/net").run(t, append([]string{binary}, form...)...)
		if code == 0 {
			t.Errorf("usernet %v without /dev/net/tun: status 0", form)
		}
		saysAll(t, out, "/dev/net/tun", "modprobe tun")
	}
}

// A device of mode 0600, as the kernel makes it and udev does not leave it, is told with its remedy.
func TestTunForbidden(t *testing.T) {
	if realRoot {
		return // nothing is forbidden to it; the ordinary user's run tests this
	}
	closed := ""
	filepath.WalkDir("/dev", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type()&fs.ModeCharDevice != 0 {
			if info, err := d.Info(); err == nil && info.Mode().Perm()&0o066 == 0 && info.Sys().(*syscall.Stat_t).Uid != uint32(os.Getuid()) {
				closed = path
			}
		}
		return nil
	})
	if closed == "" {
		t.Skip("no device below /dev is closed to ordinary users, to stand in for a closed /dev/net/tun")
	}
	c := newContainer(t)
	for _, form := range [][]string{{strconv.Itoa(c.pid)}, {"run", "--", "true"}} {
		out, code := withMounts("mount --bind "+closed+" /dev/net/tun").run(t, append([]string{binary}, form...)...)
		if code == 0 {
			t.Errorf("usernet %v with a closed /dev/net/tun: status 0", form)
		}
		saysAll(t, out, "/dev/net/tun", "chmod", "666")
	}
}

// Where user namespaces are forbidden, usernet run says which sysctl.
func TestUserNamespacesForbidden(t *testing.T) {
	if realRoot {
		return // the limit would be the machine's; the ordinary user's run has one of the lab's own
	}
	const limit = "/proc/sys/user/max_user_namespaces"
	before, err := os.ReadFile(limit)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, limit, "0")
	t.Cleanup(func() { writeFile(t, limit, strings.TrimSpace(string(before))) })
	out, code := lab.home.run(t, binary, "run", "--", "true")
	if code != 125 {
		t.Errorf("status %d, want 125", code)
	}
	saysAll(t, out, "user.max_user_namespaces")
}

// What a system lacks is said in one line, with the remedy.
func TestWhatIsMissing(t *testing.T) {
	needs(t, "prlimit", "setpriv")
	c := newContainer(t)
	pid := strconv.Itoa(c.pid)
	// Not by way of home, which is entered through /proc.
	noProc := where{place: lab.host, prefix: []string{"unshare", "--mount", "sh", "-ec", `mount -t tmpfs none /proc; exec "$@"`, "sh"}}
	rootWithout := []string{"setpriv", "--bounding-set=-all", "--inh-caps=-all"}
	for _, test := range []struct {
		name string
		at   where
		args []string
		want []string
		code int // of run; of the other form 1
	}{
		{"files", lab.home, []string{"prlimit", "--nofile=63"}, []string{"open files is 63", "needs 64", "ulimit -n"}, 125},
		{"a few files", lab.home, []string{"prlimit", "--nofile=64"}, nil, 0},
		{"proc", noProc, nil, []string{"mount -t proc proc /proc"}, 125},
		{"CAP_SETFCAP", lab.root, rootWithout, []string{"CAP_SETFCAP", "uid 0"}, 125},
	} {
		t.Run(test.name, func(t *testing.T) {
			out, code := test.at.run(t, append(append([]string{}, test.args...), runLine("--", "true")...)...)
			if code != test.code || test.code != 0 && strings.Count(out, "usernet: ") != 1 {
				t.Errorf("run: status %d, want %d: %s", code, test.code, out)
			}
			saysAll(t, out, test.want...)
			if test.code == 0 || test.name == "CAP_SETFCAP" {
				return
			}
			out, code = test.at.run(t, append(append([]string{}, test.args...), binary, pid)...)
			if code != 1 || strings.Count(out, "usernet: ") != 1 {
				t.Errorf("usernet PID: status %d: %s", code, out)
			}
			saysAll(t, out, test.want...)
		})
	}
}

// SIGKILL leaves no process of ours behind, helper or other.
func TestKillLeavesNothing(t *testing.T) {
	needs(t, "bwrap")
	for name, maker := range makers() {
		t.Run(name, func(t *testing.T) {
			c := newContainerBy(t, maker...)
			u := begin(t, strconv.Itoa(c.pid))
			t.Logf("%d processes", len(processesOf(binary)))
			u.signal(t, syscall.SIGKILL)
			u.wait(t)
			eventually(t, "no process of usernet is left", func() bool { return len(processesOf(binary)) == 0 })
		})
	}
}

// A usernet that starts after one was killed resumes: the container's interface, addresses and routes are as they were, and
// connections are possible again.
func TestAdoption(t *testing.T) {
	needs(t, "ip")
	servers := echoServers(t)
	c := newContainer(t)
	killed := begin(t, strconv.Itoa(c.pid))
	works(t, c.net, servers)
	c.sh(t, "ip addr add 10.0.2.201/24 dev tap0; ip addr add fd00::201/64 dev tap0 nodad; ip route add 198.51.100.0/24 via 10.0.2.2 dev tap0 src 10.0.2.201")
	state := func() string {
		return c.sh(t, "ip -o addr show dev tap0 | sed 's/valid_lft.*//'; ip link show dev tap0 | grep -o 'mtu.*\\|link/.*' | sed 's/ qdisc.*//'; ip route; ip -6 route | sed 's/ expires.*//' | sort")
	}
	before := state()
	killed.signal(t, syscall.SIGKILL)
	killed.wait(t)
	if !hasInterface(t, c, "tap0") {
		t.Fatal("the TAP went with the process")
	}
	u := launch(t, strconv.Itoa(c.pid))
	if after := state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	works(t, c.net, servers)
	u.end(t)
	if hasInterface(t, c, "tap0") {
		t.Error("the TAP is still there after a clean end")
	}
}

// The path form ends when the path no longer names the namespace.
func TestPathEnds(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, path string, c *container){
		"unmounted": func(t *testing.T, path string, c *container) { lab.root.must(t, "umount", path) },
		"unmounted and removed": func(t *testing.T, path string, c *container) {
			lab.root.sh(t, "umount "+path+"; rm "+path)
		},
		"another namespace mounted over": func(t *testing.T, path string, c *container) {
			lab.root.must(t, "mount", "--bind", "/proc/self/ns/net", path)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t)
			path := filepath.Join(t.TempDir(), "netns")
			writeFile(t, path, "")
			lab.root.must(t, "mount", "--bind", fmt.Sprintf("/proc/%d/ns/net", c.pid), path)
			t.Cleanup(func() {
				for unix.Unmount(path, unix.MNT_DETACH) == nil { // one upon the other
				}
			})
			u := begin(t, path)
			works(t, c.net, echoServers(t))
			end(t, path, c)
			endsWell(t, u)
			if hasInterface(t, c, "tap0") {
				t.Error("the TAP is still there after a clean end")
			}
		})
	}
}
