package main

import (
	"errors"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Who gets the terminal's signals, decided once when run starts:
//
//	handed    stdin and stdout are our terminal and we are its foreground. The command gets a process group of
//	          its own and the terminal with it: Ctrl-C and Ctrl-Z reach the command alone. When it stops,
//	          we stop too, for the shell to see; when we are continued, so is the command.
//	shared    we are a part of a pipeline, or in the background. Taking the terminal would stop our
//	          neighbours (a pager, say), so the command stays in our group, and what the terminal
//	          sends to the group reaches it without us.
//	none      no terminal. The command gets a group of its own, so that a signal to our whole group reaches
//	          it once, by us.
type terminal struct {
	mode  terminalMode
	tty   *os.File // the terminal; nil for none
	group int      // our process group
	child int      // the command, and its group unless shared

	handedOver bool // the terminal is the command's now
}

type terminalMode int

const (
	terminalNone terminalMode = iota
	terminalShared
	terminalHanded
)

// openTerminal finds out which case it is. The caller sets child, and closes tty.
func openTerminal() *terminal {
	t := &terminal{group: unix.Getpgrp()}
	foreground := func(fd int) bool {
		pgrp, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
		return err == nil && pgrp == t.group
	}
	// O_CLOEXEC is set, and the poller is not used: it is only for ioctl.
	fd, err := unix.Open("/dev/tty", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return t
	}
	t.tty = os.NewFile(uintptr(fd), "/dev/tty")
	t.mode = terminalShared
	if foreground(0) && foreground(1) {
		t.mode = terminalHanded
	}
	return t
}

// foreground tells whether our own group has the terminal.
func (t *terminal) foreground() bool {
	if t.tty == nil {
		return false
	}
	pgrp, err := unix.IoctlGetInt(int(t.tty.Fd()), unix.TIOCGPGRP)
	return err == nil && pgrp == t.group
}

// handOver gives the terminal to the command, if it is ours to give: a shell may have put us into
// the background meanwhile. The command has been started by then, so that it does not inherit
// what we ignore.
func (t *terminal) handOver() {
	if t.mode != terminalHanded || !t.foreground() {
		return
	}
	// It stops processes in the background that take the terminal or, after "stty tostop", write to it.
	signal.Ignore(unix.SIGTTOU)
	t.handedOver = t.set(t.child) == nil
}

// takeBack makes us the foreground again, if the command was.
func (t *terminal) takeBack() {
	if t.handedOver {
		t.set(t.group)
		t.handedOver = false
	}
}

func (t *terminal) set(group int) error {
	return unix.IoctlSetPointerInt(int(t.tty.Fd()), unix.TIOCSPGRP, group)
}

// forward passes on a signal that was sent to us. What the terminal sends to a group that we share with the
// command has reached it already.
func (t *terminal) forward(s syscall.Signal) {
	switch s {
	case unix.SIGINT, unix.SIGQUIT, unix.SIGWINCH:
		if t.mode == terminalShared && t.foreground() {
			return
		}
	}
	unix.Kill(t.child, s)
}

// stopGrace is how long stopping ourselves may take before we conclude that nobody could continue us: the
// kernel ignores SIGTSTP in an orphaned process group (no shell above it).
const stopGrace = 200 * time.Millisecond

// stop is called when the command has stopped. If the terminal was handed over, its shell waits for us to stop
// as well, with our whole group, as Ctrl-Z would have it. It tells whether that was tried.
func (t *terminal) stop() bool {
	if t.mode != terminalHanded {
		return false // the terminal stopped us with it, or somebody who did not mean us
	}
	t.takeBack()
	unix.Kill(0, unix.SIGTSTP)
	return true
}

// resume continues the command, after we were continued.
func (t *terminal) resume() {
	t.handOver()
	target := -t.child
	if t.mode == terminalShared {
		target = t.child
	}
	unix.Kill(target, unix.SIGCONT)
}

// attend passes signals to the command, stops and continues with it, and returns when it has ended: its
// status is there to be fetched, so that its PID is still its own. kill, when readable, kills it.
func (t *terminal) attend(signals <-chan os.Signal, kill <-chan struct{}) error {
	events, failed := make(chan bool), make(chan error, 1)
	go func() {
		failed <- watchChild(t.child, events)
		close(events)
	}()
	var grace <-chan time.Time
	for {
		select {
		case _, more := <-events:
			if !more {
				return <-failed
			}
			if t.stop() {
				grace = time.After(stopGrace)
			}
		case <-grace:
			grace = nil
			t.resume()
		case s := <-signals:
			if s == unix.SIGCONT {
				grace = nil
				t.resume()
			} else {
				t.forward(s.(syscall.Signal))
			}
		case <-kill:
			kill = nil
			unix.Kill(t.child, unix.SIGKILL)
		}
	}
}

// The si_code of a child's change, include/uapi/asm-generic/siginfo.h.
const cldStopped = 5

// watchChild sends to events whenever the child has stopped, and returns when it has ended, without
// taking its status.
func watchChild(pid int, events chan<- bool) error {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WSTOPPED|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("waitid", err)
		}
		if info.Code != cldStopped {
			return nil
		}
		// Taken, or it would be told again. What is not there any more has been continued meanwhile: to stop now would
		// be against the will of who did that.
		info = unix.Siginfo{}
		if err := unix.Waitid(unix.P_PID, pid, &info, unix.WSTOPPED|unix.WNOHANG, nil); err == nil && info.Signo != 0 {
			events <- true
		}
	}
}
