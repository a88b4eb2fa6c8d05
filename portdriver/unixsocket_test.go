package portdriver

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestUnixSocket(t *testing.T) {
	both(t, func(t *testing.T, path string) {
		l := newLab(t, labConfig{path: path})
		l.sayWho("tcp4", ":80")
		file := filepath.Join(t.TempDir(), "a.sock")
		fs := l.add(file+":80", filepath.Join(t.TempDir(), "b.sock")+":10.0.2.100:81")
		if fs[0].Spec.HostPath != file || fs[0].Path != path {
			t.Errorf("%+v", fs[0])
		}
		if who := seenBy(t, dial(t, "unix", file)); who.Addr() != gateway4 {
			t.Errorf("seen as %v", who)
		}
		// There is no RST, but the end comes at once, without an octet.
		c := dial(t, "unix", fs[1].Spec.HostPath)
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
			t.Errorf("nobody listens: %d, %v", n, err)
		}
		l.idle(fs[0].ID)
	})
}

func TestUnixSocketFile(t *testing.T) {
	d := bare(t, nil)
	file := filepath.Join(t.TempDir(), "a.sock")
	old := unix.Umask(0)
	defer unix.Umask(old)
	f := publish(t, d, file+":80")[0]
	st, err := os.Lstat(file)
	if err != nil || st.Mode() != os.ModeSocket|0o600 {
		t.Fatalf("%v, %v", st.Mode(), err)
	}
	same := f.Spec
	var conflict ErrConflict
	if _, err := d.Add(t.Context(), same); !errors.As(err, &conflict) {
		t.Errorf("the same path: %v", err)
	}
	same.HostPath = filepath.Dir(file) + "/./a.sock"
	if _, err := d.Add(t.Context(), same); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "a live program listens there") {
		t.Errorf("a live socket: %v", err)
	}
	if err := d.Remove(t.Context(), f.ID, false); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is left: %v", err)
	}

	dead, err := net.Listen("unix", file)
	if err != nil {
		t.Fatal(err)
	}
	dead.(*net.UnixListener).SetUnlinkOnClose(false)
	dead.Close()
	f = publish(t, d, file+":80")[0]

	// What somebody else has put there is not ours to remove.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(t.Context(), f.ID, false); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(file); err != nil {
		t.Error(err)
	}
	for path, want := range map[string]string{
		file:                        "a file that is no socket",
		file + ".d/x":               "the folder must be there",
		filepath.Dir(file) + "/../": "",
	} {
		_, err := d.Add(t.Context(), Spec{Proto: "tcp", HostPath: path, ContainerPort: 80})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "listen unix "+path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// What Add says of a path that cannot be listened at, to the letter.
func TestUnixSocketErrors(t *testing.T) {
	const folder = ": the folder must be there and ours to write; a confined usernet sees none, so give the path when it starts"
	const live = "bind: address already in use: a live program listens there: choose another path, or stop it"
	const file = "bind: file exists: there is a file that is no socket: choose another path, or remove it"
	for _, c := range []struct {
		what string
		put  func(t *testing.T, path string) (at string, err error)
		want string // behind "listen unix PATH: "
		is   error
	}{
		{"no folder", func(t *testing.T, path string) (string, error) { return path + "/x", nil }, "bind: no such file or directory" + folder, unix.ENOENT},
		{"no folder, nothing behind it", func(t *testing.T, path string) (string, error) { return path + "/", nil }, "bind: no such file or directory" + folder, unix.ENOENT},
		{"a file for a folder", func(t *testing.T, path string) (string, error) { return path + "/x", os.WriteFile(path, nil, 0o600) }, "bind: not a directory", unix.ENOTDIR},
		{"a file", func(t *testing.T, path string) (string, error) { return path, os.WriteFile(path, nil, 0o600) }, file, unix.EEXIST},
		{"a folder", func(t *testing.T, path string) (string, error) { return path, os.Mkdir(path, 0o700) }, file, unix.EEXIST},
		{"a folder, said so", func(t *testing.T, path string) (string, error) { return path + "/", os.Mkdir(path, 0o700) }, file, unix.EEXIST},
		{"a folder's parent", func(t *testing.T, path string) (string, error) { return path + "/..", os.Mkdir(path, 0o700) }, file, unix.EEXIST},
		{"a link to nothing", func(t *testing.T, path string) (string, error) { return path, os.Symlink(path+"2", path) }, file, unix.EEXIST},
		{"a live socket", func(t *testing.T, path string) (string, error) {
			l, err := net.Listen("unix", path)
			if err == nil {
				t.Cleanup(func() { l.Close() })
			}
			return path, err
		}, live, unix.EADDRINUSE},
		{"a live datagram socket", func(t *testing.T, path string) (string, error) {
			c, err := net.ListenPacket("unixgram", path)
			if err == nil {
				t.Cleanup(func() { c.Close() })
			}
			return path, err
		}, live, unix.EADDRINUSE},
		{"under a umask for nobody", func(t *testing.T, path string) (string, error) {
			old := unix.Umask(0o277)
			t.Cleanup(func() { unix.Umask(old) })
			return path, nil
		}, "the umask leaves PATH the mode 0400, with which nobody can connect: set one like 077", unix.EPERM},
	} {
		t.Run(c.what, func(t *testing.T) {
			path, err := c.put(t, filepath.Join(t.TempDir(), "a"))
			if err != nil {
				t.Fatal(err)
			}
			d := bare(t, nil)
			_, err = d.Add(t.Context(), Spec{Proto: "tcp", HostPath: path, ContainerPort: 80})
			var e *ErrListen
			if want := "listen unix " + path + ": " + strings.ReplaceAll(c.want, "PATH", path); !errors.As(err, &e) || err.Error() != want || !errors.Is(err, c.is) {
				t.Errorf("\n%v, want\n%s", err, want)
			}
		})
	}
}
