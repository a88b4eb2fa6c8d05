package forwarder

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"

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

// run runs a command that the tests need in their network namespace.
func run(t *testing.T, name string, args ...string) {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skipf("%s is not installed (Debian: iproute2, util-linux)", name)
	}
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
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
