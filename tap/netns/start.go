package netns

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Start starts our own binary as argv, which is how main knows what it is to be, in a user namespace and a network
// namespace; netNS may be negative for ours. It has all rights that the user namespace gives to us, our standard input, output and
// error, and every descriptor of ours without close-on-exec. The PID is that of a child of the calling thread, which
// waits for it.
func Start(userNS, netNS int, argv, env []string) (pid int, err error) {
	own, err := isOwnUserNS(userNS)
	if err != nil {
		return 0, err
	}
	exe, err := unix.Open("/proc/self/exe", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open our own binary: %w", err)
	}
	defer unix.Close(exe)
	var report [2]int
	if err := unix.Pipe2(report[:], unix.O_CLOEXEC); err != nil {
		return 0, fmt.Errorf("pipe: %w", err)
	}
	defer unix.Close(report[0])
	p := &plan{bare: true, userNS: noNS, netNS: noNS, exe: uintptr(exe), report: uintptr(report[1]), empty: new(byte)}
	if !own {
		p.userNS = uintptr(userNS)
	}
	if netNS >= 0 {
		p.netNS = uintptr(netNS)
	}
	fds := []int{report[1]}
	p.argv, err = syscall.SlicePtrFromStrings(argv)
	if err == nil {
		p.envv, err = syscall.SlicePtrFromStrings(env)
	}
	if err != nil {
		unix.Close(report[1])
		return 0, err
	}
	pid, err = p.start(report[0], &fds)
	closeFDs(fds)
	if err != nil {
		return 0, fmt.Errorf("start in another namespace: %w", err)
	}
	return pid, nil
}
