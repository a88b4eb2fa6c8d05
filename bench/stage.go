package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// innerEnv tells bench that it is in its own namespaces, and names the directory for what it needs there.
const innerEnv = "USERNET_BENCH_INNER"

// exitError is the status of a process that has reported its own failure.
type exitError struct{ status int }

func (e *exitError) Error() string { return fmt.Sprintf("status %d", e.status) }

// outer runs bench again in namespaces of its own, and keeps what lies outside of them: the scratch
// directory and one sysctl. It puts both back, however inner ends.
func outer(ctx context.Context, args []string) (err error) {
	scratch, err := os.MkdirTemp("", "usernet-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	if err := os.Chmod(scratch, 0o755); err != nil { // the ordinary user that runs the peers passes through
		return err
	}
	restore, err := allowCubic()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, restore()) }()

	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), innerEnv+"="+scratch)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	if !machineRoot() {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("run in new namespaces: %w (an ordinary user needs user namespaces: sysctl kernel.unprivileged_userns_clone, "+
			"kernel.apparmor_restrict_unprivileged_userns, user.max_user_namespaces)", err)
	}
	ended := make(chan struct{})
	forwarded := make(chan struct{})
	go func() {
		defer close(forwarded)
		select {
		case <-ctx.Done():
			cmd.Process.Signal(syscall.SIGTERM) // a second signal after a terminal's ^C changes nothing
		case <-ended:
		}
	}()
	err = cmd.Wait()
	close(ended)
	<-forwarded
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		if exit.Exited() {
			return &exitError{exit.ExitCode()}
		}
		return fmt.Errorf("the inner bench was ended by %v", exit.Sys().(syscall.WaitStatus).Signal())
	}
	return err
}

// machineRoot tells whether we have the rights of the machine's root, and not of a user namespace's.
func machineRoot() bool {
	text, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && os.Geteuid() == 0 && strings.Join(strings.Fields(string(text)), " ") == "0 0 4294967295"
}

const allowedCC = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"

// allowCubic lets every network namespace choose cubic, which only the initial one may grant, and returns what
// takes the grant back. Without the right to grant it does nothing: the lab uses, and reports, what it finds.
func allowCubic() (restore func() error, err error) {
	none := func() error { return nil }
	old, err := os.ReadFile(allowedCC)
	if err != nil || !machineRoot() || slices.Contains(strings.Fields(string(old)), "cubic") {
		return none, nil
	}
	available, _ := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control")
	if !slices.Contains(strings.Fields(string(available)), "cubic") {
		return none, nil
	}
	value := strings.TrimSpace(string(old))
	if err := os.WriteFile(allowedCC, []byte(value+" cubic"), 0); err != nil {
		return none, nil // read-only here
	}
	return func() error {
		if err := os.WriteFile(allowedCC, []byte(value), 0); err != nil {
			return fmt.Errorf("put %s back to %q: %w", allowedCC, value, err)
		}
		return nil
	}, nil
}

// inner measures. It is root of its namespaces.
func inner(ctx context.Context, o options) error {
	// What we start is ours even when its parent ends, as pasta's does: for the CPU accounts, and to be ended.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	// Ten thousand published ports are as many descriptors. What is set explicitly, and only that, Go hands on to children.
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return err
	}
	files.Cur = files.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("raise the limit of open files to %d: %w", files.Max, err)
	}
	lab, err := newLab(ctx, os.Getenv(innerEnv), o.usernet)
	if err != nil {
		return err
	}
	err = run(ctx, o, lab)
	return errors.Join(err, lab.close())
}
