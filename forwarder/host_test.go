package forwarder

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newNetNS puts the test's goroutine, and the sockets and processes that it makes, into a network
// namespace of its own, with lo up. Its thread ends with it.
func newNetNS(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "link", "set", "lo", "up")
}

// run runs a command that the tests need, in the network namespace of the calling thread.
func run(t *testing.T, name string, args ...string) {
	t.Helper()
	check(t, command(name, args...))
}

func command(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

func check(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A namespace is another host: a thread in a network namespace of its own.
type namespace struct {
	t    *testing.T
	tid  int
	work chan func()
}

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	ns := &namespace{t: t, work: make(chan func())}
	ready, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		ns.tid = unix.Gettid()
		ready <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range ns.work {
			f()
		}
	}()
	t.Cleanup(func() {
		close(ns.work)
		<-ended
	})
	check(t, <-ready)
	ns.run("ip", "link", "set", "lo", "up")
	return ns
}

// do calls f in the namespace and waits for it; f must not end the test.
func (ns *namespace) do(f func() error) {
	ns.t.Helper()
	result := make(chan error)
	ns.work <- func() { result <- f() }
	check(ns.t, <-result)
}

func (ns *namespace) run(name string, args ...string) {
	ns.t.Helper()
	ns.do(func() error { return command(name, args...) })
}

// sysctl sets sysctls of the namespace, by their paths under /proc/sys.
func (ns *namespace) sysctl(values map[string]string) {
	ns.t.Helper()
	ns.do(func() error { return setSysctls(values) })
}

func setSysctls(values map[string]string) error {
	for path, value := range values {
		if err := os.WriteFile("/proc/sys/"+path, []byte(value), 0); err != nil {
			return err
		}
	}
	return nil
}

// listen opens a server in the namespace.
func (ns *namespace) listen(addr string) (s *server) {
	ns.t.Helper()
	ns.do(func() (err error) {
		s, err = listenUDP(ns.t, addr)
		return err
	})
	return s
}

// settled waits until packets for an IPv6 address (a prefix) of the calling thread's namespace
// arrive: the kernel makes the route some time after the address, even without looking for duplicates.
func settled(prefix string) error {
	addr, _, _ := strings.Cut(prefix, "/")
	deadline := time.Now().Add(patience)
	for {
		out, err := exec.Command("ip", "-6", "route", "get", addr).CombinedOutput()
		if err == nil && strings.HasPrefix(string(out), "local") {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no local route to %s: %s", addr, out)
		}
	}
}

// addHostAddress gives the host an interface toward the world with an address (a prefix) and a default route.
func addHostAddress(t *testing.T, prefixes ...string) {
	t.Helper()
	// One end of a cable: the kernel need not have dummy interfaces.
	run(t, "ip", "link", "add", "world0", "type", "veth", "peer", "name", "world1")
	t.Cleanup(func() { run(t, "ip", "link", "del", "world0") })
	run(t, "ip", "link", "set", "world1", "up")
	run(t, "ip", "link", "set", "world0", "up")
	for _, p := range prefixes {
		args := []string{"address", "add", p, "dev", "world0"}
		if strings.Contains(p, ":") {
			run(t, "ip", append([]string{"-6"}, append(args, "nodad")...)...)
			check(t, settled(p))
			run(t, "ip", "-6", "route", "add", "default", "dev", "world0")
		} else {
			run(t, "ip", args...)
			run(t, "ip", "route", "add", "default", "dev", "world0")
		}
	}
}

// linkMTU sets an interface's MTU for the length of the test.
func linkMTU(t *testing.T, link string, mtu int) {
	t.Helper()
	i, err := net.InterfaceByName(link)
	if err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "link", "set", link, "mtu", strconv.Itoa(mtu))
	t.Cleanup(func() { run(t, "ip", "link", "set", link, "mtu", strconv.Itoa(i.MTU)) })
}

// sysctl sets a sysctl of the tests' network namespace for the length of the test.
func sysctl(t *testing.T, name, value string) {
	t.Helper()
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	old, err := os.ReadFile(path)
	if err != nil {
		t.Skipf("the kernel lacks %s: %v", name, err)
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(path, old, 0); err != nil {
			t.Error(err)
		}
	})
}
