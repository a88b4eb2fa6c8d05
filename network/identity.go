package network

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A NetNS tells one network namespace from all others while it lives, and until the next boot: its inode is given again only
// when it is gone.
type NetNS struct {
	Dev   uint64 `json:"dev"`
	Inode uint64 `json:"inode"`
}

// NetNSOf is that of an open one.
func NetNSOf(f *os.File) (NetNS, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return NetNS{}, &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	return NetNS{st.Dev, st.Ino}, nil
}

// A Process tells one process from those that had its PID before and will have it later.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // in ticks since boot: field 22 of /proc/PID/stat
}

// ReadProcess looks at the process that has a PID now. One that has ended and waits for its parent is none
// any more: os.ErrProcessDone.
func ReadProcess(pid int) (Process, error) {
	if pid <= 0 {
		return Process{}, invalidf("PID %d: must be positive", pid)
	}
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return Process{}, fmt.Errorf("process %d: %w", pid, os.ErrProcessDone)
	}
	if err != nil {
		return Process{}, err
	}
	state, start, err := parseStat(stat)
	if err != nil {
		return Process{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	if state == "Z" || state == "X" {
		return Process{}, fmt.Errorf("process %d: %w", pid, os.ErrProcessDone)
	}
	return Process{pid, start}, nil
}

// parseStat reads fields 3 and 22. The second, the command's name in parentheses, has whatever the process likes in it:
// spaces, parentheses, line feeds. No field after it has a parenthesis (proc_pid_stat(5)).
func parseStat(stat []byte) (state string, start uint64, err error) {
	end := bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[end+1:]))
	if end < 0 || len(fields) < 20 {
		return "", 0, fmt.Errorf("%.60q: has too few fields", stat)
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return fields[0], start, err
}

// Open returns a pidfd of the process, which the caller closes; it is readable once the process has ended. os.ErrProcessDone: it
// is gone, and its PID nobody's or somebody else's.
func (p Process) Open() (*os.File, error) {
	if p.PID <= 0 {
		return nil, invalidf("PID %d: must be positive", p.PID)
	}
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // the latter two: the number is a thread's
		return nil, fmt.Errorf("process %d: %w", p.PID, os.ErrProcessDone)
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd of process %d: %w", p.PID, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	// Only now is the number held by what the pidfd has: looking first would leave a gap.
	now, err := ReadProcess(p.PID)
	if err == nil && now != p {
		err = fmt.Errorf("process %d: %w, and another one has its number", p.PID, os.ErrProcessDone)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// BootID tells this boot from others: what is recorded in one has no meaning in the next.
func BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}
