package taptest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

// An Owner says what the user namespace that owns a network namespace makes of our uid.
type Owner int

const (
	OwnerRoot     Owner = iota // it is 0 there, as in most containers
	OwnerSelf                  // it is itself there (podman --userns=keep-id)
	OwnerUnmapped              // it is nobody there
	OwnerNested                // as OwnerRoot, and the process lives one user namespace further in (bwrap --dev)
)

// Owners are all of them.
var Owners = []Owner{OwnerRoot, OwnerSelf, OwnerUnmapped, OwnerNested}

func (o Owner) String() string {
	return [...]string{"root", "self", "unmapped", "nested"}[o]
}

// A Namespace is a network namespace for a test, held by a process that does nothing.
type Namespace struct {
	PID int

	end func()
}

// NewNS makes a network namespace with an owner of its own, which ends with the test at the latest.
// It skips the test where the machine forbids user namespaces. The package's TestMain
// must be Main or MainHere.
func NewNS(t testing.TB, owner Owner) *Namespace {
	t.Helper()
	name := sleeperName
	if owner == OwnerNested {
		name = nestedName
	}
	cmd := sleeper(name)
	cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER | unix.CLONE_NEWNET
	switch owner {
	case OwnerRoot, OwnerNested:
		mapIDs(cmd.SysProcAttr, 0, 0)
	case OwnerSelf:
		mapIDs(cmd.SysProcAttr, os.Geteuid(), os.Getegid())
	}
	return start(t, cmd)
}

// NewNSIn makes a network namespace that is owned by the user namespace of ns, or, with below, by a new one that is
// a child of that. Its process is root there, as ns's must be.
func NewNSIn(t testing.TB, ns *Namespace, below bool) *Namespace {
	t.Helper()
	for _, name := range []string{"nsenter", "unshare"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("no %s (util-linux) here", name)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// Both programs become the next, so that the PID stays.
	args := []string{"--target", strconv.Itoa(ns.PID), "--user", "--preserve-credentials", "--", "unshare", "--net"}
	if below {
		args = append(args, "--user", "--map-root-user")
	}
	cmd := exec.Command("nsenter", append(args, "--", exe)...)
	cmd.Stderr = os.Stderr
	cmd.Env = append(outside(), sleeperEnv+"=1")
	return start(t, cmd)
}

// start starts a sleeper, which says its PID.
func start(t testing.TB, cmd *exec.Cmd) *Namespace {
	t.Helper()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		if forbidden(err) {
			t.Skipf("this machine forbids user namespaces: %v", err)
		}
		t.Fatal(err)
	}
	ns := &Namespace{end: sync.OnceFunc(func() {
		stdin.Close()
		io.Copy(io.Discard, stdout) // until the last of them has ended
		cmd.Wait()
	})}
	t.Cleanup(ns.end)
	line, _ := bufio.NewReader(stdout).ReadString('\n')
	if ns.PID, err = strconv.Atoi(strings.TrimSpace(line)); err != nil {
		t.Fatalf("a process in a new network namespace said %q: %v", line, err)
	}
	return ns
}

// End ends the process, and with it the namespace where nothing else holds it.
func (ns *Namespace) End() { ns.end() }

// Path is the namespace's file in /proc.
func (ns *Namespace) Path() string { return fmt.Sprintf("/proc/%d/ns/net", ns.PID) }

// Open opens the namespace by PID; it is closed with the test.
func (ns *Namespace) Open(t testing.TB) *netns.NS {
	t.Helper()
	n, err := netns.OpenPID(ns.PID)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close %s: %v", n, err)
		}
	})
	return n
}

// Command is a command that runs in the process's user and network namespace (util-linux's nsenter).
// It is of no use for OwnerNested, whose process may not enter its own network.
func (ns *Namespace) Command(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{
		"--target", strconv.Itoa(ns.PID), "--user", "--net", "--preserve-credentials", "--", name}, args...)...)
}

// NeedTUN skips the test where /dev/net/tun cannot be opened by its user.
func NeedTUN(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("this user may not open TUN devices here (the device needs mode 0666): %v", err)
	}
	f.Close()
}

func sleeper(name string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args[0] = name
	cmd.Stderr = os.Stderr
	cmd.Env = outside()
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	return cmd
}

// outside is the environment of who is not to settle in namespaces of its own.
func outside() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, insideEnv) })
}

// mapIDs maps us, and nobody else, to the given ids.
func mapIDs(attr *syscall.SysProcAttr, uid, gid int) {
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: os.Geteuid(), Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: os.Getegid(), Size: 1}}
}
