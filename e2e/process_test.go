package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds everything that a test waits for; no test measures by it.
const patience = 30 * time.Second

// A where is a place and who one is there.
type where struct {
	place  *place
	prefix []string // a command line that makes the rest of it run there
}

// A process runs until it ends, is waited for, or the test ends.
type process struct {
	cmd   *exec.Cmd
	name  string
	out   *output
	ended chan struct{}
	err   error // of Wait, once ended is closed
}

// An output collects what a process writes and can be read meanwhile.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// start begins a command; change, which may be nil, may set its files first. Standard output and error are
// collected unless changed, and shown when the test fails.
func (w where) start(t testing.TB, change func(*exec.Cmd), args ...string) *process {
	t.Helper()
	line := append(append([]string{}, w.prefix...), args...)
	p := &process{name: strings.Join(args, " "), out: &output{}, ended: make(chan struct{})}
	p.cmd = exec.Command(line[0], line[1:]...)
	p.cmd.Env = append(os.Environ(), "LC_ALL=C", "HOME="+scratch, "XDG_RUNTIME_DIR="+runtimeDir, "GORACE=atexit_sleep_ms=0") // the race detector would have each process end a second late
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	// A grandchild that keeps our pipe open must not keep the test.
	p.cmd.WaitDelay = 5 * time.Second
	// A group of its own, so that what it has started ends with it.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if change != nil {
		change(p.cmd)
	}
	var err error
	w.place.do(func() { err = p.cmd.Start() })
	if err != nil {
		t.Fatalf("%s: %v", p.name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		select {
		case <-p.ended: // its number may be another's now
		default:
			syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
			<-p.ended
		}
		if t.Failed() {
			t.Logf("$ %s\n%s", p.name, tail(p.out.String()))
		}
	})
	return p
}

// tail keeps what a person can read of a long output.
func tail(s string) string {
	const most = 6000
	if len(s) > most {
		return "...\n" + s[len(s)-most:]
	}
	return s
}

// wait returns the exit status, 128 and the signal's number after a signal.
func (p *process) wait(t testing.TB) int {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		t.Fatalf("%s: has not ended after %v", p.name, patience)
	}
	var exit *exec.ExitError
	if errors.As(p.err, &exit) {
		if s := exit.Sys().(syscall.WaitStatus); s.Signaled() {
			return 128 + int(s.Signal())
		}
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) signal(t testing.TB, s os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatalf("%s: %v", p.name, err)
	}
}

// has waits until the process has written text.
func (p *process) has(t testing.TB, text string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s writes %q", p.name, text), func() bool {
		if strings.Contains(p.out.String(), text) {
			return true
		}
		select {
		case <-p.ended:
			if !strings.Contains(p.out.String(), text) {
				t.Fatalf("%s: ended without writing %q", p.name, text)
			}
		default:
		}
		return false
	})
}

// run returns what a command wrote and its exit status.
func (w where) run(t testing.TB, args ...string) (string, int) {
	t.Helper()
	p := w.start(t, nil, args...)
	code := p.wait(t)
	return p.out.String(), code
}

// must returns what a command that must succeed wrote.
func (w where) must(t testing.TB, args ...string) string {
	t.Helper()
	out, code := w.run(t, args...)
	if code != 0 {
		t.Fatalf("%s: status %d: %s", strings.Join(args, " "), code, tail(out))
	}
	return out
}

func (w where) sh(t testing.TB, script string) string {
	t.Helper()
	return w.must(t, "sh", "-ec", script)
}

// eventually waits for a condition that something else brings about.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	within(t, patience, what, is)
}

func within(t testing.TB, most time.Duration, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(most)
	for pause := time.Millisecond; !is(); pause = min(2*pause, 50*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", most, what)
		}
		time.Sleep(pause)
	}
}

// needs skips the test where programs are missing.
func needs(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed (.ci/setup lists the packages)", p)
		}
	}
}
