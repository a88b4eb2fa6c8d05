package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Of the environment of the tests' second run, inside the lab.
const (
	envInside = "USERNET_E2E_INSIDE" // set there, to the uid of who began the tests
	envBinary = "USERNET_BIN"        // the binary under test; built when empty
)

var (
	raceDetector bool
	binary       string // the binary under test
	scratch      string // a directory of this run
	runtimeDir   string // XDG_RUNTIME_DIR of what is started; there may be none on this machine
	realRoot     bool   // the machine's root runs the tests
)

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "helper" {
		os.Exit(helperMain(os.Args[2], os.Args[3:]))
	}
	var code int
	var err error
	if os.Getenv(envInside) == "" {
		code, err = outer()
	} else {
		code, err = inner(m)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

// outer builds the binary where the modules are, and runs the tests once more in new namespaces.
func outer() (int, error) {
	dir, err := os.MkdirTemp("", "usernet-e2e-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return 1, err
	}
	bin := os.Getenv(envBinary)
	if bin == "" {
		bin = filepath.Join(dir, "usernet")
		args := []string{"build", "-buildvcs=false", "-o", bin}
		cgo := "0"
		if raceDetector {
			args, cgo = append(args, "-race"), "1"
		}
		build := exec.Command("go", append(args, "../cmd/usernet")...)
		build.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
		if out, err := build.CombinedOutput(); err != nil {
			return 1, fmt.Errorf("build usernet: %w\n%s", err, out)
		}
	}
	bin, err = filepath.Abs(bin)
	if err != nil {
		return 1, err
	}

	self, err := os.Executable()
	if err != nil {
		return 1, err
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", envInside, os.Getuid()), envBinary+"="+bin, "USERNET_E2E_SCRATCH="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return 1, fmt.Errorf("the tests ended by %v", status.Signal())
		}
		return exit.ExitCode(), nil
	}
	if err != nil {
		return 1, fmt.Errorf("run the tests in new namespaces: %w (user namespaces must be permitted: sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)", err)
	}
	return 0, nil
}

func inner(m *testing.M) (int, error) {
	realRoot = os.Getenv(envInside) == "0"
	binary, scratch = os.Getenv(envBinary), os.Getenv("USERNET_E2E_SCRATCH")
	runtimeDir = filepath.Join(scratch, "runtime")
	if err := os.Mkdir(runtimeDir, 0o700); err != nil {
		return 1, err
	}
	if err := newLab(); err != nil {
		return 1, fmt.Errorf("make the lab: %w", err)
	}
	code := m.Run()
	if left := processesOf(binary); len(left) > 0 && code == 0 {
		return 1, fmt.Errorf("left behind by the tests: %v", left)
	}
	return code, lab.close()
}

// processesOf lists the processes that run a program, as "pid: command line".
func processesOf(program string) []string {
	links, _ := filepath.Glob("/proc/[0-9]*/exe")
	var found []string
	for _, link := range links {
		if exe, err := os.Readlink(link); err != nil || strings.TrimSuffix(exe, " (deleted)") != program {
			continue
		}
		dir := filepath.Dir(link)
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		found = append(found, filepath.Base(dir)+": "+strings.ReplaceAll(strings.TrimRight(string(cmdline), "\x00"), "\x00", " "))
	}
	return found
}
