package netns_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap/netns"
	"usernet/tap/taptest"
)

// watch starts n.Watch and returns what it will return.
func watch(ctx context.Context, n *netns.NS) <-chan error {
	done := make(chan error, 1)
	go func() { done <- n.Watch(ctx) }()
	return done
}

func TestWatchPID(t *testing.T) {
	for _, open := range []func(*taptest.Namespace) (*netns.NS, error){
		func(ns *taptest.Namespace) (*netns.NS, error) { return netns.OpenPID(ns.PID) },
		func(ns *taptest.Namespace) (*netns.NS, error) { return netns.OpenPath(ns.Path()) },
		func(ns *taptest.Namespace) (*netns.NS, error) { // by a link to it, with a relative detour
			link := filepath.Join(t.TempDir(), "link")
			if err := os.Symlink(fmt.Sprintf("../../../../../../../../proc/%d/task/%d/ns/net", ns.PID, ns.PID), link); err != nil {
				return nil, err
			}
			return netns.OpenPath(link)
		},
	} {
		ns := taptest.NewNS(t, taptest.OwnerRoot)
		n, err := open(ns)
		if err != nil {
			t.Fatal(err)
		}
		done := watch(t.Context(), n)
		select {
		case err := <-done:
			t.Fatalf("%s: Watch returned %v while the process lives", n, err)
		default:
		}
		ns.End()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", n, err)
		}
		if err := n.Watch(t.Context()); err != nil { // and again, when it is long gone
			t.Errorf("%s, later: %v", n, err)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Without events the end is seen all the same: that of a process, also of one that nobody has waited for, and that of a path.
func TestWatchWithoutEvents(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	n, err := netns.OpenWithoutPidfd(ns.PID)
	if err != nil {
		t.Fatal(err)
	}
	done := watch(t.Context(), n)
	if err := unix.Kill(ns.PID, unix.SIGKILL); err != nil { // End comes later
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	ns.End()
	if err := n.Watch(t.Context()); err != nil {
		t.Errorf("later: %v", err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if n, err := netns.OpenWithoutPidfd(ns.PID); !errors.Is(err, unix.ESRCH) {
		t.Errorf("a process that has ended: %v, %v", n, err)
	}

	path := bind(t, taptest.NewNS(t, taptest.OwnerRoot))
	if n, err = netns.OpenPath(path); err != nil {
		t.Fatal(err)
	}
	n.ForgetInotify()
	done = watch(t.Context(), n)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
}

func TestWatchEndsWithContext(t *testing.T) {
	n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := watch(ctx, n)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := n.Watch(ctx); !errors.Is(err, context.Canceled) {
		t.Error("with an ended context:", err)
	}
}

// bind mounts ns at a new path, as "ip netns" and podman do.
func bind(t *testing.T, ns *taptest.Namespace) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "netns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(ns.Path(), path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for unix.Unmount(path, unix.MNT_DETACH) == nil { // also what a test has put on top
		}
	})
	return path
}

// ways are how a path stops naming a namespace.
var ways = map[string]func(path string) error{
	"unmounted":          func(path string) error { return unix.Unmount(path, 0) },
	"detached":           func(path string) error { return unix.Unmount(path, unix.MNT_DETACH) },
	"covered by another": func(path string) error { return unix.Mount("/proc/self/ns/net", path, "", unix.MS_BIND, "") },
	"unmounted and unlinked": func(path string) error {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			return err
		}
		return os.Remove(path)
	},
}

func TestWatchPath(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	for name, end := range ways {
		path := bind(t, taptest.NewNS(t, taptest.OwnerRoot))
		n, err := netns.OpenPath(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Lock(t.Context()); err != nil {
			t.Fatal(err)
		}
		done := watch(t.Context(), n)
		// Mounts elsewhere and files beside it change nothing.
		other := bind(t, taptest.NewNS(t, taptest.OwnerRoot))
		if err := os.WriteFile(path+"2", nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := unix.Unmount(other, 0); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-done:
			t.Errorf("%s: Watch returned %v too early", name, err)
			continue
		default:
		}
		// Not even the plain unmount finds it busy.
		if err := end(path); err != nil {
			t.Fatal(name, err)
		}
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
		n.Close()
	}
}

// A namespace that stays while its process dies: the path form does not care for processes.
func TestWatchPathOutlivesProcess(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	path := bind(t, ns)
	n, err := netns.OpenPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := watch(ctx, n)
	ns.End()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Watch: %v, want nothing seen before the context's end", err)
	}
}

// A symbolic link on the way (/var/run is one to /run), and one at the end.
func TestWatchThroughLinks(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	path := bind(t, taptest.NewNS(t, taptest.OwnerRoot))
	links := t.TempDir()
	if err := os.Symlink(filepath.Dir(path), filepath.Join(links, "dir")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("dir/netns", filepath.Join(links, "file")); err != nil {
		t.Fatal(err)
	}
	var all []<-chan error
	for _, name := range []string{"dir/netns", "file"} {
		n, err := netns.OpenPath(filepath.Join(links, name))
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		if len(all) == 0 {
			n.UseHelper()
		}
		if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
			t.Fatal(err)
		}
		all = append(all, watch(t.Context(), n))
	}
	if err := unix.Unmount(path, 0); err != nil {
		t.Fatal(err)
	}
	for _, done := range all {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// The sandbox: another mount namespace, where a private copy of the mount lives on, and an empty root.
func TestWatchFromSandbox(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	for name, end := range ways {
		path := bind(t, taptest.NewNS(t, taptest.OwnerRoot))
		n, err := netns.OpenPath(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Lock(t.Context()); err != nil {
			t.Fatal(err)
		}
		empty := t.TempDir()
		done, ready := make(chan error, 1), make(chan error, 1)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread is thrown away
			err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS)
			if err == nil {
				err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
			}
			if err == nil {
				err = unix.Chroot(empty)
			}
			if err == nil {
				err = unix.Chdir("/")
			}
			if ready <- err; err == nil {
				done <- n.Watch(t.Context())
			}
		}()
		if err := <-ready; err != nil {
			t.Fatal(err)
		}
		if err := end(path); err != nil {
			t.Fatal(name, err)
		}
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
		n.Close()
	}
}

// NS.Lock relies on it: one namespace is one inode, whichever way it was opened.
func TestAssumeFlockOnNamespaceFile(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	a, err := unix.Open(ns.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(a)
	b, err := unix.Open(bind(t, ns), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(b)
	if err := unix.Flock(a, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(b, unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("a second lock by the other path: %v, want EWOULDBLOCK", err)
	}
}

// NS_GET_USERNS instead of /proc/PID/ns/user.
func TestAssumeOwnerIsNotTheProcessesUserNamespace(t *testing.T) {
	ns := taptest.NewNS(t, taptest.OwnerNested)
	fd, err := unix.Open(ns.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	owner, err := unix.IoctlRetInt(fd, unix.NS_GET_USERNS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(owner)
	var a, b unix.Stat_t
	if err := unix.Fstat(owner, &a); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/user", ns.PID), &b); err != nil {
		t.Fatal(err)
	}
	if a.Ino == b.Ino {
		t.Errorf("both are %d: a nested process's network is owned by the outer user namespace", a.Ino)
	}
}

// Why there is a helper at all.
func TestAssumeThreadsForbidSetnsUser(t *testing.T) {
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/user", ns.PID), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWUSER); !errors.Is(err, unix.EINVAL) {
		t.Errorf("setns(CLONE_NEWUSER) of a process with threads: %v, want EINVAL", err)
	}
}
