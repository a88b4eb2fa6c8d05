package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// idMaps are the user and group IDs of a user namespace that usernet run makes.
type idMaps struct {
	uids, gids []syscall.SysProcIDMap

	// setgroups: the command may choose its supplementary groups. Without privilege the kernel
	// forbids it, as leaving a group could open what is closed to that group.
	setgroups bool
}

// ownIDs maps us to root, as "unshare -r" does; that needs no privilege.
//
// Root has the command see every user as itself, so that package managers and daemons which change
// their user work. It is in a user namespace all the same: what it may do to the host's kernel
// and network ends there.
func ownIDs() (idMaps, error) {
	if os.Geteuid() != 0 || !hasCaps(unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_SYS_ADMIN) {
		one := func(id int) []syscall.SysProcIDMap { return []syscall.SysProcIDMap{{HostID: id, Size: 1}} }
		return idMaps{uids: one(os.Geteuid()), gids: one(os.Getegid())}, nil
	}
	// In a user namespace that an ordinary user made it is forbidden for good, and for what is below too.
	text, err := os.ReadFile("/proc/self/setgroups")
	if err != nil {
		return idMaps{}, err
	}
	m := idMaps{setgroups: string(text) != "deny\n"}
	for _, f := range []struct {
		path string
		to   *[]syscall.SysProcIDMap
	}{{"/proc/self/uid_map", &m.uids}, {"/proc/self/gid_map", &m.gids}} {
		text, err := os.ReadFile(f.path)
		if err != nil {
			return idMaps{}, err
		}
		if *f.to, err = identity(text); err != nil {
			return idMaps{}, fmt.Errorf("%s: %w", f.path, err)
		}
	}
	return m, nil
}

// identity makes, of the map of a user namespace, one for a child of it in which every ID is itself.
func identity(text []byte) ([]syscall.SysProcIDMap, error) {
	var maps []syscall.SysProcIDMap
	for line := range bytes.Lines(text) {
		words := strings.Fields(string(line)) // first ID here, first ID in the parent, number
		if len(words) != 3 {
			return nil, fmt.Errorf("not three numbers: %q", line)
		}
		first, err1 := strconv.Atoi(words[0])
		size, err2 := strconv.Atoi(words[2])
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		maps = append(maps, syscall.SysProcIDMap{ContainerID: first, HostID: first, Size: size})
	}
	if len(maps) == 0 {
		return nil, errors.New("empty")
	}
	return maps, nil
}

// namespaceAdvice adds to the error of making namespaces what the host's administrator can do. read
// reads a sysctl by its path below /proc/sys.
func namespaceAdvice(err error, read func(string) string) error {
	if e := (*os.PathError)(nil); errors.As(err, &e) && e.Op == "fork/exec" {
		err = e.Err // it did not come as far as the file
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err
	}
	advice := ""
	switch errno {
	case unix.EPERM, unix.EACCES:
		advice = "something forbids user namespaces to this user: a container's seccomp profile, or a security module"
		if read("kernel/unprivileged_userns_clone") == "0" {
			advice = "user namespaces are for root only here; allow them: sysctl -w kernel.unprivileged_userns_clone=1"
		} else if read("kernel/apparmor_restrict_unprivileged_userns") == "1" {
			advice = "AppArmor forbids user namespaces to programs without a profile; allow them: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or give usernet a profile with \"userns,\""
		}
	case unix.ENOSPC, unix.EUSERS:
		advice = "a limit on namespaces is reached; raise it: sysctl -w user.max_user_namespaces=10000"
		for _, kind := range []string{"user", "net", "mnt"} {
			if n := read("user/max_" + kind + "_namespaces"); n == "0" {
				advice = fmt.Sprintf("this host allows no %s namespaces; allow them: sysctl -w user.max_%[1]s_namespaces=10000", kind)
				break
			}
		}
	case unix.EINVAL:
		advice = "the kernel lacks user, network or mount namespaces (CONFIG_USER_NS, CONFIG_NET_NS)"
	}
	if advice == "" {
		return err
	}
	return fmt.Errorf("%w: %s", err, advice)
}

// mapAdvice is namespaceAdvice for who makes a user namespace with a map of IDs. root says that the map has our
// uid 0 in it and that we have no CAP_SETFCAP: the kernel refuses that map, since files with capabilities could be made
// with it (user_namespaces(7)).
func mapAdvice(err error, read func(string) string, root bool) error {
	if !root || !errors.Is(err, unix.EPERM) {
		return namespaceAdvice(err, read)
	}
	return fmt.Errorf("%w: root without CAP_SETFCAP may not map uid 0 into a user namespace (Linux 5.12 and newer): "+
		"start usernet with that capability, or as an ordinary user", unix.EPERM)
}

// sysctl is the value of a file below /proc/sys, "" where there is none.
func sysctl(path string) string {
	text, _ := os.ReadFile("/proc/sys/" + path)
	return strings.TrimSpace(string(text))
}
