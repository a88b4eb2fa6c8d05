package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// inherited takes over a descriptor that a flag names: it must be open, and of a kind that we were given
// rather than one of the runtime's own. It is not passed on to processes of ours, which would keep a
// reader at the other end waiting.
func inherited(flag string, fd int) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, usageError{fmt.Errorf("--%s %d: is not open; in a shell: %d>&1 or %[2]d<fifo", flag, fd, fd)}
	}
	switch kind := st.Mode & unix.S_IFMT; {
	case kind == 0: // epoll, eventfd and the like have no type
		return nil, usageError{fmt.Errorf("--%s %d: is not open", flag, fd)}
	case kind == unix.S_IFDIR:
		return nil, usageError{fmt.Errorf("--%s %d: is a directory", flag, fd)}
	case flag == "exit-fd" && kind != unix.S_IFIFO && kind != unix.S_IFSOCK && kind != unix.S_IFCHR:
		return nil, usageError{fmt.Errorf("--%s %d: is a file, which never hangs up: give a pipe or a socket", flag, fd)}
	}
	mode, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if flag == "ready-fd" && (err != nil || mode&unix.O_ACCMODE == unix.O_RDONLY || mode&unix.O_PATH != 0) {
		return nil, usageError{fmt.Errorf("--%s %d: is not open for writing", flag, fd)}
	}
	if flag == "exit-fd" && err == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO && mode&unix.O_ACCMODE == unix.O_RDWR {
		return nil, usageError{fmt.Errorf("--%s %d: is open for writing too, so that it would never hang up: open it for reading only", flag, fd)}
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "--"+flag+" "+strconv.Itoa(fd)), nil
}

// takeLoose takes descriptors as slirp4netns does. What the ready descriptor cannot do is nobody's mistake: only who
// waits there would know. The exit descriptor must be one, or else we would never end, or at once.
func takeLoose(o *options) (given inheritedFiles, err error) {
	if o.readyFD >= 0 {
		if given.ready, err = looseReady(o.readyFD); err != nil {
			return given, err
		}
	}
	if o.exitFD < 0 {
		return given, nil
	}
	if o.exitFD == o.readyFD {
		return given, fmt.Errorf("ready-fd and exit-fd are both %d: one is closed when all works, the other must stay open", o.exitFD)
	}
	var st unix.Stat_t
	if err := unix.Fstat(o.exitFD, &st); err != nil || st.Mode&unix.S_IFMT == 0 {
		return given, fmt.Errorf("exit-fd %d is not open: give the reading end of a pipe, whose other end is closed to end us", o.exitFD)
	}
	unix.CloseOnExec(o.exitFD)
	given.exit = os.NewFile(uintptr(o.exitFD), "exit-fd "+strconv.Itoa(o.exitFD))
	return given, nil
}

// looseReady returns nil for what is not open, or was opened by our own runtime.
func looseReady(fd int) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT == 0 {
		return nil, nil
	}
	name := "ready-fd " + strconv.Itoa(fd)
	if fd > 2 {
		unix.CloseOnExec(fd)
		return os.NewFile(uintptr(fd), name), nil
	}
	// It will be closed, and then the next file of ours would be standard error, say, and get the log.
	ours, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, os.NewSyscallError("fcntl(F_DUPFD_CLOEXEC)", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err == nil {
		err = errors.Join(os.NewSyscallError("dup3", unix.Dup3(int(null.Fd()), fd, 0)), null.Close())
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(ours))
	}
	return os.NewFile(uintptr(ours), name), nil
}

// sayReady writes "1" and closes. Whoever has stopped waiting is no reason to end.
func sayReady(f *os.File) error {
	if f == nil {
		return nil
	}
	_, err := f.Write([]byte("1"))
	return errors.Join(err, f.Close())
}

// hungUp blocks until the other end of a pipe or socket is closed, and returns nil then, or ctx's error
// when that ends first. What is written to the pipe does not matter and is not read.
func hungUp(ctx context.Context, fd int) error {
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	defer unix.Close(stop)
	woken := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(woken)
		unix.Write(stop, []byte{1, 0, 0, 0, 0, 0, 0, 1}) // not zero in either byte order
	})
	defer func() {
		if !cancel() {
			<-woken
		}
	}()
	// Without any event asked for, the kernel reports POLLHUP, POLLERR (a writer whose reader is gone) and POLLNVAL.
	fds := []unix.PollFd{{Fd: int32(fd)}, {Fd: int32(stop), Events: unix.POLLIN}}
	for {
		if _, err := unix.Ppoll(fds, nil, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("ppoll", err)
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case fds[0].Revents&unix.POLLNVAL != 0:
			return errors.New("the descriptor was closed under us")
		case fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0:
			return nil
		}
	}
}

// A pidFile is removed by whoever wrote it, unless somebody has put another one there meanwhile.
type pidFile struct {
	dir  *os.File // O_PATH: reachable from within the sandbox
	base string
	dev  uint64
	ino  uint64
}

// writePIDFile writes our PID and a newline to path.
func writePIDFile(path string) (*pidFile, error) {
	dir, base := filepath.Split(path)
	fd, err := unix.Open(or(dir, "."), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("--pid-file: %w", &os.PathError{Op: "open", Path: or(dir, "."), Err: err})
	}
	p := &pidFile{dir: os.NewFile(uintptr(fd), or(dir, ".")), base: base}
	if err := p.write(); err != nil {
		return nil, errors.Join(fmt.Errorf("--pid-file: %w", &os.PathError{Op: "write", Path: path, Err: err}), p.dir.Close())
	}
	return p, nil
}

func (p *pidFile) write() error {
	// Not through a symlink: the directory may be one that others can write to.
	fd, err := unix.Openat(int(p.dir.Fd()), p.base, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), p.base)
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	p.dev, p.ino = uint64(st.Dev), st.Ino
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errors.New("not a regular file")
	}
	if err == nil {
		_, err = fmt.Fprintln(f, os.Getpid())
	}
	return errors.Join(err, f.Close())
}

// remove removes the file. nil is no file.
func (p *pidFile) remove() error {
	if p == nil {
		return nil
	}
	defer p.dir.Close()
	var st unix.Stat_t
	if err := unix.Fstatat(int(p.dir.Fd()), p.base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil || uint64(st.Dev) != p.dev || st.Ino != p.ino {
		return nil // it is gone, or another's
	}
	if err := unix.Unlinkat(int(p.dir.Fd()), p.base, 0); err != nil {
		return fmt.Errorf("--pid-file: %w", &os.PathError{Op: "remove", Path: filepath.Join(p.dir.Name(), p.base), Err: err})
	}
	return nil
}
