package e2e

import (
	"fmt"
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

// What a container finds behind usernet.
const (
	gateway4, gateway6     = "10.0.2.2", "fd00::2"
	resolver4, resolver6   = "10.0.2.3", "fd00::3"
	container4, container6 = "10.0.2.100", "fd00::100"
	alias4, alias6         = "169.254.1.2", "fd00::4" // the host at its own addresses
)

// A container is a process of home's in namespaces of its own.
type container struct {
	*process
	where        // inside, with every right there
	pid   int    // of a process that lives as long as the container
	net   *place // a thread in its network namespace
}

// rootMapped is how most runtimes make a user namespace: its root is our user.
var rootMapped = []string{"unshare", "--user", "--map-root-user", "--net", "--mount"}

// newContainer makes a container that asks usernet's resolver for names.
func newContainer(t testing.TB) *container {
	t.Helper()
	c := newContainerBy(t, rootMapped...)
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver "+resolver4+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c.must(t, "mount", "--bind", resolv, "/etc/resolv.conf")
	return c
}

// newContainerBy makes a container with a command that runs its arguments in new namespaces.
func newContainerBy(t testing.TB, maker ...string) *container {
	t.Helper()
	c := &container{}
	// The container ends with its standard input, so that it does not outlive the tests. cat is the
	// process that a runtime would call the container's: makers such as bwrap stay in front of it.
	c.process = lab.home.start(t, func(cmd *exec.Cmd) {
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close() })
	}, append(maker, "sh", "-c", "echo pid $(readlink /proc/self/ns/net); exec cat")...)
	c.has(t, "]\n")
	_, ns, _ := strings.Cut(strings.TrimSpace(c.out.String()), "pid ")
	c.pid = processIn(t, c.cmd.Process.Pid, ns)
	c.where = lab.root.inside(c.pid)
	c.net = enterNet(t, fmt.Sprintf("/proc/%d/ns/net", c.pid))
	return c
}

// processIn finds the process below pid, or pid itself, that is cat in the network namespace called ns.
func processIn(t testing.TB, pid int, ns string) int {
	t.Helper()
	found := 0
	var look func(pid int)
	look = func(pid int) {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if link, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); link == ns && string(comm) == "cat\n" {
			found = pid
		}
		for _, child := range childrenOf(pid) {
			look(child)
		}
	}
	eventually(t, "the container runs in "+ns, func() bool {
		look(pid)
		return found != 0
	})
	return found
}

func childrenOf(pid int) []int {
	var pids []int
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		text, _ := os.ReadFile(list)
		for _, f := range strings.Fields(string(text)) {
			child, _ := strconv.Atoi(f)
			pids = append(pids, child)
		}
	}
	return pids
}

// inside is where commands run in the user, network and mount namespace of a process.
func (w where) inside(pid int) where {
	nsenter := []string{"nsenter", "--target", strconv.Itoa(pid), "--net", "--mount"}
	ours, _ := os.Readlink("/proc/self/ns/user")
	if theirs, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", pid)); ours != theirs {
		nsenter = append(nsenter, "--user", "--preserve-credentials")
	}
	return where{place: w.place, prefix: append(append(append([]string{}, w.prefix...), nsenter...), "--")}
}

// enterNet starts a thread in a network namespace.
func enterNet(t testing.TB, path string) *place {
	t.Helper()
	p, err := newPlace("container", func() error {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Setns(fd, unix.CLONE_NEWNET)
	})
	if err != nil {
		t.Fatalf("enter %s: %v", path, err)
	}
	t.Cleanup(p.close)
	return p
}

// A usernet is a process of the binary under test.
type usernet struct {
	*process
}

// attach starts usernet for a container, waits until it says that it is ready, and
// expects that at the end of the test it ends at once and well when it is told to.
func attach(t testing.TB, c *container, flags ...string) *usernet {
	t.Helper()
	return launch(t, append(flags, strconv.Itoa(c.pid))...)
}

func launch(t testing.TB, args ...string) *usernet {
	t.Helper()
	u := begin(t, args...)
	t.Cleanup(func() {
		select {
		case <-u.ended:
		default:
			u.end(t)
		}
	})
	return u
}

// begin is launch without an expectation for the end.
func begin(t testing.TB, args ...string) *usernet {
	t.Helper()
	return lab.home.begin(t, args...)
}

func (w where) begin(t testing.TB, args ...string) *usernet {
	t.Helper()
	r, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	args = append([]string{binary, "--ready-fd", "3", "--log-level", "debug"}, args...)
	u := &usernet{w.start(t, func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{writer} }, args...)}
	writer.Close()
	ready := make(chan string, 1)
	go func() {
		b := make([]byte, 8)
		n, _ := r.Read(b)
		ready <- string(b[:n])
	}()
	select {
	case s := <-ready:
		if s != "1" {
			t.Fatalf("usernet %s: wrote %q to its ready fd, want \"1\"", strings.Join(args, " "), s)
		}
	case <-time.After(patience):
		t.Fatalf("usernet %s: not ready after %v", strings.Join(args, " "), patience)
	}
	return u
}

// runLine is the command line of usernet run.
func runLine(args ...string) []string {
	return append([]string{binary, "run"}, args...)
}

// end asks usernet to end, and expects status 0.
func (u *usernet) end(t testing.TB) {
	t.Helper()
	u.signal(t, syscall.SIGTERM)
	select {
	case <-u.ended:
	case <-time.After(patience):
		u.signal(t, syscall.SIGQUIT) // where it is stuck
		u.wait(t)
		t.Fatalf("usernet has not ended %v after SIGTERM:\n%s", patience, u.out)
	}
	if code := u.wait(t); code != 0 {
		t.Errorf("usernet ended with status %d after SIGTERM", code)
	}
}

// status reads a line of /proc/PID/status.
func (p *process) status(t testing.TB, key string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if k, v, _ := strings.Cut(line, ":"); k == key {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("no %s in the status of %s", key, p.name)
	return ""
}

// fds counts the open files of a process.
func (p *process) fds(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
