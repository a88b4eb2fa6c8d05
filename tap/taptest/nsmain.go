package taptest

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

// What a test binary is besides a test binary, by argv[0] or environment.
const (
	sleeperName = "usernet-test-sleeper" // NewNS: holds a namespace until its stdin ends
	sleeperEnv  = "USERNET_TEST_SLEEPER" // NewNSIn: the same, where argv[0] is not ours to choose
	nestedName  = "usernet-test-nested"  // NewNS: starts a sleeper one user namespace further in
	insideEnv   = "USERNET_TEST_INSIDE"  // Main: we are in the namespaces
)

// Main is a TestMain that runs the tests in user, network and mount namespaces of their own, as root
// of these, whoever started them. ops are what a netns helper made of this test binary knows.
// It fails the run if descriptors or goroutines are left behind. It does not return.
func Main(m *testing.M, ops netns.Ops) {
	be(ops)
	if os.Getenv(insideEnv) == "" {
		os.Exit(again())
	}
	os.Exit(checkLeaks(m.Run))
}

// MainHere is Main without the namespaces: the tests keep the rights of their user, except where they ask
// for Inside.
func MainHere(m *testing.M, ops netns.Ops) {
	be(ops)
	os.Exit(checkLeaks(m.Run))
}

// be is for the processes that the tests make of their own binary; it returns in the tests' own.
func be(ops netns.Ops) {
	switch {
	case netns.IsHelper():
		os.Exit(netns.HelperMain(ops))
	case os.Args[0] == sleeperName || os.Getenv(sleeperEnv) != "":
		fmt.Println(os.Getpid())
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	case os.Args[0] == nestedName:
		cmd := sleeper(sleeperName)
		cmd.Stdin, cmd.Stdout = os.Stdin, os.Stdout
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER
		mapIDs(cmd.SysProcAttr, 1000, 1000)
		if err := cmd.Run(); err != nil {
			fmt.Println(err)
		}
		os.Exit(0)
	}
	// A program built with -race sleeps a second when it ends; the tests start dozens.
	if os.Getenv("GORACE") == "" {
		os.Setenv("GORACE", "atexit_sleep_ms=0")
	}
	if os.Getenv(insideEnv) != "" {
		if err := settle(); err != nil {
			fmt.Fprintln(os.Stderr, "taptest:", err)
			os.Exit(1)
		}
	}
}

// Inside runs the calling test once more in a process and in user, network and mount namespaces of its
// own, as their root, where it may mount and chroot as it likes. It returns true there, and false when
// that is done and the caller has nothing more to do.
func Inside(t *testing.T) bool {
	t.Helper()
	if os.Getenv(insideEnv) != "" {
		return true
	}
	again := oneTest(t)
	enterNew(again)
	runOne(t, again, "in namespaces of its own")
	return false
}

// AsUser returns true where the test runs as a plain user. As root it runs the calling test once more in
// a process of one, without any capability, and returns false when that is done.
func AsUser(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		return true
	}
	again := oneTest(t)
	again.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: plainID, Gid: plainID},
		Pdeathsig:  syscall.SIGKILL,
	}
	again.Dir = "/"
	runOne(t, again, "as a plain user")
	return false
}

// plainID is a user and group that nobody has: the kernel needs no entry in /etc/passwd.
const plainID = 54321

// oneTest is this test binary with the calling test alone.
func oneTest(t *testing.T) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run", "^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$")
	cmd.Args[0] = os.Args[0]
	return cmd
}

// runOne gives the other process's verdict to t.
func runOne(t *testing.T, cmd *exec.Cmd, where string) {
	t.Helper()
	runtime.LockOSThread() // the death signal is bound to the thread
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	switch {
	case forbidden(err):
		t.Skipf("this machine forbids a process %s: %v", where, err)
	case err != nil:
		t.Errorf("%s: %v\n%s", where, err, out)
	case bytes.Contains(out, []byte("--- SKIP: "+t.Name())):
		t.Skipf("%s:\n%s", where, out)
	case !bytes.Contains(out, []byte("--- PASS: "+t.Name())):
		t.Errorf("%s it did not run:\n%s", where, out)
	}
}

// enterNew makes cmd start in new namespaces, as root there.
func enterNew(cmd *exec.Cmd) {
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	mapIDs(cmd.SysProcAttr, 0, 0)
}

// again runs this test binary in new namespaces, and returns its exit status.
func again() int {
	runtime.LockOSThread() // the death signal is bound to the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	enterNew(cmd)
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode()
	case forbidden(err):
		fmt.Printf("--- SKIP: all of it: user namespaces are forbidden here: %v\n", err)
		return 0
	}
	fmt.Fprintln(os.Stderr, "taptest: run the tests in namespaces of their own:", err)
	return 1
}

// forbidden tells the errors of a clone with CLONE_NEWUSER that mean "not on this machine".
func forbidden(err error) bool {
	return errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EINVAL)
}

// settle makes the new namespaces usable: mounts that nobody else sees, and lo.
func settle() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	return linkUp("lo")
}

// linkUp sets an interface of the current network namespace up.
func linkUp(name string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, req); err != nil {
		return fmt.Errorf("flags of %s: %w", name, err)
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// leakPatience is how long what was stopped may take to be gone: the last goroutines end after
// the call that stopped them returned.
const leakPatience = 5 * time.Second

// checkLeaks runs run and looks at what it left. The netpoller's own descriptors are made before.
func checkLeaks(run func() int) int {
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
	fds, goroutines := openFiles(), runtime.NumGoroutine()
	code := run()
	// The coordinator of fuzzing keeps its goroutine for signals.
	if fuzz := flag.Lookup("test.fuzz"); code != 0 || fuzz != nil && fuzz.Value.String() != "" {
		return code
	}
	deadline := time.Now().Add(leakPatience)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		runtime.GC() // an os.Process that nobody waited for is a leak, one that was is closed by now
		left := openFiles()
		maps.DeleteFunc(left, func(fd, what string) bool { _, was := fds[fd]; return was })
		n := runtime.NumGoroutine()
		if len(left) == 0 && n <= goroutines {
			return code
		}
		if time.Now().After(deadline) {
			for _, fd := range slices.Sorted(maps.Keys(left)) {
				fmt.Fprintf(os.Stderr, "taptest: descriptor %s is left open: %s\n", fd, left[fd])
			}
			if n > goroutines {
				fmt.Fprintf(os.Stderr, "taptest: %d goroutines before, %d after:\n", goroutines, n)
				pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
			}
			return 1
		}
		<-tick.C
	}
}

func openFiles() map[string]string {
	open := map[string]string{}
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		what, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.HasSuffix(what, "/fd") { // not ReadDir's own
			open[e.Name()] = what
		}
	}
	return open
}
