package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// What a process that parses a stranger's packets can do at most is decided here, once all it needs
// is open. In this order, as each step needs rights that a later one takes:
//
//	memory        no core file, not traceable by others of the same uid
//	no_new_privs  no way up again, and what the next steps demand
//	root          an empty directory that has no name, where we may chroot(2)
//	landlock      files: read below the directories of resolv.conf, nothing else
//	caps          none but those that forwarding needs, nor any to regain
//	seccomp       the system calls of the table, and no other
//	bounds        no capability from an execve either; this one alone when the start is over, see confineBounds
//
// Each holds for all threads: Go moves goroutines between them. syscall.AllThreadsSyscall repeats a
// call on each one, which it can only without cgo. With cgo nothing of it is done, for half of it is worse:
// C's library makes threads by clone3 and aborts the process where the table refuses that.

// A confinement is what the process may still do afterwards.
type confinement struct {
	// readDirs are directories below which files may be opened for reading, removeDirs such in
	// which a file may be unlinked. Both stay the caller's, who goes through these descriptors.
	readDirs, removeDirs []*os.File

	// caps is a set of capabilities (bit n: capability n) to keep where we have them.
	caps uint64

	// child is the process that run waits for; signals go to it, its group and our own. 0: none.
	child int

	profile bool // profiles of ourselves may be taken
}

// confine gives up everything that c does not name. What the host refuses is warned of, and the rest is
// done all the same: a container with less protection is what --no-sandbox would have given.
func confine(c confinement, log *slog.Logger) {
	if cgoEnabled {
		log.Warn("sandbox: left out, usernet keeps every right: it was built with cgo; build it with CGO_ENABLED=0")
		return
	}
	c.give(log, []part{
		{"memory", confineMemory},
		{"no_new_privs", noNewPrivs},
		{"root", confineRoot},
		{"landlock", confineFiles},
		{"capabilities", confineCaps},
		{"seccomp", confineCalls},
	})
}

// confineMore is for what nobody need wait for; it comes some time after confine.
func confineMore(c confinement, log *slog.Logger) {
	if !cgoEnabled {
		c.give(log, []part{{"bounds", confineBounds}})
	}
}

// A part of the sandbox.
type part struct {
	name string
	do   func(confinement) error
}

// give gives up, part by part.
func (c confinement) give(log *slog.Logger, parts []part) {
	var done []string
	for _, step := range parts {
		err := step.do(c)
		switch {
		case err == nil:
			done = append(done, step.name)
		case errors.Is(err, errNotPrivileged): // what it would keep us from, a plain user cannot do either
			log.Debug("sandbox: part left out", "part", step.name, "reason", err)
		default:
			log.Warn("sandbox: this host refuses a part; the rest is in force (--no-sandbox turns it off)", "part", step.name, "error", err)
		}
	}
	if log.Enabled(context.Background(), slog.LevelDebug) {
		log.Debug("sandboxed", "parts", done)
	}
}

// errNotPrivileged: a step is only for whoever has capabilities.
var errNotPrivileged = errors.New("needs a capability that usernet was not started with")

// confineMemory: a core file would hold the container's traffic, and so would ptrace by another
// process of this uid. /proc/PID's files belong to root from here on.
func confineMemory(confinement) error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("prctl(PR_SET_DUMPABLE): %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("setrlimit(RLIMIT_CORE): %w", err)
	}
	return nil
}

func noNewPrivs(confinement) error {
	if err := allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("prctl(PR_SET_NO_NEW_PRIVS): %w", err)
	}
	return nil
}

// allThreads makes one system call on each thread of the process. A thread that is born later
// inherits what it did.
func allThreads(trap, a1, a2, a3 uintptr) error {
	_, _, errno := syscall.AllThreadsSyscall6(trap, a1, a2, a3, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
