package api

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A gate knows who may speak: the user that this process was when the socket was made, and root, both from our own
// network namespace.
//
// The kernel translates a peer's user ID into the user namespace of whoever asks, and all IDs that have no name there
// into one and the same, the overflow ID (65534, "nobody"). A stranger and a process of another container would look alike,
// and, where our own ID has no name, like ourselves. So that ID never passes, and usernet asks from the
// namespace it was started in.
//
// Whoever is in another network namespace is in a container, ours or not: a command of "usernet run" is our own user, and
// sees our files. An accepted Unix socket belongs to the namespace of the client's socket, not to that of the
// listener (net/unix/af_unix.c, unix_stream_connect), so that its cookie tells where the client has made it.
type gate struct {
	uid, overflow uint32
	ns            uint64 // the cookie of ours; 0: before Linux 5.14, which has none, only users are told apart
}

func newGate() gate {
	g := gate{uid: uint32(os.Geteuid()), overflow: 65534} // DEFAULT_OVERFLOWUID, where there is no /proc to ask
	if text, err := os.ReadFile("/proc/sys/kernel/overflowuid"); err == nil {
		if n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32); err == nil {
			g.overflow = uint32(n)
		}
	}
	if fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
		g.ns, _ = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		_ = unix.Close(fd)
	}
	return g
}

// admits tells whether a user may speak.
func (g gate) admits(uid uint32) bool {
	return uid != g.overflow && (uid == g.uid || uid == 0)
}

// check says why the peer of c may not speak. Its credentials are those of the moment in which it connected.
func (g gate) check(c syscall.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	ns := g.ns
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err == nil && g.ns != 0 {
			ns, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		}
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	if !g.admits(cred.Uid) {
		return fmt.Errorf("uid %d (pid %d) may not speak to us, only uid %d and root may", cred.Uid, cred.Pid, g.uid)
	}
	if ns != g.ns {
		return fmt.Errorf("uid %d (pid %d) is in another network namespace: containers may not speak to us", cred.Uid, cred.Pid)
	}
	return nil
}
