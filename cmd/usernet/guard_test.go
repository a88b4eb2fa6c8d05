package main

import (
	"io"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// inNamespace starts a shell in a network namespace of its own, with a child that has left its session.
// Both hold the pipe that is returned.
func inNamespace(t *testing.T) (*exec.Cmd, io.Reader) {
	t.Helper()
	ids, err := ownIDs()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "setsid sleep 1000 & echo ready; wait")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: ids.uids, GidMappings: ids.gids, GidMappingsEnableSetgroups: ids.setgroups,
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Skipf("no user namespaces here: %v", namespaceAdvice(err, sysctl))
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	return cmd, out
}

// What a killed usernet leaves in the namespace is killed, whatever it made of itself, and nothing else.
func TestGuardKillsTheNamespace(t *testing.T) {
	cmd, out := inNamespace(t)
	other, _ := inNamespace(t)
	g, err := startGuard(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.killAll(); err != nil { // its pipe is closed as the kernel does it for a process that dies
		t.Errorf("the guard: %v", err)
	}
	if _, err := io.Copy(io.Discard, out); err != nil { // until nobody has the other end
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the shell: %v", err)
	}
	if err := other.Process.Signal(unix.SIGCONT); err != nil {
		t.Errorf("a process elsewhere: %v", err)
	}
	killOff(t, other)
}

func TestGuardDismissed(t *testing.T) {
	cmd, _ := inNamespace(t)
	g, err := startGuard(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.dismiss(); err != nil {
		t.Fatal(err)
	}
	var status unix.WaitStatus
	if pid, err := unix.Wait4(cmd.Process.Pid, &status, unix.WNOHANG, nil); pid != 0 || err != nil {
		t.Errorf("the shell has ended: %d %v", status, err)
	}
	killOff(t, cmd)
}

// killOff ends what inNamespace started, by a guard, and waits.
func killOff(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	g, err := startGuard(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.killAll(); err != nil {
		t.Error(err)
	}
	cmd.Wait()
}

// Whoever has ended the guard has not ended the command, whose status is still run's.
func TestGuardThatIsGone(t *testing.T) {
	cmd, _ := inNamespace(t)
	g, err := startGuard(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.proc.Kill(); err != nil {
		t.Fatal(err)
	}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, g.proc.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if err := g.dismiss(); err != nil {
		t.Errorf("dismiss: %v", err)
	}
	killOff(t, cmd)
}
