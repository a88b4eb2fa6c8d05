package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestRun(t *testing.T) {
	needs(t, "curl", "dig", "script")
	serveDNS(t, outsideAddr4)
	url := lab.outside.serveHTTP(t, "198.51.100.9:80", files())
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	writeFile(t, plain, "no program\n")
	script := filepath.Join(dir, "script")
	writeFile(t, script, "#!/no/such/perl -w\n")
	if err := os.Chmod(script, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		args []string // after "run"
		code int
		want []string
	}{
		{"success", []string{"true"}, 0, nil},
		{"its status", []string{"--", "sh", "-c", "exit 7"}, 7, nil},
		{"its signal", []string{"--", "sh", "-c", "kill -KILL $$"}, 137, nil},
		{"not found", []string{"--", "no-such-program"}, 127, []string{"no-such-program"}},
		{"not executable", []string{"--", plain}, 126, []string{plain}},
		{"no interpreter", []string{"--", script}, 127, []string{script, "bad interpreter /no/such/perl"}},
		{"the network", []string{"--", "curl", "-sS", url + "/5"}, 0, []string{string(pattern[:5])}},
		{"by name", []string{"--", "curl", "-sS", "http://web.test/peer"}, 0, []string{hostAddr4}},
		{"resolv.conf", []string{"--", "cat", "/etc/resolv.conf"}, 0, []string{"nameserver " + resolver4}},
		{"hosts", []string{"--", "cat", "/etc/hosts"}, 0, []string{"localhost", "host.containers.internal", "host.docker.internal", alias4}},
		{"names of the host", []string{"--", "getent", "ahostsv4", "host.containers.internal"}, 0, []string{alias4}},
		{"root inside", []string{"--", "id", "-u"}, 0, []string{"0\n"}},
		{"interfaces", []string{"--", "ip", "addr"}, 0, []string{"lo: <LOOPBACK,UP", container4, container6}},
		{"flags", []string{"--mtu=1500", "--", "ip", "link", "show", "tap0"}, 0, []string{"mtu 1500"}},
		{"a flag of the command", []string{"sh", "-c", "exit 3"}, 3, nil},
		{"within itself", append([]string{"--"}, runLine("--", "curl", "-sS", url+"/5")...), 0, []string{string(pattern[:5])}},
	} {
		t.Run(test.name, func(t *testing.T) {
			out, code := lab.home.run(t, runLine(test.args...)...)
			if code != test.code {
				t.Errorf("status %d, want %d: %s", code, test.code, out)
			}
			for _, want := range test.want {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in %q", want, out)
				}
			}
		})
	}
	t.Run("the shell", func(t *testing.T) {
		p := lab.home.start(t, func(cmd *exec.Cmd) {
			cmd.Env = append(cmd.Env, "SHELL=/bin/sh")
			cmd.Stdin = strings.NewReader("echo shell $0\nexit 5\n")
		}, runLine()...)
		if code := p.wait(t); code != 5 || !strings.Contains(p.out.String(), "shell /bin/sh") {
			t.Errorf("status %d, %q", code, p.out)
		}
	})
	t.Run("a terminal", func(t *testing.T) {
		out := lab.home.must(t, "script", "-qec", strings.Join(runLine(), " ")+" -- sh -c 'tty; echo size $(stty size); test -t 0 -a -t 1 && echo terminal'", "/dev/null")
		if !strings.Contains(out, "terminal") || strings.Contains(out, "not a tty") {
			t.Errorf("got %q", out)
		}
	})
	t.Run("a shell with job control", func(t *testing.T) {
		out := lab.home.must(t, "script", "-qec", strings.Join(runLine(), " ")+" -- bash -ic 'echo interactive'", "/dev/null")
		if !strings.Contains(out, "interactive") || strings.Contains(out, "no job control") {
			t.Errorf("got %q", out)
		}
	})
	t.Run("etc untouched", func(t *testing.T) {
		if text, err := os.ReadFile("/etc/resolv.conf"); err != nil || !strings.Contains(string(text), outsideAddr4) {
			t.Errorf("the host's resolv.conf is %q, %v", text, err)
		}
	})
}

// Signals reach the command, and what it makes of them is what counts.
func TestRunSignals(t *testing.T) {
	for name, s := range map[string]syscall.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP, "USR1": syscall.SIGUSR1} {
		t.Run(name, func(t *testing.T) {
			p := lab.home.start(t, nil, runLine("--", "sh", "-c", "trap 'echo got "+name+"; exit 9' "+name+"; echo up; while :; do sleep 0.05; done")...)
			p.has(t, "up\n")
			p.signal(t, s)
			if code := p.wait(t); code != 9 || !strings.Contains(p.out.String(), "got "+name) {
				t.Errorf("status %d, %q; want 9 from its trap", code, p.out)
			}
		})
	}
	t.Run("KILL", func(t *testing.T) {
		p := lab.home.start(t, nil, runLine("--", "sh", "-c", "echo up; exec sleep 3456")...)
		p.has(t, "up\n")
		p.signal(t, syscall.SIGKILL)
		p.wait(t)
		eventually(t, "no process of usernet or of the command is left", func() bool {
			return len(processesOf(binary)) == 0 && lab.root.finds(t, "sleep 3456") == ""
		})
	})
}

// A hang-up of --exit-fd leaves nothing of what the command has started, wherever that has gone.
func TestRunExitFD(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	p := lab.home.start(t, func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{r} },
		runLine("--exit-fd", "3", "--", "sh", "-c", "setsid sleep 3457 3<&- & (setsid sleep 3457 &); echo up; wait")...)
	r.Close()
	p.has(t, "up\n")
	eventually(t, "what the command starts runs", func() bool { return strings.Count(lab.root.finds(t, "sleep 3457"), "sleep") == 2 })
	w.Close()
	if code := p.wait(t); code != 137 {
		t.Errorf("status %d, want 137", code)
	}
	eventually(t, "nothing is left", func() bool { return lab.root.finds(t, "sleep 3457") == "" })
}

// finds lists the processes with this text in their command line.
func (w where) finds(t testing.TB, text string) string {
	t.Helper()
	var found []string
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		b, _ := os.ReadFile(f)
		if line := strings.ReplaceAll(string(b), "\x00", " "); strings.HasPrefix(line, text) {
			found = append(found, f+": "+line)
		}
	}
	return strings.Join(found, "\n")
}
