package runtimes

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	kit1 = "/usr/bin/rootlesskit"      // Debian 12's, 1.1
	kit3 = "/opt/lab/bin/rootlesskit3" // the third version: .ci/rootlesskit3
)

// A kit is a rootlesskit that runs, with the container that it made: a shell which waits for the end of its input.
type kit struct {
	*daemon
	state  string // its state directory
	parent string // the number of its outer process in the lab
	child  string // the number of the container's first process in the lab
	prefix []string
	inside *place    // the container's network namespace
	nets   []process // the processes of usernet that it started
}

// A daemon is a program of the lab's user that runs in the background until its standard input ends, or it is killed.
type daemon struct {
	cmd   *exec.Cmd
	stdin io.Closer
	log   *output
	ended chan struct{}
	err   error // of Wait, once ended is closed
}

// An output collects what a program writes, and can be read meanwhile.
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

// startDaemon starts a program as the lab's user. What it writes is shown when the test fails.
func startDaemon(t *testing.T, lab *labType, args ...string) *daemon {
	t.Helper()
	d := &daemon{cmd: lab.script(append([]string{"user"}, args...)...), log: &output{}, ended: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.cmd.WaitDelay = time.Second // what it left in the background may hold the pipe
	d.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	var err error
	if d.stdin, err = d.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.ended)
	}()
	t.Cleanup(func() {
		d.stdin.Close()
		select {
		case <-d.ended:
		default:
			unix.Kill(-d.cmd.Process.Pid, unix.SIGKILL) // it is not waited for yet, so the number is its own
			<-d.ended
		}
		if t.Failed() {
			t.Logf("$ %s\n%s", strings.Join(args, " "), d.log)
		}
	})
	return d
}

// says waits until the program has written a line.
func (d *daemon) says(t *testing.T, line string) {
	t.Helper()
	eventually(t, func() error {
		if slices.Contains(strings.Split(d.log.String(), "\n"), line) {
			return nil
		}
		select {
		case <-d.ended:
			t.Fatalf("it has ended without %q: %v", line, d.err)
		default:
		}
		return fmt.Errorf("it has not written %q", line)
	})
}

// wait gives the error of a program's end.
func (d *daemon) wait(t *testing.T) error {
	t.Helper()
	select {
	case <-d.ended:
	case <-time.After(patience):
		t.Fatalf("%s runs on", d.cmd)
	}
	return d.err
}

// A process is named by its number in the lab and when it began, as numbers come back.
type process struct{ pid, began string }

// usernets are the processes of the lab that run the binary under test.
func (l *labType) usernets() []process {
	var all []process
	links, _ := filepath.Glob(l.path("/proc/[0-9]*/exe"))
	for _, link := range links {
		exe, err := os.Readlink(link)
		if err != nil || filepath.Base(strings.TrimSuffix(exe, " (deleted)")) != "usernet" {
			continue
		}
		if p, err := l.process(filepath.Base(filepath.Dir(link))); err == nil {
			all = append(all, p)
		}
	}
	return all
}

// process says when the process with that number began.
func (l *labType) process(pid string) (process, error) {
	stat, err := os.ReadFile(l.path("/proc/" + pid + "/stat"))
	if err != nil {
		return process{}, err
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	return process{pid, strings.Fields(after)[19]}, nil // proc(5): 22, starttime
}

// gone waits until none of the processes is left.
func (l *labType) gone(t *testing.T, all []process) {
	t.Helper()
	eventually(t, func() error {
		for _, p := range all {
			if now, err := l.process(p.pid); err == nil && now == p {
				cmdline, _ := os.ReadFile(l.path("/proc/" + p.pid + "/cmdline"))
				return fmt.Errorf("process %s is left: %s", p.pid, strings.ReplaceAll(string(cmdline), "\x00", " "))
			}
		}
		return nil
	})
}

// statusOf reads a line of /proc/PID/status.
func (l *labType) statusOf(t *testing.T, pid, key string) string {
	t.Helper()
	file, err := os.Open(l.path("/proc/" + pid + "/status"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if k, v, _ := strings.Cut(lines.Text(), ":"); k == key {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("no %s in the status of process %s", key, pid)
	return ""
}

// buildKit3 puts rootlesskit's third version into the lab.
func buildKit3(t *testing.T, lab *labType) {
	t.Helper()
	if _, err := os.Stat(lab.path(kit3)); err == nil {
		return
	}
	if out, err := exec.Command("../../.ci/rootlesskit3").CombinedOutput(); err != nil {
		t.Skipf("rootlesskit's third version cannot be built: .ci/rootlesskit3: %v\n%s", err, out)
	}
	program, err := os.ReadFile("../../bin/rootlesskit3")
	if err == nil {
		err = os.WriteFile(lab.path(kit3), program, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// kitLine is the command line of a rootlesskit that uses the binary under test by that name, up to the container's command.
func kitLine(t *testing.T, lab *labType, program, binary string, flags ...string) (state string, line []string) {
	t.Helper()
	if program == kit3 {
		buildKit3(t, lab)
	}
	state = lab.user(t, "mktemp", "-d", home+"/kit-XXXXXX")
	t.Cleanup(func() { lab.root(t, "rm", "-rf", state) })
	line = []string{program, "--state-dir=" + state, "--net=slirp4netns", "--slirp4netns-binary=" + bin + "/" + binary, "--copy-up=/etc", "--copy-up=/run"}
	return state, append(line, flags...)
}

// startKit makes a container by rootlesskit, with the binary under test as slirp4netns, and expects that at the end of the test
// everything of it ends well by itself when the container does.
func startKit(t *testing.T, lab *labType, program string, flags ...string) *kit {
	t.Helper()
	k := beginKit(t, lab, program, "slirp4netns", flags...)
	t.Cleanup(func() {
		k.stdin.Close()
		if err := k.wait(t); err != nil {
			t.Errorf("rootlesskit's end: %v", err)
		}
		lab.gone(t, k.nets)
	})
	return k
}

// beginKit is startKit with usernet under the name binary, and without an expectation for the end.
func beginKit(t *testing.T, lab *labType, program, binary string, flags ...string) *kit {
	t.Helper()
	before := lab.usernets()
	state, line := kitLine(t, lab, program, binary, flags...)
	k := &kit{state: state}
	k.daemon = startDaemon(t, lab, append(line, "sh", "-c", "echo ready; exec cat")...)
	k.says(t, "ready")
	child, err := os.ReadFile(lab.path(state + "/child_pid"))
	if err != nil {
		t.Fatal(err)
	}
	k.child = strings.TrimSpace(string(child))
	k.parent = lab.statusOf(t, k.child, "PPid")
	for _, p := range lab.usernets() {
		if !slices.Contains(before, p) {
			k.nets = append(k.nets, p)
		}
	}
	if len(k.nets) == 0 {
		t.Fatal("no usernet runs")
	}

	k.prefix = []string{"nsenter", "--target", k.child, "--user", "--preserve-credentials", "--mount", "--net"}
	net := "/proc/" + k.child + "/ns/net"
	if slices.Contains(flags, "--detach-netns") {
		// The container's processes stay in the host's network, and enter the other one when they like.
		net = "/proc/" + k.child + "/root" + state + "/netns"
		k.prefix[len(k.prefix)-1] = "--net=" + net
	}
	if k.inside, err = newPlace("container", lab.path(net)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.inside.close)
	return k
}

// try runs a command as root of the container.
func (k *kit) try(lab *labType, args ...string) (string, error) {
	return lab.try("user", append(append(slices.Clone(k.prefix), "--"), args...)...)
}

// must runs a command as root of the container, which must succeed.
func (k *kit) must(t *testing.T, lab *labType, args ...string) string {
	t.Helper()
	out, err := k.try(lab, args...)
	if err != nil {
		t.Fatalf("in the container: %v\n%s", err, out)
	}
	return out
}

// ctl asks rootlesskit's own API.
func (k *kit) ctl(lab *labType, args ...string) (string, error) {
	return lab.try("user", append([]string{"rootlessctl", "--socket", k.state + "/api.sock"}, args...)...)
}

// mustCtl is ctl that must succeed.
func (k *kit) mustCtl(t *testing.T, lab *labType, args ...string) string {
	t.Helper()
	out, err := k.ctl(lab, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A device is what ip says of an interface.
type device struct {
	MTU      int
	Address  string
	LinkInfo struct {
		Data struct {
			Type       string
			VnetHdr    bool `json:"vnet_hdr"`
			MultiQueue bool `json:"multi_queue"`
			Persist    bool
		} `json:"info_data"`
	}
}

// tap is the container's interface.
func (k *kit) tap(t *testing.T, lab *labType, name string) device {
	t.Helper()
	var all []device
	text := k.must(t, lab, "ip", "-json", "-details", "link", "show", name)
	if err := json.Unmarshal([]byte(text), &all); err != nil || len(all) != 1 {
		t.Fatalf("%v: %s", err, text)
	}
	return all[0]
}

// askUDP sends a datagram from the place and gives the answer.
func (p *place) askUDP(address, text string) (string, error) {
	c, err := p.dial("udp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte(text)); err != nil {
		return "", err
	}
	b := make([]byte, 64<<10)
	n, err := c.Read(b)
	return string(b[:n]), err
}

// refused tells whether a connection from the place meets nobody.
func (p *place) refused(address string) error {
	c, err := p.dial("tcp", address)
	if err == nil {
		c.Close()
		return fmt.Errorf("%s is connected to %s", p.name, address)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return err
	}
	return nil
}
