// Package sockfile makes listening unix sockets with a file that only its owner may connect to, and removes the file again.
// It goes like this, so that no two starters meet and nobody else ever gets in:
//
//	fchmod(socket, 0600)             the file is born with the mode of the socket's own inode (unix(7): mode & ~umask)
//	flock(directory)                 one starter at a time; for moments only
//	  lstat, connect                 a live socket, a foreign one or a file: refused; a dead one of ours: unlinked
//	  bind, listen                   before the lock is given up: to others a socket is live from the first moment
//	unlock
//
// The mode is set before there is a name, so no moment exists in which another user could connect, and the umask, which
// belongs to the whole process and so cannot be changed for a moment without changing it for others, is left alone. It
// can only take bits away. bind and rename would do too, but leave the private name in getsockname and ss.
//
// The directory is what is locked as it is there already: a lock file of its own would be left behind by SIGKILL. There is one
// only where somebody else keeps a shared lock on the directory: see lockBeside.
package sockfile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// MaxPath is how many octets a name has at most: what sockaddr_un holds without its final zero.
const MaxPath = 107

const (
	// lockPatience: an honest starter keeps the lock for less than a millisecond.
	lockPatience = 5 * time.Second

	// removePatience is short, as Remove works without the lock too, and thousands of files may go one after the other.
	removePatience = 10 * time.Millisecond

	// backlog of connections that nobody has accepted yet. Past it a client that does not block, as all of Go's, gets
	// EAGAIN. Clients come in swarms when a host starts its containers; the kernel cuts this to net.core.somaxconn.
	backlog = 4096

	// lockName is the file of lockBeside, in the directory.
	lockName = ".usernet.lock"

	// maxSweep names are looked at for each start, so that it takes no longer where thousands run.
	maxSweep = 4096
)

// A File is the name of a listening socket. It is removed by whoever made it, unless somebody has put another one
// there meanwhile, and by way of the directory's descriptor, which reaches it from within a sandbox.
type File struct {
	path     string
	dir      *os.File
	beside   *os.File // the locked file of lockBeside, while it is needed
	base     string
	dev, ino uint64
	born     unix.Timespec // some file systems give an inode's number to the next file
}

// An Error says why there is no socket.
type Error struct {
	// Call is the one that failed, in the words of package net: socket, fchmod, bind or listen.
	// Empty where none did and only Err can tell.
	Call  string
	Errno unix.Errno
	Err   error // what happened, with the remedy
}

func (e *Error) Error() string   { return e.Err.Error() }
func (e *Error) Unwrap() []error { return []error{e.Err, e.Errno} }

// failed is an Error whose errno is err's own.
func failed(call string, err error) *Error {
	e := &Error{Call: call, Err: err}
	_ = errors.As(err, &e.Errno)
	return e
}

// Listen makes a stream socket, non-blocking and listening, and its file with the mode 0600. A dead socket of ours in its
// place is replaced; a live one, somebody else's, and any other file is an *Error. path begins with / or ./, is taken as it is,
// and leads to a directory that can be read, too, for its lock. fd is the caller's, and so is the File, which is removed
// before fd is closed.
func Listen(path string) (f *File, fd int, err error) { return listenAs(path, unix.SOCK_STREAM) }

// ListenSeqpacket is Listen for a socket of type SOCK_SEQPACKET, which keeps the borders of messages.
func ListenSeqpacket(path string) (f *File, fd int, err error) {
	return listenAs(path, unix.SOCK_SEQPACKET)
}

func listenAs(path string, kind int) (f *File, fd int, err error) {
	if len(path) > MaxPath {
		return nil, -1, &Error{Errno: unix.ENAMETOOLONG,
			Err: fmt.Errorf("%s has %d octets, and the name of a socket at most %d: choose a shorter one", path, len(path), MaxPath)}
	}
	fd, err = socket(kind)
	if err != nil {
		return nil, -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
			f, fd = nil, -1
		}
	}()
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return nil, fd, failed("fchmod", fmt.Errorf("mode of the socket %s: %w", path, err))
	}
	f = &File{path: path}
	var dir string
	dir, f.base = filepath.Split(path)
	f.dir, err = os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fd, failed("bind", err)
	}
	defer func() {
		if err != nil {
			f.dir.Close()
		}
	}()
	if f.base == "" {
		return f, fd, &Error{Call: "bind", Errno: unix.EEXIST, Err: fmt.Errorf("%s is a directory", path)}
	}
	if err := f.lock(lockPatience); err != nil {
		return f, fd, err
	}
	defer f.unlock()
	if err := f.clear(); err != nil {
		return f, fd, err
	}
	return f, fd, f.bind(fd)
}

func socket(kind int) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, failed("socket", os.NewSyscallError("socket", err))
	}
	return fd, nil
}

// lock takes the directory's lock, and waits for it at most so long.
func (f *File) lock(patience time.Duration) error {
	for end := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		err := unix.Flock(int(f.dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = f.lockBeside()
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case !errors.Is(err, unix.EWOULDBLOCK):
			return failed("", fmt.Errorf("lock %s: %w (choose a directory that is yours alone, on a file system that has locks)", f.dir.Name(), err))
		case !time.Now().Before(end):
			return &Error{Errno: unix.EBUSY,
				Err: fmt.Errorf("lock %s: another process has held it for %v: choose a directory that is yours alone", f.dir.Name(), patience)}
		}
	}
}

// lockBeside locks a directory on which somebody keeps a shared lock for long. That is how programs tell systemd-tmpfiles to leave
// a directory of theirs in /tmp alone (tmpfiles.d(5)), and rootlesskit, which wants our socket there, is one. With a shared
// lock of our own nobody gets the exclusive one, and a file keeps out those who come this way too. It is removed
// while it is locked; SIGKILL in that moment leaves it for the next who comes. EWOULDBLOCK: another starter is at work.
func (f *File) lockBeside() (err error) {
	dir := int(f.dir.Fd())
	if err := unix.Flock(dir, unix.LOCK_SH|unix.LOCK_NB); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = unix.Flock(dir, unix.LOCK_UN)
		}
	}()
	fd, err := unix.Openat(dir, lockName, unix.O_RDONLY|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "open", Path: lockName, Err: err}
	}
	file := os.NewFile(uintptr(fd), lockName)
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return err
	}
	var ours, named unix.Stat_t
	if err := unix.Fstat(fd, &ours); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if unix.Fstatat(dir, lockName, &named, unix.AT_SYMLINK_NOFOLLOW) != nil || named.Ino != ours.Ino || named.Dev != ours.Dev {
		return unix.EWOULDBLOCK // it was removed between open and flock, and locks nothing any more
	}
	f.beside = file
	return nil
}

func (f *File) unlock() {
	if f.beside != nil {
		_ = unix.Unlinkat(int(f.dir.Fd()), lockName, 0)
		f.beside.Close()
		f.beside = nil
	}
	_ = unix.Flock(int(f.dir.Fd()), unix.LOCK_UN)
}

// stat looks at what has the name now.
func (f *File) stat() (st unix.Stat_t, err error) {
	err = unix.Fstatat(int(f.dir.Fd()), f.base, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, err
}

// unlink removes what has the name.
func (f *File) unlink(op string) error {
	if err := unix.Unlinkat(int(f.dir.Fd()), f.base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: op, Path: f.path, Err: err}
	}
	return nil
}

// clear removes a socket of ours that nobody listens at any more, and refuses all else.
func (f *File) clear() error {
	st, err := f.stat()
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return failed("bind", &os.PathError{Op: "stat", Path: f.path, Err: err})
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return &Error{Call: "bind", Errno: unix.EEXIST,
			Err: fmt.Errorf("%s is there already and is no socket: remove it, or choose another name", f.path)}
	case int(st.Uid) != os.Geteuid():
		return &Error{Errno: unix.EADDRINUSE, Err: fmt.Errorf("%s is a socket of uid %d: choose another name", f.path, st.Uid)}
	}
	if err := f.dead(); err != nil {
		return err
	}
	if err := f.unlink("remove the dead socket"); err != nil {
		return failed("bind", err)
	}
	return nil
}

// dead returns an error unless nobody listens at the socket.
func (f *File) dead() error {
	fd, err := socket(unix.SOCK_STREAM) // the kernel looks whether there is a listener before it looks at its type
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: f.path}); {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOENT):
		return nil
	case err == nil, errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EPROTOTYPE): // its queue is full; of another type
		return &Error{Call: "bind", Errno: unix.EADDRINUSE,
			Err: fmt.Errorf("%s is in use by a running process: choose another name, or end that one: %w", f.path, unix.EADDRINUSE)}
	default:
		return &Error{Call: "bind", Errno: unix.EADDRINUSE, Err: fmt.Errorf("%s: see whether it is in use: %w", f.path, err)}
	}
}

// bind gives the socket its file, and listens.
func (f *File) bind(fd int) (err error) {
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: f.path}); err != nil {
		return failed("bind", fmt.Errorf("bind %s: %w", f.path, err))
	}
	defer func() {
		if err != nil {
			_ = f.unlink("") // we hold the lock: it is ours
		}
	}()
	st, err := f.stat()
	if err != nil {
		return failed("bind", &os.PathError{Op: "stat", Path: f.path, Err: err})
	}
	if mode := st.Mode & 0o7777; mode != 0o600 {
		return &Error{Errno: unix.EPERM,
			Err: fmt.Errorf("the umask leaves %s the mode %04o, with which nobody can connect: set one like 077", f.path, mode)}
	}
	f.dev, f.ino, f.born = uint64(st.Dev), st.Ino, st.Mtim
	if err := unix.Listen(fd, backlog); err != nil {
		return failed("listen", fmt.Errorf("listen at %s: %w", f.path, err))
	}
	return nil
}

// Path is the file's name, as Listen was told.
func (f *File) Path() string { return f.path }

// Dir is the directory of the file. A sandbox must allow removing files in it, or else the file is left behind.
// It belongs to the File.
func (f *File) Dir() *os.File { return f.dir }

// Remove removes the file, if it is still ours, and closes the directory; once. The socket must still be listening: while
// it does nobody replaces the file.
func (f *File) Remove() error {
	defer f.dir.Close()
	// Without the lock it works as well, unless somebody has removed the file by hand and another starter
	// comes in between the next two calls.
	if f.lock(removePatience) == nil {
		defer f.unlock()
	}
	st, err := f.stat()
	if err != nil || uint64(st.Dev) != f.dev || st.Ino != f.ino || st.Mtim != f.born {
		return nil // it is gone, or another's
	}
	return f.unlink("remove")
}

// Sweep removes from dir the dead sockets of ours whose names which admits. What it cannot remove does no harm.
func Sweep(dir string, which func(name string) bool) {
	d, err := os.Open(dir)
	if err != nil {
		return
	}
	defer d.Close()
	names, _ := d.Readdirnames(maxSweep)
	guard := &File{dir: d}
	defer guard.unlock()
	locked := false
	for _, name := range names {
		if !which(name) {
			continue
		}
		f := &File{path: filepath.Join(dir, name), dir: d, base: name}
		if locked = locked || guard.lock(0) == nil; !locked {
			return // another one starts, and sweeps
		}
		_ = f.clear() // one that is live stays
	}
}
