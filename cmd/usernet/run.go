package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// passedOn are the signals that go to the command. SIGCONT continues it, see terminal.
var passedOn = []os.Signal{
	unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGCONT,
}

// notIgnored leaves signals out that whoever started us had us ignore: nohup(1) means the command too.
func notIgnored(signals []os.Signal) []os.Signal {
	return slices.DeleteFunc(slices.Clone(signals), signal.Ignored)
}

// run is usernet run: a command in namespaces of its own, with a network. It returns the command's status.
func run(o *options, log *slog.Logger) (_ int, err error) {
	given, err := takeInherited(o)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(checkFiles(), checkProc()); err != nil {
		return 0, err
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, notIgnored(passedOn)...)

	t := openTerminal()
	if t.tty != nil {
		defer t.tty.Close()
	}
	var shared *sharedClient // nil: a network of its own
	if o.join != nil {
		if shared, err = findShared(o.joins); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, shared.close()) }()
	}
	child, err := startStage(t, shared)
	if err != nil {
		return 0, err
	}
	t.child = child.pid
	defer func() { err = errors.Join(err, child.abandon()) }()
	g, err := startGuard(child.pid)
	if err != nil {
		return 0, err
	}
	kill := make(chan struct{}) // closed when --exit-fd hangs up
	defer func() {
		select {
		case <-kill:
			err = errors.Join(err, g.killAll())
		default:
			err = errors.Join(err, g.dismiss())
		}
	}()

	// Until the command runs, a signal that would end it ends us.
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	early := make(chan struct{})
	go func() {
		defer close(early)
		cancelOnSignal(ctx, signals, cancel)
	}()

	var n *runNet
	if shared != nil {
		n, err = shared.join(ctx, o, child.pid, log)
	} else {
		n, err = ownNet(ctx, o, child.pid, log)
	}
	if err != nil {
		return 0, signalStatus(ctx, err)
	}
	defer func() { err = errors.Join(err, n.close()) }()
	var pid *pidFile
	if o.pidFile != "" {
		if pid, err = writePIDFile(o.pidFile); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, pid.remove()) }()
	}
	if o.sandbox && n.confine != nil {
		n.confine(pid)
	}
	cancel(nil)
	<-early
	var s signalled
	if errors.As(context.Cause(ctx), &s) {
		return 0, statusError{s, statusSignal + int(s)}
	}

	// From here on the network runs, and when it does the command.
	network, stopNetwork := context.WithCancel(context.Background())
	defer stopNetwork()
	up, served := make(chan struct{}), make(chan error, 1)
	go func() {
		served <- goEach(network,
			func(ctx context.Context) error {
				return n.serve(ctx, func() error { close(up); return nil })
			},
			func(ctx context.Context) error {
				err := endOnHangUp(ctx, given.exit)
				if errors.As(err, new(ending)) {
					close(kill) // what it means for a command; the network lasts as long as that
					return nil
				}
				return err
			},
		)
	}()
	select {
	case <-up:
	case err := <-served:
		return 0, err
	}
	t.handOver()
	defer t.takeBack()
	if err := child.release(n.stage); err != nil {
		return 0, errors.Join(err, stopAndWait(stopNetwork, served))
	}
	if err := sayReady(given.ready); err != nil {
		log.Warn("nobody listens on --ready-fd", "error", err)
	}
	watched := make(chan error, 1)
	go func() {
		err := <-served
		// A network that fails while the command runs is told at once; the command may have more to do.
		if err != nil && network.Err() == nil {
			log.Error("the command has no network any more", "error", err)
			err = nil
		}
		watched <- err
	}()
	err = t.attend(signals, kill)
	t.takeBack()
	err = errors.Join(err, stopAndWait(stopNetwork, watched))
	if n.counted != nil {
		n.counted()
	}
	if err != nil {
		return 0, err
	}
	return child.status()
}

func stopAndWait(stop func(), ended <-chan error) error {
	stop()
	return <-ended
}

// signalled is a signal that came before the command ran.
type signalled syscall.Signal

func (s signalled) Error() string { return "ended by " + unix.SignalName(syscall.Signal(s)) }

// cancelOnSignal cancels with a signalled for signals that end a process, until ctx ends.
func cancelOnSignal(ctx context.Context, signals <-chan os.Signal, cancel context.CancelCauseFunc) {
	for {
		select {
		case s := <-signals:
			switch s {
			case unix.SIGWINCH, unix.SIGCONT:
			default:
				cancel(signalled(s.(syscall.Signal)))
			}
		case <-ctx.Done():
			return
		}
	}
}

// signalStatus makes of an error the signal's status if that was behind it.
func signalStatus(ctx context.Context, err error) error {
	var s signalled
	if errors.As(context.Cause(ctx), &s) {
		return statusError{s, statusSignal + int(s)}
	}
	return err
}

// A child is the stage, and then the command.
type child struct {
	pid    int
	pipe   *os.File // nil once released
	reaped bool
}

// findShared returns a way to the daemon that has a network.
func findShared(name string) (*sharedClient, error) {
	ctx, cancel := context.WithTimeout(context.Background(), askPatience)
	defer cancel()
	s, err := openSharedClient(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.do(ctx, func(ctx context.Context) error { _, err := s.client.Network(ctx, name); return err }); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// startStage starts our own binary in new namespaces, where it waits for release; with shared below that one's user namespace.
func startStage(t *terminal, shared *sharedClient) (_ *child, err error) {
	ids, err := ownIDs()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	// Not by one of the low numbers: the caller's own descriptors go to the command as they are. checkFiles
	// knows that there is this one.
	const firstOurs = minFiles - 1
	fd, err := unix.FcntlInt(r.Fd(), unix.F_DUPFD, firstOurs)
	if err != nil {
		return nil, errors.Join(os.NewSyscallError("fcntl(F_DUPFD)", err), w.Close())
	}
	defer unix.Close(fd)
	advise := func(err error) error {
		return fmt.Errorf("make user, network and mount namespaces: %w", mapAdvice(err, sysctl, os.Geteuid() == 0 && !hasCaps(unix.CAP_SETFCAP)))
	}
	if shared != nil {
		ns, done, err := sharedNamespaces(shared.daemon)
		if err != nil {
			return nil, errors.Join(err, w.Close())
		}
		defer done()
		pid, err := startBelow(ns, fd, t.mode != terminalShared)
		if err != nil {
			return nil, errors.Join(advise(err), w.Close())
		}
		return &child{pid: pid, pipe: w}, nil
	}
	p, err := os.StartProcess("/proc/self/exe", []string{stageName, strconv.Itoa(fd)}, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys: &syscall.SysProcAttr{
			Cloneflags:                 unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
			UidMappings:                ids.uids,
			GidMappings:                ids.gids,
			GidMappingsEnableSetgroups: ids.setgroups,
			Setpgid:                    t.mode != terminalShared,
			Pdeathsig:                  unix.SIGKILL,
		},
	})
	if err != nil {
		return nil, errors.Join(advise(err), w.Close())
	}
	c := &child{pid: p.Pid, pipe: w}
	return c, p.Release() // waited for by PID, as stops matter too
}

// release lets the stage become the command.
func (c *child) release(config stageConfig) error {
	defer func() { c.pipe = nil }()
	if err := errors.Join(json.NewEncoder(c.pipe).Encode(config), c.pipe.Close()); err != nil && !errors.Is(err, unix.EPIPE) {
		return fmt.Errorf("start the command: %w", err)
	}
	return nil // EPIPE: it has ended, and its status says how
}

// status takes the status of a child that has ended, as shells put it into one number.
func (c *child) status() (int, error) {
	var s unix.WaitStatus
	for {
		_, err := unix.Wait4(c.pid, &s, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, os.NewSyscallError("wait4", err)
		}
		break
	}
	c.reaped = true
	if s.Signaled() {
		return statusSignal + int(s.Signal()), nil
	}
	return s.ExitStatus(), nil
}

// abandon ends a child that still lives when we fail.
func (c *child) abandon() error {
	if c.reaped {
		return nil
	}
	if c.pipe != nil {
		c.pipe.Close()
	}
	unix.Kill(c.pid, unix.SIGKILL)
	_, err := c.status()
	return err
}

// stageConfigFor says what the command is and what it finds below /etc, for addresses of a plan, and the search list and options
// of its resolv.conf.
func stageConfigFor(o *options, p plan, search, resolverOptions []string) stageConfig {
	c := stageConfig{Parent: os.Getpid(), Argv: o.argv}
	hostname, _ := os.Hostname()
	hosts, _ := os.ReadFile("/etc/hosts") // if there is none, the stage says so
	c.Files = []etcFile{{"/etc/hosts", hostsText(string(hosts), p, hostname)}}
	if !o.dns {
		return c
	}
	text := resolvConfText(p.dns4, search, resolverOptions)
	c.Files = append(c.Files, etcFile{"/etc/resolv.conf", text})
	c.Dirs = []etcDir{
		{"/run/nscd", nil},
		{"/run/systemd/resolve", []etcFile{{"resolv.conf", text}, {"stub-resolv.conf", text}}},
	}
	return c
}
