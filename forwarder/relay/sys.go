package relay

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System calls on non-blocking sockets, made raw. An ordinary one tells the scheduler that it may take long, and
// one that takes over 20 µs (a connect on loopback runs the listener's half too) has sysmon take the processor
// away and keeps sysmon awake, at a fifth of the time of short connections on two cores.
// None of these waits for anything.

func rawCall(trap, a1, a2, a3 uintptr) (int, error) { return rawCall6(trap, a1, a2, a3, 0, 0, 0) }

func rawCall6(trap, a1, a2, a3, a4, a5, a6 uintptr) (int, error) {
	for {
		r, _, e := unix.RawSyscall6(trap, a1, a2, a3, a4, a5, a6)
		switch e {
		case 0:
			return int(r), nil
		case unix.EINTR:
		default:
			return -1, e
		}
	}
}

func sysWritev(fd int, iov []unix.Iovec) (int, error) {
	return rawCall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
}

func sysRead(fd int, p []byte) (int, error) {
	return rawCall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
}

// sysAsk is an ioctl that writes an int. Its address becomes a number in the system call's own arguments: n lies on
// the stack, which a Go function on the way there might move.
func sysAsk(fd int, request uintptr) (int, error) {
	var n int32
	if _, _, e := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&n))); e != 0 {
		return 0, os.NewSyscallError("ioctl", e)
	}
	return int(n), nil
}

// sysQueued is how many octets a socket has to read.
func sysQueued(fd int) (int, error) { return sysAsk(fd, unix.SIOCINQ) }

// sysPeek reads one octet and leaves it there: 0 is the end of the stream.
func sysPeek(fd int) (int, error) {
	var b [1]byte
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b)), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return -1, e
		}
	}
}

// sysRecv and sysSend go past the file layer, and sysSend raises no SIGPIPE.
func sysRecv(fd int, p []byte) (int, error) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return -1, e
		}
	}
}

func sysSend(fd int, p []byte) (int, error) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return -1, e
		}
	}
}

// sysUnsent is how many octets a socket's peer has not acknowledged.
func sysUnsent(fd int) (int, error) { return sysAsk(fd, unix.SIOCOUTQ) }

// sysAccept returns a non-blocking close-on-exec socket, and writes up to *size octets of its peer's address.
func sysAccept(fd int, from *unix.RawSockaddrAny, size *uint32) (int, error) {
	n, _, e := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(from)), uintptr(unsafe.Pointer(size)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if e != 0 {
		return -1, e
	}
	return int(n), nil
}

func sysSetLinger(fd int, linger *unix.Linger) error {
	_, _, e := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(linger)), unsafe.Sizeof(*linger), 0)
	if e != 0 {
		return os.NewSyscallError("setsockopt", e)
	}
	return nil
}

func sysShutdown(fd int) error {
	_, err := rawCall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
	return err
}

// sysClose closes a non-blocking socket, whose linger time is 0 if it has one.
func sysClose(fd int) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// sysEpollWait waits for timeout milliseconds at most. A signal ends it too: the scheduler sends one when it wants
// the processor back.
func sysEpollWait(fd int, events []unix.EpollEvent, timeout int) (int, error) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), uintptr(timeout), 0, 0)
		switch {
		case e == 0:
			return int(n), nil
		case e != unix.EINTR:
			return 0, e
		case timeout != 0:
			return 0, nil
		}
	}
}

func sysEpollCtl(epfd, op, fd int, ev *unix.EpollEvent) error {
	_, _, e := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(epfd), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(ev)), 0, 0)
	if e != 0 {
		return os.NewSyscallError("epoll_ctl", e)
	}
	return nil
}

func sysSetsockopt(fd, level, opt int, value int32) error {
	_, _, e := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt), uintptr(unsafe.Pointer(&value)), unsafe.Sizeof(value), 0)
	if e != 0 {
		return os.NewSyscallError("setsockopt", e)
	}
	return nil
}

// sysGetsockopt reads up to size octets at value.
func sysGetsockopt(fd, level, opt int, value unsafe.Pointer, size uint32) error {
	_, _, e := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt), uintptr(value), uintptr(unsafe.Pointer(&size)), 0)
	if e != 0 {
		return os.NewSyscallError("getsockopt", e)
	}
	return nil
}
