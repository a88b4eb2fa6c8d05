package api_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/api"
)

func listen(path string) (*api.Server, error) {
	return api.Listen(api.Config{Path: path, Info: testInfo})
}

// dead leaves a socket that nobody listens at.
func dead(t *testing.T, path string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
}

// What we rely on: the mode of a socket's own inode is that of its file, less the umask (net/unix/af_unix.c,
// unix_bind_bsd).
func TestAssumeSocketFileHasSocketsMode(t *testing.T) {
	path := socketPath(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	defer unix.Umask(unix.Umask(0))
	if err := errors.Join(unix.Fchmod(fd, 0o640), unix.Bind(fd, &unix.SockaddrUnix{Name: path})); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v %v", err, st.Mode())
	}
}

// Whoever looks all the time, under a umask that forbids nothing, never sees another mode than 0600.
func TestModeFromBirth(t *testing.T) {
	path := socketPath(t)
	defer unix.Umask(unix.Umask(0))
	var seen, wrong atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if st, err := os.Lstat(path); err == nil {
				if seen.Add(1); st.Mode() != os.ModeSocket|0o600 {
					wrong.Store(int64(st.Mode()))
				}
			}
		}
	})
	for seen.Load() < 100 {
		s, err := listen(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	if m := wrong.Load(); m != 0 {
		t.Errorf("mode %v", os.FileMode(m))
	}
}

func TestUmaskThatLocksUsOut(t *testing.T) {
	path := socketPath(t)
	old := unix.Umask(0o277)
	_, err := listen(path)
	unix.Umask(old)
	if err == nil || !strings.Contains(err.Error(), "umask") {
		t.Errorf("%v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}

// What is in the socket's place: only a dead socket of ours goes.
func TestWhatIsThereAlready(t *testing.T) {
	for _, c := range []struct {
		what string
		put  func(t *testing.T, path string)
		want string // in the error; none: it is replaced
	}{
		{"nothing", func(*testing.T, string) {}, ""},
		{"a dead socket", dead, ""},
		{"a live socket of ours", func(t *testing.T, path string) {
			s, err := listen(path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
		}, "in use by a running process"},
		{"a live datagram socket", func(t *testing.T, path string) {
			c, err := net.ListenPacket("unixgram", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
		}, "in use"},
		{"a file", func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "is no socket"},
		{"a link to a dead socket", func(t *testing.T, path string) {
			dead(t, path+"2")
			if err := os.Symlink(path+"2", path); err != nil {
				t.Fatal(err)
			}
		}, "is no socket"},
		{"a directory", func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}, "is no socket"},
		{"another user's dead socket", func(t *testing.T, path string) {
			dead(t, path)
			if err := os.Lchown(path, 54321, -1); err != nil {
				t.Skipf("giving a file away takes root: %v", err)
			}
		}, "socket of uid 54321"},
	} {
		t.Run(c.what, func(t *testing.T) {
			path := socketPath(t)
			c.put(t, path)
			before, _ := os.Lstat(path)
			s, err := listen(path)
			if err == nil {
				defer s.Close()
			}
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				dial(t, path).Close()
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
				t.Errorf("it was touched: %v", err)
			}
		})
	}
}

func TestPathsThatCannotBe(t *testing.T) {
	dir := filepath.Dir(socketPath(t))
	for path, want := range map[string]string{
		filepath.Join(dir, strings.Repeat("x", 108)): "octets",
		filepath.Join(dir, "none", "s"):              "no such file",
		"":                                           "no name",
	} {
		s, err := listen(path)
		if err == nil {
			s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.50s: %v, want %q", path, err, want)
		}
	}
}

// Many start at once where a dead socket lies: one gets it, and it is the one that clients reach.
func TestStartersMeet(t *testing.T) {
	for range 20 {
		path := socketPath(t)
		dead(t, path)
		servers := make([]*api.Server, 8)
		start := make(chan struct{})
		var wg sync.WaitGroup
		for i := range servers {
			wg.Go(func() {
				<-start
				s, err := listen(path)
				if err != nil && !errors.Is(err, unix.EADDRINUSE) {
					t.Error(err)
				}
				servers[i] = s
			})
		}
		close(start)
		wg.Wait()
		won := 0
		for _, s := range servers {
			if s == nil {
				continue
			}
			won++
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- s.Serve(ctx) }()
			if status, _, _ := request(t, path, "GET", "/v1/usernet/info", ""); status != 200 {
				t.Errorf("status %d", status)
			}
			cancel()
			if err := errors.Join(<-done, s.Close()); err != nil {
				t.Error(err)
			}
		}
		if won != 1 {
			t.Fatalf("%d have the socket", won)
		}
	}
}

// Somebody else's socket in our place stays when we end.
func TestCloseLeavesWhatIsNotOurs(t *testing.T) {
	path := socketPath(t)
	first, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(first.Close(), first.Close()); err != nil {
		t.Error(err)
	}
	dial(t, path).Close()
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}

// In a sandbox the path leads nowhere any more, but the directory's descriptor does.
func TestCloseByDirectory(t *testing.T) {
	path := socketPath(t)
	s, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	moved := filepath.Dir(path) + "2"
	if err := os.Rename(filepath.Dir(path), moved); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(moved)
	if s.Path() != path || s.Dir().Name() != filepath.Dir(path)+"/" {
		t.Errorf("%s in %s", s.Path(), s.Dir().Name())
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(moved); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// Another user may not speak, even where the file would let him; and nobody is not who we are.
func TestOtherUsersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("to be somebody else takes root")
	}
	path, _ := serve(t, newFake())
	if err := errors.Join(os.Chmod(filepath.Dir(path), 0o755), os.Chmod(path, 0o666)); err != nil {
		t.Fatal(err)
	}
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("there is no curl on this machine")
	}
	for uid, ok := range map[uint32]bool{0: true, 54321: false, 65534: false} {
		cmd := exec.CommandContext(t.Context(), curl, "-sS", "--unix-socket", path, "http://x/v1/usernet/info")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if (err == nil) != ok || ok != strings.Contains(string(out), "apiVersion") {
			t.Errorf("uid %d: %v: %s", uid, err, out)
		}
	}
	if got := ask(t, path, add); got != `{"return":{"id":1}}` { // a refusal keeps no place
		t.Error(got)
	}
}

// A plain user and root may speak; root has every way in anyhow.
func TestRootMaySpeakToUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("to be root takes root")
	}
	dir := filepath.Dir(socketPath(t))
	if err := os.Chown(dir, 54321, 54321); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The test binary of another run serves until its standard input ends.
	bin := filepath.Join(dir, "bin")
	data, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bin, data, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), bin, "-test.run", "^TestServeForAnother$")
	cmd.Dir, cmd.Env = "/", []string{"USERNET_TEST_SOCKET=" + filepath.Join(dir, "s")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 54321, Gid: 54321}}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("ready"))); err != nil {
		t.Errorf("no server: %v", err)
	} else if got := ask(t, filepath.Join(dir, "s"), `{"execute":"list_hostfwd"}`); !strings.Contains(got, "entries") {
		t.Errorf("%q", got)
	}
	in.Close()
	rest, _ := io.ReadAll(out)
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, rest)
	}
}

// TestServeForAnother is the server of TestRootMaySpeakToUser.
func TestServeForAnother(t *testing.T) {
	path := os.Getenv("USERNET_TEST_SOCKET")
	if path == "" {
		return
	}
	serve(t, newFake(), func(c *api.Config) { c.Path = path })
	fmt.Print("ready")
	io.Copy(io.Discard, os.Stdin)
}
