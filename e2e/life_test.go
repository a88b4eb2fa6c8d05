package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// prompt is three times what usernet promises for its end, because the machine may be busy with other tests.
const prompt = 3 * time.Second

// endsWell waits for an end with status 0 that something else brought about.
func endsWell(t testing.TB, u *usernet) {
	t.Helper()
	start := time.Now()
	select {
	case <-u.ended:
	case <-time.After(prompt):
		u.signal(t, syscall.SIGQUIT) // where it is stuck
		u.wait(t)
		t.Fatalf("usernet has not ended after %v:\n%s", prompt, u.out)
	}
	if code := u.wait(t); code != 0 {
		t.Errorf("status %d, want 0", code)
	}
	t.Logf("ended after %v", time.Since(start))
}

func TestEnds(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(t *testing.T, c *container, u *usernet)
	}{
		{"SIGTERM", func(t *testing.T, c *container, u *usernet) { u.signal(t, syscall.SIGTERM) }},
		{"SIGINT", func(t *testing.T, c *container, u *usernet) { u.signal(t, syscall.SIGINT) }},
		{"SIGHUP", func(t *testing.T, c *container, u *usernet) { u.signal(t, syscall.SIGHUP) }},
		{"the container ends", func(t *testing.T, c *container, u *usernet) { syscall.Kill(c.pid, syscall.SIGKILL) }},
	} {
		for _, form := range []string{"%d", "/proc/%d/ns/net"} {
			t.Run(test.name+" "+form, func(t *testing.T) {
				c := newContainer(t)
				u := begin(t, fmt.Sprintf(form, c.pid))
				// With a connection and a dial open: neither may hold the end up.
				c.net.connect(t, "tcp", echoServers(t)[0].String())
				test.end(t, c, u)
				endsWell(t, u)
				if hasInterface(t, c, "tap0") {
					t.Error("the TAP is still there after a clean end")
				}
				if left := processesOf(binary); len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
			})
		}
	}
}

// A TAP that is deleted is the end, and the only thing that is said to be wrong.
func TestTAPDeleted(t *testing.T) {
	needs(t, "ip")
	c := newContainer(t)
	u := begin(t, strconv.Itoa(c.pid))
	c.must(t, "ip", "link", "del", "tap0")
	if code := u.wait(t); code != 1 {
		t.Errorf("status %d, want 1", code)
	}
	_, said, _ := strings.Cut(u.out.String(), "usernet: ")
	if strings.Count(said, "\n") != 1 || !strings.Contains(said, "the TAP was deleted") {
		t.Errorf("it says %q, want that the TAP was deleted and nothing else", said)
	}
}

// --exit-fd ends usernet when its other end is closed, and not before.
func TestExitFD(t *testing.T) {
	c := newContainer(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	ready, readyW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	u := &usernet{lab.home.start(t, func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{readyW, r} },
		binary, "--ready-fd", "3", "--exit-fd=4", strconv.Itoa(c.pid))}
	readyW.Close()
	r.Close()
	// The whole of it is "1" and then the end of the file.
	ready.SetReadDeadline(time.Now().Add(patience))
	text := make([]byte, 8)
	n, _ := ready.Read(text)
	m, err := ready.Read(text[n:])
	if string(text[:n+m]) != "1" || err == nil {
		t.Errorf("the ready fd got %q, %v; want \"1\" and its end", text[:n+m], err)
	}
	works(t, c.net, echoServers(t))
	w.Close()
	endsWell(t, u)
}

func TestPIDFile(t *testing.T) {
	c := newContainer(t)
	file := filepath.Join(t.TempDir(), "pid")
	u := attach(t, c, "--pid-file", file)
	text, err := os.ReadFile(file)
	if want := strconv.Itoa(u.cmd.Process.Pid); err != nil || strings.TrimSpace(string(text)) != want {
		t.Errorf("the file has %q, %v; want %s", text, err, want)
	}
	u.end(t)
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("the file after the end: %v", err)
	}
}

func TestLogFormat(t *testing.T) {
	c := newContainer(t)
	u := attach(t, c, "--log-format", "json")
	c.net.connect(t, "tcp", echoServers(t)[0].String())
	u.end(t)
	lines := strings.Split(strings.TrimSpace(u.out.String()), "\n")
	for _, line := range lines {
		var record struct{ Time, Level, Msg string }
		if err := json.Unmarshal([]byte(line), &record); err != nil || record.Time == "" || record.Level == "" || record.Msg == "" {
			t.Errorf("%q is no record of JSON: %v", line, err)
		}
	}
}

// Once it works, usernet gives up every right that it does not need.
func TestSandbox(t *testing.T) {
	if raceDetector {
		return // it needs cgo, with which there is none
	}
	c := newContainer(t)
	u := attach(t, c)
	const none = "0000000000000000"
	kept := none
	if realRoot {
		kept = "0000000000000400" // CAP_NET_BIND_SERVICE
		eventually(t, "the bounding set is empty", func() bool { return u.status(t, "CapBnd") == none })
	}
	for key, want := range map[string]string{"NoNewPrivs": "1", "Seccomp": "2", "CapEff": kept, "CapPrm": kept, "CapInh": none, "CapAmb": none} {
		if got := u.status(t, key); got != want {
			t.Errorf("%s is %s, want %s", key, got, want)
		}
	}
	if strings.Contains(u.out.String(), "level=WARN") {
		t.Error("it starts with a warning")
	}
	works(t, c.net, echoServers(t))

	free := attach(t, newContainer(t), "--no-sandbox")
	for key, want := range map[string]string{"NoNewPrivs": "0", "Seccomp": "0"} {
		if got := free.status(t, key); got != want {
			t.Errorf("with --no-sandbox %s is %s, want %s", key, got, want)
		}
	}
}

// What it did is in the log at its end: flows, octets, dials and what became of them, questions, drops by reason.
func TestCounters(t *testing.T) {
	needs(t, "dig")
	serveDNS(t, outsideAddr4)
	c := newContainer(t)
	u := attach(t, c)
	works(t, c.net, echoServers(t))
	c.net.dial("tcp", outsideAddr4+":9") // refused
	if got := ask(t, c.net, lab.outside.serveUDP(t, outsideAddr4+":0", same), "x"); got != "x" {
		t.Errorf("got %q", got)
	}
	sendError(t, c.net, gateway4+":9") // the host's loopback is shut
	c.must(t, "dig", "+short", "@"+resolver4, "a.test")
	u.end(t)
	for _, want := range []string{"Accepted=2", "Rejected=1", "TCP.OctetsOut=2", "UDP.Sent=1", "UDP.Drops.refused=1", "package=dns"} {
		if !strings.Contains(u.out.String(), want) {
			t.Errorf("no %q in the log", want)
		}
	}
}

func TestVersionAndHelp(t *testing.T) {
	for _, args := range [][]string{{"version"}, {"--version"}, {"help"}, {"--help"}, {"run", "--help"}} {
		if out, code := lab.home.run(t, append([]string{binary}, args...)...); code != 0 || !strings.Contains(out, "usernet") {
			t.Errorf("usernet %v: status %d, %q", args, code, out)
		}
	}
}
