package netns_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"usernet/tap/netns"
	"usernet/tap/taptest"
)

// ops are what the tests do inside.
var ops = netns.Ops{
	"where":  netns.Handle(where),
	"socket": netns.Handle(socket),
	"fail": netns.Handle(func(_ context.Context, text string) (struct{}, []*os.File, error) {
		return struct{}{}, nil, fmt.Errorf("%s: %w", text, unix.EBUSY)
	}),
	"hang": netns.Handle(func(ctx context.Context, _ struct{}) (struct{}, []*os.File, error) {
		<-ctx.Done()
		return struct{}{}, nil, ctx.Err()
	}),
	"die": netns.Handle(func(context.Context, struct{}) (struct{}, []*os.File, error) {
		os.Exit(7)
		panic("unreachable")
	}),
	"at end": netns.Handle(func(ctx context.Context, c struct{ Name, Text string }) (bool, []*os.File, error) {
		if c.Text == "" {
			return netns.AtEnd(ctx, c.Name, nil), nil, nil
		}
		return netns.AtEnd(ctx, c.Name, func() { os.WriteFile(c.Name, []byte(c.Text), 0o666) }), nil, nil
	}),
	"sent": netns.Handle(func(ctx context.Context, _ struct{}) (files []string, _ []*os.File, err error) {
		for _, fd := range netns.Sent(ctx) {
			what, e := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
			files, err = append(files, what), errors.Join(err, e)
		}
		return files, nil, err
	}),
	"large": netns.Handle(func(_ context.Context, size int) (string, []*os.File, error) {
		return strings.Repeat("x", size), nil, nil
	}),
}

func TestMain(m *testing.M) {
	if pid := os.Getenv(victimEnv); pid != "" {
		os.Exit(victim(pid))
	}
	taptest.MainHere(m, ops)
}

type place struct {
	PID   int
	Net   string
	User  string
	Links []string
	Caps  string // CapEff of /proc
	NoNew string
	Files []string
}

func where(context.Context, struct{}) (place, []*os.File, error) {
	p := place{PID: os.Getpid()}
	p.Net, _ = os.Readlink("/proc/thread-self/ns/net")
	p.User, _ = os.Readlink("/proc/thread-self/ns/user")
	links, err := net.Interfaces()
	for _, l := range links {
		p.Links = append(p.Links, l.Name)
	}
	status, _ := os.ReadFile("/proc/thread-self/status")
	for line := range strings.Lines(string(status)) {
		if s, ok := strings.CutPrefix(line, "CapEff:"); ok {
			p.Caps = strings.TrimSpace(s)
		}
		if s, ok := strings.CutPrefix(line, "NoNewPrivs:"); ok {
			p.NoNew = strings.TrimSpace(s)
		}
	}
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		what, _ := os.Readlink("/proc/self/fd/" + fd.Name())
		p.Files = append(p.Files, fd.Name()+" "+what)
	}
	return p, nil, err
}

// socket makes a socket inside and passes it out with its namespace's inode.
func socket(context.Context, struct{}) (struct{}, []*os.File, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return struct{}{}, nil, err
	}
	return struct{}{}, []*os.File{os.NewFile(uintptr(fd), "socket")}, nil
}

func link(t *testing.T, path string) string {
	t.Helper()
	target, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return target
}

func TestCallIsInside(t *testing.T) {
	for _, owner := range taptest.Owners {
		for _, way := range []string{"found", "helper"} {
			t.Run(owner.String()+"/"+way, func(t *testing.T) {
				ns := taptest.NewNS(t, owner)
				n := ns.Open(t)
				if way == "helper" {
					n.UseHelper()
				}
				before := link(t, "/proc/self/ns/net")
				for range 3 { // the same helper each time
					var p place
					if _, err := n.Call(t.Context(), ops, "where", struct{}{}, &p); err != nil {
						t.Fatal(err)
					}
					if want := link(t, ns.Path()); p.Net != want || p.Net == before {
						t.Fatalf("it ran in %s, want %s (ours is %s)", p.Net, want, before)
					}
					if len(p.Links) != 1 || p.Links[0] != "lo" {
						t.Errorf("interfaces there: %v, want lo", p.Links)
					}
					switch pid := n.HelperPID(); {
					case n.Direct() && (pid != 0 || p.PID != os.Getpid()):
						t.Errorf("direct, yet done by %d (helper %d)", p.PID, pid)
					case !n.Direct() && (pid == 0 || p.PID != pid):
						t.Errorf("done by %d, want the helper %d", p.PID, pid)
					}
					if way == "helper" {
						checkHelper(t, p)
					}
				}
				if now := link(t, "/proc/self/ns/net"); now != before {
					t.Errorf("our own thread is in %s now, was in %s", now, before)
				}
			})
		}
	}
}

// checkHelper: a helper has three capabilities, can gain none, and holds nothing of ours but stderr.
func checkHelper(t *testing.T, p place) {
	t.Helper()
	if p.Caps != "0000000000003400" || p.NoNew != "1" {
		t.Errorf("capabilities %s, no_new_privs %s; want NET_ADMIN, NET_RAW, NET_BIND_SERVICE and 1", p.Caps, p.NoNew)
	}
	for _, f := range p.Files {
		fd, what, _ := strings.Cut(f, " ")
		ok := fd == "2" || what == "/dev/null" && (fd == "0" || fd == "1") || fd == "3" && strings.HasPrefix(what, "socket:") ||
			strings.HasPrefix(what, "anon_inode:[event") || strings.HasPrefix(what, "/proc/") || what == "" ||
			strings.HasPrefix(what, "socket:") || // the conn's own copy of 3
			strings.Contains(what, "/cgroup/") // the Go runtime reads the CPU limit there
		if !ok {
			t.Errorf("the helper holds descriptor %s", f)
		}
	}
}

func TestPlainUserNeedsHelper(t *testing.T) {
	if !taptest.AsUser(t) {
		return
	}
	for _, owner := range taptest.Owners {
		n := taptest.NewNS(t, owner).Open(t)
		if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
			t.Errorf("%s: %v", owner, err)
		}
		if n.Direct() {
			t.Errorf("%s: entered directly", owner)
		}
	}
}

func TestInheritedPipeDoesNotReachHelper(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
	n.UseHelper()
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETFD, 0); err != nil { // as a --ready-fd comes to us
		t.Fatal(err)
	}
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if rest, err := io.ReadAll(r); err != nil || len(rest) != 0 { // hangs if the helper has it
		t.Errorf("read %q, %v", rest, err)
	}
}

func TestFilesComeOut(t *testing.T) {
	for _, helper := range []bool{false, true} {
		ns := taptest.NewNS(t, taptest.OwnerRoot)
		n := ns.Open(t)
		if helper {
			n.UseHelper()
		}
		files, err := n.Call(t.Context(), ops, "socket", struct{}{}, nil)
		if err != nil || len(files) != 1 {
			t.Fatalf("helper %v: %d files, %v", helper, len(files), err)
		}
		defer files[0].Close()
		flags, err := unix.FcntlInt(files[0].Fd(), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("helper %v: descriptor flags %#x, %v; want close-on-exec", helper, flags, err)
		}
		// lo is down there: nothing is reachable, whatever our own namespace has.
		sa := &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}
		if err := unix.Connect(int(files[0].Fd()), sa); !errors.Is(err, unix.ENETUNREACH) {
			t.Errorf("helper %v: connect inside: %v, want ENETUNREACH", helper, err)
		}
	}
}

func TestErrorsKeepErrno(t *testing.T) {
	for _, helper := range []bool{false, true} {
		n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
		if helper {
			n.UseHelper()
		}
		_, err := n.Call(t.Context(), ops, "fail", "attach", nil)
		if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "attach: ") {
			t.Errorf("helper %v: %v", helper, err)
		}
		if _, err := n.Call(t.Context(), ops, "nothing", nil, nil); err == nil {
			t.Errorf("helper %v: an unknown operation was done", helper)
		}
		if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
			t.Errorf("helper %v: after an error: %v", helper, err)
		}
	}
}

func TestHelperComesBack(t *testing.T) {
	n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
	n.UseHelper()
	if _, err := n.Call(t.Context(), ops, "die", struct{}{}, nil); err == nil {
		t.Error("a call whose helper died succeeded")
	}
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
		t.Error("the next call:", err)
	}
}

func TestCallEndsWithContext(t *testing.T) {
	n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
	n.UseHelper()
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := n.Call(ctx, ops, "hang", struct{}{}, nil)
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
		t.Error("the next call:", err)
	}
}

func TestAnswerTooLong(t *testing.T) {
	n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
	n.UseHelper()
	var s string
	if _, err := n.Call(t.Context(), ops, "large", 60_000, &s); err != nil || len(s) != 60_000 {
		t.Errorf("%d octets, %v", len(s), err)
	}
	if _, err := n.Call(t.Context(), ops, "large", 70_000, &s); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("70 000 octets: %v, want EMSGSIZE", err)
	}
}

func TestCloseReapsHelper(t *testing.T) {
	n, err := netns.OpenPID(taptest.NewNS(t, taptest.OwnerSelf).PID)
	if err != nil {
		t.Fatal(err)
	}
	n.UseHelper()
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	pid := n.HelperPID()
	for range 2 {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the helper's PID after Close: %v, want none", err)
	}
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); !errors.Is(err, os.ErrClosed) {
		t.Errorf("call after Close: %v", err)
	}
}

func TestRestEndsHelperUntilNextCall(t *testing.T) {
	n, err := netns.OpenPID(taptest.NewNS(t, taptest.OwnerSelf).PID)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if err := n.Rest(); err != nil {
		t.Errorf("rest without a helper: %v", err)
	}
	n.UseHelper()
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	pid := n.HelperPID()
	if err := n.Rest(); err != nil {
		t.Error(err)
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the helper's PID after Rest: %v, want none", err)
	}
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
		t.Errorf("call after Rest: %v", err)
	}
}

func TestAnswers(t *testing.T) {
	n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
	n.UseHelper()
	n.Answers(func(fd int) { t.Errorf("descriptor %d before there is a helper", fd) })
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	fd := []unix.PollFd{{Fd: -1, Events: unix.POLLIN}}
	n.Answers(func(its int) { fd[0].Fd = int32(its) })
	if events, err := unix.Poll(fd, 0); events != 0 || err != nil {
		t.Errorf("poll between two calls: %d, %v", events, err)
	}
	// The end of the helper is an event too.
	if err := unix.Kill(n.HelperPID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	events, err := unix.Poll(fd, 10_000)
	for err == unix.EINTR {
		events, err = unix.Poll(fd, 10_000)
	}
	if events != 1 || err != nil {
		t.Errorf("poll after the helper's end: %d, %v", events, err)
	}
	if err := n.Rest(); err != nil {
		t.Log(err) // it was killed
	}
	n.Answers(func(fd int) { t.Errorf("descriptor %d after the helper's end", fd) })
}

// What an operation leaves for the end is done whatever ends the helper.
func TestAtEnd(t *testing.T) {
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	dir := t.TempDir()
	type later struct{ Name, Text string }
	end := func(n *netns.NS, name, text string) (will bool) {
		t.Helper()
		if _, err := n.Call(t.Context(), ops, "at end", later{filepath.Join(dir, name), text}, &will); err != nil {
			t.Fatal(err)
		}
		return will
	}
	for name, finish := range map[string]func(*netns.NS) error{
		"closed": (*netns.NS).Close,
		"rests":  (*netns.NS).Rest,
		"hangs": func(n *netns.NS) error {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(0, cancel)
			if _, err := n.Call(ctx, ops, "hang", struct{}{}, nil); !errors.Is(err, context.Canceled) {
				return err
			}
			return nil
		},
	} {
		n, err := netns.Open(netns.Config{PID: ns.PID, Helper: true})
		if err != nil {
			t.Fatal(err)
		}
		if !end(n, name, "first") || !end(n, name, "last") || !end(n, name+" not", "taken back") || !end(n, name+" not", "") {
			t.Error("a helper has no end")
		}
		if _, err := os.Stat(filepath.Join(dir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: before the end: %v", name, err)
		}
		if err := finish(n); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if text, err := os.ReadFile(filepath.Join(dir, name)); string(text) != "last" {
			t.Errorf("%s: at the end %q was done, %v; want the last", name, text, err)
		}
		if _, err := os.Stat(filepath.Join(dir, name+" not")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: what was taken back: %v", name, err)
		}
	}
}

// On a thread of ours there is no end but our own.
func TestAtEndOfThread(t *testing.T) {
	n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
	var will bool
	if _, err := n.Call(t.Context(), ops, "at end", struct{ Name, Text string }{"/nonexistent/x", "text"}, &will); err != nil {
		t.Fatal(err)
	}
	if will == n.Direct() {
		t.Errorf("an end is promised: %t; the call was made on a thread of ours: %t", will, n.Direct())
	}
}

// With Config.Helper there is one also where a thread might enter: as root, and where the namespace is owned by
// the user namespace that we are in.
func TestAlwaysHelper(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		cmd.Wait()
	}()
	for _, pid := range []int{cmd.Process.Pid, taptest.NewNS(t, taptest.OwnerSelf).PID} {
		n, err := netns.Open(netns.Config{PID: pid, Helper: true})
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		var p place
		if _, err := n.Call(t.Context(), ops, "where", struct{}{}, &p); err != nil {
			t.Fatal(err)
		}
		if p.PID == os.Getpid() || n.Direct() || n.HelperPID() != p.PID {
			t.Errorf("the call was made in process %d, not in a helper", p.PID)
		}
		if want := link(t, fmt.Sprintf("/proc/%d/ns/net", pid)); p.Net != want {
			t.Errorf("it was made in %s, want %s", p.Net, want)
		}
		if p.Caps != "0000000000003400" || p.NoNew != "1" {
			t.Errorf("the helper has capabilities %s, no_new_privs %s", p.Caps, p.NoNew)
		}
	}
}

// What a helper gives back when it rests comes back when it is needed.
func TestTrim(t *testing.T) {
	if n := netns.Trim(); n == 0 {
		t.Error("there is nothing to give back")
	}
	if !strings.Contains(link(t, "/proc/self/exe"), "netns") {
		t.Error(link(t, "/proc/self/exe"))
	}
}

func TestCallFDs(t *testing.T) {
	n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
	for _, helper := range []bool{false, true} {
		if helper {
			n.UseHelper()
		}
		fds, err := n.CallFDs(t.Context(), ops, "socket", struct{}{}, nil)
		if err != nil || len(fds) == 0 {
			t.Fatalf("helper %t: %d descriptors, %v", helper, len(fds), err)
		}
		for _, fd := range fds {
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("helper %t: flags %#x, %v; want close-on-exec", helper, flags, err)
			}
			unix.Close(fd)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink("loop", loop); err != nil {
		t.Fatal(err)
	}
	ended := exec.Command("true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	gone := ended.Process.Pid
	for _, c := range []struct {
		cfg  netns.Config
		want string
		err  error
	}{
		{netns.Config{}, "by a PID or by a path", nil},
		{netns.Config{PID: 1, Path: "/x"}, "by a PID or by a path", nil},
		{netns.Config{PID: -1}, "a PID is positive", nil},
		{netns.Config{PID: gone}, "no such process", unix.ESRCH},
		{netns.Config{Path: fmt.Sprintf("/proc/%d/ns/net", gone)}, "no such process", unix.ESRCH},
		{netns.Config{Path: filepath.Join(dir, "absent")}, "no such file", unix.ENOENT},
		{netns.Config{Path: filepath.Join(dir, "absent", "x")}, "no such file", unix.ENOENT},
		{netns.Config{Path: file}, "an ordinary file", nil},
		{netns.Config{Path: fifo}, "an ordinary file", nil},
		{netns.Config{Path: loop}, "symbolic links", unix.ELOOP},
		{netns.Config{Path: "/"}, "a directory", nil},
		{netns.Config{Path: "/proc/self/ns/user"}, "another kind (user)", nil},
		{netns.Config{PID: os.Getpid(), UserPath: "/proc/self/ns/net"}, "not a user namespace", nil},
	} {
		n, err := netns.Open(c.cfg)
		if err == nil {
			n.Close()
			t.Errorf("%+v was opened", c.cfg)
			continue
		}
		if !strings.Contains(err.Error(), c.want) || c.err != nil && !errors.Is(err, c.err) {
			t.Errorf("%+v: %v; want %q and %v", c.cfg, err, c.want, c.err)
		}
	}
}

func TestOpenForeignProcess(t *testing.T) {
	if !taptest.AsUser(t) {
		return
	}
	_, err := netns.OpenPID(1)
	if !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "belongs to uid 0") {
		t.Errorf("process 1: %v; want EACCES and who owns it", err)
	}
}

func TestOwnNamespaceWithoutRights(t *testing.T) {
	if !taptest.AsUser(t) {
		return
	}
	n, err := netns.OpenPID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	_, err = n.Call(t.Context(), ops, "where", struct{}{}, nil)
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
		t.Errorf("enter the host's own: %v; want the capability that lacks", err)
	}
}

func TestUserPath(t *testing.T) {
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	n, err := netns.Open(netns.Config{PID: ns.PID, UserPath: fmt.Sprintf("/proc/%d/ns/user", ns.PID)})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.UseHelper()
	var p place
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, &p); err != nil || p.Net != link(t, ns.Path()) {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestWrongUserPath(t *testing.T) {
	ns, other := taptest.NewNS(t, taptest.OwnerRoot), taptest.NewNS(t, taptest.OwnerRoot)
	n, err := netns.Open(netns.Config{PID: ns.PID, UserPath: fmt.Sprintf("/proc/%d/ns/user", other.PID)})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.UseHelper()
	_, err = n.Call(t.Context(), ops, "where", struct{}{}, nil)
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "--userns-path") {
		t.Errorf("by a user namespace that does not own it: %v", err)
	}
}

func TestLock(t *testing.T) {
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	a, b := ns.Open(t), ns.Open(t)
	a.UseHelper()
	if err := a.Lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil { // no fd of the lock lives on in the helper
		t.Fatal(err)
	}
	if err := b.Lock(t.Context()); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), fmt.Sprintf("busy: another usernet serves it: end that one (process %d)", os.Getpid())) {
		t.Errorf("a second lock: %v, want EBUSY", err)
	}
	if err := a.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := b.Lock(t.Context()); err != nil {
		t.Error("after Unlock:", err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := a.Lock(t.Context()); err != nil {
		t.Error("after Close of the other:", err)
	}
}

// victimEnv makes the test binary a usernet that starts a helper in the process's namespace, says its PID, and is
// killed.
const victimEnv = "USERNET_TEST_VICTIM"

func victim(pid string) int {
	n, err := netns.OpenPath("/proc/" + pid + "/ns/net")
	if err == nil {
		n.UseHelper()
		_, err = n.Call(context.Background(), ops, "where", struct{}{}, nil)
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(n.HelperPID())
	_, err = n.Call(context.Background(), ops, "hang", struct{}{}, nil) // killed in the midst of a call
	fmt.Println("survived:", err)
	return 1
}

func TestKillLeavesNoHelper(t *testing.T) {
	for _, owner := range taptest.Owners {
		ns := taptest.NewNS(t, owner)
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), victimEnv+"="+strconv.Itoa(ns.PID))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		pid, convErr := strconv.Atoi(strings.TrimSpace(line))
		if convErr != nil {
			cmd.Wait()
			t.Fatalf("%s: %q, %v", owner, line, err)
		}
		helper, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		cmd.Wait()
		for { // until it has ended, however long that takes
			_, err := unix.Ppoll([]unix.PollFd{{Fd: int32(helper), Events: unix.POLLIN}}, nil, nil)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		unix.Close(helper)
	}
}

// A signal to the whole group, as a terminal or a service manager sends it, ends usernet in good order, for
// which it still needs its helper.
func TestHelperIgnoresSignalsOfTheGroup(t *testing.T) {
	n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
	n.UseHelper()
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	pid := n.HelperPID()
	if group, err := unix.Getpgid(pid); err != nil || group != pid {
		t.Errorf("the helper is in process group %d, %v; want one of its own", group, err)
	}
	for _, s := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP} {
		if err := unix.Kill(pid, s); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil || n.HelperPID() != pid {
		t.Errorf("after signals: %v, helper %d, was %d", err, n.HelperPID(), pid)
	}
}

// Helpers are started while the runtime is busy with everything that a fork must not disturb.
func TestManyHelpersUnderLoad(t *testing.T) {
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	stop := make(chan struct{})
	var load, work sync.WaitGroup
	for range 2 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = bytes.Repeat([]byte("garbage"), 10_000)
				}
			}
		})
	}
	for range 4 {
		work.Go(func() {
			for range 5 {
				n, err := netns.OpenPID(ns.PID)
				if err != nil {
					t.Error(err)
					return
				}
				n.UseHelper()
				if _, err := n.Call(t.Context(), ops, "where", struct{}{}, nil); err != nil {
					t.Error(err)
				}
				if err := n.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	work.Wait()
	close(stop)
	load.Wait()
}

// What made slirp4netns fail: bubblewrap's --dev puts the process into a user namespace inside the one that
// owns its network.
func TestBubblewrap(t *testing.T) {
	if _, err := exec.LookPath("bwrap"); err != nil {
		t.Skip("no bwrap (bubblewrap) here")
	}
	info, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer info.Close()
	cmd := exec.Command("bwrap", "--unshare-user", "--unshare-net", "--ro-bind", "/", "/", "--dev", "/dev",
		"--die-with-parent", "--info-fd", "3", "--", "cat")
	cmd.ExtraFiles = []*os.File{w}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		cmd.Wait()
	}()
	var child struct {
		PID int `json:"child-pid"`
	}
	// cat answers when all of bwrap's namespaces are made.
	_, err = stdin.Write([]byte("x"))
	if _, readErr := stdout.Read(make([]byte, 1)); err != nil || readErr != nil {
		t.Skipf("bwrap may not make its namespaces here: %v, %v", err, readErr)
	}
	if err := json.NewDecoder(info).Decode(&child); err != nil {
		t.Fatal(err)
	}
	n, err := netns.OpenPID(child.PID)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	var p place
	if _, err := n.Call(t.Context(), ops, "where", struct{}{}, &p); err != nil {
		t.Fatal(err)
	}
	if want := link(t, fmt.Sprintf("/proc/%d/ns/net", child.PID)); p.Net != want {
		t.Errorf("it ran in %s, want %s", p.Net, want)
	}
	if os.Geteuid() != 0 && p.User == link(t, fmt.Sprintf("/proc/%d/ns/user", child.PID)) {
		t.Errorf("the helper is in the process's own user namespace %s, not in the owner", p.User)
	}
}

// The same number is another process there.
func TestProcOfAnotherPIDNamespace(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", "mount -t proc proc "+dir+" && echo mounted && exec cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
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
		cmd.Wait()
		unix.Unmount(dir, unix.MNT_DETACH)
	}()
	if line, _ := bufio.NewReader(stdout).ReadString('\n'); line != "mounted\n" {
		t.Skip("a user namespace may not mount /proc here: the machine's own is covered in parts")
	}
	if n, err := netns.OpenPath(dir + "/1/ns/net"); err == nil || !strings.Contains(err.Error(), "another PID namespace") {
		t.Errorf("opened %v, %v", n, err)
	}
}

// A descriptor that goes along is the same file inside, and is closed there after the call.
func TestCallWith(t *testing.T) {
	for _, helper := range []bool{false, true} {
		n := taptest.NewNS(t, taptest.OwnerRoot).Open(t)
		if helper {
			n.UseHelper()
		}
		other := taptest.NewNS(t, taptest.OwnerRoot)
		o := other.Open(t)
		var before, after place
		if _, err := n.Call(t.Context(), ops, "where", struct{}{}, &before); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			var got []string
			if _, err := n.CallWith(t.Context(), ops, "sent", struct{}{}, &got, o.FD(), int(os.Stdin.Fd())); err != nil {
				t.Fatal(err)
			}
			if len(got) != 2 || got[0] != link(t, other.Path()) || got[1] != link(t, "/proc/self/fd/0") {
				t.Errorf("helper %v: inside they are %q", helper, got)
			}
		}
		if _, err := n.CallWith(t.Context(), ops, "fail", "oops", nil, o.FD()); !errors.Is(err, unix.EBUSY) {
			t.Error(err)
		}
		if _, err := n.Call(t.Context(), ops, "where", struct{}{}, &after); err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(after.Files) != fmt.Sprint(before.Files) {
			t.Errorf("helper %v: it had open\n%q and has\n%q", helper, before.Files, after.Files)
		}
		var got []string
		if _, err := n.Call(t.Context(), ops, "sent", struct{}{}, &got); err != nil || len(got) != 0 {
			t.Errorf("a call without: %q, %v", got, err)
		}
		if _, err := n.CallWith(t.Context(), ops, "sent", struct{}{}, nil, make([]int, 300)...); n.Direct() == errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("direct %v, more than a message takes: %v", n.Direct(), err)
		}
	}
}
