package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// The guard is our own binary beside run, for the one end of run that nothing in run can follow: SIGKILL.
// A hang-up of --exit-fd is made the same end, for who asks for it that way wants nothing left. The kernel kills the command then (see stage) but not what that has started, which would go on in a
// namespace without a network and with nobody to wait for it. The guard waits for run's end of a pipe to close, and then
// kills whatever lives in the network namespace. Any other end tells it to leave before.

// guardName is argv[0] of the guard. Its pipe is descriptor 3, the namespace 4.
const guardName = "usernet-run-guard"

const (
	guardPipe  = 3
	guardNetNS = 4
)

// killRounds bounds the hunt for processes that fork faster than we see them: each round kills all that are
// there, so that only a fork bomb gets past a few, and that one is not ours to end.
const killRounds = 100

func isGuard(args []string) bool { return len(args) == 1 && args[0] == guardName }

// guardMain returns the exit status.
func guardMain() int {
	// What was passed to run is not the guard's to hold open, and signals to its group not its to die of.
	unix.CloseRange(guardNetNS+1, 1<<31-1, 0)
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGPIPE)
	if n, err := os.NewFile(guardPipe, "pipe").Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		return 0
	}
	// A /proc of another PID namespace speaks of other processes by the same numbers.
	if self, err := os.Readlink("/proc/self"); err != nil || self != strconv.Itoa(os.Getpid()) {
		return 1
	}
	var ns unix.Stat_t
	if unix.Fstat(guardNetNS, &ns) != nil {
		return 1
	}
	for range killRounds {
		if killed, err := killIn(&ns); err != nil {
			return 1
		} else if killed == 0 {
			return 0
		}
	}
	return 1
}

// killIn kills the processes in a network namespace and returns how many there were.
func killIn(ns *unix.Stat_t) (int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	killed := 0
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid != os.Getpid() && killIfIn(pid, ns) {
			killed++
		}
	}
	return killed, nil
}

// killIfIn opens the process before it looks, so that what is killed is what was looked at.
func killIfIn(pid int, ns *unix.Stat_t) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st) != nil || st.Dev != ns.Dev || st.Ino != ns.Ino {
		return false
	}
	return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil
}

// A guard is run's handle on it.
type guard struct {
	pipe *os.File
	proc *os.Process
}

// startGuard starts a guard for the network namespace that a process is in.
func startGuard(pid int) (_ *guard, err error) {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	defer null.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{guardName}, &os.ProcAttr{
		Env:   []string{"GOMAXPROCS=1"},
		Files: []*os.File{null, null, null, r, ns},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", guardName, err), w.Close())
	}
	return &guard{pipe: w, proc: p}, nil
}

// killAll has the guard kill what is left in the namespace, and waits for it.
func (g *guard) killAll() error {
	err := g.pipe.Close()
	state, werr := g.proc.Wait()
	if err = errors.Join(err, werr); err == nil && !state.Success() {
		err = errors.New("what the command has started could not be killed: is /proc mounted, and of our PID namespace?")
	}
	return err
}

// dismiss lets the guard go and waits for it. One that somebody else has ended has nothing left to do, and is no
// reason for the command's status not to be ours.
func (g *guard) dismiss() error {
	_, err := g.pipe.Write([]byte{1})
	if errors.Is(err, unix.EPIPE) {
		err = nil
	}
	err = errors.Join(err, g.pipe.Close()) // and with that the guard ends in any case
	_, werr := g.proc.Wait()
	return errors.Join(err, werr)
}
