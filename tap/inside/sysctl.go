package inside

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// sysctls are switched on while routing is ours. tcp_fwmark_accept gives the mark of a SYN to the server's end of the
// connection; fwmark_reflect gives that of any segment to an answer that belongs to no socket, which is
// how a port where nobody listens is refused.
var sysctls = [...]string{"ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"}

const sysctl6 = 2 // of sysctls; a kernel without IPv6 has it not

// switches are sysctls as bits, in their order.
type switches uint8

const allSwitches = switches(1<<len(sysctls) - 1)

// openSysctls opens what is not open yet. They stay open as long as there is something to undo: a sandbox may
// allow no other.
func (s *site) openSysctls() error {
	for i, name := range sysctls {
		if s.sysctls[i] != nil {
			continue
		}
		f, err := openSysctl(name)
		if err != nil && (i != sysctl6 || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
		s.sysctls[i] = f
	}
	return nil
}

func openSysctl(name string) (*os.File, error) {
	path := "/proc/sys/net/" + name
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
		if f, readErr := os.Open(path); readErr == nil { // it may be 1 already
			return f, nil
		}
		return nil, fmt.Errorf("the sysctl net/%s (is /proc/sys read-only here?): %w", name, err)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the kernel has no sysctl net/%s (or /proc is not mounted): %w", name, err)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// off are those that are 0.
func (s *site) off() (off switches, err error) {
	for i, f := range s.sysctls {
		if f == nil {
			continue
		}
		var raw [16]byte
		n, err := f.ReadAt(raw[:], 0)
		if n == 0 {
			return 0, fmt.Errorf("read the sysctl net/%s: %w", sysctls[i], err)
		}
		if raw[0] == '0' {
			off |= 1 << i
		}
	}
	return off, nil
}

// write gives some of them a value.
func (s *site) write(which switches, value string) error {
	for i, f := range s.sysctls {
		if f == nil || which&(1<<i) == 0 {
			continue
		}
		if _, err := f.WriteAt([]byte(value), 0); err != nil {
			return fmt.Errorf("set the sysctl net/%s in the namespace: %w", sysctls[i], err)
		}
	}
	return nil
}

func (s *site) closeSysctls() {
	for i, f := range s.sysctls {
		if f != nil {
			f.Close()
		}
		s.sysctls[i] = nil
	}
}
