package netns

import (
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A helper may stay as long as usernet does, and have nothing to do for most of the time. It is our own binary, of
// which it needs little again: the pages of text that its start has touched are in the page cache, and cost a fault
// where they are needed once more.

// Spare are the mappings of files that hold what the file holds, and nothing else. The zero Spare has none.
type Spare struct{ smaps *os.File }

type mapping struct{ start, size uintptr }

// OpenSpare comes before a sandbox that closes /proc. Without /proc there is nothing to spare. Close follows.
func OpenSpare() Spare {
	f, _ := os.Open("/proc/self/smaps") // to read it takes the kernel a millisecond: not while somebody waits for our start
	return Spare{f}
}

// Close gives up the file.
func (s Spare) Close() error {
	if s.smaps == nil {
		return nil
	}
	return s.smaps.Close()
}

// Trim gives back what can be had again.
func (s Spare) Trim() {
	debug.FreeOSMemory()
	for _, m := range s.find() {
		// The same octets come back from the file. An error leaves them where they are.
		unix.RawSyscall(unix.SYS_MADVISE, m.start, m.size, unix.MADV_DONTNEED)
	}
}

// find lists the mappings as they are now.
func (s Spare) find() (spare []mapping) {
	if s.smaps == nil {
		return nil
	}
	if _, err := s.smaps.Seek(0, io.SeekStart); err != nil {
		return nil
	}
	smaps, err := io.ReadAll(s.smaps)
	if err != nil {
		return nil
	}
	var m mapping
	for line := range strings.Lines(string(smaps)) {
		// 00400000-00a3c000 r-xp 00000000 00:1f 4711 /usr/bin/usernet
		// ...
		// Anonymous:             0 kB
		f := strings.Fields(line)
		switch {
		case len(f) >= 5 && len(f[1]) == 4 && !strings.HasSuffix(f[0], ":"):
			m = mapping{}
			from, to, _ := strings.Cut(f[0], "-")
			start, err1 := strconv.ParseUint(from, 16, 64)
			end, err2 := strconv.ParseUint(to, 16, 64)
			if err1 == nil && err2 == nil && len(f) > 5 && strings.HasPrefix(f[5], "/") && !strings.Contains(f[1], "w") {
				m = mapping{uintptr(start), uintptr(end - start)}
			}
		case len(f) > 1 && f[0] == "Anonymous:" && f[1] == "0" && m.size > 0:
			// What was written before it became read-only, as a dynamic linker does, would not come back.
			spare = append(spare, m)
		}
	}
	return spare
}
