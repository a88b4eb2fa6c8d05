package dns

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// checkEvery is the least time between two looks at the file: a look is three system calls, and a
	// client cannot make us do it per question.
	checkEvery = 100 * time.Millisecond

	// settled is the age from which a file's times tell whether it changed: of two changes within
	// one tick of the clock that stamps them the second leaves no trace.
	settled = time.Second

	maxLinks = 8 // symlinks from the path to the file; real ones have one

	// maxDirs is the limit on directories kept open: a path that moves through more of them than
	// this has its last contents kept.
	maxDirs = 16
)

// Where the daemons that manage /etc/resolv.conf keep theirs: a symlink may point there
// tomorrow, when a sandbox no longer lets us open anything new.
var managedDirs = []string{"/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf"}

// A ResolvConf is a resolv.conf as it is now: it may be written, replaced, pointed elsewhere, or go and come
// back, and is looked at again when somebody asks. While it cannot be read, what it said last holds.
//
// It works inside a chroot and a landlock domain too, because every step goes through directories that were opened
// before: that of the path and those that its symlinks lead to. A symlink that is later
// pointed at another directory cannot be followed there (Err says so), and a directory that is removed and
// made again is found only outside a sandbox.
//
// Methods may be called concurrently.
type ResolvConf struct {
	dir, base string // of the path

	mu      sync.Mutex
	dirs    map[string]*os.File // by the names under which paths lead to them
	held    []*os.File          // the same, each once
	checked time.Time
	seen    identity
	now     settings
	err     error
	closed  bool
}

var _ Upstreams = (*ResolvConf)(nil)

// An identity changes when the file does, or which file it is.
type identity struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// OpenResolvConf opens path, or rather the directories that lead to it, for good. The file need not exist:
// until it does, the name server is the local machine, as resolv.conf(5) has it. Close must follow.
func OpenResolvConf(path string) (*ResolvConf, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	r := &ResolvConf{
		dir:  filepath.Dir(path),
		base: filepath.Base(path),
		dirs: map[string]*os.File{},
		now:  settings{servers: defaultServers()},
	}
	if _, err := r.open(r.dir); err != nil {
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	if path == "/etc/resolv.conf" {
		for _, dir := range managedDirs {
			r.open(dir) // most hosts have one of them
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.check(time.Now())
	if r.err != nil && !errors.Is(r.err, fs.ErrNotExist) {
		return nil, errors.Join(r.err, r.close())
	}
	return r, nil
}

// Servers returns the name servers, at most three, and never none. The slice is shared: do not change it.
func (r *ResolvConf) Servers() []netip.AddrPort { return r.look().servers }

// Search returns the search list, which may be empty. The slice is shared.
func (r *ResolvConf) Search() []string { return r.look().search }

// Options returns the options as they are written, such as "ndots:2". The slice is shared.
func (r *ResolvConf) Options() []string { return r.look().options }

// Err tells why the file could not be read when it was last looked at; nil if it could.
func (r *ResolvConf) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// Dirs returns the directories (O_PATH; Name is the path) that a sandbox must let us read files in. They stay ours.
func (r *ResolvConf) Dirs() []*os.File {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]*os.File(nil), r.held...)
}

// Close gives the directories back. What the file said last is still returned.
func (r *ResolvConf) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.close()
}

func (r *ResolvConf) close() error {
	r.closed = true
	var err error
	for _, f := range r.held {
		err = errors.Join(err, f.Close())
	}
	r.held, r.dirs = nil, nil
	return err
}

func (r *ResolvConf) look() settings {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); !r.closed && now.Sub(r.checked) >= checkEvery {
		r.check(now)
	}
	return r.now
}

// check reads the file again if it is another one than was read last.
func (r *ResolvConf) check(now time.Time) {
	r.checked = now
	dir, base, err := r.follow()
	if err == nil {
		err = r.read(dir, base, now)
	}
	r.err = err
	if errors.Is(err, fs.ErrNotExist) {
		r.seen = identity{} // the same inode may come back with other contents
		r.forgetRemoved()
	}
}

// follow resolves symlinks, from the path to a directory of ours and the name of a file in it.
func (r *ResolvConf) follow() (*os.File, string, error) {
	dir, base := r.dir, r.base
	for range maxLinks {
		f, err := r.open(dir)
		if err != nil {
			return nil, "", err
		}
		var buf [unix.PathMax]byte
		n, err := unix.Readlinkat(int(f.Fd()), base, buf[:])
		switch {
		case errors.Is(err, unix.EINVAL): // no symlink
			return f, base, nil
		case err != nil:
			return nil, "", &fs.PathError{Op: "readlink", Path: filepath.Join(dir, base), Err: err}
		}
		target := string(buf[:n])
		if !strings.HasPrefix(target, "/") {
			// f.Name, not dir: ".." in a symlink starts from where the link really is.
			target = filepath.Join(f.Name(), target)
		}
		dir, base = filepath.Dir(target), filepath.Base(target)
	}
	return nil, "", &fs.PathError{Op: "open", Path: filepath.Join(r.dir, r.base), Err: unix.ELOOP}
}

// read reads the file if it changed, or may have.
func (r *ResolvConf) read(dir *os.File, base string, now time.Time) error {
	path := filepath.Join(dir.Name(), base)
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if r.err == nil && identify(&st) == r.seen && now.Sub(time.Unix(st.Mtim.Unix())) > settled {
		return nil
	}
	// O_NONBLOCK: a FIFO would stop us for ever.
	fd, err := unix.Openat(int(dir.Fd()), base, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := unix.Fstat(fd, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return &fs.PathError{Op: "read", Path: path, Err: errors.New("not a regular file")}
	}
	text, err := io.ReadAll(io.LimitReader(f, maxResolvConf+1))
	if err != nil {
		return err
	}
	if len(text) > maxResolvConf {
		return &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("longer than %d octets", maxResolvConf)}
	}
	r.now, r.seen = parseResolvConf(text), identify(&st) // as it was before the reading
	return nil
}

func identify(st *unix.Stat_t) identity {
	return identity{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim}
}

// open returns the directory that a path leads to, if it is one of ours or can be opened still.
func (r *ResolvConf) open(path string) (*os.File, error) {
	if f := r.dirs[path]; f != nil {
		return f, nil
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	f := r.dirs[real]
	if f == nil {
		if len(r.dirs) >= maxDirs {
			return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("too many directories")}
		}
		fd, err := unix.Open(real, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: real, Err: err}
		}
		f = os.NewFile(uintptr(fd), real)
		r.held = append(r.held, f)
	}
	r.dirs[path], r.dirs[real] = f, f
	return f, nil
}

// forgetRemoved lets go of directories that were removed, where the path leads to
// another one by now.
func (r *ResolvConf) forgetRemoved() {
	for i := 0; i < len(r.held); {
		f := r.held[i]
		var st, now unix.Stat_t
		if unix.Fstat(int(f.Fd()), &st) != nil || st.Nlink > 0 || unix.Stat(f.Name(), &now) != nil {
			i++
			continue
		}
		for name, d := range r.dirs {
			if d == f {
				delete(r.dirs, name)
			}
		}
		r.held = append(r.held[:i], r.held[i+1:]...)
		f.Close()
	}
}
