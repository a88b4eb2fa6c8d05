package api

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A gate knows who may speak: the user that this process was when the socket was made, and root.
//
// The kernel translates a peer's user ID into the user namespace of whoever asks, and all IDs that have no name there
// into one and the same, the overflow ID (65534, "nobody"). A stranger and a process of another container would look alike,
// and, where our own ID has no name, like ourselves. So that ID never passes, and usernet asks from the
// namespace it was started in.
type gate struct {
	uid, overflow uint32
}

func newGate() gate {
	g := gate{uid: uint32(os.Geteuid()), overflow: 65534} // DEFAULT_OVERFLOWUID, where there is no /proc to ask
	if text, err := os.ReadFile("/proc/sys/kernel/overflowuid"); err == nil {
		if n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32); err == nil {
			g.overflow = uint32(n)
		}
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
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return os.NewSyscallError("getsockopt(SO_PEERCRED)", err)
	}
	if !g.admits(cred.Uid) {
		return fmt.Errorf("uid %d (pid %d) may not speak to us, only uid %d and root may", cred.Uid, cred.Pid, g.uid)
	}
	return nil
}
