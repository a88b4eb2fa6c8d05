package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// An etcFile is a file that the command sees in the place of the host's.
type etcFile struct {
	Path, Text string
}

// An etcDir is a directory that the command sees in the place of the host's, and all that is in it. It is
// skipped where the host has none. The services below /run would answer with the host's names, past our
// resolver, to whom C libraries ask first; without their sockets those turn to resolv.conf.
type etcDir struct {
	Path  string
	Files []etcFile // paths are names
}

// mountEtc mounts files and dirs, in a mount namespace that is ours, from a tmpfs that has no
// other name. What could not be replaced is in warnings, one each, and the rest is done; err is for a
// namespace in which nothing may be mounted at all.
func mountEtc(files []etcFile, dirs []etcDir) (warnings []error, err error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make mounts private: %w", namespaceAdvice(err, sysctl))
	}
	warn := func(path string, err error) {
		warnings = append(warnings, fmt.Errorf("%s stays as it is: %w", path, err))
	}
	// All that is mounted over is opened first: the tmpfs may cover it for a while, and a file may lead
	// into one of the directories.
	over := map[string]*os.File{}
	defer func() {
		for _, f := range over {
			f.Close()
		}
	}()
	for _, d := range dirs {
		if fd, err := unix.Open(d.Path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			over[d.Path] = os.NewFile(uintptr(fd), d.Path)
		}
	}
	for _, f := range files {
		fd, err := unix.Open(f.Path, unix.O_PATH|unix.O_CLOEXEC, 0) // through symlinks
		if err != nil {
			warn(f.Path, err)
			continue
		}
		over[f.Path] = os.NewFile(uintptr(fd), f.Path)
	}
	base, err := scratch()
	if err != nil {
		return warnings, namespaceAdvice(err, sysctl)
	}
	// A directory covers the files in it, and brings its own.
	for i, f := range files {
		if over[f.Path] == nil {
			continue
		}
		source := filepath.Join(base, fmt.Sprintf("file%d", i))
		err := os.WriteFile(source, []byte(f.Text), 0o644)
		if err == nil {
			err = bind(source, over[f.Path])
		}
		if err != nil {
			warn(f.Path, err)
		}
	}
	for i, d := range dirs {
		if over[d.Path] == nil {
			continue
		}
		source := filepath.Join(base, fmt.Sprintf("dir%d", i))
		err := makeFiles(source, d.Files)
		if err == nil {
			err = bind(source, over[d.Path])
		}
		if err != nil {
			warn(d.Path, err)
		}
	}
	if err := unix.Unmount(base, unix.MNT_DETACH); err != nil {
		return warnings, fmt.Errorf("unmount %s: %w", base, err)
	}
	return warnings, nil
}

// scratch mounts a tmpfs somewhere and returns where; only this process is in the mount namespace yet.
func scratch() (string, error) {
	var errs []error
	for _, dir := range []string{"/tmp", "/run", "/mnt", "/dev/shm"} {
		err := unix.Mount("usernet", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0755")
		if err == nil {
			return dir, nil
		}
		errs = append(errs, fmt.Errorf("mount a tmpfs on %s: %w", dir, err))
	}
	return "", errors.Join(errs...)
}

// bind mounts source over what target leads to, whatever covers its path.
func bind(source string, target *os.File) error {
	if err := unix.Mount(source, fmt.Sprintf("/proc/self/fd/%d", target.Fd()), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind mount (is /proc mounted?): %w", err)
	}
	return nil
}

// makeFiles makes a directory with files in it.
func makeFiles(dir string, files []etcFile) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f.Path), []byte(f.Text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
