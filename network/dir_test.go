package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func openDir(t testing.TB) *Dir {
	t.Helper()
	d, err := OpenDir(filepath.Join(t.TempDir(), "usernet", "shared"))
	want(t, err, nil)
	t.Cleanup(func() { want(t, d.Close(), nil) })
	return d
}

// put writes a file as an editor would.
func put(t testing.TB, d *Dir, name, data string, mode os.FileMode) {
	t.Helper()
	path := filepath.Join(d.Path(), name)
	want(t, os.WriteFile(path, []byte(data), 0o600), nil)
	want(t, os.Chmod(path, mode), nil)
}

func files(t testing.TB, d *Dir) string {
	t.Helper()
	entries, err := os.ReadDir(d.Path())
	want(t, err, nil)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

func TestSaveAndLoad(t *testing.T) {
	d := openDir(t)
	s, err := d.Load(boot)
	want(t, err, nil)
	if l := s.List(); len(l) != 0 {
		t.Error(l)
	}
	st := example(t).State(boot)
	for range 2 { // the second takes the first one's place
		want(t, d.Save(st), nil)
		if got := files(t, d); got != "state.json" {
			t.Error(got)
		}
	}
	info, err := os.Stat(filepath.Join(d.Path(), StateFile))
	want(t, err, nil)
	if info.Mode() != 0o600 {
		t.Error(info.Mode())
	}
	s, err = d.Load(boot, "host.containers.internal")
	want(t, err, nil)
	if got := text(t, s.State(boot)); string(got) != string(text(t, st)) {
		t.Errorf("%s", got)
	}
	_, err = d.Load("b0072")
	want(t, err, ErrOtherBoot, d.Path()+"/state.json", boot, "b0072")
	want(t, d.Discard(StateFile), nil)
	if got := files(t, d); got != "state.json.old" {
		t.Error(got)
	}
}

// A state.json that nobody could have meant says what to do, and stays as it is.
func TestLoadRefused(t *testing.T) {
	good := string(text(t, example(t).State(boot)))
	for _, tt := range []struct {
		name, data string
		mode       os.FileMode
		words      []string
	}{
		{"empty", "", 0o600, []string{"ends after 0 octets", "mv "}},
		{"truncated", good[:len(good)/2], 0o600, []string{"in the middle", "Containers go on", "mv "}},
		{"nonsense", strings.Replace(good, `"ipv4": "10.89.0.77"`, `"ipv4": "10.89.0.2"`, 1), 0o600, []string{`network "web": member "app"`, "10.89.0.2", "mv "}},
		{"newer", `{"version": 7}`, 0o600, []string{"version 7"}},
		{"others may write", good, 0o620, []string{"mode 0620", "remove it"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := openDir(t)
			put(t, d, StateFile, tt.data, tt.mode)
			s, err := d.Load(boot, "host.containers.internal")
			if err == nil || s != nil {
				t.Fatal("it was read")
			}
			for _, w := range append(tt.words, d.Path()+"/state.json") {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%v: does not say %q", err, w)
				}
			}
			data, err := os.ReadFile(filepath.Join(d.Path(), StateFile))
			want(t, err, nil)
			if string(data) != tt.data {
				t.Error("the file was changed")
			}
		})
	}
}

func TestLoadNoRegularFile(t *testing.T) {
	d := openDir(t)
	path := filepath.Join(d.Path(), StateFile)
	for what, put := range map[string]func() error{
		"no regular file": func() error { return os.Mkdir(path, 0o700) },
		"is no regular":   func() error { return syscall.Mkfifo(path, 0o600) }, // does not wait for a writer
		"octets":          func() error { return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, maxFile+1)) },
		"escapes":         func() error { return os.Symlink("/etc/passwd", path) },
	} {
		want(t, put(), nil)
		if _, err := d.Load(boot); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%v, want %q", err, what)
		}
		want(t, os.Remove(path), nil)
	}
}

// What an interrupted writer has left is in nobody's way.
func TestWriteAfterCrash(t *testing.T) {
	d := openDir(t)
	want(t, d.Save(New().State(boot)), nil)
	put(t, d, "state.json.tmp", strings.Repeat("x", 100_000), 0o600)
	_, err := d.Load(boot)
	want(t, err, nil)
	want(t, d.Save(example(t).State(boot)), nil)
	_, err = d.Load(boot, "host.containers.internal")
	want(t, err, nil)
	if got := files(t, d); got != "state.json" {
		t.Error(got)
	}
}

// A write that fails leaves the old file, and nothing beside it.
func TestWriteFails(t *testing.T) {
	d := openDir(t)
	want(t, os.Mkdir(filepath.Join(d.Path(), KeeperFile), 0o700), nil)
	if err := d.WriteFile(KeeperFile, 1); err == nil || !strings.Contains(err.Error(), d.Path()+"/keeper.json") {
		t.Error(err)
	}
	if err := d.WriteFile(KeeperFile, func() {}); err == nil {
		t.Error("a function was written")
	}
	if got := files(t, d); got != "keeper.json" {
		t.Error(got)
	}
	d.most = 1000
	want(t, d.WriteFile(StateFile, strings.Repeat("x", 1000)), ErrExhausted, "1003 octets", "1000 are read")
	want(t, d.WriteFile(StateFile, strings.Repeat("x", 997)), nil)
}

// A reader sees one file or the other, whole.
func TestReadWhileWriting(t *testing.T) {
	d := openDir(t)
	want(t, d.WriteFile(KeeperFile, []int{}), nil)
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			for range 100 {
				if err := d.WriteFile(KeeperFile, make([]int, 1000*i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 200 {
		var v []int
		if err := d.ReadFile(KeeperFile, &v); err != nil || len(v) != 0 && len(v) != 1000 {
			t.Errorf("%d numbers, %v", len(v), err)
		}
	}
	wg.Wait()
}

func TestReadFile(t *testing.T) {
	d := openDir(t)
	var v Process
	if err := d.ReadFile(KeeperFile, &v); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	want(t, d.WriteFile(KeeperFile, Process{5, 6}), nil)
	want(t, d.ReadFile(KeeperFile, &v), nil)
	if v != (Process{5, 6}) {
		t.Error(v)
	}
	put(t, d, KeeperFile, `{"pid":5,"start":6,"x":1}`, 0o600)
	want(t, d.ReadFile(KeeperFile, &v), ErrInvalid, d.Path()+"/keeper.json", "damaged")
	put(t, d, KeeperFile, `{"pid":5`, 0o600)
	want(t, d.ReadFile(KeeperFile, &v), ErrInvalid, "in the middle")
}

func TestOpenDir(t *testing.T) {
	base := t.TempDir()
	path := filepath.Join(base, "usernet", "shared")
	mode := func(p string) os.FileMode {
		info, err := os.Stat(p)
		want(t, err, nil)
		return info.Mode().Perm()
	}
	reopen := func(words ...string) {
		t.Helper()
		d, err := OpenDir(path)
		if len(words) == 0 {
			want(t, err, nil)
			want(t, d.Close(), nil)
			return
		}
		if err == nil {
			d.Close()
			t.Fatal("it was opened")
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%v: does not say %q", err, w)
			}
		}
	}
	reopen()
	if mode(path) != 0o700 || mode(filepath.Dir(path)) != 0o700 {
		t.Errorf("modes %o and %o", mode(path), mode(filepath.Dir(path)))
	}
	want(t, os.Chmod(path, 0o755), nil)
	reopen()
	if mode(path) != 0o700 {
		t.Errorf("mode %o: others may look into it", mode(path))
	}
	want(t, os.Chmod(path, 0o770), nil)
	reopen(path, "0770", "chmod go-w")
	want(t, os.Remove(path), nil)
	want(t, os.Symlink(base, path), nil)
	reopen(path, "no directory")
	want(t, os.Remove(path), nil)
	want(t, os.WriteFile(path, nil, 0o600), nil)
	reopen(path, "no directory")
	want(t, os.Remove(path), nil)
	want(t, os.Chmod(filepath.Dir(path), 0o777), nil)
	reopen("usernet has mode 0777")
	path = filepath.Join(base, "missing", "usernet", "shared")
	reopen("missing/usernet")

	// Somebody else's: /usr is root's, and root itself can give one away.
	path = filepath.Join(base, "other", "shared")
	want(t, os.MkdirAll(path, 0o700), nil)
	if os.Chown(filepath.Dir(path), 4711, -1) != nil {
		path = "/usr/usernet-test"
	}
	reopen("belongs to uid", fmt.Sprint("this is uid ", os.Geteuid()), "XDG_RUNTIME_DIR")
}

func TestDefaultDir(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	got, err := DefaultDir()
	want(t, err, nil)
	if got != "/run/user/7/usernet/shared" {
		t.Error(got)
	}
	for _, bad := range []string{"", "run"} {
		t.Setenv("XDG_RUNTIME_DIR", bad)
		if got, err := DefaultDir(); err == nil || !strings.Contains(err.Error(), "XDG_RUNTIME_DIR") {
			t.Error(got, err)
		}
	}
}

func TestSocket(t *testing.T) {
	d := openDir(t)
	got, err := d.Socket("web", "db")
	want(t, err, nil)
	if got != filepath.Join(d.Path(), "web", "db.sock") && len(d.Path()) < 80 {
		t.Error(got)
	}
	info, err := os.Stat(filepath.Join(d.Path(), "web"))
	want(t, err, nil)
	if info.Mode() != fs.ModeDir|0o700 {
		t.Error(info.Mode())
	}
	_, err = d.Socket("web", "../db")
	want(t, err, ErrInvalid)
	_, err = d.Socket("..", "db")
	want(t, err, ErrInvalid)

	// Names of 63 octets are no socket's any more; two that begin alike are told apart.
	long := strings.Repeat("n", 62)
	dir := "/run/user/4294967295/usernet/shared/" + strings.Repeat("w", 40)
	a, b := socketIn(dir, long+"a"), socketIn(dir, long+"b")
	if len(a) != maxSocket || len(b) != maxSocket || a == b || a != socketIn(dir, long+"a") || filepath.Dir(a) != dir || !strings.Contains(a, "~") {
		t.Error(a, b)
	}
	if got := socketIn(dir+strings.Repeat("w", 60), "a"); !strings.Contains(got, "~") {
		t.Error(got) // too long, whatever the name: who binds it says so
	}
}

// What was left of members and networks goes, and nothing outside of it.
func TestDirRemoves(t *testing.T) {
	d := openDir(t)
	for _, member := range []string{"db", strings.Repeat("n", 63)} {
		path, err := d.Socket("web", member)
		want(t, err, nil)
		want(t, os.WriteFile(path, nil, 0o600), nil)
		want(t, d.RemoveSocket("web", member), nil)
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
		want(t, d.RemoveSocket("web", member), nil) // there is none
	}
	path, err := d.Socket("web", "db")
	want(t, err, nil)
	want(t, os.WriteFile(path, nil, 0o600), nil)
	want(t, d.RemoveNetwork("web"), nil)
	if _, err := os.Lstat(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the network's folder is still there: %v", err)
	}
	want(t, d.RemoveNetwork("web"), nil)
	want(t, d.RemoveNetwork(".."), ErrInvalid)
	want(t, d.RemoveSocket("web", "../x"), ErrInvalid)
	want(t, d.RemoveSocket("..", "x"), ErrInvalid)
}
