package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A tapSet is all TAPs that the daemon reads. It has one processor, on which whoever lingers for the next event of his own
// keeps the others off; so he lingers beside the set, which is readable when a TAP has a frame, be it another network's or one
// that a cable carries. Without it a round trip out by a cable took a millisecond and a half.
type tapSet struct {
	fd   int
	file *os.File
}

// newTAPSet opens one; close it when nobody lingers any more.
func newTAPSet() (*tapSet, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	return &tapSet{fd: fd, file: os.NewFile(uintptr(fd), "taps")}, nil
}

// add has them in the set for as long as they are open.
func (t *tapSet) add(fds ...int) error {
	for _, fd := range fds {
		if err := unix.EpollCtl(t.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
			return fmt.Errorf("watch TAP %d: %w", fd, err)
		}
	}
	return nil
}

func (t *tapSet) close() error { return t.file.Close() }
