package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"usernet/api"
	"usernet/tap/netns"
)

// A runNet is the network of run's command: one of its own, by an engine in this process, or a membership of a shared one, which
// the daemon serves.
type runNet struct {
	stage   stageConfig                                         // what the command finds below /etc
	confine func(pid *pidFile)                                  // nil: there is nothing to give up
	serve   func(ctx context.Context, ready func() error) error // until ctx ends
	counted func()                                              // logs what was counted; nil: nothing was
	close   func() error
}

// ownNet is a network of the command's own.
func ownNet(ctx context.Context, o *options, child int, log *slog.Logger) (*runNet, error) {
	warnShadowed(o.plan, log)
	e, err := openEngine(ctx, o, netns.Config{PID: child}, log)
	if err != nil {
		return nil, err
	}
	return &runNet{
		stage: stageConfigFor(o, o.plan, e.search(), e.resolverOptions()),
		confine: func(pid *pidFile) {
			c := e.confinement(pid)
			c.child = child
			confine(c, log)
		},
		serve: e.run, counted: func() { logStats(log, e) }, close: e.close,
	}, nil
}

// join makes the command's namespace a member of a shared network.
func (s *sharedClient) join(ctx context.Context, o *options, child int, log *slog.Logger) (*runNet, error) {
	request := *o.join
	request.PID = child
	a, err := s.client.Attach(ctx, o.joins, request)
	if err != nil {
		return nil, err
	}
	n, err := s.client.Network(ctx, o.joins)
	if err != nil {
		return nil, err
	}
	p := plan{net4: n.Subnet, net6: n.Subnet6, dns4: n.Gateway, container4: a.Member.IPv4, container6: a.Member.IPv6}
	if !n.Internal {
		p.host4, p.host6 = hostAlias4, n.Host6
	}
	return &runNet{
		stage: stageConfigFor(o, p, a.Search, a.Options),
		serve: func(ctx context.Context, ready func() error) error {
			err := ready()
			<-ctx.Done()
			return err
		},
		close: func() error {
			ctx, cancel := context.WithTimeout(context.Background(), askPatience)
			defer cancel()
			err := s.client.Detach(ctx, o.joins, request.Name)
			// NotFound: the daemon has seen the command's end. Nor is its absence the command's failure: the next one lets the member go.
			if e := (*api.Error)(nil); err != nil && (!errors.As(err, &e) || e.Code != api.CodeNotFound) {
				log.Warn("the end of the membership could not be told", "network", o.joins, "name", request.Name, "error", err)
			}
			return nil
		},
	}, nil
}

// belowName is argv[0] of our own binary on its way from run to the stage, in the shared user namespace:
//
//	run ── enters the shared user namespace ──▶ below ── clone, with new namespaces and CLONE_PARENT ──▶ stage
//
// The stage's user namespace is then a child of the shared one, and the kernel makes a veth between their network namespaces;
// and yet what is in it has no rights over the bridges, or over other containers. With CLONE_PARENT the stage is run's own child.
const belowName = "usernet-run-below"

func isBelow(args []string) bool { return len(args) == 4 && args[0] == belowName }

// A belowReport is what comes back over a pipe.
type belowReport struct {
	PID   int
	Error string `json:",omitempty"`
	Errno syscall.Errno
}

// belowMain starts the stage, whose pipe and our own are at the numbers in args, and whether it is to have a process group of its own.
func belowMain(args []string) int {
	pipe, err1 := strconv.Atoi(args[1])
	report, err2 := strconv.Atoi(args[2])
	if errors.Join(err1, err2) != nil || pipe < 3 || report < 3 {
		fmt.Fprintf(os.Stderr, "%s is a part of usernet: it is not for use by hand\n", belowName)
		return statusOurs
	}
	unix.CloseOnExec(report)
	var r belowReport
	ids, err := ownIDs()
	if err == nil {
		var p *os.Process
		p, err = os.StartProcess("/proc/self/exe", []string{stageName, args[1]}, &os.ProcAttr{
			Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
			Sys: &syscall.SysProcAttr{
				Cloneflags:                 unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_PARENT,
				UidMappings:                ids.uids,
				GidMappings:                ids.gids,
				GidMappingsEnableSetgroups: ids.setgroups,
				Setpgid:                    args[3] == "group",
			},
		})
		if err == nil {
			r.PID = p.Pid
			p.Release()
		}
	}
	if err != nil {
		r.Error = err.Error()
		errors.As(err, &r.Errno)
	}
	if err := json.NewEncoder(os.NewFile(uintptr(report), "report")).Encode(r); err != nil {
		return statusOurs
	}
	return 0
}

// startBelow has the stage started below the shared user namespace. pipe is the stage's descriptor, without close-on-exec.
func startBelow(shared namespacePair, pipe int, group bool) (int, error) {
	runtime.LockOSThread() // main has done that; the stage's life hangs on this thread
	defer runtime.UnlockOSThread()
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	defer w.Close()
	report, err := unix.FcntlInt(w.Fd(), unix.F_DUPFD, minFiles-1)
	if err != nil {
		return 0, os.NewSyscallError("fcntl(F_DUPFD)", err)
	}
	word := "shared"
	if group {
		word = "group"
	}
	pid, err := netns.Start(shared.user, -1, []string{belowName, strconv.Itoa(pipe), strconv.Itoa(report), word}, os.Environ())
	unix.Close(report)
	if err != nil {
		return 0, err
	}
	w.Close()
	var said belowReport
	derr := json.NewDecoder(io.LimitReader(r, 64<<10)).Decode(&said)
	status, err := (&child{pid: pid}).status()
	switch {
	case err != nil:
		return 0, err
	case said.Error != "" && said.Errno != 0:
		return 0, said.Errno
	case said.Error != "":
		return 0, errors.New(said.Error)
	case derr != nil:
		return 0, fmt.Errorf("%s ended with status %d: %w", belowName, status, derr)
	}
	return said.PID, nil
}
