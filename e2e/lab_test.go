package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	hostAddr4    = "203.0.113.1"
	hostAddr6    = "2001:db8::1"
	outsideAddr4 = "203.0.113.2"
	outsideAddr6 = "2001:db8::2"
	moreAddr4    = "198.51.100.7" // outside too
	moreAddr6    = "2001:db8:1::7"
	farAddr4     = "198.18.5.2" // behind outside, a hop further
	deadAddr4    = "192.0.2.1"  // silence
	deadAddr6    = "2001:db8:dead::1"
	badAddr4     = "192.0.2.129" // host unreachable
	badAddr6     = "2001:db8:bad::1"
)

// The lab that all tests share. A test that changes it puts it back.
var lab labType

type labType struct {
	host, outside, far *place
	home               where // an ordinary user of the host
	root               where // who may change the host
	homeCmd            *exec.Cmd
}

// A place is a network namespace with a thread in it that stays there.
type place struct {
	name string
	pid  string // path below /proc of the thread's namespace
	work chan func()
	done chan struct{}
}

// newPlace starts the thread of a place. enter is called on it first, and moves it.
func newPlace(name string, enter func() error) (*place, error) {
	p := &place{name: name, work: make(chan func()), done: make(chan struct{})}
	entered := make(chan error)
	go func() {
		defer close(p.done)
		runtime.LockOSThread() // and never unlocked, so that the thread ends with the goroutine
		err := enter()
		p.pid = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		entered <- err
		if err != nil {
			return
		}
		for f := range p.work {
			f()
		}
	}()
	return p, <-entered
}

// do runs f on the place's thread: sockets that it makes and processes that it starts are there.
func (p *place) do(f func()) {
	ended := make(chan struct{})
	p.work <- func() { defer close(ended); f() }
	<-ended
}

func (p *place) close() {
	close(p.work)
	<-p.done
}

func newLab() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := ownEtc(); err != nil {
		return err
	}
	stay := func() error { return nil }
	leave := func() error { return unix.Unshare(unix.CLONE_NEWNET) }
	var errs [3]error
	lab.host, errs[0] = newPlace("host", stay)
	lab.outside, errs[1] = newPlace("outside", leave)
	lab.far, errs[2] = newPlace("far", leave)
	if err := errors.Join(errs[:]...); err != nil {
		return err
	}
	lab.root = where{place: lab.host}
	for _, p := range []*place{lab.host, lab.outside, lab.far} {
		// Addresses that work at once: nobody else can have them.
		if err := sysctl(p, "ipv6/conf/default/dad_transmits", "0"); err != nil {
			return err
		}
	}
	for _, step := range []struct {
		at   *place
		text string
	}{
		{lab.host, "ip link set lo up"},
		{lab.host, "ip link add world type veth peer name host0 netns " + lab.outside.pid},
		{lab.host, "ip addr add 203.0.113.1/24 dev world"},
		{lab.host, "ip addr add 2001:db8::1/64 dev world nodad"},
		{lab.host, "ip link set world up"},
		{lab.outside, "ip link set lo up"},
		{lab.outside, "ip addr add 203.0.113.2/24 dev host0"},
		{lab.outside, "ip addr add 2001:db8::2/64 dev host0 nodad"},
		{lab.outside, "ip link set host0 up"},
		{lab.host, "ip route add default via 203.0.113.2"},
		{lab.host, "ip route add default via 2001:db8::2"},
		{lab.outside, "ip route add local 198.51.100.0/24 dev lo"},
		{lab.outside, "ip -6 route add local 2001:db8:1::/64 dev lo"},
		{lab.outside, "ip route add blackhole 192.0.2.0/25"},
		{lab.outside, "ip -6 route add blackhole 2001:db8:dead::/64"},
		{lab.outside, "ip route add unreachable 192.0.2.128/25"},
		{lab.outside, "ip -6 route add unreachable 2001:db8:bad::/64"},
		{lab.outside, "ip link add far0 type veth peer name near0 netns " + lab.far.pid},
		{lab.outside, "ip addr add 198.18.5.1/24 dev far0"},
		{lab.outside, "ip link set far0 up"},
		{lab.far, "ip link set lo up"},
		{lab.far, "ip addr add 198.18.5.2/24 dev near0"},
		{lab.far, "ip link set near0 up"},
		{lab.far, "ip route add default via 198.18.5.1"},
	} {
		if out, err := at(step.at, strings.Fields(step.text)...); err != nil {
			return fmt.Errorf("%s: %s: %w: %s (Debian's iproute2 is needed)", step.at.name, step.text, err, out)
		}
	}
	for _, s := range []struct {
		at          *place
		name, value string
	}{
		{lab.host, "ipv4/ping_group_range", "0 0"},
		{lab.outside, "ipv4/ip_forward", "1"},
		{lab.outside, "ipv6/conf/all/forwarding", "1"},
		{lab.outside, "ipv6/ip_nonlocal_bind", "1"}, // a local route is not enough to bind to it
		// Every packet that is refused is told so, not some of them a second.
		{lab.outside, "ipv4/icmp_ratelimit", "0"},
		{lab.outside, "ipv6/icmp/ratelimit", "0"},
		{lab.host, "ipv4/icmp_ratelimit", "0"},
	} {
		if err := sysctl(s.at, s.name, s.value); err != nil {
			return err
		}
	}
	return newHome()
}

// ownEtc puts a copy of /etc in its place, which tests may change: resolv.conf, by writing and by renaming.
func ownEtc() error {
	dir := filepath.Join(scratch, "etc")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	// What we may not read (shadow, private keys) no test needs.
	out, err := exec.Command("cp", "-r", "--preserve=mode", "--no-dereference", "/etc/.", dir).CombinedOutput()
	if err != nil && strings.Contains(string(out), "No space") {
		return fmt.Errorf("copy /etc: %s", out)
	}
	for name, text := range map[string]string{
		"resolv.conf": "nameserver " + outsideAddr4 + "\n",
		"hosts":       "127.0.0.1 localhost\n::1 localhost\n",
	} {
		name = filepath.Join(dir, name)
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return unix.Mount(dir, "/etc", "", unix.MS_BIND, "")
}

// newHome makes the ordinary user that runs usernet. The machine's root is one already.
func newHome() error {
	if realRoot {
		lab.home = lab.root
		return nil
	}
	cmd := exec.Command("sh", "-c", "echo ready; exec cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 1000, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 1000, HostID: 0, Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	if _, err := cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	lab.host.do(func() { err = cmd.Start() })
	if err != nil {
		return err
	}
	if _, err := out.Read(make([]byte, 16)); err != nil {
		return err
	}
	lab.homeCmd = cmd
	lab.home = where{place: lab.host, prefix: []string{"nsenter", fmt.Sprintf("--user=/proc/%d/ns/user", cmd.Process.Pid), "--preserve-credentials", "--"}}
	return nil
}

// close ends the threads and the user's namespace.
func (l *labType) close() error {
	if l.homeCmd != nil {
		l.homeCmd.Process.Kill()
		l.homeCmd.Wait() // its status is that of the kill
	}
	for _, p := range []*place{l.host, l.outside, l.far} {
		p.close()
	}
	return unix.Unmount("/etc", unix.MNT_DETACH) // the files below belong to who removes them
}

// at runs a command of the lab's own making in a place.
func at(p *place, args ...string) (string, error) {
	cmd := exec.Command(args[0], args[1:]...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	var err error
	p.do(func() { err = cmd.Start() })
	if err == nil {
		err = cmd.Wait()
	}
	return strings.TrimSpace(out.String()), err
}

// sysctl writes below /proc/sys/net of a place.
func sysctl(p *place, name, value string) (err error) {
	p.do(func() { err = os.WriteFile("/proc/sys/net/"+name, []byte(value), 0) })
	return err
}
