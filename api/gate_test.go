package api

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestGate(t *testing.T) {
	for _, c := range []struct {
		ours, overflow, peer uint32
		admits               bool
	}{
		{1000, 65534, 1000, true},
		{1000, 65534, 0, true},
		{1000, 65534, 1001, false},
		{1000, 65534, 65534, false},
		{0, 65534, 0, true},
		{0, 65534, 1000, false},
		{65534, 65534, 65534, false}, // in a user namespace without us: everybody unknown looks like us
		{65534, 65534, 0, true},
		{1000, 0, 0, false}, // a host on which the overflow ID is 0 has lost its mind; we do not follow
	} {
		if got := (gate{uid: c.ours, overflow: c.overflow}).admits(c.peer); got != c.admits {
			t.Errorf("%+v: %v", c, got)
		}
	}
	if g := newGate(); int(g.uid) != os.Geteuid() || g.overflow == 0 {
		t.Errorf("%+v", g)
	}
}

func TestDefaultPath(t *testing.T) {
	uid := os.Geteuid()
	base := t.TempDir()
	give := func(t *testing.T, path string) {
		if err := os.Chown(path, 54321, -1); err != nil {
			t.Fatal(err)
		}
	}
	mkdir := func(t *testing.T, mode os.FileMode, parts ...string) string {
		dir := filepath.Join(parts...)
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.Chmod(dir, mode)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	for _, c := range []struct {
		what string
		do   func(t *testing.T, run, tmp string) (xdg, want string) // want: the directory, or "!" and a part of the error
	}{
		{"as it should be", func(t *testing.T, run, tmp string) (string, string) {
			return mkdir(t, 0o700, run, "x"), run + "/x/usernet"
		}},
		{"no variable", func(t *testing.T, run, tmp string) (string, string) {
			return "", mkdir(t, 0o700, run, strconv.Itoa(uid)) + "/usernet"
		}},
		{"a relative one is ignored", func(t *testing.T, run, tmp string) (string, string) {
			return "x", tmp + "/usernet-" + strconv.Itoa(uid)
		}},
		{"it names nothing", func(t *testing.T, run, tmp string) (string, string) {
			return run + "/none", mkdir(t, 0o700, run, strconv.Itoa(uid)) + "/usernet"
		}},
		{"nothing at all", func(t *testing.T, run, tmp string) (string, string) { return "", tmp + "/usernet-" + strconv.Itoa(uid) }},
		{"ours, but wide open", func(t *testing.T, run, tmp string) (string, string) {
			mkdir(t, 0o777, tmp, "usernet-"+strconv.Itoa(uid))
			return "", tmp + "/usernet-" + strconv.Itoa(uid)
		}},
		{"another's", func(t *testing.T, run, tmp string) (string, string) {
			dir := mkdir(t, 0o755, run, "x")
			give(t, dir)
			return dir, "!belongs to uid 54321"
		}},
		{"another's in /tmp", func(t *testing.T, run, tmp string) (string, string) {
			give(t, mkdir(t, 0o777, tmp, "usernet-"+strconv.Itoa(uid)))
			return "", "!belongs to uid 54321"
		}},
		{"others can write to it", func(t *testing.T, run, tmp string) (string, string) {
			return mkdir(t, 0o777, run, "x"), "!open to others"
		}},
		{"a link in /tmp", func(t *testing.T, run, tmp string) (string, string) {
			if err := os.Symlink(mkdir(t, 0o700, run, "y"), filepath.Join(tmp, "usernet-"+strconv.Itoa(uid))); err != nil {
				t.Fatal(err)
			}
			return "", "!is no directory"
		}},
		{"a file", func(t *testing.T, run, tmp string) (string, string) {
			dir := mkdir(t, 0o700, run, "x")
			if err := os.WriteFile(filepath.Join(dir, "usernet"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return dir, "!is no directory"
		}},
	} {
		if strings.HasPrefix(c.what, "another") && uid != 0 {
			continue // to give a directory away takes root, who runs the tests as well
		}
		t.Run(c.what, func(t *testing.T) {
			run, tmp := mkdir(t, 0o755, base, t.Name(), "run"), mkdir(t, 0o777, base, t.Name(), "tmp")
			xdg, want := c.do(t, run, tmp)
			t.Setenv("XDG_RUNTIME_DIR", xdg)
			if xdg == "" {
				os.Unsetenv("XDG_RUNTIME_DIR")
			}
			got, err := defaultDir(run, tmp)
			if part, bad := strings.CutPrefix(want, "!"); bad {
				if err == nil || !strings.Contains(err.Error(), part) || !strings.Contains(err.Error(), "--api-socket") {
					t.Errorf("%s, %v, want %q", got, err, part)
				}
				return
			}
			if err != nil || got != want {
				t.Fatalf("%s, %v, want %s", got, err, want)
			}
			var st unix.Stat_t
			if err := unix.Lstat(got, &st); err != nil || st.Mode != unix.S_IFDIR|0o700 || int(st.Uid) != uid {
				t.Errorf("%v mode %o uid %d", err, st.Mode, st.Uid)
			}
			if again, err := defaultDir(run, tmp); err != nil || again != got {
				t.Errorf("again: %s, %v", again, err)
			}
		})
	}
	t.Setenv("XDG_RUNTIME_DIR", mkdir(t, 0o700, base, "x"))
	if got, err := DefaultPath("17"); err != nil || got != base+"/x/usernet/17.sock" {
		t.Errorf("%s, %v", got, err)
	}
	for _, name := range []string{"", ".", "..", "a/b", "/"} {
		if got, err := DefaultPath(name); err == nil {
			t.Errorf("%q: %s", name, got)
		}
	}
}

// What killed processes leave in the default directory goes when the next one starts; nothing else does.
func TestSweep(t *testing.T) {
	// Not t.TempDir, whose name is too long for a socket.
	base, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(base)
	t.Setenv("XDG_RUNTIME_DIR", base)
	dir, err := DefaultDir()
	if err != nil {
		t.Fatal(err)
	}
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Skipf("there is no program to run: %v", err)
	}
	dead := func(name string) {
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		ln.SetUnlinkOnClose(false)
		ln.Close()
	}
	killed := strconv.Itoa(gone.Process.Pid)
	dead(killed + ".sock")
	dead("mine.sock")                                          // named by somebody
	dead(strconv.Itoa(os.Getpid()) + ".sock")                  // Listen's to replace
	foreign, err := net.Listen("unix", dir+"/2147483647.sock") // live, of a PID that we cannot see
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	if err := os.WriteFile(filepath.Join(dir, "2147483646.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := DefaultPath("next"); err != nil {
		t.Fatal(err)
	}
	var left []string
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		left = append(left, e.Name())
	}
	want := []string{"2147483646.sock", "2147483647.sock", "mine.sock", strconv.Itoa(os.Getpid()) + ".sock"}
	slices.Sort(left)
	slices.Sort(want)
	if err != nil || !slices.Equal(left, want) {
		t.Errorf("%v: left %q, want %q", err, left, want)
	}
}
