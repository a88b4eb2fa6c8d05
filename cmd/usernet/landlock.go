package main

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	landlockRead   = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	landlockRemove = unix.LANDLOCK_ACCESS_FS_REMOVE_FILE
)

// landlockRights are the file rights that a version of Landlock's ABI can forbid
// (Documentation/userspace-api/landlock.rst). Network and signals are left alone: forwarding is what
// we are for, and run's command lives outside of the domain.
func landlockRights(abi int) uint64 {
	rights := uint64(unix.LANDLOCK_ACCESS_FS_MAKE_SYM)<<1 - 1 // ABI 1: from EXECUTE to MAKE_SYM
	for _, more := range []struct {
		abi   int
		right uint64
	}{
		{2, unix.LANDLOCK_ACCESS_FS_REFER}, {3, unix.LANDLOCK_ACCESS_FS_TRUNCATE}, {5, unix.LANDLOCK_ACCESS_FS_IOCTL_DEV},
		{9, unix.LANDLOCK_ACCESS_FS_RESOLVE_UNIX},
	} {
		if abi >= more.abi {
			rights |= more.right
		}
	}
	return rights
}

// confineFiles forbids all access to files by name except reading below c.readDirs and unlinking in c.removeDirs.
// It is what keeps a plain user's files from us, who may not chroot. What is open stays open.
func confineFiles(c confinement) error {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch errno {
	case 0:
	case unix.ENOSYS, unix.EOPNOTSUPP:
		return fmt.Errorf("this kernel has no Landlock (5.13 or newer with landlock in its lsm= list): %w", errno)
	default:
		return fmt.Errorf("ask for Landlock's version: %w", errno)
	}
	attr := unix.LandlockRulesetAttr{Handled_access_fs: landlockRights(int(abi))}
	// Later ABIs made the structure longer; the first field is all that the oldest takes.
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr.Handled_access_fs), 0)
	if errno != 0 {
		return fmt.Errorf("landlock_create_ruleset: %w", errno)
	}
	defer unix.Close(int(fd))
	for _, grant := range []struct {
		dirs   []*os.File
		rights uint64
	}{{c.readDirs, landlockRead}, {c.removeDirs, landlockRemove}} {
		for _, dir := range grant.dirs {
			if err := landlockAllow(int(fd), dir, grant.rights); err != nil {
				return err
			}
		}
	}
	if err := allThreads(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); err != nil {
		return fmt.Errorf("landlock_restrict_self: %w", err)
	}
	return nil
}

func landlockAllow(ruleset int, dir *os.File, rights uint64) error {
	attr := unix.LandlockPathBeneathAttr{Allowed_access: rights, Parent_fd: int32(dir.Fd())}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&attr)), 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("landlock_add_rule %s: %w", dir.Name(), errno)
	}
	return nil
}
