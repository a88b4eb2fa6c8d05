package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Containers of separate user namespaces, and one of usernet run, reach each other by name and address, the world, and are reached
// by clients who keep their address.
func TestShared(t *testing.T) {
	needs(t, "dig")
	s := newSharing(t)
	s.do(t, "network", "create", "web", "--subnet", "10.89.7.0/24")
	a, am := s.joined(t, "web", "a", "--alias", "first", "-p", "7101:80")
	b, bm := s.joined(t, "web", "b", "--ip", "10.89.7.77", "--mac", "02:00:00:00:00:77")
	c, cm := s.running(t, "web", "c", "-p", "7103:80")
	if am.Cable != "tap" && !realRoot || bm.IPv4 != "10.89.7.77" || bm.MAC != "02:00:00:00:00:77" || cm.Cable != "veth" {
		t.Errorf("members %+v, %+v and %+v: want TAPs, the address and MAC that were asked for, a veth", am, bm, cm)
	}
	members := []struct {
		c    *container
		m    sharedMember
		port int // published
	}{{a, am, 7101}, {b, bm, 0}, {c, cm, 7103}}
	for _, m := range members {
		m.c.net.serve(t, "tcp", ":80", echo)
		m.c.net.serve(t, "tcp", ":81", tellPeer)
	}
	for _, from := range members {
		for _, to := range members {
			mustReach(t, from.c.net, joinHostPort(to.m.IPv4, 80))
			mustReach(t, from.c.net, joinHostPort(to.m.IPv6, 80))
			name := to.m.Name + ".web.usernet.internal"
			for _, q := range []struct{ ask, want string }{
				{"-t A -q " + to.m.Name, to.m.IPv4}, {"-t AAAA -q " + to.m.Name, to.m.IPv6},
				{"-t A -q " + name, to.m.IPv4}, {"-x " + to.m.IPv4, name + "."}, {"-x " + to.m.IPv6, name + "."},
			} {
				if got := strings.TrimSpace(from.c.must(t, append([]string{"dig", "+short"}, strings.Fields(q.ask)...)...)); got != q.want {
					t.Errorf("%s asks for %s: %q, want %q", from.m.Name, q.ask, got, q.want)
				}
			}
		}
	}
	if got := strings.TrimSpace(b.must(t, "dig", "+short", "first")); got != am.IPv4 {
		t.Errorf("alias: %q, want %q", got, am.IPv4)
	}
	if got := b.must(t, "dig", "nobody.web.usernet.internal"); !strings.Contains(got, "NXDOMAIN") {
		t.Errorf("a name that nobody has:\n%s", got)
	}

	t.Run("out", func(t *testing.T) {
		for _, addr := range []string{outsideAddr4, outsideAddr6} {
			server := lab.outside.serve(t, "tcp", net.JoinHostPort(addr, "0"), echo)
			for _, m := range members {
				mustReach(t, m.c.net, server.String())
			}
		}
		onHost := lab.host.serve(t, "tcp", net.JoinHostPort(hostAddr4, "0"), echo)
		mustReach(t, c.net, joinHostPort(alias4, int(onHost.Port())))
	})
	t.Run("in", func(t *testing.T) {
		for _, m := range members {
			if m.port == 0 {
				continue
			}
			mustReach(t, lab.outside, joinHostPort(hostAddr4, m.port))
			mustReach(t, lab.outside, joinHostPort(hostAddr6, m.port))
			s.do(t, "port", "add", "--network", "web", "--name", m.m.Name, fmt.Sprintf("%d:81", m.port+10))
			for _, host := range []struct{ at, see string }{{hostAddr4, outsideAddr4}, {hostAddr6, outsideAddr6}} {
				seen, own, err := peerSeen(lab.outside, joinHostPort(host.at, m.port+10))
				if err != nil {
					t.Fatal(err)
				}
				if seen != own || seen.Addr() != netip.MustParseAddr(host.see) {
					t.Errorf("%s sees %v, want the client, %v", m.m.Name, seen, own)
				}
			}
			// Another member comes by the host's address.
			mustReach(t, b.net, joinHostPort(alias4, m.port))
		}
	})
}

// Datagrams to published ports reach a member that has not said anything yet, on either cable, also after the daemon was killed.
func TestSharedUDP(t *testing.T) {
	s := newSharing(t)
	s.do(t, "network", "create", "web")
	silent, silentM := s.joined(t, "web", "silent", "-p", "7500:5000/udp")
	loud, loudM := s.running(t, "web", "loud", "-p", "7501:5000/udp")
	for addr, at := range map[string]*place{silentM.IPv4: silent.net, silentM.IPv6: silent.net, loudM.IPv4: loud.net, loudM.IPv6: loud.net} {
		at.serveUDP(t, joinHostPort(addr, 5000), same)
	}
	heard := func(port int) {
		t.Helper()
		for _, host := range []string{hostAddr4, hostAddr6} {
			c := lab.outside.connect(t, "udp", joinHostPort(host, port))
			mustAnswer(t, c)
		}
	}
	heard(7501)
	heard(7500)
	s.kill(t, "usernet-daemon")
	s.do(t, "network", "ls")
	heard(7501)
	heard(7500)
}

// Who asks by DHCP gets the address that it has.
func TestSharedDHCP(t *testing.T) {
	needs(t, "busybox")
	s := newSharing(t)
	s.do(t, "network", "create", "web")
	c, m := s.joined(t, "web", "a")
	out := c.must(t, "busybox", "udhcpc", "-i", "eth0", "-q", "-n", "-f", "-s", "/bin/true")
	if want := "lease of " + m.IPv4 + " obtained"; !strings.Contains(out, want) {
		t.Errorf("udhcpc says\n%s\nwant %q", out, want)
	}
}

// However many commands find nothing at once, one keeper and one daemon come of it, and all that was asked for.
func TestSharedStartersMeet(t *testing.T) {
	const starters = 8
	s := newSharing(t)
	var all []*process
	for i := range starters {
		all = append(all, s.start(t, nil, binary, "network", "create", fmt.Sprintf("n%d", i)))
	}
	for _, p := range all {
		if code := p.wait(t); code != 0 {
			t.Errorf("%s: status %d: %s", p.name, code, p.out)
		}
	}
	s.pid(t, "usernet-keeper")
	s.pid(t, "usernet-daemon")
	if got := strings.Count(s.do(t, "network", "ls"), "usernet.internal"); got != starters {
		t.Errorf("there are %d networks, want %d", got, starters)
	}
}

// The walk through in docs/shared.md does what it says.
func TestSharedWalkThrough(t *testing.T) {
	needs(t, "busybox", "bash", "unshare", "ip")
	text, err := os.ReadFile("../docs/shared.md")
	if err != nil {
		t.Fatal(err)
	}
	script, wants := "set -e -m\n", 0 // -m: jobs, as at a prompt
	for line := range strings.Lines(string(text)) {
		if command, ok := strings.CutPrefix(line, "    $ "); ok {
			script += command
			if strings.Contains(command, "busybox nc ") && !strings.Contains(command, "-e echo") {
				wants++
			}
		}
	}
	if strings.Count(script, "\n") < 12 || wants < 3 {
		t.Fatalf("there is no walk through:\n%s", script)
	}
	bin := t.TempDir()
	if err := os.Symlink(binary, filepath.Join(bin, "usernet")); err != nil {
		t.Fatal(err)
	}
	s := newSharing(t)
	out := s.must(t, "env", "PATH="+bin+":"+os.Getenv("PATH"), "bash", "-c", script)
	for _, want := range []string{"web.usernet.internal", "*:8081", "other: 10.89.1.", "\"name\": \"other\"", "b1 "} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in what it prints:\n%s", want, out)
		}
	}
	if got := strings.Count(strings.ReplaceAll("\n"+out, "\nhello", "\n\nhello"), "\nhello\n"); got != wants {
		t.Errorf("%d times hello, want %d:\n%s", got, wants, out)
	}
}

// What is on one network alone is not seen from another, and an internal one has no way out; a container on two sees both.
func TestSharedSeparation(t *testing.T) {
	needs(t, "dig")
	s := newSharing(t)
	s.do(t, "network", "create", "front")
	s.do(t, "network", "create", "back", "--internal")
	both := newContainerBy(t, rootMapped...)
	s.attach(t, both, "front", "app", "-p", "7200:80")
	inBack := s.attach(t, both, "back", "app")
	if inBack.Ifname != "eth1" {
		t.Errorf("the second network's interface is %s, want eth1", inBack.Ifname)
	}
	front, frontM := s.joined(t, "front", "proxy")
	back, backM := s.joined(t, "back", "db")
	both.asks(t, s.inspect(t, "front").Gateway)
	for _, c := range []*container{both, front, back} {
		c.net.serve(t, "tcp", ":80", echo)
	}
	mustReach(t, both.net, joinHostPort(frontM.IPv4, 80))
	mustReach(t, both.net, joinHostPort(backM.IPv4, 80))
	mustReach(t, back.net, joinHostPort(inBack.IPv4, 80))
	for name, want := range map[string]string{"proxy": frontM.IPv4, "db": backM.IPv4} {
		if got := strings.TrimSpace(both.must(t, "dig", "+short", name)); got != want {
			t.Errorf("the container on both networks finds %s at %q, want %q", name, got, want)
		}
	}
	if got := front.must(t, "dig", "db.back.usernet.internal"); !strings.Contains(got, "NXDOMAIN") {
		t.Errorf("a member of the front finds one of the back:\n%s", got)
	}
	outside := lab.outside.serve(t, "tcp", net.JoinHostPort(outsideAddr4, "0"), echo)
	mustReach(t, front.net, outside.String())
	for _, to := range []string{outside.String(), joinHostPort(frontM.IPv4, 80), joinHostPort(alias4, 7200)} {
		if echoes(back.net, to) {
			t.Errorf("a member of the internal network reaches %s", to)
		}
	}
	if echoes(front.net, joinHostPort(backM.IPv4, 80)) {
		t.Error("a member of the front reaches one of the back")
	}
	s.refused(t, []string{"port", "add", "--network", "back", "--name", "db", "7201:80"}, "internal")
	// The way out goes on by the other network when the first is left.
	s.do(t, "network", "create", "side")
	s.attach(t, both, "side", "app")
	s.do(t, "detach", "front", "app")
	mustReach(t, both.net, outside.String())
}

// A member that is named by a path is one as long as the path leads to its namespace, whatever daemon looks.
func TestSharedPath(t *testing.T) {
	needs(t, "mount", "umount")
	s := newSharing(t)
	s.do(t, "network", "create", "web")
	path := filepath.Join(t.TempDir(), "ns")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	c := newContainerBy(t, rootMapped...)
	lab.root.must(t, "mount", "--bind", fmt.Sprintf("/proc/%d/ns/net", c.pid), path)
	mounted := true
	t.Cleanup(func() {
		if mounted {
			lab.root.run(t, "umount", path)
		}
	})
	s.do(t, "attach", "web", "--netns-path", path, "--name", "p")
	m := s.member(t, "web", "p")
	c.net.serve(t, "tcp", ":80", echo)
	other, _ := s.running(t, "web", "other")
	mustReach(t, other.net, joinHostPort(m.IPv4, 80))
	s.kill(t, "usernet-daemon")
	s.do(t, "network", "ls")
	mustReach(t, other.net, joinHostPort(m.IPv4, 80))
	lab.root.must(t, "umount", path) // nothing of ours keeps it busy
	mounted = false
	eventually(t, "the member is gone", func() bool { return len(s.inspect(t, "web").Members) == 1 })
}

// When a member's process ends, its port, address and name are free, and the others do not notice.
func TestSharedDeath(t *testing.T) {
	s := newSharing(t)
	s.do(t, "network", "create", "web", "--subnet", "10.89.8.0/30") // room for one
	gone, was := s.joined(t, "web", "x", "-p", "7300:80")
	s.refused(t, []string{"run", "--network", "web", "--name", "y", "true"}, "all addresses", "--subnet")
	syscall.Kill(gone.pid, syscall.SIGKILL)
	eventually(t, "the member is gone", func() bool { return len(s.inspect(t, "web").Members) == 0 })
	next, is := s.running(t, "web", "x", "-p", "7300:80")
	if is.IPv4 != was.IPv4 {
		t.Errorf("the name's next member has %s, want %s as before", is.IPv4, was.IPv4)
	}
	next.net.serve(t, "tcp", ":80", echo)
	mustReach(t, lab.outside, joinHostPort(hostAddr4, 7300))
	if got := s.do(t, "netns", "exec", "web", "--", "ls", "/proc/self/ns/net"); !strings.Contains(got, "net") {
		t.Errorf("netns exec: %q", got)
	}
	if out, code := s.run(t, binary, "netns", "exec", "web", "--", "sh", "-c", "exit 7"); code != 7 {
		t.Errorf("netns exec has status %d, want the command's 7: %s", code, out)
	}
}

// A daemon without members ends, and the next command finds the networks again; a persistent network keeps it.
func TestSharedIdle(t *testing.T) {
	s := newSharing(t)
	s.do(t, "network", "create", "web", "--subnet", "10.89.9.0/24")
	eventually(t, "daemon and keeper end", func() bool { return len(s.processes()) == 0 })
	if n := s.inspect(t, "web"); n.Subnet != "10.89.9.0/24" {
		t.Errorf("the network came back with %s", n.Subnet)
	}
	s.do(t, "network", "rm", "web")
	s.refused(t, []string{"network", "inspect", "web"}, "none of that name")
	// Nor does it stay where nobody finds it any more.
	if err := os.RemoveAll(s.dir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "daemon and keeper end again", func() bool { return len(s.processes()) == 0 })
}

// A network that is to be served all the time is.
func TestSharedPersist(t *testing.T) {
	s := newSharing(t)
	s.do(t, "network", "create", "web", "--persist")
	s.do(t, "network", "create", "other")
	other := newSharing(t) // without such a network, and begun later
	other.do(t, "network", "create", "web")
	daemon := s.pid(t, "usernet-daemon")
	eventually(t, "the other daemon has had its time", func() bool { return len(other.processes()) == 0 })
	if s.pid(t, "usernet-daemon") != daemon {
		t.Error("the daemon of a persistent network is another one")
	}
	s.do(t, "network", "rm", "web")
	eventually(t, "daemon and keeper end", func() bool { return len(s.processes()) == 0 })
}

// What users get wrong is said clearly, and harms nobody.
func TestSharedRefuses(t *testing.T) {
	s := newSharing(t)
	s.do(t, "network", "create", "web", "--subnet", "10.89.10.0/24")
	c, m := s.joined(t, "web", "a")
	other := newContainerBy(t, rootMapped...)
	pid := fmt.Sprint(other.pid)
	dead := lab.home.start(t, nil, "true")
	dead.wait(t)
	for _, r := range []struct {
		args  string
		words []string
	}{
		{"network create web", []string{"already"}},
		{"network create x --subnet 10.89.10.128/25", []string{"overlaps", "web"}},
		{"network create x --subnet 203.0.113.0/24", []string{"overlaps", "this host's own"}},
		{"network create X", []string{"did you mean"}},
		{"network create x --mtu 70000", []string{"MTU"}},
		{"network rm web", []string{"1 members"}},
		{"network rm nope", []string{"none of that name"}},
		{"attach nope " + pid + " --name b", []string{"none of that name"}},
		{"attach web " + pid + " --name a", []string{"a member has it"}},
		{"attach web " + pid + " --name b --alias a", []string{"member \"a\""}},
		{"attach web " + pid + " --name b --ip " + m.IPv4, []string{"member \"a\""}},
		{"attach web " + pid + " --name b --ip 10.89.10.1", []string{"the gateway's"}},
		{"attach web " + pid + " --name b --ip 192.0.2.7", []string{"not in"}},
		{"attach web " + pid + " --name b --mac " + m.MAC, []string{"usernet's own"}},
		{"attach web " + pid + " --name b --ifname lo", []string{"interface"}},
		{"attach web " + fmt.Sprint(c.pid) + " --name b", []string{"a member already"}},
		{"attach web " + fmt.Sprint(dead.cmd.Process.Pid) + " --name b", []string{"no such process"}},
		{"attach web " + fmt.Sprint(s.pid(t, "usernet-keeper")) + " --name b", []string{"usernet itself"}},
		{"attach web --netns-path /etc/hosts --name b", []string{"ordinary file"}},
		{"attach web --netns-path " + fmt.Sprintf("/proc/%d/fd/4", s.pid(t, "usernet-keeper")) + " --name b", []string{"cannot be a member"}},
		{"detach web b", []string{"no member"}},
		{"port list --network web --name b", []string{"no member"}},
		{"netns exec nope -- true", []string{"none of that name"}},
	} {
		s.refused(t, strings.Fields(r.args), r.words...)
	}
	if got := len(s.inspect(t, "web").Members); got != 1 {
		t.Errorf("there are %d members, want the one from before", got)
	}
	other.net.serve(t, "tcp", ":80", echo)
	b := s.attach(t, other, "web", "b")
	mustReach(t, c.net, joinHostPort(b.IPv4, 80))
}

// A state that is damaged is an error that says so, and is left as it is; one of another boot is put aside.
func TestSharedState(t *testing.T) {
	s := newSharing(t)
	s.do(t, "network", "create", "web")
	eventually(t, "daemon and keeper end", func() bool { return len(s.processes()) == 0 })
	file := filepath.Join(s.dir, "state.json")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bad := string(good[:len(good)/2])
	if err := os.WriteFile(file, []byte(bad), 0o600); err != nil {
		t.Fatal(err)
	}
	s.refused(t, []string{"network", "ls"}, "state.json", "in the middle", "mv ")
	if now, err := os.ReadFile(file); err != nil || string(now) != bad {
		t.Errorf("the damaged file was touched: %v", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	old := strings.Replace(string(good), strings.TrimSpace(string(boot)), "00000000-0000-0000-0000-000000000000", 1)
	if err := os.WriteFile(file, []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := s.do(t, "network", "ls"); strings.Contains(out, "web") {
		t.Errorf("a network of another boot is there:\n%s", out)
	}
	if now, err := os.ReadFile(file + ".old"); err != nil || string(now) != old {
		t.Errorf("the file of another boot was not put aside: %v", err)
	}
}
