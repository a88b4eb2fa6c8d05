package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminalRole is run without its network: it attends to a shell that does what USERNET_TEST_SCRIPT says, and
// tells how that ended and who has the terminal then.
func terminalRole() int {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, passedOn...)
	t := openTerminal()
	// As run's command, it begins when it has the terminal.
	wait, release, err := os.Pipe()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	p, err := os.StartProcess("/bin/sh", []string{"sh", "-c", "read go <&3; exec 3<&-; " + os.Getenv("USERNET_TEST_SCRIPT")}, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr, wait},
		Sys:   &syscall.SysProcAttr{Setpgid: t.mode != terminalShared},
	})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	t.child = p.Pid
	t.handOver()
	wait.Close()
	fmt.Fprintln(release)
	release.Close()
	err = t.attend(signals, nil)
	t.takeBack()
	status, err2 := (&child{pid: p.Pid}).status()
	fmt.Printf("mode %d, status %d, foreground %v, errors %v %v\n", t.mode, status, t.foreground(), err, err2)
	return 0
}

// onTerminal runs the role on a terminal of its own, and returns the terminal's other end.
func onTerminal(t *testing.T, script string) *screen {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"=terminal", "USERNET_TEST_SCRIPT="+script)
	return startOnTerminal(t, cmd)
}

// onShell runs a shell with job control on a terminal, for the test to type the role's command line.
func onShell(t *testing.T) *screen {
	t.Helper()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("no bash, whose job control is asked for")
	}
	cmd := exec.Command(bash, "--norc", "--noediting", "-i")
	cmd.Env = append(os.Environ(), "PS1=> ", "HISTFILE=")
	return startOnTerminal(t, cmd)
}

func testBinary(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

func startOnTerminal(t *testing.T, cmd *exec.Cmd) *screen {
	t.Helper()
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	t.Cleanup(func() { ptmx.Close() })
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	defer tty.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	s := &screen{t: t, tty: ptmx}
	s.changed.L = &s.mu
	go s.read()
	return s
}

// A screen collects what appears on a terminal.
type screen struct {
	t       *testing.T
	tty     *os.File
	mu      sync.Mutex
	changed sync.Cond
	text    bytes.Buffer
	ended   bool
}

func (s *screen) read() {
	b := make([]byte, 4096)
	for {
		n, err := s.tty.Read(b) // EIO once nobody has the terminal open
		s.mu.Lock()
		s.text.Write(b[:n])
		s.ended = err != nil
		s.changed.Broadcast()
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// expect waits until the terminal shows text behind all that was expected before.
func (s *screen) expect(text string) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	deadline := time.Now().Add(patience)
	defer time.AfterFunc(patience+time.Second, s.changed.Broadcast).Stop()
	for {
		if i := strings.Index(s.text.String(), text); i >= 0 {
			s.text.Next(i + len(text))
			return
		}
		if s.ended {
			s.t.Fatalf("the terminal never showed %q, but\n%s", text, &s.text)
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the terminal does not show %q, but\n%s", text, &s.text)
		}
		s.changed.Wait()
	}
}

// patience is far beyond what anything here takes; what is not shown then never will be.
const patience = 15 * time.Second

// end waits until nothing can appear any more.
func (s *screen) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.ended {
		s.changed.Wait()
	}
}

func (s *screen) press(keys string) {
	s.t.Helper()
	if _, err := s.tty.WriteString(keys); err != nil {
		s.t.Fatal(err)
	}
}

// Ctrl-C is the command's to answer, once, and the terminal is ours again afterwards.
func TestTerminalInterrupt(t *testing.T) {
	s := onTerminal(t, `n=0; trap 'n=$((n+1)); echo interrupted $n' INT; echo ready; read x; read x; exit 7`)
	s.expect("ready")
	s.press("\x03")
	s.expect("interrupted 1")
	s.press("x\n")
	s.press("x\n")
	s.expect("mode 2, status 7, foreground true, errors <nil> <nil>")
}

// Nobody could continue a command on a terminal without a shell; it goes on by itself, with the terminal.
func TestTerminalStopWithoutShell(t *testing.T) {
	s := onTerminal(t, `echo ready; read x; echo got $x; exit 7`)
	s.expect("ready")
	s.press("\x1a")
	s.press("hello\n")
	s.expect("got hello")
	s.expect("mode 2, status 7, foreground true")
}

// Under a shell with job control Ctrl-Z stops us with the command, and "fg" continues both.
func TestTerminalStopUnderShell(t *testing.T) {
	s := onShell(t)
	s.press(roleVariable + `=terminal USERNET_TEST_SCRIPT='echo rea""dy; read x; echo got $x; exit 7' ` + testBinary(t) + "\n")
	s.expect("ready")
	s.press("\x1a")
	s.expect("Stopped")
	s.expect("> ") // what is typed while the terminal changes hands may be lost
	s.press("echo the shell h\"\"as it\n")
	s.expect("the shell has it")
	s.press("fg\n")
	s.press("hello\n")
	s.expect("got hello")
	s.expect("mode 2, status 7, foreground true")
	s.press("echo status $?\n")
	s.expect("status 0")
}

// In a pipeline the neighbours keep the terminal, and Ctrl-C reaches the command once all the same.
func TestTerminalPipeline(t *testing.T) {
	s := onShell(t)
	s.press(roleVariable + `=terminal USERNET_TEST_SCRIPT='n=0; trap "n=\$((n+1))" INT; echo rea""dy >&2; read x; read x; exit $n' ` + testBinary(t) + " | (trap '' INT; cat)\n")
	s.expect("ready")
	s.press("\x03")
	s.press("x\n")
	s.press("x\n")
	s.expect("mode 1, status 1, foreground true")
}

// Without a terminal what is sent to us is passed on.
func TestTerminalNone(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"=terminal", `USERNET_TEST_SCRIPT=trap "exit 9" TERM; trap "echo one" USR1; echo ready; while :; do sleep 0.01; done`)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := &screen{t: t, tty: out.(*os.File)}
	s.changed.L = &s.mu
	go s.read()
	s.expect("ready")
	cmd.Process.Signal(unix.SIGUSR1)
	s.expect("one")
	cmd.Process.Signal(unix.SIGTERM)
	s.expect("mode 0, status 9, foreground false")
	s.end() // Wait closes what is read from
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
