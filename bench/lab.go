package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	hostAddr    = "203.0.113.1"
	outsideAddr = "203.0.113.2"

	// homeUID runs peers and containers where bench has the machine's root. Nobody is told to have it.
	homeUID  = 61733
	homeName = "usernet-bench"

	containArg = "contain" // bench as what makes a container: not for people
	// portRange leaves short connections enough source ports for the samples of a minute, and the servers' ports alone.
	portRange = "24576 65535"
)

// A lab is the namespaces, and the agents in host and outside.
type lab struct {
	scratch string // ours, readable by the user of the peers
	usernet string // a copy there
	root    bool   // of the machine, so that home is another user
	cc      string // congestion control of host and outside
	ccWhy   string // why it is not cubic, or empty

	host, outside *agent
	outsideWork   chan func()
	outsideEnded  chan struct{}
	home          *exec.Cmd // without the machine's root: the process that holds home's user namespace
	rootlesskit   error     // why there is none
	rootlesskit3  string    // a copy of what setup has built, or empty
}

// newLab makes the lab in the namespaces that this process is in. usernet is the binary to copy; it may be missing.
func newLab(ctx context.Context, scratch, usernet string) (_ *lab, err error) {
	l := &lab{scratch: scratch, root: machineRoot(), outsideWork: make(chan func()), outsideEnded: make(chan struct{})}
	if err := l.startOutside(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if err := l.ownFiles(usernet); err != nil {
		return nil, err
	}
	if err := l.wire(); err != nil {
		return nil, err
	}
	if err := l.congestion(); err != nil {
		return nil, err
	}
	if err := l.startHome(); err != nil {
		return nil, err
	}
	self := func() *exec.Cmd { return exec.Command("/proc/self/exe", agentArg) }
	host := self()
	if l.host, err = startAgent(ctx, "host", host, func() error { return host.Start() }); err != nil {
		return nil, err
	}
	outside := self()
	l.outside, err = startAgent(ctx, "outside", outside, func() error { return l.atOutside(outside.Start) })
	return l, err
}

// startOutside starts the thread that is in outside. Processes that it starts are there.
func (l *lab) startOutside() error {
	entered := make(chan error)
	go func() {
		defer close(l.outsideEnded)
		runtime.LockOSThread() // and never unlocked, so that the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		entered <- err
		if err != nil {
			return
		}
		for f := range l.outsideWork {
			f()
		}
	}()
	if err := <-entered; err != nil {
		return fmt.Errorf("make a network namespace: %w", err)
	}
	return nil
}

func (l *lab) atOutside(f func() error) (err error) {
	done := make(chan struct{})
	l.outsideWork <- func() { defer close(done); err = f() }
	<-done
	return err
}

// ownFiles prepares what the peers find in the file system, in our own mount namespace.
func (l *lab) ownFiles(usernet string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// Home gets there wherever the binary was built.
	if err := copyFile(usernet, filepath.Join(l.scratch, "usernet"), 0o755); err == nil {
		l.usernet = filepath.Join(l.scratch, "usernet")
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if built := filepath.Join(l.scratch, "rootlesskit3"); copyFile(filepath.Join(filepath.Dir(usernet), "rootlesskit3"), built, 0o755) == nil {
		l.rootlesskit3 = built
	}
	if err := os.Mkdir(filepath.Join(l.scratch, "home"), 0o700); err != nil {
		return err
	}
	if !l.root {
		if err := unix.Access("/dev/net/tun", unix.R_OK|unix.W_OK); err != nil {
			return fmt.Errorf("/dev/net/tun: %w: every peer needs it; the machine's root makes it usable by `chmod 666 /dev/net/tun` (modprobe tun)", err)
		}
		return nil
	}
	if err := os.Chown(filepath.Join(l.scratch, "home"), homeUID, homeUID); err != nil {
		return err
	}
	if err := l.ownTun(); err != nil {
		return err
	}
	for _, f := range []struct{ name, line string }{
		{"/etc/passwd", fmt.Sprintf("%s:x:%d:%d::%s/home:/bin/sh", homeName, homeUID, homeUID, l.scratch)},
		{"/etc/group", fmt.Sprintf("%s:x:%d:", homeName, homeUID)},
		{"/etc/subuid", homeName + ":2000000:65536"},
		{"/etc/subgid", homeName + ":2000000:65536"},
	} {
		if err := addLine(l.scratch, f.name, f.line); err != nil {
			l.rootlesskit = err // only it wants a user with a name
		}
	}
	return nil
}

// ownTun gives the peers a /dev/net/tun that an ordinary user may open, and leaves the machine's as it is.
func (l *lab) ownTun() error {
	const dev = "/dev/net/tun"
	info, err := os.Stat(dev)
	if err == nil && info.Mode().Perm()&0o666 == 0o666 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: make it by `mkdir -p /dev/net; mknod -m 666 %s c 10 200` (modprobe tun)", err, dev)
	}
	// A file system of our own, because the scratch directory's may forbid devices.
	dir := filepath.Join(l.scratch, "dev")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID, "size=64k,mode=755"); err != nil {
		return fmt.Errorf("mount a tmpfs on %s: %w", dir, err)
	}
	tun := filepath.Join(dir, "tun")
	if err := unix.Mknod(tun, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		return fmt.Errorf("make %s: %w", tun, err)
	}
	if err := os.Chmod(tun, 0o666); err != nil {
		return err
	}
	return unix.Mount(tun, dev, "", unix.MS_BIND, "")
}

// addLine shows a longer copy of a file in its place.
func addLine(scratch, name, line string) error {
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	own := filepath.Join(scratch, filepath.Base(name))
	if len(text) > 0 && text[len(text)-1] != '\n' {
		text = append(text, '\n')
	}
	if err := os.WriteFile(own, append(text, (line+"\n")...), 0o644); err != nil {
		return err
	}
	return unix.Mount(own, name, "", unix.MS_BIND, "")
}

func copyFile(from, to string, mode os.FileMode) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Chmod(mode), dst.Close())
}

// wire joins host and outside.
func (l *lab) wire() error {
	var netns string
	l.atOutside(func() error {
		netns = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		return nil
	})
	here := func(f func() error) error { return f() }
	for _, step := range []struct {
		at   func(func() error) error
		text string
	}{
		{here, "link set lo up"},
		{here, "link add world type veth peer name host0 netns " + netns},
		{here, "addr add " + hostAddr + "/24 dev world"},
		{here, "addr add 2001:db8::1/64 dev world nodad"},
		{here, "link set world up"},
		{l.atOutside, "link set lo up"},
		{l.atOutside, "addr add " + outsideAddr + "/24 dev host0"},
		{l.atOutside, "addr add 2001:db8::2/64 dev host0 nodad"},
		{l.atOutside, "link set host0 up"},
		{here, "route add default via " + outsideAddr},
		{here, "route add default via 2001:db8::2"},
	} {
		cmd := exec.Command("ip", strings.Fields(step.text)...)
		var out tail
		cmd.Stdout, cmd.Stderr = &out, &out
		err := step.at(cmd.Start)
		if err == nil {
			err = cmd.Wait()
		}
		if err != nil {
			return fmt.Errorf("ip %s: %w: %s (Debian's iproute2 is needed)", step.text, err, out.String())
		}
	}
	for _, at := range []func(func() error) error{here, l.atOutside} {
		if err := at(func() error { _, err := setSysctl("ipv4/ip_local_port_range", portRange); return err }); err != nil {
			return err
		}
	}
	return nil
}

// congestion chooses cubic where it is allowed, and notes what it is.
func (l *lab) congestion() error {
	set := func() error {
		if _, err := setSysctl("ipv4/tcp_congestion_control", "cubic"); err != nil {
			l.ccWhy = "cubic is not in net.ipv4.tcp_allowed_congestion_control, which only the machine's root can change"
		}
		var err error
		l.cc, err = setSysctl("ipv4/tcp_congestion_control", "")
		return err
	}
	return errors.Join(set(), l.atOutside(set))
}

// startHome makes the user namespace of an ordinary user, where bench is root of one only.
func (l *lab) startHome() error {
	if l.root {
		return nil
	}
	if _, err := exec.LookPath("nsenter"); err != nil {
		return nil // the peers are run by the namespace's root then
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
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("make a user namespace in a user namespace: %w", err)
	}
	l.home = cmd
	_, err = out.Read(make([]byte, 16))
	return err
}

// homeCommand is a command in host, run by the ordinary user, with descriptors raised to the hard limit.
func (l *lab) homeCommand(args ...string) *exec.Cmd {
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if l.root {
		attr.Credential = &syscall.Credential{Uid: homeUID, Gid: homeUID, Groups: []uint32{}}
	} else if l.home != nil {
		args = slices.Concat([]string{"nsenter", fmt.Sprintf("--user=/proc/%d/ns/user", l.home.Process.Pid), "--preserve-credentials", "--"}, args)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = attr
	home := filepath.Join(l.scratch, "home")
	cmd.Dir = home
	cmd.Env = []string{"PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin", "HOME=" + home, "XDG_RUNTIME_DIR=" + home, "TMPDIR=" + home}
	return cmd
}

// newContainer starts an agent in a user and network namespace of home's.
func (l *lab) newContainer(ctx context.Context, name string) (*agent, error) {
	cmd := l.homeCommand(l.self(), containArg)
	return startAgent(ctx, name, cmd, cmd.Start)
}

// self is bench's own binary by a path that home can name: a process of another user may not read our /proc/self/exe.
func (l *lab) self() string {
	path := filepath.Join(l.scratch, "bench")
	if _, err := os.Stat(path); err != nil {
		if copyFile("/proc/self/exe", path, 0o755) != nil {
			return "/proc/self/exe"
		}
	}
	return path
}

// contain becomes, as an ordinary user, the parent of an agent in new user and network namespaces, where the agent is root.
func contain() error {
	cmd := exec.Command("/proc/self/exe", agentArg)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	runtime.LockOSThread() // the signal is sent when the thread that started it ends
	return cmd.Run()
}

// close ends the agents and every process that is still below us. The namespaces end with them.
func (l *lab) close() error {
	for _, a := range []*agent{l.host, l.outside} {
		if a != nil {
			a.close()
		}
	}
	if l.home != nil {
		l.home.Process.Kill()
		l.home.Wait() // its status is that of the kill
	}
	close(l.outsideWork)
	<-l.outsideEnded
	return endOrphans()
}

// endOrphans kills and reaps what has been left to us: daemons of peers that did not end.
func endOrphans() error {
	for {
		children, err := childrenOf(os.Getpid())
		if err != nil || len(children) == 0 {
			return err
		}
		for _, pid := range children {
			unix.Kill(pid, unix.SIGKILL)
			var status unix.WaitStatus
			if _, err := unix.Wait4(pid, &status, 0, nil); err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("wait for process %d: %w", pid, err)
			}
		}
	}
}
