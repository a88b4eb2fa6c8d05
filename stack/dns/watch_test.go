package dns

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func write(t *testing.T, path string, lines ...string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// replace points a symlink elsewhere, in one step.
func replace(t *testing.T, target, link string) {
	t.Helper()
	must(t, os.Symlink(target, link+".new"))
	must(t, os.Rename(link+".new", link))
}

// A lab is a directory tree as hosts have it.
type lab struct{ root, etc, run, path string }

func newLab(t *testing.T) lab {
	root, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	must(t, os.Chmod(root, 0o755))
	l := lab{root: root, etc: root + "/etc", run: root + "/run/systemd/resolve"}
	must(t, os.MkdirAll(l.etc, 0o755))
	must(t, os.MkdirAll(l.run, 0o755))
	l.path = l.etc + "/resolv.conf"
	return l
}

// expect waits until get returns the first server wanted.
func expect(t *testing.T, what, want string, get func() string) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	var got string
	for time.Now().Before(deadline) {
		if got = get(); got == want {
			return
		}
		runtime.Gosched()
	}
	t.Fatalf("%s: %s, want %s", what, got, want)
}

// scenario changes the lab in every way that a host does and holds that it is seen.
func scenario(t *testing.T, l lab, get func() string) {
	t.Helper()
	expect(t, "through a relative symlink", "192.0.2.1:53", get)
	write(t, l.run+"/stub.conf", "nameserver 192.0.2.2")
	expect(t, "written", "192.0.2.2:53", get)
	write(t, l.run+"/new", "nameserver 192.0.2.3")
	must(t, os.Rename(l.run+"/new", l.run+"/stub.conf"))
	expect(t, "renamed over", "192.0.2.3:53", get)
	write(t, l.run+"/other.conf", "nameserver 192.0.2.4")
	replace(t, l.run+"/other.conf", l.path)
	expect(t, "absolute symlink to another file there", "192.0.2.4:53", get)
	write(t, l.etc+"/static.conf", "nameserver 192.0.2.5")
	replace(t, "static.conf", l.path)
	expect(t, "symlink beside it", "192.0.2.5:53", get)
	must(t, os.Remove(l.path))
	write(t, l.path, "nameserver 192.0.2.6")
	expect(t, "a file in place of the symlink", "192.0.2.6:53", get)
	must(t, os.Remove(l.path))
	expect(t, "gone: the last word holds", "192.0.2.6:53", get)
	write(t, l.path, "nameserver 192.0.2.7")
	expect(t, "back again", "192.0.2.7:53", get)
	write(t, l.path, "nameserver 192.0.2.8") // as long as before, and perhaps in the same tick
	expect(t, "changed at once", "192.0.2.8:53", get)
	must(t, os.Symlink("../run/systemd/resolve/other.conf", l.path+".new"))
	must(t, os.Rename(l.path+".new", l.path))
	expect(t, "a symlink again", "192.0.2.4:53", get)
}

func TestResolvConfFollows(t *testing.T) {
	l := newLab(t)
	write(t, l.run+"/stub.conf", "nameserver 192.0.2.1", "search a.example b.example", "options edns0")
	must(t, os.Symlink("../run/systemd/resolve/stub.conf", l.path))
	r, err := OpenResolvConf(l.path)
	must(t, err)
	defer r.Close()
	if got := fmt.Sprint(r.Servers(), r.Search(), r.Options(), r.Err()); got != "[192.0.2.1:53] [a.example b.example] [edns0] <nil>" {
		t.Error(got)
	}
	var dirs []string
	for _, d := range r.Dirs() {
		dirs = append(dirs, d.Name())
	}
	if got, want := strings.Join(dirs, " "), l.etc+" "+l.run; got != want {
		t.Errorf("directories %s, want %s", got, want)
	}
	scenario(t, l, func() string { return r.Servers()[0].String() })

	// The directory itself may be removed and made again.
	must(t, os.RemoveAll(l.run))
	expect(t, "directory gone", "192.0.2.4:53", func() string { return r.Servers()[0].String() })
	must(t, os.MkdirAll(l.run, 0o755))
	write(t, l.run+"/other.conf", "nameserver 192.0.2.9")
	expect(t, "directory back", "192.0.2.9:53", func() string { return r.Servers()[0].String() })

	must(t, r.Close())
	if got := r.Servers()[0].String(); got != "192.0.2.9:53" || len(r.Dirs()) != 0 {
		t.Errorf("closed: %s", got)
	}
}

func TestResolvConfNotThereYet(t *testing.T) {
	l := newLab(t)
	r, err := OpenResolvConf(l.path)
	must(t, err)
	defer r.Close()
	if got := fmt.Sprint(r.Servers()); got != "[127.0.0.1:53 [::1]:53]" || r.Err() == nil {
		t.Error(got, r.Err())
	}
	write(t, l.path, "nameserver 192.0.2.1")
	expect(t, "made", "192.0.2.1:53", func() string { return r.Servers()[0].String() })
	if err := r.Err(); err != nil {
		t.Error(err)
	}
}

func TestResolvConfErrors(t *testing.T) {
	l := newLab(t)
	for _, tt := range []struct {
		name string
		make func() error
		want string
	}{
		{"a directory", func() error { return os.Mkdir(l.path, 0o755) }, "not a regular file"},
		{"a FIFO", func() error { return unix.Mkfifo(l.path, 0o666) }, "not a regular file"},
		{"a loop", func() error { return os.Symlink("resolv.conf", l.path) }, "too many levels"},
		{"endless", func() error { return os.Symlink("/dev/zero", l.path) }, "not a regular file"},
		{"too long", func() error { return os.WriteFile(l.path, make([]byte, maxResolvConf+1), 0o644) }, "longer than"},
	} {
		must(t, tt.make())
		r, err := OpenResolvConf(l.path)
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), l.root) && tt.name != "endless" {
			t.Errorf("%s: %v", tt.name, err)
		}
		if r != nil {
			r.Close()
		}
		must(t, os.RemoveAll(l.path))
	}
	if _, err := OpenResolvConf(l.root + "/none/resolv.conf"); err == nil || !strings.Contains(err.Error(), "none") {
		t.Error(err)
	}
}

// Any number of symlinks into new directories holds no more than maxDirs of them.
func TestResolvConfDirsAreBounded(t *testing.T) {
	l := newLab(t)
	write(t, l.path, "nameserver 192.0.2.1")
	r, err := OpenResolvConf(l.path)
	must(t, err)
	defer r.Close()
	for i := range 2 * maxDirs {
		dir := fmt.Sprintf("%s/%d", l.root, i)
		must(t, os.Mkdir(dir, 0o755))
		write(t, dir+"/f", fmt.Sprintf("nameserver 192.0.2.%d", i+2))
		replace(t, dir+"/f", l.path)
		r.mu.Lock()
		r.check(time.Now())
		r.mu.Unlock()
	}
	if n := len(r.Dirs()); n > maxDirs || r.Err() == nil {
		t.Errorf("%d directories, %v", n, r.Err())
	}
}

// A file that has just changed may change again without a trace, and is read at each look until it
// is a second old.
func TestResolvConfDistrustsFreshTimes(t *testing.T) {
	l := newLab(t)
	write(t, l.path, "nameserver 192.0.2.1")
	r, err := OpenResolvConf(l.path)
	must(t, err)
	defer r.Close()
	written := time.Unix(r.seen.mtime.Unix())
	for _, tt := range []struct {
		age  time.Duration
		read bool
	}{{0, true}, {settled, true}, {settled + 1, false}, {time.Hour, false}} {
		r.now = settings{}
		r.check(written.Add(tt.age))
		if read := len(r.now.servers) > 0; read != tt.read {
			t.Errorf("age %v: read %v", tt.age, read)
		}
	}
}

func TestResolvConfIsNotReadPerQuestion(t *testing.T) {
	l := newLab(t)
	write(t, l.path, "nameserver 192.0.2.1")
	r, err := OpenResolvConf(l.path)
	must(t, err)
	defer r.Close()
	r.checked = time.Now().Add(time.Hour) // no look is due
	if n := testing.AllocsPerRun(100, func() { r.Servers() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	write(t, l.path, "nameserver 192.0.2.2")
	if got := r.Servers()[0].String(); got != "192.0.2.1:53" {
		t.Error(got)
	}
}

func TestResolvConfConcurrently(t *testing.T) {
	l := newLab(t)
	write(t, l.path, "nameserver 192.0.2.1")
	r, err := OpenResolvConf(l.path)
	must(t, err)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 1000 {
				if len(r.Servers()) == 0 {
					t.Error("none")
				}
			}
		})
	}
	wg.Go(func() { r.Dirs(); r.Close() })
	wg.Wait()
}

// The same in a process that has chrooted itself into an empty directory and may, by landlock, read nothing but what
// Dirs names. A plain user does that in a user namespace.
func TestResolvConfInSandbox(t *testing.T) {
	l := newLab(t)
	write(t, l.run+"/stub.conf", "nameserver 192.0.2.1")
	must(t, os.Symlink("../run/systemd/resolve/stub.conf", l.path))
	empty := l.root + "/empty"
	must(t, os.Mkdir(empty, 0o755))

	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "TEST_SANDBOX="+l.path+":"+empty)
	cmd.Stderr = os.Stderr
	if os.Getuid() != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		}
	}
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	if err := cmd.Start(); err != nil {
		t.Skipf("this machine gives no user namespace to a plain user: %v", err)
	}
	defer func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	lines := bufio.NewScanner(out)
	getAll := func() string {
		fmt.Fprintln(in)
		if !lines.Scan() {
			t.Fatal("the sandbox is gone")
		}
		return lines.Text()
	}
	get := func() string {
		server, _, _ := strings.Cut(getAll(), ",")
		return server
	}
	switch ready := get(); ready {
	case "sandboxed":
	case "no landlock":
		t.Log("this kernel has no landlock: only the chroot is tested")
	default:
		t.Fatal(ready)
	}
	scenario(t, l, get)

	// What is not under Dirs stays out of reach, and the last word holds.
	write(t, l.root+"/secret", "nameserver 203.0.113.66")
	replace(t, l.root+"/secret", l.path)
	expect(t, "outside", "192.0.2.4:53, failed", getAll)
}

// sandboxed is the child of TestResolvConfInSandbox: for each line it prints the first
// server, and whether the last look at the file failed.
func sandboxed(arg string) error {
	path, empty, _ := strings.Cut(arg, ":")
	r, err := OpenResolvConf(path)
	if err != nil {
		return err
	}
	defer r.Close()
	runtime.LockOSThread() // landlock is per thread
	ready := "sandboxed"
	if err := allowOnly(r.Dirs()); err == unix.ENOSYS || err == unix.EOPNOTSUPP {
		ready = "no landlock"
	} else if err != nil {
		return fmt.Errorf("landlock: %w", err)
	}
	if err := unix.Chroot(empty); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("chdir: %w", err)
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if ready != "" {
			fmt.Println(ready)
			ready = ""
			continue
		}
		server, state := r.Servers()[0], ""
		if r.Err() != nil {
			state = ", failed"
		}
		fmt.Printf("%s%s\n", server, state)
	}
	return lines.Err()
}

// allowOnly lets the calling thread read files under dirs and open nothing else.
func allowOnly(dirs []*os.File) error {
	attr := unix.LandlockRulesetAttr{Handled_access_fs: unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR |
		unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_EXECUTE}
	set, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), 8, 0)
	if errno != 0 {
		return errno
	}
	defer unix.Close(int(set))
	for _, d := range dirs {
		rule := unix.LandlockPathBeneathAttr{Allowed_access: unix.LANDLOCK_ACCESS_FS_READ_FILE, Parent_fd: int32(d.Fd())}
		if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, set, unix.LANDLOCK_RULE_PATH_BENEATH,
			uintptr(unsafe.Pointer(&rule)), 0, 0, 0); errno != 0 {
			return errno
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, set, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
