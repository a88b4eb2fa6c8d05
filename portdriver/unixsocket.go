package portdriver

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A socketFile is a unix socket that we have made. It is removed by us alone, and only while it is that very file.
type socketFile struct {
	dir      *os.File // O_PATH: it can be reached from within the sandbox
	base     string
	dev, ino uint64
}

// bindPath makes the forward's unix socket. Only its owner may connect, from its birth on. A dead socket that is in
// the way is replaced; a live one, or any other file, is not.
func (f *forward) bindPath() error {
	fail := func(call string, err error) error { return f.d.listenError(f.spec, call, err) }
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail("socket", err)
	}
	f.fds = append(f.fds, fd)
	// The file gets the mode of the socket itself, less the umask, which belongs to the whole process.
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return fail("fchmod", err)
	}
	sa := &unix.SockaddrUnix{Name: f.spec.HostPath}
	err = unix.Bind(fd, sa)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := removeDead(f.spec.HostPath); err != nil {
			return fail("bind", err)
		}
		err = unix.Bind(fd, sa)
	}
	if err != nil {
		return fail("bind", err)
	}
	if f.path, err = holdFile(f.spec.HostPath); err != nil {
		_ = os.Remove(f.spec.HostPath)
		return fail("open", err)
	}
	return nil
}

// removeDead removes a socket that nobody listens on.
func removeDead(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return unix.EEXIST
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); !errors.Is(err, unix.ECONNREFUSED) {
		return unix.EADDRINUSE // it lives, or its owner is not to be asked
	}
	return unix.Unlink(path)
}

// holdFile remembers a file.
func holdFile(path string) (*socketFile, error) {
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		closeFD(fd)
		return nil, err
	}
	return &socketFile{dir: os.NewFile(uintptr(fd), dir), base: base, dev: uint64(st.Dev), ino: st.Ino}, nil
}

// remove removes the file, if it is still there, and lets go of it.
func (s *socketFile) remove() error {
	defer s.dir.Close()
	fd := int(s.dir.Fd())
	var st unix.Stat_t
	if err := unix.Fstatat(fd, s.base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil || uint64(st.Dev) != s.dev || st.Ino != s.ino {
		return nil // it is gone, or another's
	}
	if err := unix.Unlinkat(fd, s.base, 0); err != nil {
		return &os.PathError{Op: "remove", Path: s.base, Err: err}
	}
	return nil
}

// Dirs are the directories of the unix sockets that are published now. A sandbox must allow removing files in them, or else
// these are left behind. They belong to the Driver.
func (d *Driver) Dirs() []*os.File {
	var dirs []*os.File
	for _, f := range d.all() {
		if f.path != nil {
			dirs = append(dirs, f.path.dir)
		}
	}
	return dirs
}
