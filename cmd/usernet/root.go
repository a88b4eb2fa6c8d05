package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// confineRoot makes an empty directory without a name the root. All threads of a Go process share
// one fs_struct (CLONE_FS), so that one chroot(2) moves them all. Descriptors that are open stay what
// they are, which is how the namespace's path is still watched.
func confineRoot(confinement) error {
	if !hasCaps(unix.CAP_SYS_CHROOT) {
		return errNotPrivileged
	}
	dir, err := makeDir(os.TempDir(), "/run", "/dev/shm") // one of them can be written to even where / cannot
	if err != nil {
		return err
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return errors.Join(&os.PathError{Op: "open", Path: dir, Err: err}, os.Remove(dir))
	}
	defer unix.Close(fd)
	// Nothing can be made in a directory that has been removed: it stays empty.
	if err := os.Remove(dir); err != nil {
		return err
	}
	if err := unix.Fchdir(fd); err != nil {
		return fmt.Errorf("fchdir: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return nil
}

// makeDir makes a directory in the first of some that takes one.
func makeDir(in ...string) (string, error) {
	var errs []error
	for _, d := range in {
		dir, err := os.MkdirTemp(d, "usernet-root-")
		if err == nil {
			return dir, nil
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}
