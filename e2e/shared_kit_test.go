package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A sharing is home's shared mode, in a runtime directory of the test's own, so that its keeper and its daemon are too.
type sharing struct {
	where
	dir string // of the state
}

func newSharing(t testing.TB) *sharing {
	t.Helper()
	run, err := os.MkdirTemp(scratch, "s")
	if err != nil {
		t.Fatal(err)
	}
	w := lab.home
	w.prefix = append(append([]string{}, w.prefix...), "env", "XDG_RUNTIME_DIR="+run)
	s := &sharing{where: w, dir: filepath.Join(run, "usernet", "shared")}
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := os.ReadFile(filepath.Join(s.dir, "daemon.log"))
			t.Logf("daemon.log:\n%s", tail(string(text)))
		}
		// The keeper tells the daemon; members that are left end with their tests' containers.
		for _, p := range s.processes() {
			syscall.Kill(p, syscall.SIGTERM)
		}
		eventually(t, "keeper and daemon end", func() bool { return len(s.processes()) == 0 })
	})
	return s
}

// processes are the keeper and the daemon of this sharing, as far as they live.
func (s *sharing) processes() (pids []int) {
	for _, name := range []string{"usernet-keeper", "usernet-daemon"} {
		pids = append(pids, s.called(name)...)
	}
	return pids
}

func (s *sharing) called(name string) (pids []int) {
	lists, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, list := range lists {
		text, _ := os.ReadFile(list)
		words := strings.Split(string(text), "\x00")
		if len(words) > 1 && words[0] == name && words[1] == s.dir {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(list)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// pid is that of the only process of a name.
func (s *sharing) pid(t testing.TB, name string) int {
	t.Helper()
	var pids []int
	eventually(t, "there is a "+name, func() bool {
		pids = s.called(name)
		return len(pids) == 1
	})
	return pids[0]
}

// kill ends processes as nothing else would, and waits until they are gone with all they had open: the command line of a process that
// ends is empty before its files are closed, so only a pidfd tells (exit_mm comes before exit_files, and exit_notify last: kernel/exit.c).
func (s *sharing) kill(t testing.TB, names ...string) {
	t.Helper()
	var ends []unix.PollFd
	for _, name := range names {
		fd, err := unix.PidfdOpen(s.pid(t, name), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		ends = append(ends, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	for _, e := range ends {
		if err := unix.PidfdSendSignal(int(e.Fd), unix.SIGKILL, nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	for i := range ends {
		eventually(t, names[i]+" is gone", func() bool {
			n, err := unix.Poll(ends[i:i+1], 0)
			return err == nil && n == 1
		})
	}
}

// do runs usernet, which must succeed.
func (s *sharing) do(t testing.TB, args ...string) string {
	t.Helper()
	return s.must(t, append([]string{binary}, args...)...)
}

// refused runs usernet, which must fail and say all of some words.
func (s *sharing) refused(t testing.TB, args []string, words ...string) {
	t.Helper()
	out, code := s.run(t, append([]string{binary}, args...)...)
	if code == 0 {
		t.Errorf("usernet %s: succeeded, want a refusal", strings.Join(args, " "))
	}
	for _, w := range words {
		if !strings.Contains(out, w) {
			t.Errorf("usernet %s: %q, want %q in it", strings.Join(args, " "), out, w)
		}
	}
}

// What tests read of inspect.
type sharedNetwork struct {
	Name, Subnet, Gateway, Gateway6 string
	Members                         []sharedMember
}

type sharedMember struct {
	Name, IPv4, IPv6, MAC, Ifname, Cable string
	Ports                                []string
}

func (s *sharing) inspect(t testing.TB, name string) (n sharedNetwork) {
	t.Helper()
	if err := json.Unmarshal([]byte(s.do(t, "network", "inspect", name)), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// member is one that there is.
func (s *sharing) member(t testing.TB, network, name string) sharedMember {
	t.Helper()
	for _, m := range s.inspect(t, network).Members {
		if m.Name == name {
			return m
		}
	}
	t.Fatalf("network %s has no member %s", network, name)
	return sharedMember{}
}

// attach makes a container a member, and has it ask that network's resolver.
func (s *sharing) attach(t testing.TB, c *container, network, name string, flags ...string) sharedMember {
	t.Helper()
	s.do(t, append([]string{"attach", network, strconv.Itoa(c.pid), "--name", name}, flags...)...)
	return s.member(t, network, name)
}

// joined is a new container that is a member, on a cable of two TAPs: its user namespace is the bridges' sibling.
func (s *sharing) joined(t testing.TB, network, name string, flags ...string) (*container, sharedMember) {
	t.Helper()
	c := newContainerBy(t, rootMapped...)
	m := s.attach(t, c, network, name, flags...)
	c.asks(t, s.inspect(t, network).Gateway)
	return c, m
}

// running is a container made by usernet run, on a veth.
func (s *sharing) running(t testing.TB, network, name string, flags ...string) (*container, sharedMember) {
	t.Helper()
	c := &container{}
	line := append(append([]string{binary, "run", "--network", network, "--name", name}, flags...),
		"--", "sh", "-c", "echo pid $(readlink /proc/self/ns/net); exec cat")
	c.process = s.start(t, func(cmd *exec.Cmd) {
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close() })
	}, line...)
	c.has(t, "]\n")
	_, ns, _ := strings.Cut(strings.TrimSpace(c.out.String()), "pid ")
	c.pid = processIn(t, c.cmd.Process.Pid, ns)
	c.where = lab.root.inside(c.pid)
	c.net = enterNet(t, fmt.Sprintf("/proc/%d/ns/net", c.pid))
	return c, s.member(t, network, name)
}

// asks gives a container a resolv.conf.
func (c *container) asks(t testing.TB, resolver string) {
	t.Helper()
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver "+resolver+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c.must(t, "mount", "--bind", resolv, "/etc/resolv.conf")
}

// echoes tells whether an echo server at addr answers a connection from a place.
func echoes(from *place, addr string) bool {
	c, err := from.dial("tcp", addr)
	if err != nil {
		return false
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		return false
	}
	n, _ := c.Read(make([]byte, 1))
	return n == 1
}

// reaches fails unless an echo server at addr answers a place within the test's patience.
func mustReach(t testing.TB, from *place, addr string) {
	t.Helper()
	eventually(t, from.name+" reaches "+addr, func() bool { return echoes(from, addr) })
}

func joinHostPort(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }

// mustAnswer sends a datagram again and again until its echo comes: nobody promises the first.
func mustAnswer(t testing.TB, c net.Conn) {
	t.Helper()
	eventually(t, "an answer from "+c.RemoteAddr().String(), func() bool {
		if _, err := c.Write([]byte("hello?")); err != nil {
			return false // refused a moment ago
		}
		if err := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 16)
		n, err := c.Read(b)
		return err == nil && string(b[:n]) == "hello?"
	})
}
