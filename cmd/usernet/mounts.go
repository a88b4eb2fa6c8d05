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
	// Where the paths lead is asked before the tmpfs covers anything.
	targets := make([]string, len(files))
	for i, f := range files {
		target, err := filepath.EvalSymlinks(f.Path)
		if err != nil {
			warnings = append(warnings, fmt.Errorf("%s stays as it is: %w", f.Path, err))
		}
		targets[i] = target
	}
	base, err := scratch()
	if err != nil {
		return warnings, namespaceAdvice(err, sysctl)
	}
	for i, d := range dirs {
		if err := mountDir(filepath.Join(base, fmt.Sprintf("dir%d", i)), d); err != nil {
			warnings = append(warnings, fmt.Errorf("%s stays as it is: %w", d.Path, err))
		}
	}
	for i, f := range files {
		if targets[i] == "" {
			continue
		}
		source := filepath.Join(base, fmt.Sprintf("file%d", i))
		err := os.WriteFile(source, []byte(f.Text), 0o644)
		if err == nil {
			if err = unix.Mount(source, targets[i], "", unix.MS_BIND, ""); err != nil {
				err = fmt.Errorf("bind mount: %w", err)
			}
		}
		if err != nil {
			warnings = append(warnings, fmt.Errorf("%s stays as it is: %w", f.Path, err))
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

func mountDir(source string, d etcDir) error {
	if fi, err := os.Stat(d.Path); err != nil || !fi.IsDir() {
		return nil
	}
	if err := os.Mkdir(source, 0o755); err != nil {
		return err
	}
	for _, f := range d.Files {
		if err := os.WriteFile(filepath.Join(source, f.Path), []byte(f.Text), 0o644); err != nil {
			return err
		}
	}
	if err := unix.Mount(source, d.Path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind mount: %w", err)
	}
	return nil
}
