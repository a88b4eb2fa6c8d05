package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Config says which namespace Open opens. Exactly one of PID and Path is set.
type Config struct {
	PID  int    // a process (not a thread) in the namespace, as /proc shows it to us
	Path string // a file of nsfs: /proc/PID/ns/net, or a bind mount of one

	// UserPath is a file of nsfs that names the user namespace to enter first; "" means the
	// one that the kernel says owns the network namespace, which is right wherever
	// we may ask.
	UserPath string

	// Helper has calls go to a helper also where a thread of ours might enter: it goes on answering when
	// the process has given up the rights to enter, or to start another.
	Helper bool
}

// An NS is an open network namespace. Its methods may be called concurrently, except
// that Close comes after Watch and Call have returned.
type NS struct {
	name   string // what the user called it, for messages
	fd     int    // the network namespace
	userFd int    // its owner; -1 where the kernel does not tell us, ownerErr says why
	life   life

	ownerErr error
	always   bool // a helper, also where a thread would do

	mu       sync.Mutex // guards what follows, and is held during a call: calls take turns
	direct   place
	unpinned bool // fd is not of a bind mount, or not any more
	helper   *helper
	closed   bool
}

// place is where calls run.
type place int

const (
	placeUnknown place = iota
	placeThread        // a thread of ours may enter
	placeHelper
)

// OpenPID opens the network namespace of a process.
func OpenPID(pid int) (*NS, error) { return Open(Config{PID: pid}) }

// OpenPath opens the network namespace that path names.
func OpenPath(path string) (*NS, error) { return Open(Config{Path: path}) }

// Open opens a namespace. The caller closes it.
func Open(cfg Config) (*NS, error) {
	n := &NS{fd: -1, userFd: -1, life: noLife(), always: cfg.Helper}
	var err error
	switch {
	case (cfg.PID != 0) == (cfg.Path != ""):
		return nil, errors.New("a network namespace is named by a PID or by a path: give one of them")
	case cfg.PID < 0:
		return nil, fmt.Errorf("process %d: a PID is positive", cfg.PID)
	case cfg.PID > 0:
		n.name = "network namespace of process " + strconv.Itoa(cfg.PID)
		err = n.openPID(cfg.PID)
	default:
		n.name = "network namespace " + cfg.Path
		err = n.openPath(cfg.Path)
	}
	if err == nil {
		err = n.openOwner(cfg.UserPath)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", n.name, err), n.Close())
	}
	return n, nil
}

// String names the namespace as whoever opened it did.
func (n *NS) String() string { return n.name }

// FD is the namespace's file descriptor, which stays the NS's own.
func (n *NS) FD() int { return n.fd }

// openPID opens the pidfd first: a process that still lives after its namespace was
// opened is the one that the pidfd holds, however fast PIDs are used again.
func (n *NS) openPID(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return fmt.Errorf("no such process (it has ended, or lives in a PID namespace that is not ours): %w", err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%d is a thread: give the PID of its process: %w", pid, err)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM): // a kernel before 5.3; a filter of calls that is older
		return n.openProc(pid)
	case err != nil:
		return fmt.Errorf("pidfd_open: %w", err)
	}
	n.life.pidfd = fd
	path := fmt.Sprintf("/proc/%d/ns/net", pid)
	if n.fd, err = openNS(path, unix.CLONE_NEWNET); err != nil {
		if gone, _ := readable(fd); gone {
			return fmt.Errorf("the process has ended: %w", unix.ESRCH)
		}
		return explainProc(pid, err)
	}
	if gone, err := readable(fd); err != nil || gone {
		return errors.Join(err, fmt.Errorf("the process has ended: %w", unix.ESRCH))
	}
	return nil
}

// openProc is openPID without a pidfd.
func (n *NS) openProc(pid int) error {
	if err := n.life.openProc(pid); err != nil {
		return err
	}
	var err error
	if n.fd, err = openNSAt(n.life.dir, n.life.base, fmt.Sprintf("/proc/%d/ns/net", pid), unix.CLONE_NEWNET); err != nil {
		return explainProc(pid, err)
	}
	return nil
}

// openPath takes a path through /proc for what it is, a process: with the process the
// path ends, and nothing else in /proc can be watched.
func (n *NS) openPath(path string) error {
	dir, base, err := resolve(path)
	if err != nil {
		if m := procPath.FindStringSubmatch(path); m != nil && errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("no such process %s: %w", m[1], unix.ESRCH)
		}
		return err
	}
	pid, err := procPID(dir)
	if err == nil && pid > 0 {
		if err = n.openPID(pid); err != nil {
			err = fmt.Errorf("process %d: %w", pid, err)
		}
		closeFd(&n.fd) // the path may be that of a thread
	}
	if err != nil {
		unix.Close(dir)
		return err
	}
	n.fd, err = openNSAt(dir, base, path, unix.CLONE_NEWNET)
	if pid > 0 {
		unix.Close(dir)
	} else {
		n.life.dir, n.life.base = dir, base
	}
	if err != nil {
		return explainPath(path, err)
	}
	if pid > 0 {
		return nil
	}
	return n.life.openPath(n.fd)
}

var procPath = regexp.MustCompile(`^/proc/([0-9]+)/`)

// openOwner finds the user namespace that a helper has to enter. Not being told is
// no error yet: whoever may enter directly never needs to know.
func (n *NS) openOwner(path string) error {
	var err error
	if path != "" {
		if n.userFd, err = openNS(path, unix.CLONE_NEWUSER); err != nil {
			return fmt.Errorf("user namespace %s: %w", path, explainPath(path, err))
		}
		return nil
	}
	n.userFd, err = unix.IoctlRetInt(n.fd, unix.NS_GET_USERNS)
	if err == nil {
		unix.CloseOnExec(n.userFd)
		return nil
	}
	n.userFd = -1
	if errors.Is(err, unix.EPERM) {
		n.ownerErr = fmt.Errorf("its owner is a user namespace outside of ours: run usernet in that one or one of its parents: %w", err)
		return nil
	}
	return fmt.Errorf("ask for its owner (NS_GET_USERNS): %w", err)
}

// Lock takes the namespace for us alone, among all that call Lock, until Close or the end of this
// process however it ends; EBUSY where someone else has it. It is a flock on the namespace's own
// file: every opener of one namespace gets the same inode, and nothing is left in a file
// system. A process inside may take it too, which harms nobody but itself.
//
// It enters the namespace once, as Call does, since the lock goes with a descriptor that stays.
func (n *NS) Lock(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fmt.Errorf("lock %s: %w", n.name, os.ErrClosed)
	}
	if err := n.settleLocked(ctx); err != nil {
		return err
	}
	err := unix.Flock(n.fd, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%s is busy: another usernet serves it: end that one (%s): %w", n.name, n.lockedBy(), unix.EBUSY)
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", n.name, err)
	}
	return nil
}

// lockedBy tells who has the lock, or how to find out: of another PID namespace the kernel does not say.
func (n *NS) lockedBy() string {
	var st unix.Stat_t
	text, err := os.ReadFile("/proc/locks")
	if err == nil && unix.Fstat(n.fd, &st) == nil {
		file := fmt.Sprintf("%02x:%02x:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino)
		for line := range strings.Lines(string(text)) {
			// 1: FLOCK ADVISORY WRITE 708 00:04:4026532217 0 EOF
			if f := strings.Fields(line); len(f) > 5 && f[1] == "FLOCK" && f[5] == file {
				return "process " + f[4]
			}
		}
	}
	return "pgrep -a usernet lists them; it may be in another container"
}

// Unlock gives up what Lock took.
func (n *NS) Unlock() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	return unix.Flock(n.fd, unix.LOCK_UN)
}

// Close ends the helper, waits for it, and gives up the namespace and its lock. A second call does nothing.
func (n *NS) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	n.closed = true
	err := n.restLocked()
	closeFd(&n.fd)
	closeFd(&n.userFd)
	n.life.close()
	return err
}

// Rest ends the helper, if there is one, until the next Call, which needs the rights to start one again.
// A helper is a process of some megabytes, and one that the container may see: whoever has no more to
// ask lets it go.
func (n *NS) Rest() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.restLocked()
}

func (n *NS) restLocked() error {
	if n.helper == nil {
		return nil
	}
	err := n.helper.close()
	n.helper = nil
	return err
}

func closeFd(fd *int) {
	if *fd >= 0 {
		unix.Close(*fd)
		*fd = -1
	}
}

// openNS opens the namespace file at path, which must be of the given kind (CLONE_NEW…).
func openNS(path string, kind int) (int, error) {
	return openNSAt(unix.AT_FDCWD, path, path, kind)
}

func openNSAt(dir int, base, path string, kind int) (int, error) {
	// O_NONBLOCK: a FIFO in the place of a namespace must not hold us up.
	fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return -1, err
	}
	if err := checkNS(fd, kind); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

var errNotNS = errors.New("not a namespace")

func checkNS(fd, kind int) error {
	want := map[int]string{unix.CLONE_NEWNET: "network", unix.CLONE_NEWUSER: "user"}[kind]
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return fmt.Errorf("statfs: %w", err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return fmt.Errorf("%w but an ordinary file: name a %s namespace, such as /proc/PID/ns/net or what \"ip netns\" and podman mount", errNotNS, want)
	}
	got, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil {
		return fmt.Errorf("ask for its kind (NS_GET_NSTYPE): %w", err)
	}
	if got != kind {
		return fmt.Errorf("not a %s namespace but one of another kind (%s)", want, kindName(got))
	}
	return nil
}

func kindName(kind int) string {
	for k, name := range map[int]string{
		unix.CLONE_NEWNET: "net", unix.CLONE_NEWUSER: "user", unix.CLONE_NEWNS: "mnt", unix.CLONE_NEWPID: "pid",
		unix.CLONE_NEWIPC: "ipc", unix.CLONE_NEWUTS: "uts", unix.CLONE_NEWCGROUP: "cgroup", unix.CLONE_NEWTIME: "time",
	} {
		if k == kind {
			return name
		}
	}
	return fmt.Sprintf("%#x", kind)
}

// explainProc says what keeps us from a process that is there.
func explainProc(pid int, err error) error {
	if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) {
		return err
	}
	var st unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d", pid), &st) != nil {
		return err
	}
	if int(st.Uid) == os.Geteuid() {
		return fmt.Errorf("the process is ours but may not be looked into (it has more rights than we have): %w", err)
	}
	return fmt.Errorf("the process belongs to uid %d and we are uid %d: run usernet as that user or as root: %w", st.Uid, os.Geteuid(), err)
}

func explainPath(path string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("no such file (the namespace is gone, or was mounted where we do not see it): %w", err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil {
			return fmt.Errorf("it belongs to uid %d and we are uid %d: %w", st.Uid, os.Geteuid(), err)
		}
	}
	return err
}

// procPID tells whose directory dir is, if it is one in /proc (/proc/PID/ns or
// /proc/PID/task/TID/ns, however it was reached), and 0 if it is none.
func procPID(dir int) (int, error) {
	var fs unix.Statfs_t
	if unix.Fstatfs(dir, &fs) != nil || fs.Type != unix.PROC_SUPER_MAGIC {
		return 0, nil
	}
	name, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(dir))
	if err != nil {
		return 0, fmt.Errorf("find its process: %w", err)
	}
	parts := strings.Split(name, "/")
	for i, part := range parts {
		pid, err := strconv.Atoi(part)
		if err != nil || pid <= 0 {
			continue
		}
		// The number counts in the PID namespace of that mount; ours is the one in which we are ourselves.
		self, _ := os.Readlink(strings.Join(parts[:i], "/") + "/self")
		if self != strconv.Itoa(os.Getpid()) {
			return 0, errors.New("it is in the /proc of another PID namespace, whose processes cannot be watched: name it by our own /proc")
		}
		return pid, nil
	}
	return 0, nil
}
