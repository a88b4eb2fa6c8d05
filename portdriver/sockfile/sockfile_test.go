package sockfile

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"usernet/tap/taptest"
)

func TestMain(m *testing.M) { taptest.MainHere(m, nil) }

// socketPath is the name of a socket in a new directory; t.TempDir's names are too long for some.
func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sockfile")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// A server is a socket with its file.
type server struct {
	*File
	fd int
}

func listen(path string) (*server, error) {
	f, fd, err := Listen(path)
	if err != nil {
		return nil, err
	}
	return &server{f, fd}, nil
}

func (s *server) Close() error { return errors.Join(s.Remove(), unix.Close(s.fd)) }

// meet connects to path and tells whether it is s who is reached.
func (s *server) meet(t *testing.T, path string) bool {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Error(err)
		return false
	}
	defer c.Close()
	fd, _, err := unix.Accept4(s.fd, unix.SOCK_CLOEXEC) // a connection is there before connect returns
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
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
				t.Fatal(err)
			}
		}, "socket of uid 54321"},
	} {
		if strings.HasPrefix(c.what, "another") && os.Geteuid() != 0 {
			continue // to give a file away takes root, who runs the tests as well
		}
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
				if !s.meet(t, path) {
					t.Error("somebody else is reached")
				}
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
		filepath.Join(dir, "s\x00s"):                 "invalid argument",
		dir + "/":                                    "is a directory",
		dir + "/..":                                  "is no socket",
		"":                                           "no such file",
		"@abstract":                                  "no such file",
	} {
		s, err := listen(path)
		if err == nil {
			s.Close()
		}
		var e *Error
		if !errors.As(err, &e) || e.Errno == 0 || !errors.Is(err, e.Errno) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.50q: %v, want %q", path, err, want)
		}
	}
}

// Many start at once where a dead socket lies: one gets it, and it is the one that clients reach.
func TestStartersMeet(t *testing.T) {
	for range 20 {
		startersMeet(t, socketPath(t))
	}
}

// rootlesskit keeps a shared lock on its state directory, where it wants the socket of its network. That is no other starter.
func TestStartersMeetInDirectoryWithSharedLock(t *testing.T) {
	for range 20 {
		path := socketPath(t)
		holder := openDir(t, filepath.Dir(path))
		if err := unix.Flock(int(holder.dir.Fd()), unix.LOCK_SH); err != nil {
			t.Fatal(err)
		}
		startersMeet(t, path)
		if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v %v", left, err)
		}
	}
}

// A starter that was killed in a directory with somebody's shared lock leaves its lock file, which stops nobody.
func TestLockFileLeftBehind(t *testing.T) {
	path := socketPath(t)
	holder := openDir(t, filepath.Dir(path))
	left := filepath.Join(filepath.Dir(path), lockName)
	if err := errors.Join(unix.Flock(int(holder.dir.Fd()), unix.LOCK_SH), os.WriteFile(left, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	s, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}

// startersMeet has many start at once at a path where a dead socket lies.
func startersMeet(t *testing.T, path string) {
	t.Helper()
	dead(t, path)
	servers := make([]*server, 8)
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
		if !s.meet(t, path) {
			t.Error("somebody else is reached")
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if won != 1 {
		t.Fatalf("%d have the socket", won)
	}
}

// What somebody else has put in our place stays when we end, also under the inode number that was ours.
func TestRemoveLeavesWhatIsNotOurs(t *testing.T) {
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
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if !second.meet(t, path) {
		t.Error("the second is not reached")
	}
	if err := os.Chtimes(path, time.Time{}, time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("a file of another time is gone: %v", err)
	}
}

// In a sandbox the path leads nowhere any more, but the directory's descriptor does. Another one's lock is no hindrance.
func TestRemoveByDirectory(t *testing.T) {
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
	other := openDir(t, moved)
	if err := other.lock(lockPatience); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(moved); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// openDir is a File in dir that is not there.
func openDir(t *testing.T, dir string) *File {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return &File{path: filepath.Join(dir, "s"), dir: d, base: "s"}
}

// Somebody who keeps the lock of a directory that others can open, as /tmp, is no reason to hang.
func TestLockIsHeld(t *testing.T) {
	dir := t.TempDir()
	a, b := openDir(t, dir), openDir(t, dir)
	if err := a.lock(lockPatience); err != nil {
		t.Fatal(err)
	}
	if err := b.lock(time.Millisecond); err == nil || !strings.Contains(err.Error(), "another process has held it") {
		t.Errorf("%v", err)
	}
	a.unlock()
	if err := b.lock(lockPatience); err != nil {
		t.Error(err)
	}
}

// Of what lies in a directory only the dead sockets go that are asked for.
func TestSweep(t *testing.T) {
	dir := filepath.Dir(socketPath(t))
	dead(t, dir+"/a-dead")
	dead(t, dir+"/b-dead")
	s, err := listen(dir + "/a-live")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := os.WriteFile(dir+"/a-file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	left := func() (names []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Error(err)
		}
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	sweep := func() { Sweep(dir, func(name string) bool { return strings.HasPrefix(name, "a") }) }
	other := openDir(t, dir)
	if err := other.lock(lockPatience); err != nil {
		t.Fatal(err)
	}
	if sweep(); !slices.Contains(left(), "a-dead") {
		t.Error("it sweeps while another one has the lock")
	}
	other.unlock()
	if sweep(); !slices.Equal(left(), []string{"a-file", "a-live", "b-dead"}) {
		t.Errorf("left %q", left())
	}
}
