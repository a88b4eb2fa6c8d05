package main

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// ticks is USER_HZ, the unit of /proc/PID/stat: 100 on every architecture that Go knows.
const ticks = 100

// stat is what one line of /proc/PID/stat tells.
type stat struct {
	pid, parent int
	cpu         time.Duration // user and system, all threads, and the children that have been waited for
}

// parseStat reads /proc/PID/stat. The name, in parentheses, may hold anything.
func parseStat(text []byte) (stat, error) {
	open, end := bytes.IndexByte(text, '('), bytes.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return stat{}, fmt.Errorf("no name in %q", text)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text[:open])))
	f := strings.Fields(string(text[end+1:])) // from the third field on
	if err != nil || len(f) < 15 {
		return stat{}, fmt.Errorf("too few fields in %q", text)
	}
	s := stat{pid: pid}
	if s.parent, err = strconv.Atoi(f[1]); err != nil {
		return stat{}, err
	}
	for _, field := range f[11:15] { // utime stime cutime cstime
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return stat{}, err
		}
		s.cpu += time.Duration(n) * time.Second / ticks
	}
	return s, nil
}

// processes are all that /proc shows.
func processes() (map[int]stat, error) {
	names, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	all := make(map[int]stat, len(names))
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		if s, err := parseStat(text); err == nil {
			all[s.pid] = s
		}
	}
	if len(all) == 0 {
		return nil, errors.New("/proc shows no process: is it mounted?")
	}
	return all, nil
}

// below tells the processes of the tree under root, root included.
func below(all map[int]stat, root int) map[int]bool {
	tree := map[int]bool{}
	for pid := range all {
		for p, steps := pid, 0; p > 0 && steps < len(all); steps++ {
			if p == root || tree[p] {
				tree[pid] = true
				break
			}
			p = all[p].parent
		}
	}
	return tree
}

func childrenOf(pid int) ([]int, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	var children []int
	for _, s := range all {
		if s.parent == pid {
			children = append(children, s.pid)
		}
	}
	return children, nil
}

// An account is the processes whose CPU and memory are a peer's: trees, without the trees of some that they started.
// The account of a limit is empty.
type account struct{ roots, except []int }

func (a account) processes() (map[int]stat, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	ours := map[int]stat{}
	for _, root := range a.roots {
		if _, there := all[root]; !there {
			return nil, fmt.Errorf("the network process, %d, has ended", root)
		}
		for pid := range below(all, root) {
			ours[pid] = all[pid]
		}
	}
	for _, root := range a.except {
		for pid := range below(all, root) {
			delete(ours, pid)
		}
	}
	return ours, nil
}

// cpu is the time that they have used so far. A child that ends and is waited for stays counted.
func (a account) cpu() (sum time.Duration, err error) {
	if len(a.roots) == 0 {
		return 0, nil
	}
	ours, err := a.processes()
	for _, s := range ours {
		sum += s.cpu
	}
	return sum, err
}

// rss is their resident memory in octets. Pages that two of them share count twice.
func (a account) rss() (sum int64, err error) {
	ours, err := a.processes()
	if err != nil {
		return 0, err
	}
	for pid := range ours {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue // it has ended
		}
		n, err := parseRSS(text)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// pss is the same with each page that several processes share counted once, among all of them. The kernel tells it only to those
// who might trace the process: NaN where that is not we.
func (a account) pss() (float64, error) {
	ours, err := a.processes()
	if err != nil {
		return 0, err
	}
	var sum int64
	for pid := range ours {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if errors.Is(err, os.ErrPermission) {
			return math.NaN(), nil
		}
		if err != nil {
			continue // it has ended
		}
		n, err := parseKiB(text, "Pss:")
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return float64(sum), nil
}

// parseRSS reads VmRSS of /proc/PID/status, in octets. A zombie has none.
func parseRSS(text []byte) (int64, error) { return parseKiB(text, "VmRSS:") }

// parseKiB reads the line that begins with name, in octets.
func parseKiB(text []byte, name string) (int64, error) {
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			return n << 10, err
		}
	}
	return 0, nil
}

// foreignLoad watches what is not ours: the CPU of processes that are not below us, and what the
// hypervisor took. Kernel threads do not count, since they work for the loads too.
type foreignLoad struct {
	begin  time.Time
	others time.Duration
	stolen time.Duration
}

func watchForeign() (foreignLoad, error) {
	f := foreignLoad{begin: time.Now()}
	all, err := processes()
	if err != nil {
		return f, err
	}
	f.others = othersCPU(all, ourRoot(all))
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return f, err
	}
	f.stolen, err = parseStolen(text)
	return f, err
}

// ourRoot is the outer bench, which started us.
func ourRoot(all map[int]stat) int {
	if parent := all[os.Getpid()].parent; parent > 1 && os.Getenv(innerEnv) != "" {
		return parent
	}
	return os.Getpid()
}

const kthreadd = 2 // the parent of kernel threads

func othersCPU(all map[int]stat, ours int) time.Duration {
	own := below(all, ours)
	var sum time.Duration
	// A process above us counts the CPU of children that it has waited for, but we are not among those yet.
	for pid, s := range all {
		if !own[pid] && pid != kthreadd && s.parent != kthreadd {
			sum += s.cpu
		}
	}
	return sum
}

// parseStolen reads the steal time of all CPUs from /proc/stat.
func parseStolen(text []byte) (time.Duration, error) {
	line, _, _ := strings.Cut(string(text), "\n")
	f := strings.Fields(line)
	if len(f) < 9 || f[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q", line)
	}
	n, err := strconv.ParseInt(f[8], 10, 64)
	return time.Duration(n) * time.Second / ticks, err
}

// share is the part of the machine's CPU that others took since the watch began.
func (f foreignLoad) share() (float64, error) {
	now, err := watchForeign()
	if err != nil {
		return 0, err
	}
	used := now.others - f.others + now.stolen - f.stolen
	all := time.Since(f.begin) * time.Duration(runtime.NumCPU())
	return max(0, min(1, used.Seconds()/all.Seconds())), nil
}
