package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"usernet/network"
	"usernet/tap/netns"
)

// The keeper is the process that the shared mode hangs on, and so it does next to nothing:
//
//	an entry ── starts ──▶ keeper ── once ──▶ a user and a network namespace, held open at 3 and 4
//	                         │
//	                         └── starts, and starts again when it dies ──▶ daemon, which has both at 3 and 4 too
//
// Everything on a bridge lives in the namespace that it holds, so that the daemon may be killed. When the keeper itself is killed the daemon goes on; the next entry starts another keeper, which gets the
// namespaces from the daemon's descriptors. It ends when the daemon has nothing left to do.

// keeperName is argv[0] of the keeper; argv[1] is the directory of the shared mode, argv[2] and [3] are PID and start of a
// daemon that lives.
const keeperName = "usernet-keeper"

// Descriptors that keeper and daemon have at fixed numbers: entries open the namespaces as /proc/PID/fd/N.
const (
	fdUserNS = 3
	fdNetNS  = 4
	fdReady  = 5 // of a pipe: "ok", or why there is no network
)

// Exit statuses of the daemon.
const (
	daemonDone   = 0 // no member, and none has come for a while; or it was asked to end
	daemonCannot = 3 // what it said on fdReady
)

// A daemon that dies at once is started again after a pause, which doubles. It stays short, for members are back in the world within
// two seconds however often somebody kills it, and a start costs 20 ms of a processor.
const (
	shortLife      = 2 * time.Second
	firstPause     = 100 * time.Millisecond
	longestPause   = time.Second
	daemonPatience = 10 * time.Second // to start
)

// A keeperRecord is what keeper.json has.
type keeperRecord struct {
	Process network.Process `json:"process"`
}

func isKeeper(args []string) bool {
	return (len(args) == 2 || len(args) == 4) && args[0] == keeperName
}

// keeperMain returns the exit status.
func keeperMain(args []string) int {
	// What was open in who started us is not ours to hold.
	unix.CloseRange(fdReady+1, 1<<31-1, 0)
	runtime.GOMAXPROCS(1)
	ready := os.NewFile(fdReady, "ready")
	if err := keepShared(args, ready); err != nil {
		fmt.Fprintf(ready, "%v\n", err) // who waits is told, if it is still open
		fmt.Fprintf(os.Stderr, "%s: %v\n", keeperName, err)
		return statusFailure
	}
	return 0
}

func keepShared(args []string, ready *os.File) error {
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGPIPE)
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	for fd := fdUserNS; fd <= fdReady; fd++ {
		unix.CloseOnExec(fd)
	}
	dir, err := network.OpenDir(args[1])
	if err != nil {
		return err
	}
	defer dir.Close()
	var d *daemonHandle
	if len(args) == 4 {
		if d, err = adoptDaemon(args[2], args[3]); err != nil {
			return err
		}
	} else if err := makeShared(); err != nil {
		return err
	}
	self, err := network.ReadProcess(os.Getpid())
	if err == nil {
		err = dir.WriteFile(network.KeeperFile, keeperRecord{self})
	}
	if err != nil {
		return err
	}
	if d != nil {
		fmt.Fprintln(ready, "ok")
		ready = nobodyWaits(ready)
	}
	var pause time.Duration
	for first := true; ; first = false {
		if d == nil {
			if d, err = startDaemon(args[1], ready); err != nil {
				return err
			}
			ready = nobodyWaits(ready) // the daemon has it
		}
		born := time.Now()
		status := d.wait(term)
		if status == daemonDone || first && status == daemonCannot {
			return nil
		}
		fmt.Fprintf(os.Stderr, "%s: the daemon has ended (%s) and is started again\n", keeperName, d)
		d = nil
		pause = nextPause(pause, time.Since(born))
		select {
		case <-time.After(pause):
		case <-term:
			return nil
		}
	}
}

// nobodyWaits closes ready, and returns what daemons have in its place that are started again: /dev/null, as standard input is. With nothing
// at its number a daemon would find there, and close, whatever it opens first.
func nobodyWaits(ready *os.File) *os.File {
	if ready != os.Stdin {
		ready.Close()
	}
	return os.Stdin
}

// nextPause is the one after a daemon that has lived so long; last is the one before it.
func nextPause(last, life time.Duration) time.Duration {
	if life > shortLife {
		return 0
	}
	return min(max(2*last, firstPause), longestPause)
}

// makeShared makes the namespaces and has them at their numbers. The process that they begin with ends at once: an open
// descriptor holds them as well.
func makeShared() (err error) {
	ids, err := ownIDs()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	defer r.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{stageName, "3"}, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr, r},
		Sys: &syscall.SysProcAttr{
			Cloneflags:                 unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
			UidMappings:                ids.uids,
			GidMappings:                ids.gids,
			GidMappingsEnableSetgroups: ids.setgroups,
		},
	})
	if err != nil {
		return fmt.Errorf("make the shared user and network namespace: %w", mapAdvice(err, sysctl, os.Geteuid() == 0 && !hasCaps(unix.CAP_SETFCAP)))
	}
	defer func() {
		w.Close() // and so it ends
		_, werr := p.Wait()
		err = errors.Join(err, werr)
	}()
	for fd, name := range map[int]string{fdUserNS: "user", fdNetNS: "net"} {
		path := fmt.Sprintf("/proc/%d/ns/%s", p.Pid, name)
		ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: path, Err: err}
		}
		err = unix.Dup3(ns, fd, unix.O_CLOEXEC)
		unix.Close(ns)
		if err != nil {
			return os.NewSyscallError("dup3", err)
		}
	}
	return nil
}

// A daemonHandle is the keeper's hold on the daemon.
type daemonHandle struct {
	child *os.Process // nil: it is another's child, or nobody's
	state *os.ProcessState
	pidfd *os.File // of one that is no child
	pid   int
}

func (d *daemonHandle) String() string {
	if d.state != nil {
		return "process " + strconv.Itoa(d.pid) + ", " + d.state.String()
	}
	return "process " + strconv.Itoa(d.pid)
}

// startDaemon gives it the namespaces and ready.
func startDaemon(dir string, ready *os.File) (*daemonHandle, error) {
	user, net := os.NewFile(dup(fdUserNS), "user"), os.NewFile(dup(fdNetNS), "net")
	defer user.Close()
	defer net.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{daemonName, dir}, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr, user, net, ready},
	})
	if err != nil {
		return nil, fmt.Errorf("start the daemon: %w", err)
	}
	return &daemonHandle{child: p, pid: p.Pid}, nil
}

// dup is a descriptor of its own, for a File that closes it.
func dup(fd int) uintptr {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, fdReady+1)
	if err != nil {
		return ^uintptr(0) // EBADF, where it is used
	}
	return uintptr(n)
}

func adoptDaemon(pid, start string) (*daemonHandle, error) {
	n, err := strconv.Atoi(pid)
	ticks, err2 := strconv.ParseUint(start, 10, 64)
	if err := errors.Join(err, err2); err != nil {
		return nil, fmt.Errorf("%s is a part of usernet: it is not for use by hand: %w", keeperName, err)
	}
	f, err := (network.Process{PID: n, Start: ticks}).Open()
	if err != nil {
		return nil, err
	}
	return &daemonHandle{pidfd: f, pid: n}, nil
}

// wait returns the daemon's exit status once it has ended; that of one that is no child nobody tells, and it is as good as killed.
// A signal to end goes on to the daemon.
func (d *daemonHandle) wait(term <-chan os.Signal) int {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if d.child != nil {
			d.state, _ = d.child.Wait()
			return
		}
		untilReadable(d.pidfd)
		d.pidfd.Close()
	}()
	asked := false
	for {
		select {
		case <-term:
			asked = true
			unix.Kill(d.pid, unix.SIGTERM)
		case <-ended:
			switch {
			case asked:
				return daemonDone
			case d.state == nil:
				return -1
			}
			return d.state.ExitCode()
		}
	}
}

// untilReadable waits for a pidfd to tell its process's end, or to be closed.
func untilReadable(pidfd *os.File) {
	c, err := pidfd.SyscallConn()
	if err != nil {
		return
	}
	_ = c.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
}

// startKeeper starts a keeper, and returns when there is a network. With a daemon that lives, its namespaces go on.
func startKeeper(dir *network.Dir, daemon network.Process) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	logFile, err := os.OpenFile(dir.Path()+"/"+logName, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	args, user, net := []string{keeperName, dir.Path()}, null, null
	if daemon != (network.Process{}) {
		args = append(args, strconv.Itoa(daemon.PID), strconv.FormatUint(daemon.Start, 10))
		if user, err = os.Open(sharedPath(daemon.PID, fdUserNS)); err == nil {
			defer user.Close()
			if net, err = os.Open(sharedPath(daemon.PID, fdNetNS)); err == nil {
				defer net.Close()
			}
		}
		if err != nil {
			w.Close()
			return fmt.Errorf("the daemon's namespaces: %w", err)
		}
	}
	p, err := os.StartProcess("/proc/self/exe", args, &os.ProcAttr{
		Dir:   "/",
		Files: []*os.File{null, logFile, logFile, user, net, w},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	w.Close()
	if err != nil {
		return fmt.Errorf("start the keeper: %w", err)
	}
	if err := p.Release(); err != nil {
		return err
	}
	return heardReady(r, dir)
}

// heardReady waits for what comes on the ready pipe.
func heardReady(r *os.File, dir *network.Dir) error {
	if err := r.SetReadDeadline(time.Now().Add(daemonPatience)); err != nil {
		return err
	}
	text := make([]byte, 0, 4096)
	for len(text) < cap(text) {
		n, err := r.Read(text[len(text):cap(text)])
		text = text[:len(text)+n]
		if err != nil {
			break
		}
	}
	switch {
	case string(text) == "ok\n":
		return nil
	case len(text) > 0:
		return errors.New(string(text[:len(text)-1]))
	}
	return fmt.Errorf("the daemon of the shared networks has not come up: see %s/%s", dir.Path(), logName)
}

// sharedPath is where a process holds a namespace.
func sharedPath(pid, fd int) string { return fmt.Sprintf("/proc/%d/fd/%d", pid, fd) }

// openShared opens the shared network namespace that this process holds.
func openShared() (*netns.NS, error) { return netns.OpenPath(sharedPath(os.Getpid(), fdNetNS)) }
