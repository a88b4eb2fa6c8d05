package runtimes

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

const (
	envBinary = "USERNET_BIN"
	envTrixie = "USERNET_TRIXIE" // the folder that .ci/trixie prints, where podman 5 is to be tested too
)

// binary is the program under test, as the machine and not the lab sees it.
var binary string

// missing says why there is no lab, and is empty where there is one.
var missing string

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "runtimes:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	if missing = unfit(); missing != "" {
		return m.Run(), nil
	}
	dir, err := os.MkdirTemp("", "usernet-runtimes-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if binary = os.Getenv(envBinary); binary == "" {
		binary = filepath.Join(dir, "usernet")
		build := exec.Command("go", "build", "-buildvcs=false", "-o", binary, "../../cmd/usernet")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return 1, fmt.Errorf("build usernet: %w\n%s", err, out)
		}
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return 1, err
	}
	l, err := newLab("")
	if err != nil {
		return 1, err
	}
	lab = l
	podmans["podman 4"] = lab
	if root := os.Getenv(envTrixie); root != "" {
		if podmans["podman 5"], err = newLab(root); err != nil {
			return 1, errors.Join(err, lab.close())
		}
	}
	code := m.Run()
	for _, l := range podmans {
		err = errors.Join(err, l.close())
	}
	return code, err
}

// unfit says what keeps this machine from having a lab.
func unfit() string {
	if os.Getuid() != 0 {
		return "only root can make the lab of the container runtimes (.ci/lab)"
	}
	for _, program := range []string{"apt-get", "unshare", "nsenter", "setpriv"} {
		if _, err := exec.LookPath(program); err != nil {
			return "the lab of the container runtimes (.ci/lab) needs Debian and its " + program
		}
	}
	return ""
}

// lab is what all tests share. Each leaves it as it found it.
var lab *labType

// needLab skips the test where there is no lab.
func needLab(t *testing.T) *labType {
	t.Helper()
	if missing != "" {
		t.Skip(missing)
	}
	return lab
}

// A labType is a lab that this process holds: it ends with it, however that ends.
type labType struct {
	env     []string // LAB=… for the script
	hold    *exec.Cmd
	init    string // the number of the lab's first process
	host    *place
	outside *place
}

// newLab makes a lab of the machine's own system, or of the one in the folder root.
func newLab(root string) (*labType, error) {
	l := &labType{env: append(os.Environ(), fmt.Sprintf("LAB=test-%d%s", os.Getpid(), strings.ReplaceAll(root, "/", "-")), envBinary+"="+binary)}
	if root != "" {
		l.env = append(l.env, "LAB_ROOT="+root)
	}
	runtime.LockOSThread() // the lab dies with the thread that started it, and a locked one ends only with the process
	l.hold = exec.Command("../../.ci/lab", "hold")
	l.hold.Env = l.env
	l.hold.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	var stderr bytes.Buffer
	l.hold.Stderr = &stderr
	out, err := l.hold.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := l.hold.Start(); err != nil {
		return nil, err
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		werr := l.hold.Wait()
		return nil, fmt.Errorf("make the lab: %q: %w\n%s", line, errors.Join(err, werr), &stderr)
	}
	pid, err := l.script("pid").Output()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("find the lab: %w", err), l.close())
	}
	l.init = strings.TrimSpace(string(pid))
	proc := "/proc/" + l.init
	if l.host, err = newPlace("host", proc+"/ns/net"); err == nil {
		l.outside, err = newPlace("outside", proc+"/root/run/netns/outside")
	}
	if err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

// script is the lab's script with a word.
func (l *labType) script(args ...string) *exec.Cmd {
	cmd := exec.Command("../../.ci/lab", args...)
	cmd.Env = l.env
	return cmd
}

// close ends the lab, and tells of processes of usernet that outlived what they served.
func (l *labType) close() error {
	for _, p := range []*place{l.host, l.outside} {
		if p != nil {
			p.close()
		}
	}
	out, err := l.script("down").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("take the lab down: %w: %s", err, out)
	}
	l.hold.Wait() // it was killed
	return err
}

// path is where the lab's file lies for this process.
func (l *labType) path(name string) string { return "/proc/" + l.init + "/root" + name }
