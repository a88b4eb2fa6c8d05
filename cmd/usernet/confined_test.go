package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"

	"usernet/stack/dns"
)

// confinedRole is the process inside: it opens what usernet opens, confines itself, and tells what it can
// still do. Its stdin says when to go on.
func confinedRole() int {
	dir := os.Args[1]
	resolv, err := dns.OpenResolvConf(filepath.Join(dir, "etc", "resolv.conf"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	pid, err := writePIDFile(filepath.Join(dir, "run", "pid"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// Threads that are there before, one of them in a system call for ever.
	stuck, _, _ := os.Pipe()
	go func() { runtime.LockOSThread(); unix.Read(int(stuck.Fd()), make([]byte, 1)) }()
	go func() { runtime.LockOSThread(); select {} }()

	// A host without some system call, such as another's filter makes it.
	if missing := os.Getenv("USERNET_TEST_WITHOUT"); missing != "" {
		err := seccomp.LoadFilter(seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync, Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionAllow,
			Syscalls:      []seccomp.SyscallGroup{{Names: []string{missing}, Action: seccomp.ActionErrno}},
		}})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	// And a child, as run has one.
	p, err := os.StartProcess("/bin/sleep", []string{"sleep", "1000"}, &os.ProcAttr{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	c := confinement{readDirs: resolv.Dirs(), removeDirs: []*os.File{pid.dir}, caps: capsForwarding, child: p.Pid}
	confine(c, log)
	confineMore(c, log)

	out := json.NewEncoder(os.Stdout)
	tried := map[string]string{}
	try := func(what string, err error) {
		tried[what] = "allowed"
		var errno syscall.Errno
		if errors.As(err, &errno) {
			tried[what] = unix.ErrnoName(errno)
		} else if err != nil {
			tried[what] = err.Error()
		}
	}
	file := func(flags int, path string) error {
		f, err := os.OpenFile(path, flags, 0o644)
		f.Close()
		return err
	}
	try("read /etc/passwd", file(os.O_RDONLY, "/etc/passwd"))
	try("read /proc/self/environ", file(os.O_RDONLY, "/proc/self/environ"))
	try("write resolv.conf", file(os.O_WRONLY, filepath.Join(dir, "etc", "resolv.conf")))
	try("make a file", file(os.O_WRONLY|os.O_CREATE, filepath.Join(dir, "etc", "new")))
	fd, err := unix.Openat(int(resolv.Dirs()[0].Fd()), "new", unix.O_WRONLY|unix.O_CREAT, 0o644)
	unix.Close(fd)
	try("make a file by descriptor", err)
	try("execve", syscall.Exec("/bin/true", []string{"true"}, nil))
	_, err = os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{})
	try("fork", err)
	try("ptrace", syscall.PtraceAttach(os.Getppid()))
	try("unshare", unix.Unshare(unix.CLONE_NEWUSER))
	try("mount", unix.Mount("x", "/", "tmpfs", 0, ""))
	try("setns", unix.Setns(0, 0))
	try("kill another", unix.Kill(os.Getppid(), 0))
	try("kill our group", unix.Kill(0, 0))
	_, err = unix.IoctlGetInt(0, unix.TIOCGPGRP)
	try("ioctl TIOCGPGRP", err)
	try("kill the child's group", unix.Kill(-p.Pid, 0))
	try("kill the child", unix.Kill(p.Pid, unix.SIGKILL))
	var status unix.WaitStatus
	_, err = unix.Wait4(p.Pid, &status, 0, nil)
	try("wait for the child", err)
	for name, family := range map[string]int{"unix": unix.AF_UNIX, "packet": unix.AF_PACKET, "netlink": unix.AF_NETLINK, "inet": unix.AF_INET} {
		fd, err := unix.Socket(family, unix.SOCK_DGRAM, 0)
		unix.Close(fd)
		try("socket "+name, err)
	}
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_KOBJECT_UEVENT)
	unix.Close(fd)
	try("socket uevent", err)
	_, err = unix.IoctlGetTermios(0, unix.TCGETS)
	try("ioctl TCGETS", err)
	try("TCP over loopback", tcpOverLoopback())
	done := make(chan bool) // and on threads that are made only now
	for range 8 {
		go func() { runtime.LockOSThread(); done <- file(os.O_RDONLY, "/etc/passwd") != nil }()
	}
	for range 8 {
		if !<-done {
			try("read /etc/passwd on a new thread", nil)
		}
	}
	out.Encode(tried)

	// The parent changes resolv.conf now.
	bufio.NewReader(os.Stdin).ReadString('\n')
	for range 100 {
		if resolv.Servers()[0].Addr().String() == "192.0.2.2" {
			break
		}
		time.Sleep(checkResolv)
	}
	out.Encode(resolv.Servers())
	try("remove the PID file", pid.remove())
	out.Encode(tried["remove the PID file"])
	return 0
}

// checkResolv: a resolver's file is looked at no more often than every 100 ms.
const checkResolv = 50 * time.Millisecond

func tcpOverLoopback() error {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer ln.Close()
	served := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			_, err = io.WriteString(c, "x")
			c.Close()
		}
		served <- err
	}()
	c, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.ReadAll(c)
	return errors.Join(err, <-served)
}

func TestConfinedProcess(t *testing.T) {
	if cgoEnabled { // as with -race: not all threads could be confined, and usernet is built without
		goTool, err := exec.LookPath("go")
		if err != nil {
			t.Skip("no go command to build the test without cgo")
		}
		cmd := exec.Command(goTool, "test", "-count=1", "-run=^TestConfinedProcess$", ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	ordinary := &syscall.Credential{Uid: 4242, Gid: 4242}
	// What one part is made of may be missing: the rest must hold.
	for _, missing := range []string{"", "landlock_create_ruleset", "chroot", "capset"} {
		name := "whole"
		if missing != "" {
			name = "without " + missing
		}
		t.Run(name, func(t *testing.T) { testConfined(t, nil, missing) })
		if os.Geteuid() == 0 {
			t.Run(name+", as an ordinary user", func(t *testing.T) { testConfined(t, ordinary, missing) })
		}
	}
}

func testConfined(t *testing.T, user *syscall.Credential, missing string) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "etc", "resolv.conf")
	for _, d := range []string{dir, filepath.Dir(conf), filepath.Join(dir, "run")} {
		if err := errors.Join(os.MkdirAll(d, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
			t.Fatal(err)
		}
		if user != nil {
			if err := os.Chown(d, int(user.Uid), int(user.Gid)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.WriteFile(conf, []byte("nameserver 192.0.2.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", dir)
	if user != nil {
		// The build directory is root's alone.
		exe = copyBinary(t, exe, filepath.Join(dir, "usernet.test"))
		cmd = exec.Command(exe, dir)
	}
	cmd.Env = []string{roleVariable + "=confined", "USERNET_TEST_WITHOUT=" + missing}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: user}
	log, err := os.CreateTemp(t.TempDir(), "stderr") // a file: what was written before the answer is there when that is
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	stderr := func() string {
		text, err := os.ReadFile(log.Name())
		if err != nil {
			t.Error(err)
		}
		return string(text)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		err := cmd.Wait()
		if err != nil || t.Failed() {
			t.Errorf("%v\n%s", err, stderr())
		}
	}()
	in := json.NewDecoder(stdout)
	var tried map[string]string
	if err := in.Decode(&tried); err != nil {
		t.Fatal(err)
	}
	refused := func(part string) bool { return strings.Contains(stderr(), "part="+part+" error=") }
	landlock := !refused("landlock")
	for call, part := range map[string]string{"landlock_create_ruleset": "landlock", "chroot": "root", "capset": "capabilities"} {
		// A plain user does not even try to chroot.
		if tried := part != "root" || user == nil && hasCaps(unix.CAP_SYS_CHROOT); missing == call && tried && !refused(part) {
			t.Errorf("no word about %s:\n%s", part, stderr())
		}
	}
	want := map[string]string{
		"read /etc/passwd": "EACCES", "read /proc/self/environ": "EACCES", "write resolv.conf": "EPERM", "make a file": "EPERM",
		"make a file by descriptor": "EPERM", "execve": "EPERM", "fork": "EPERM", "ptrace": "EPERM", "unshare": "EPERM",
		"mount": "EPERM", "setns": "EPERM", "kill another": "EPERM", "kill our group": "allowed", "kill the child's group": "ESRCH",
		"kill the child": "allowed", "wait for the child": "allowed", "ioctl TIOCGPGRP": "ENOTTY",
		"socket unix": "EPERM", "socket packet": "EPERM", "socket uevent": "EPERM", "socket netlink": "allowed", "socket inet": "allowed",
		"ioctl TCGETS": "EPERM", "TCP over loopback": "allowed",
	}
	// Whatever hides files first; /proc/self is root's anyway, as we are not dumpable.
	switch chrooted := user == nil && hasCaps(unix.CAP_SYS_CHROOT) && !refused("root"); {
	case chrooted:
		want["read /etc/passwd"], want["read /proc/self/environ"] = "ENOENT", "ENOENT"
	case !landlock && user == nil && os.Geteuid() == 0:
		want["read /etc/passwd"], want["read /proc/self/environ"] = "allowed", "allowed"
	case !landlock:
		want["read /etc/passwd"] = "allowed"
	}
	if want["read /etc/passwd"] == "allowed" {
		want["read /etc/passwd on a new thread"] = "allowed"
	}
	for what, result := range want {
		if tried[what] != result {
			t.Errorf("%s: %s, want %s", what, tried[what], result)
		}
	}
	for what, result := range tried {
		if want[what] == "" {
			t.Errorf("%s: %s", what, result)
		}
	}

	keep := uint64(0)
	if user == nil {
		have, err := effectiveCaps()
		if err != nil {
			t.Fatal(err)
		}
		keep = have & capsForwarding
		if refused("capabilities") {
			keep = have
		}
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", cmd.Process.Pid))
	if err != nil || len(tasks) < 3 {
		t.Fatalf("%d threads, %v", len(tasks), err)
	}
	for _, path := range tasks {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // a thread that has ended
		}
		caps := fmt.Sprintf("%016x", keep)
		for field, value := range map[string]string{"Seccomp": "2", "NoNewPrivs": "1", "CapEff": caps, "CapPrm": caps, "CapInh": "0000000000000000", "CapAmb": "0000000000000000"} {
			if !strings.Contains(string(text), "\n"+field+":\t"+value+"\n") {
				t.Errorf("%s: %s is not %s:\n%s", path, field, value, text)
			}
		}
	}

	// Replaced as resolvers' daemons do it.
	if err := errors.Join(os.WriteFile(conf+".new", []byte("nameserver 192.0.2.2\n"), 0o644), os.Rename(conf+".new", conf)); err != nil {
		t.Fatal(err)
	}
	io.WriteString(stdin, "\n")
	var servers []string
	var removed string
	if err := errors.Join(in.Decode(&servers), in.Decode(&removed)); err != nil {
		t.Fatal(err)
	}
	if len(servers) != 1 || servers[0] != "192.0.2.2:53" {
		t.Errorf("after resolv.conf changed: %v", servers)
	}
	if _, err := os.Stat(filepath.Join(dir, "run", "pid")); removed != "allowed" || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("removing the PID file: %s; it is still there: %v", removed, err)
	}
}

func copyBinary(t *testing.T, from, to string) string {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return to
}
