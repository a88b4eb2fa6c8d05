package network

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"testing"

	"golang.org/x/sys/unix"
)

func TestProcess(t *testing.T) {
	self, err := ReadProcess(os.Getpid())
	want(t, err, nil)
	if self.PID != os.Getpid() || self.Start == 0 {
		t.Error(self)
	}
	f, err := self.Open()
	want(t, err, nil)
	want(t, f.Close(), nil)
	other := self
	other.Start++
	_, err = other.Open()
	want(t, err, os.ErrProcessDone, fmt.Sprint(os.Getpid()), "another")
	for _, pid := range []int{0, -1} {
		_, err := ReadProcess(pid)
		want(t, err, ErrInvalid, "positive")
		_, err = Process{pid, 1}.Open()
		want(t, err, ErrInvalid, "positive")
	}
	for _, pid := range []int{1 << 22, 1<<31 - 1} { // PID_MAX_LIMIT: nobody has it
		_, err := ReadProcess(pid)
		want(t, err, os.ErrProcessDone)
		_, err = Process{pid, 1}.Open()
		want(t, err, os.ErrProcessDone)
	}
}

// A process that has ended is gone, also while its parent has not asked for its status.
func TestProcessEnded(t *testing.T) {
	cmd := exec.Command("/bin/cat")
	in, err := cmd.StdinPipe()
	want(t, err, nil)
	want(t, cmd.Start(), nil)
	defer cmd.Wait()
	p, err := ReadProcess(cmd.Process.Pid)
	want(t, err, nil)
	pidfd, err := p.Open()
	want(t, err, nil)
	defer pidfd.Close()
	want(t, in.Close(), nil)
	var n int
	conn, err := pidfd.SyscallConn()
	want(t, err, nil)
	want(t, conn.Control(func(fd uintptr) {
		for n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); errors.Is(err, unix.EINTR); {
			n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		}
	}), nil)
	want(t, err, nil)
	if n != 1 {
		t.Error(n)
	}
	_, err = ReadProcess(p.PID)
	want(t, err, os.ErrProcessDone)
	_, err = p.Open()
	want(t, err, os.ErrProcessDone)
}

func TestParseStat(t *testing.T) {
	fields := " 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2 3"
	for name, stat := range map[string]string{
		"plain": "42 (cat) S", "empty": "42 () S", "spaces": "42 (a b c) S", "parentheses": "42 (a) Z 1 (b) S", "lines": "42 (\n) R\n) S",
	} {
		state, start, err := parseStat([]byte(stat + fields))
		if state != "S" || start != 987654 || err != nil {
			t.Errorf("%s: %q %d %v", name, state, start, err)
		}
	}
	for _, bad := range []string{"", "42", "42 cat S" + fields, "42 (cat) S 1 2 3", "42 (cat)", "42 (cat) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 x 1"} {
		if _, _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("42 (cat) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2 3"))
	f.Add([]byte(")"))
	f.Fuzz(func(t *testing.T, stat []byte) {
		if state, _, err := parseStat(stat); err == nil && state == "" {
			t.Error("no state and no error")
		}
	})
}

func TestNetNSOf(t *testing.T) {
	var ids [2]NetNS
	for i := range ids {
		f, err := os.Open("/proc/self/ns/net")
		want(t, err, nil)
		ids[i], err = NetNSOf(f)
		want(t, err, nil)
		want(t, f.Close(), nil)
	}
	f, err := os.Open("/proc/self/ns/pid")
	want(t, err, nil)
	defer f.Close()
	other, err := NetNSOf(f)
	want(t, err, nil)
	if ids[0] != ids[1] || ids[0] == (NetNS{}) || other == ids[0] {
		t.Error(ids, other)
	}
	closed, err := os.Open("/proc/self/ns/net")
	want(t, err, nil)
	want(t, closed.Close(), nil)
	if id, err := NetNSOf(closed); err == nil {
		t.Error(id)
	}
}

func TestBootID(t *testing.T) {
	a, err := BootID()
	want(t, err, nil)
	b, err := BootID()
	want(t, err, nil)
	if a != b || !regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`).MatchString(a) {
		t.Error(a, b)
	}
}
