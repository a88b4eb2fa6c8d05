package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel tells nobody that the last process of a network namespace has died, and our own fds
// keep the namespace alive anyway. What can be known is whether the name by which
// it was given to us still holds: the process lives, or the path leads to the same inode.
//
// All descriptors are opened before the caller gives up its rights: a directory fd and
// the mount table of the mount namespace that we started in show the original mounts also to a
// process that has since moved to another root and another mount namespace. Watch itself needs
// ppoll, read, write, newfstatat and eventfd2.
type life struct {
	pidfd int // the process, or -1

	// Path form:
	dir    int // O_PATH: the directory of the path's last element
	base   string
	mounts int // mountinfo: POLLERR|POLLPRI when something was mounted or unmounted
	events int // inotify on dir: unlinked, renamed, replaced
	dev    uint64
	ino    uint64

	// Where the host has no pidfd or no inotify for us, by a filter of somebody's or a limit that is reached, it is
	// looked for again and again.
	looks bool
	proc  bool // dir is the process's own, /proc/PID/ns: it is the process whose end counts
}

// lookEvery is how late an end is seen without events. A look is one system call.
const lookEvery = time.Second

func noLife() life { return life{pidfd: -1, dir: -1, mounts: -1, events: -1} }

func (l *life) close() {
	closeFd(&l.pidfd)
	closeFd(&l.dir)
	closeFd(&l.mounts)
	closeFd(&l.events)
}

// maxSymlinks is the kernel's own limit for one look-up (MAXSYMLINKS).
const maxSymlinks = 40

// resolve follows the symbolic links that path ends in and opens the directory that holds what they
// lead to. Links further up are followed by the kernel.
func resolve(path string) (dir int, base string, err error) {
	for range maxSymlinks {
		parent, base := filepath.Split(strings.TrimRight(path, "/"))
		if base == "" {
			return -1, "", fmt.Errorf("%w but a directory", errNotNS)
		}
		if parent == "" {
			parent = "."
		}
		dir, err := unix.Open(parent, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, "", explainPath(parent, err)
		}
		buf := make([]byte, unix.PathMax)
		size, err := unix.Readlinkat(dir, base, buf)
		if err != nil || isMagic(string(buf[:size])) {
			return dir, base, nil // what is wrong with it, if anything, shows when it is opened
		}
		unix.Close(dir)
		path = string(buf[:size])
		if !filepath.IsAbs(path) {
			path = parent + "/" + path // not Join: it would cut ".." off behind a link
		}
	}
	return -1, "", unix.ELOOP
}

// isMagic tells a link of /proc/PID/ns, such as "net:[4026531840]", which names no file.
func isMagic(target string) bool {
	return strings.HasSuffix(target, "]") && strings.Contains(target, ":[") && !strings.Contains(target, "/")
}

func (l *life) openPath(ns int) error {
	var st unix.Stat_t
	if err := unix.Fstat(ns, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	l.dev, l.ino = st.Dev, st.Ino
	var err error
	if l.mounts, err = unix.Open("/proc/thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("watch the mount table (is /proc mounted?): %w", err)
	}
	if l.events, err = unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK); err != nil {
		l.events, l.looks = -1, true // a user has 128 of them (fs.inotify.max_user_instances), and may have more containers
		return nil
	}
	const what = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_ONLYDIR
	_, err = unix.InotifyAddWatch(l.events, fmt.Sprintf("/proc/self/fd/%d", l.dir), what)
	// A directory that we may pass but not list cannot be watched. Little is lost: whoever unlinks
	// a mount point detaches what is mounted there, which the mount table tells.
	l.looks = err != nil && !errors.Is(err, unix.EACCES) // fs.inotify.max_user_watches
	return nil
}

// openProc is for a process of which there is no pidfd. Its directory of /proc stays its own when its number
// is given to another.
func (l *life) openProc(pid int) error {
	var err error
	if l.dir, err = unix.Open(fmt.Sprintf("/proc/%d/ns", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		l.dir = -1
		if errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("no such process (it has ended, or lives in a PID namespace that is not ours): %w", unix.ESRCH)
		}
		return explainProc(pid, err)
	}
	l.base, l.looks, l.proc = "net", true, true
	return nil
}

// named tells whether the path still leads to the namespace.
func (l *life) named() bool {
	var st unix.Stat_t
	if l.proc { // where the link leads may not be for us to know; that of a process that has ended, waited for or not, is none
		err := unix.Fstatat(l.dir, l.base, &st, 0)
		return err == nil || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)
	}
	err := unix.Fstatat(l.dir, l.base, &st, unix.AT_NO_AUTOMOUNT)
	return err == nil && st.Dev == l.dev && st.Ino == l.ino
}

// Watch blocks until the namespace is gone, and returns nil then: its process has ended, or its
// path no longer leads to it. It returns ctx's error when ctx ends first. It is driven by
// events where the host has them for us, and works after chroot, in another mount namespace and under landlock.
func (n *NS) Watch(ctx context.Context) error {
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch %s: eventfd: %w", n.name, err)
	}
	defer unix.Close(stop)
	woken := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(woken)
		wake(stop)
	})
	defer func() {
		if !cancel() {
			<-woken // it writes to stop, which must still be ours
		}
	}()

	fds := []unix.PollFd{{Fd: int32(stop), Events: unix.POLLIN}}
	if n.life.pidfd >= 0 {
		fds = append(fds, unix.PollFd{Fd: int32(n.life.pidfd), Events: unix.POLLIN})
	} else {
		fds = append(fds,
			unix.PollFd{Fd: int32(n.life.mounts), Events: unix.POLLPRI},
			unix.PollFd{Fd: int32(n.life.events), Events: unix.POLLIN})
	}
	var timeout *unix.Timespec
	if n.life.looks {
		ts := unix.NsecToTimespec(int64(lookEvery))
		timeout = &ts
	}
	var buf [4096]byte // of inotify's events only that there were some matters
	for {
		if n.life.pidfd < 0 && !n.life.named() {
			return nil
		}
		if _, err := unix.Ppoll(fds, timeout, nil); err != nil && !errors.Is(err, unix.EINTR) { // passes over those that are -1
			return fmt.Errorf("watch %s: %w", n.name, err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if n.life.pidfd >= 0 {
			if fds[1].Revents != 0 {
				return nil
			}
			continue
		}
		if fds[2].Revents != 0 {
			unix.Read(n.life.events, buf[:])
		}
	}
}

// wake makes an eventfd readable.
func wake(fd int) {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	unix.Write(fd, one[:])
}

// readable tells whether a read from fd would not block, now.
func readable(fd int) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Ppoll(fds, &unix.Timespec{}, nil)
		if !errors.Is(err, unix.EINTR) {
			return n > 0, err
		}
	}
}
