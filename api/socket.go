package api

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// The file of the socket comes and goes like this, so that no two starters meet and nobody else ever gets in:
//
//	flock(directory)                 one starter at a time; for moments only
//	  lstat, connect                 a live socket, a foreign one or a file: refused; a dead one of ours: unlinked
//	  fchmod(socket, 0600), bind     the file is born with the mode of the socket's own inode (unix(7): mode & ~umask)
//	  listen                         before the lock is given up: to others a socket is live from the first moment
//	unlock
//
// The mode is set before there is a name, so no moment exists in which another user could connect, and the umask, which
// belongs to the whole process and so cannot be changed for a moment without changing it for others, is left alone. It
// can only take bits away. bind and rename would do too, but leave the private name in getsockname and ss.
//
// The directory is what is locked as it is there already: a lock file of its own would be left behind by SIGKILL.

const (
	// maxPath is what sockaddr_un holds without its final zero.
	maxPath = 107

	// lockPatience: an honest starter keeps the lock for less than a millisecond.
	lockPatience = 5 * time.Second

	// backlog of connections that nobody has accepted yet. Past it a client that does not block, as all of Go's, gets
	// EAGAIN. Clients come in swarms when a host starts its containers; the kernel cuts this to net.core.somaxconn.
	backlog = 4096
)

// A socketFile is the name of a listening socket. It is removed by whoever made it, unless somebody has put another one
// there meanwhile, and by way of the directory's descriptor, which reaches it from within a sandbox.
type socketFile struct {
	path     string // absolute
	dir      *os.File
	base     string
	dev, ino uint64
	born     unix.Timespec // some file systems give an inode's number to the next file
}

func (f *socketFile) is(st *unix.Stat_t) bool {
	return uint64(st.Dev) == f.dev && st.Ino == f.ino && st.Mtim == f.born
}

// listenAt makes the socket and its file.
func listenAt(path string) (_ net.Listener, _ *socketFile, err error) {
	if path == "" {
		return nil, nil, errors.New("it has no name")
	}
	path, err = filepath.Abs(path)
	if err != nil {
		return nil, nil, err
	}
	if len(path) > maxPath {
		return nil, nil, fmt.Errorf("%s has %d octets, and the name of a socket at most %d: choose a shorter one", path, len(path), maxPath)
	}
	dir, base := filepath.Split(path)
	if base == "" {
		return nil, nil, fmt.Errorf("%s is a directory", path)
	}
	d, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, nil, err
	}
	f := &socketFile{path: path, dir: d, base: base}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	if err := f.lock(lockPatience); err != nil {
		return nil, nil, err
	}
	defer f.unlock()
	if err := f.clear(); err != nil {
		return nil, nil, err
	}
	ln, err := f.bind()
	return ln, f, err
}

// lock takes the directory's lock, and waits for it at most so long.
func (f *socketFile) lock(patience time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		err := unix.Flock(int(f.dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case !errors.Is(err, unix.EWOULDBLOCK):
			return fmt.Errorf("lock %s: %w (the file system has no locks: choose another directory)", f.dir.Name(), err)
		case !wait(ctx, 2*time.Millisecond):
			return fmt.Errorf("lock %s: another process has held it for %v: choose a directory that is yours alone", f.dir.Name(), patience)
		}
	}
}

func (f *socketFile) unlock() { _ = unix.Flock(int(f.dir.Fd()), unix.LOCK_UN) }

// clear removes a socket of ours that nobody listens at any more, and refuses all else.
func (f *socketFile) clear() error {
	var st unix.Stat_t
	switch err := unix.Fstatat(int(f.dir.Fd()), f.base, &st, unix.AT_SYMLINK_NOFOLLOW); {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return &os.PathError{Op: "stat", Path: f.path, Err: err}
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return fmt.Errorf("%s is there already and is no socket: remove it, or choose another name", f.path)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s is a socket of uid %d: choose another name", f.path, st.Uid)
	}
	live, err := f.live()
	if err != nil {
		return err
	}
	if live {
		return fmt.Errorf("%s is in use by a running process: choose another name, or end that one: %w", f.path, unix.EADDRINUSE)
	}
	if err := unix.Unlinkat(int(f.dir.Fd()), f.base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "remove the dead socket", Path: f.path, Err: err}
	}
	return nil
}

// live tells whether somebody listens at the socket.
func (f *socketFile) live() (bool, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return false, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: f.path}); {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOENT):
		return false, nil
	case err == nil, errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EPROTOTYPE): // its queue is full; of another type
		return true, nil
	default:
		return false, fmt.Errorf("%s: see whether it is in use: %w", f.path, err)
	}
}

// bind makes the socket with its file.
func (f *socketFile) bind() (_ net.Listener, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	s := os.NewFile(uintptr(fd), f.path)
	defer s.Close() // FileListener has a duplicate
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return nil, fmt.Errorf("mode of the socket %s: %w", f.path, err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: f.path}); err != nil {
		return nil, fmt.Errorf("bind %s: %w", f.path, err)
	}
	defer func() {
		if err != nil {
			_ = unix.Unlinkat(int(f.dir.Fd()), f.base, 0) // we hold the lock: it is ours
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstatat(int(f.dir.Fd()), f.base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, &os.PathError{Op: "stat", Path: f.path, Err: err}
	}
	if mode := st.Mode & 0o7777; mode != 0o600 {
		return nil, fmt.Errorf("the umask leaves %s the mode %04o, with which nobody can connect: set one like 077", f.path, mode)
	}
	f.dev, f.ino, f.born = uint64(st.Dev), st.Ino, st.Mtim
	if err := unix.Listen(fd, backlog); err != nil {
		return nil, fmt.Errorf("listen at %s: %w", f.path, err)
	}
	return net.FileListener(s)
}

// remove removes the file, if it is still ours, and closes the directory. The socket must still be listening: while it
// does nobody replaces the file.
func (f *socketFile) remove() error {
	defer f.dir.Close()
	// Without the lock it works as well, unless somebody has removed the file by hand and another starter
	// comes in between the next two calls.
	if f.lock(lockPatience/50) == nil {
		defer f.unlock()
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(f.dir.Fd()), f.base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil || !f.is(&st) {
		return nil // it is gone, or another's
	}
	if err := unix.Unlinkat(int(f.dir.Fd()), f.base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "remove", Path: f.path, Err: err}
	}
	return nil
}

// wait sleeps, and returns false where ctx has ended first.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
