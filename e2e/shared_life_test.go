package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// What tests of survival have: two members on veths, and one on TAPs unless the machine's root, who may connect everybody by a veth, runs them.
type crew struct {
	*sharing
	members map[string]*container
	was     map[string]sharedMember
}

func newCrew(t *testing.T) *crew {
	t.Helper()
	c := &crew{newSharing(t), map[string]*container{}, map[string]sharedMember{}}
	c.do(t, "network", "create", "web")
	for _, name := range []string{"a", "b"} {
		c.members[name], c.was[name] = c.running(t, "web", name)
	}
	c.members["tap"], c.was["tap"] = c.joined(t, "web", "tap", "-p", "7400:80")
	for _, m := range c.members {
		m.net.serve(t, "tcp", ":80", echo)
	}
	return c
}

// same fails unless the members are what they were, and all that they had works. On which cable they are need not stay.
func (c *crew) same(t *testing.T) {
	t.Helper()
	now := map[string]sharedMember{}
	for _, m := range c.inspect(t, "web").Members {
		now[m.Name] = m
	}
	if len(now) != len(c.was) {
		t.Errorf("there are %d members, and were %d", len(now), len(c.was))
	}
	outside := lab.outside.serve(t, "tcp", outsideAddr4+":0", echo)
	for name, was := range c.was {
		is := now[name]
		is.Cable = was.Cable
		if fmt.Sprint(is) != fmt.Sprint(was) {
			t.Errorf("%s is %+v, and was %+v", name, is, was)
		}
		for _, to := range c.was {
			mustReach(t, c.members[name].net, joinHostPort(to.IPv4, 80))
			mustReach(t, c.members[name].net, joinHostPort(to.IPv6, 80))
		}
		mustReach(t, c.members[name].net, outside.String())
		if got := strings.TrimSpace(c.members[name].must(t, "dig", "+short", "@"+c.inspect(t, "web").Gateway, "-q", "tap.web.usernet.internal")); got != c.was["tap"].IPv4 {
			t.Errorf("%s finds tap at %q", name, got)
		}
	}
	mustReach(t, lab.outside, joinHostPort(hostAddr4, 7400))
}

// A daemon that is killed is started again and finds everything; members on veths meanwhile lose not one packet.
func TestSharedDaemonKilled(t *testing.T) {
	needs(t, "dig", "ping")
	c := newCrew(t)
	// 200 packets in 2 s, amid which the daemon is killed: by then some have come back.
	ping := c.members["a"].start(t, nil, "ping", "-O", "-i", "0.01", "-c", "200", c.was["b"].IPv4)
	ping.has(t, "icmp_seq=20 ")
	c.kill(t, "usernet-daemon")
	c.same(t)
	ping.wait(t)
	if out := ping.out.String(); !strings.Contains(out, "200 packets transmitted, 200 received") {
		t.Errorf("members lost packets between them:\n%s", tail(out))
	}
	c.kill(t, "usernet-daemon")
	c.same(t)
}

// A daemon that the keeper has started again takes new members and records them, as the first one did.
func TestSharedJoinAfterDaemonKilled(t *testing.T) {
	s := newSharing(t)
	s.do(t, "network", "create", "web")
	old, _ := s.joined(t, "web", "old")
	for i, killed := range [][]string{{"usernet-daemon"}, {"usernet-daemon"}, {"usernet-keeper"}, {"usernet-daemon"}} {
		s.kill(t, killed...)
		s.do(t, "network", "ls")
		c, m := s.joined(t, "web", fmt.Sprintf("new%d", i))
		c.net.serve(t, "tcp", ":80", echo)
		mustReach(t, old.net, joinHostPort(m.IPv4, 80))
	}
	s.kill(t, "usernet-keeper", "usernet-daemon")
	if n := len(s.inspect(t, "web").Members); n != 5 {
		t.Errorf("%d members are found again, want 5", n)
	}
}

// Members that die together are gone together, and those that stay lose nothing.
func TestSharedManyDie(t *testing.T) {
	needs(t, "ping", "ip")
	c := newCrew(t)
	links := func() int { return strings.Count(c.do(t, "netns", "exec", "web", "--", "ip", "-o", "link"), "\n") }
	before := links()
	var dying []*container
	for i := range 8 {
		m, _ := c.joined(t, "web", fmt.Sprintf("dying%d", i), "-p", fmt.Sprintf("%d:80", 7440+i))
		dying = append(dying, m)
	}
	ping := c.members["a"].start(t, nil, "ping", "-O", "-i", "0.01", "-c", "100", c.was["b"].IPv4)
	ping.has(t, "icmp_seq=10 ")
	for _, m := range dying {
		if err := syscall.Kill(m.pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "they are gone", func() bool { return len(c.inspect(t, "web").Members) == len(c.was) })
	if n := links(); n != before {
		t.Errorf("%d interfaces are left, and %d were before", n, before)
	}
	c.same(t)
	ping.wait(t)
	if out := ping.out.String(); !strings.Contains(out, "100 packets transmitted, 100 received") {
		t.Errorf("those that stay lost packets:\n%s", tail(out))
	}
	again, _ := c.joined(t, "web", "dying0", "-p", "7440:80")
	again.net.serve(t, "tcp", ":80", echo)
	mustReach(t, lab.outside, joinHostPort(hostAddr4, 7440))
}

// Of members and networks that are gone no file is left, whoever was killed.
func TestSharedLeavesNoFiles(t *testing.T) {
	s := newSharing(t)
	s.do(t, "network", "create", "web")
	s.joined(t, "web", "left")
	var dead []*container
	for _, name := range []string{"dead", strings.Repeat("long", 15)} {
		c, _ := s.joined(t, "web", name)
		dead = append(dead, c)
	}
	files := func(pattern string) []string {
		all, err := filepath.Glob(filepath.Join(s.dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	if got := files("web/*"); len(got) != 3 {
		t.Fatalf("the members' sockets are %v, want 3", got)
	}
	s.kill(t, "usernet-keeper", "usernet-daemon")
	for _, c := range dead {
		syscall.Kill(c.pid, syscall.SIGKILL)
		<-c.ended
	}
	s.do(t, "network", "ls")
	if got := files("web/*"); len(got) != 1 {
		t.Errorf("there are %v, want the socket of the one member", got)
	}
	s.do(t, "detach", "web", "left")
	if got := files("web/*"); len(got) != 0 {
		t.Errorf("there are %v, want none", got)
	}
	s.do(t, "network", "rm", "web")
	eventually(t, "daemon and keeper end", func() bool { return len(s.processes()) == 0 })
	if got := append(files("web"), files("*.sock")...); len(got) != 0 {
		t.Errorf("there are %v, want none", got)
	}
}

// Without its keeper the daemon goes on, and the next command starts a keeper, which starts the daemon again.
func TestSharedKeeperKilled(t *testing.T) {
	needs(t, "dig")
	c := newCrew(t)
	daemon := c.pid(t, "usernet-daemon")
	c.kill(t, "usernet-keeper")
	c.do(t, "network", "ls")
	if c.pid(t, "usernet-daemon") != daemon {
		t.Error("the daemon is another one")
	}
	c.pid(t, "usernet-keeper")
	c.same(t)
	c.kill(t, "usernet-daemon")
	c.pid(t, "usernet-daemon")
	c.same(t)
}

// When both are killed the bridges are gone, and the next command makes them anew for the members that live.
func TestSharedBothKilled(t *testing.T) {
	needs(t, "dig")
	c := newCrew(t)
	dead, _ := c.joined(t, "web", "dead")
	c.kill(t, "usernet-keeper", "usernet-daemon")
	syscall.Kill(dead.pid, syscall.SIGKILL)
	<-dead.ended
	c.do(t, "network", "ls")
	c.same(t)
}

// What somebody removes in the namespace of the bridges comes back; a member that removes its own interface has left.
func TestSharedInterfacesRemoved(t *testing.T) {
	needs(t, "dig", "ip")
	c := newCrew(t)
	for _, name := range []string{"u1", "b1"} {
		daemon := c.pid(t, "usernet-daemon")
		c.do(t, "netns", "exec", "web", "--", "ip", "link", "del", name)
		eventually(t, "another daemon serves", func() bool {
			pids := c.called("usernet-daemon")
			return len(pids) == 1 && pids[0] != daemon
		})
		c.same(t)
	}
	c.members["b"].must(t, "ip", "link", "del", "eth0")
	eventually(t, "b has left", func() bool { return len(c.inspect(t, "web").Members) == 2 })
	delete(c.was, "b")
	c.same(t)
}

// The host changes its network, and members have the new one at once: another resolver, another address.
func TestSharedHostChanges(t *testing.T) {
	needs(t, "dig", "ip")
	s := newSharing(t)
	s.do(t, "network", "create", "web")
	c, _ := s.joined(t, "web", "a")
	serveDNS(t, outsideAddr4)
	const other = "198.51.100.54"
	serveDNS(t, other)
	finds := func() bool {
		out, _ := c.run(t, "dig", "+short", "+tries=1", "web.test")
		return strings.TrimSpace(out) != "" && !strings.Contains(out, ";;")
	}
	eventually(t, "a name of the world is found", finds)
	writeFile(t, "/etc/resolv.conf", "nameserver "+deadAddr4+"\n")
	t.Cleanup(func() { writeFile(t, "/etc/resolv.conf", "nameserver "+outsideAddr4+"\n") })
	replaceFile(t, "/etc/resolv.conf", "nameserver "+other+"\n")
	eventually(t, "it is found by the new resolver", finds)

	seen := func() string {
		server := lab.outside.serve(t, "tcp", outsideAddr4+":0", tellPeer)
		from, _, err := peerSeen(c.net, server.String())
		if err != nil {
			return err.Error()
		}
		return from.Addr().String()
	}
	if got := seen(); got != hostAddr4 {
		t.Errorf("the world sees %s, want %s", got, hostAddr4)
	}
	const moved = "203.0.113.99"
	lab.root.sh(t, "ip addr add "+moved+"/24 dev world; ip route replace default via "+outsideAddr4+" src "+moved)
	t.Cleanup(func() {
		lab.root.sh(t, "ip route replace default via "+outsideAddr4+"; ip addr del "+moved+"/24 dev world")
	})
	lab.root.sh(t, "ip route add "+outsideAddr4+"/32 dev world src "+moved)
	t.Cleanup(func() { lab.root.sh(t, "ip route del "+outsideAddr4+"/32 dev world") })
	eventually(t, "the world sees the new address", func() bool { return seen() == moved })
}

// Members come and go, and nothing of them stays, here or there. Those that stay do not notice.
func TestSharedComings(t *testing.T) {
	needs(t, "ping", "ip")
	const rounds, present = 100, 50 // of two guests
	c := newCrew(t)
	for i := len(c.was); i < present; i++ {
		crowd := newContainerBy(t, rootMapped...)
		c.do(t, "attach", "web", fmt.Sprint(crowd.pid), "--name", fmt.Sprintf("crowd%d", i))
	}
	guests := []*container{newContainerBy(t, rootMapped...), newContainerBy(t, rootMapped...)}
	round := func() {
		for i, g := range guests {
			c.do(t, "attach", "web", fmt.Sprint(g.pid), "--name", fmt.Sprintf("guest%d", i), "-p", fmt.Sprintf("%d:80", 7410+i))
		}
		for i := range guests {
			c.do(t, "detach", "web", fmt.Sprintf("guest%d", i))
		}
	}
	round() // what comes once stays
	count := func() string {
		links := c.do(t, "netns", "exec", "web", "--", "ip", "-o", "link")
		return fmt.Sprintf("%d interfaces, %d helpers", strings.Count(links, "\n"), len(childrenOf(c.pid(t, "usernet-daemon"))))
	}
	fds := func() int {
		all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.pid(t, "usernet-daemon")))
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	before, open := count(), fds()
	ping := c.members["b"].start(t, nil, "ping", "-O", "-i", "0.02", c.was["a"].IPv4)
	ping.has(t, "icmp_seq=2 ")
	for range rounds {
		round()
	}
	ping.signal(t, syscall.SIGINT)
	ping.wait(t)
	if out := ping.out.String(); !strings.Contains(out, " 0% packet loss") {
		t.Errorf("members lost packets while others came and went:\n%s", tail(out))
	}
	if after := count(); after != before {
		t.Errorf("%s, and before %s", after, before)
	}
	eventually(t, fmt.Sprintf("the daemon has %d files open again", open), func() bool { return fds() <= open })
	for _, g := range guests {
		if out := g.must(t, "ip", "-o", "link"); strings.Count(out, "\n") != 1 {
			t.Errorf("a guest keeps an interface:\n%s", out)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(c.dir, "web", "guest*.sock")); len(left) > 0 {
		t.Errorf("sockets are left: %v", left)
	}
	if got := len(c.inspect(t, "web").Members); got != present {
		t.Errorf("there are %d members, want %d", got, present)
	}
	for name, m := range c.members {
		mustReach(t, m.net, joinHostPort(c.was["a"].IPv4, 80))
		mustReach(t, lab.outside, joinHostPort(hostAddr4, 7400))
		if is := c.member(t, "web", name); is.IPv4 != c.was[name].IPv4 {
			t.Errorf("%s has %s, and had %s", name, is.IPv4, c.was[name].IPv4)
		}
	}
}

// Ports that were added at once are all found again, but for the one that somebody has taken meanwhile; that comes back when it is free, and
// is not forgotten when others are added or the daemon dies before.
func TestSharedPortsComeBack(t *testing.T) {
	s := newSharing(t)
	s.do(t, "network", "create", "web")
	c, _ := s.joined(t, "web", "a")
	c.net.serve(t, "tcp", ":80", echo)
	const first, count = 7420, 12
	var g sync.WaitGroup
	for i := range count {
		g.Go(func() {
			if out, code := s.run(t, binary, "port", "add", "--network", "web", "--name", "a", fmt.Sprintf("%d:80", first+i)); code != 0 {
				t.Errorf("port add: status %d: %s", code, out)
			}
		})
	}
	g.Wait()
	reached := func() (n int) {
		for i := range count {
			if echoes(lab.outside, joinHostPort(hostAddr4, first+i)) {
				n++
			}
		}
		return n
	}
	if n := reached(); n != count {
		t.Fatalf("%d ports are reached, want %d", n, count)
	}
	s.kill(t, "usernet-keeper", "usernet-daemon")
	taken := lab.host.listen(t, fmt.Sprintf(":%d", first+3))
	go func() {
		for {
			other, err := taken.Accept()
			if err != nil {
				return
			}
			other.Close()
		}
	}()
	s.do(t, "network", "ls")
	if n := reached(); n != count-1 {
		t.Errorf("%d ports are reached with one taken, want %d", n, count-1)
	}
	s.do(t, "port", "add", "--network", "web", "--name", "a", "7440:80")
	s.kill(t, "usernet-daemon")
	s.do(t, "network", "ls")
	if n := reached(); n != count-1 {
		t.Errorf("%d ports are reached by another daemon, want %d", n, count-1)
	}
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the port is published again", func() bool { return reached() == count })
	mustReach(t, lab.outside, joinHostPort(hostAddr4, 7440))
}
