package api

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"usernet/portdriver/sockfile"
)

// DefaultPath is where the control socket of the process called name goes when nobody says: $XDG_RUNTIME_DIR/usernet/NAME.sock.
// The name must tell processes of one user apart; the PID does. It makes the directory, and removes from it the sockets of
// processes that were killed: rootlesskit and buildah end theirs in no other way.
func DefaultPath(name string) (string, error) {
	if name == "" || name != filepath.Base(name) || strings.Trim(name, "./") == "" {
		return "", fmt.Errorf("%q is no name of a socket", name)
	}
	dir, err := DefaultDir()
	if err != nil {
		return "", err
	}
	sweep(dir)
	return filepath.Join(dir, name+".sock"), nil
}

// sweep removes dead sockets that are named by a PID.
func sweep(dir string) {
	sockfile.Sweep(dir, func(name string) bool {
		number, ok := strings.CutSuffix(name, ".sock")
		pid, err := strconv.Atoi(number)
		// Most live ones are told by their process, and need not be woken. One of another PID namespace stays as it is live.
		return ok && err == nil && pid > 0 && errors.Is(unix.Kill(pid, 0), unix.ESRCH)
	})
}

// DefaultDir makes the directory of DefaultPath, or sees that it is as it must be: ours, and closed to all others. It is
//
//	$XDG_RUNTIME_DIR/usernet
//	/run/user/UID/usernet      where that variable is unset, or names nothing
//	/tmp/usernet-UID           where there is no such directory either
//
// What belongs to somebody else is an error and not passed over, for what we would open there somebody else could move.
func DefaultDir() (string, error) { return defaultDir("/run/user", "/tmp") }

func defaultDir(run, tmp string) (string, error) {
	uid := os.Geteuid()
	for _, base := range []string{os.Getenv("XDG_RUNTIME_DIR"), fmt.Sprintf("%s/%d", run, uid)} {
		if !filepath.IsAbs(base) { // as the specification has it: others are to be ignored
			continue
		}
		switch err := ours(base, uid); {
		case errors.Is(err, os.ErrNotExist):
			continue
		case err != nil:
			return "", fmt.Errorf("%w: set XDG_RUNTIME_DIR to a directory of your own, or name the socket with --api-socket", err)
		}
		return private(filepath.Join(base, "usernet"), uid)
	}
	return private(fmt.Sprintf("%s/usernet-%d", tmp, uid), uid)
}

// ours says why dir is not a directory of uid that nobody else can write to. A link is followed: it is the user's own setting.
func ours(dir string, uid int) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	return check(dir, &st, uid, 0o022)
}

func check(dir string, st *unix.Stat_t, uid int, others uint32) error {
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is no directory", dir)
	case int(st.Uid) != uid:
		return fmt.Errorf("%s belongs to uid %d, and usernet runs as %d", dir, st.Uid, uid)
	case st.Mode&others != 0:
		return fmt.Errorf("%s is open to others (mode %04o)", dir, st.Mode&0o7777)
	}
	return nil
}

// private makes dir, closed to all others. One that exists is closed to them if it is ours: only a program with an odd
// idea of it can have opened it.
func private(dir string, uid int) (string, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	// Not through a link, which in /tmp anybody may have put there.
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		return "", fmt.Errorf("%s is there already and is no directory: remove it, or name the socket with --api-socket", dir)
	case errors.Is(err, unix.EACCES):
		return "", fmt.Errorf("%s belongs to somebody else: name the socket with --api-socket: %w", dir, err)
	case err != nil:
		return "", &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	if err := check(dir, &st, uid, 0); err != nil {
		return "", fmt.Errorf("%w: name the socket with --api-socket", err)
	}
	if st.Mode&0o777 != 0o700 {
		if err := unix.Fchmod(fd, 0o700); err != nil {
			return "", &os.PathError{Op: "chmod", Path: dir, Err: err}
		}
	}
	return dir, nil
}
