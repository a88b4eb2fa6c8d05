package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// How a Go program gets a process of its own into another user namespace. setns(CLONE_NEWUSER) is
// refused to whoever has threads, which is every Go program, and syscall.ForkExec does no setns. So
// we fork ourselves, as it does: between clone and execve the child has one thread and a
// copy of a heap that other threads were changing, so that it makes raw system calls on memory prepared
// before, allocates nothing, takes no lock and does not grow its stack.
//
//	parent                               child
//	plan, fds ≥ 10, pipe
//	clone ───────────────────────────▶   setsid
//	read the pipe                        setns(owner) unless we are in it, setns(netns)
//	  │                                  capabilities made to survive execve
//	  │                                  0,1 = /dev/null · 2 stays · 3 = the socketpair
//	  │◀── end of file: it runs ──────   execveat(our own binary)
//	  │◀── stage, errno ──────────────   or exit

// A stage is what the child was doing when it failed.
type stage uint32

const (
	stageNone stage = iota
	stageSession
	stageUserNS
	stageNetNS
	stageSecurebits
	stageCapset
	stageAmbient
	stageNoNewPrivs
	stageFiles
	stageExec
)

func (s stage) String() string {
	switch s {
	case stageSession:
		return "start a session"
	case stageUserNS:
		return "enter its user namespace"
	case stageNetNS:
		return "enter the network namespace"
	case stageSecurebits, stageCapset, stageAmbient:
		return "keep capabilities over execve"
	case stageNoNewPrivs:
		return "set no_new_privs"
	case stageFiles:
		return "arrange file descriptors"
	case stageExec:
		return "execute our own binary"
	}
	return "clone"
}

// helperCaps are what a helper is left with: the TAP, addresses, routes, rules, transparent
// sockets (CAP_NET_ADMIN), raw sockets, and ports below 1024. They are the lot: entering
// needed more, and is over. Where it stays in our own user namespace it gets those that we have.
const helperCaps = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_BIND_SERVICE

// secbitNoRoot (SECBIT_NOROOT, include/uapi/linux/securebits.h) keeps execve from giving
// uid 0 of the namespace everything, so that a helper has the same rights whoever we are there.
const secbitNoRoot = 1

// A plan is all that the child needs, in memory that does not move.
type plan struct {
	userNS, netNS  uintptr // userNS is noNS where it is our own
	bare           bool    // no helper, but a command: it has the rights that the user namespace gives, and our descriptors
	noRoot         bool    // set secbitNoRoot: always where we become somebody in another user namespace
	caps           uintptr
	exe, null      uintptr
	socket, report uintptr
	capHeader      unix.CapUserHeader
	capData        [2]unix.CapUserData
	argv, envv     []*byte
	empty          *byte
	failure        [2]uint32 // stage, errno
}

// noNS: stay in the namespace that we are in. The user namespace may not be entered again.
const noNS = ^uintptr(0)

func startHelper(userNS, netNS int) (_ *helper, err error) {
	own, err := isOwnUserNS(userNS)
	if err != nil {
		return nil, err
	}
	var fds []int // the parent's copies, at 10 and above so that the child can fill 0 to 3
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	keep := func(fd int) uintptr {
		high, e := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 10)
		if e != nil {
			err = errors.Join(err, e)
			return 0
		}
		fds = append(fds, high)
		return uintptr(high)
	}
	// O_PATH: a binary may be executable and not readable.
	exe, err := unix.Open("/proc/self/exe", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open our own binary: %w", err)
	}
	defer unix.Close(exe)
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/null: %w", err)
	}
	defer unix.Close(null)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	defer unix.Close(pair[1])
	conn, err := newConn(pair[0])
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	var report [2]int
	if err := unix.Pipe2(report[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	defer unix.Close(report[0])

	p := &plan{
		userNS: noNS, netNS: keep(netNS), noRoot: true, caps: helperCaps,
		exe: keep(exe), null: keep(null), socket: keep(pair[1]), report: keep(report[1]),
		capHeader: unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3},
		empty:     new(byte),
	}
	unix.Close(report[1])
	if !own {
		p.userNS = keep(userNS)
	} else if err == nil {
		err = p.limit()
	}
	if err != nil {
		return nil, err
	}
	p.capData[0] = unix.CapUserData{Effective: uint32(p.caps), Permitted: uint32(p.caps), Inheritable: uint32(p.caps)}
	if p.argv, err = syscall.SlicePtrFromStrings([]string{helperName}); err != nil {
		return nil, err
	}
	if p.envv, err = syscall.SlicePtrFromStrings(helperEnv()); err != nil {
		return nil, err
	}

	pid, err := p.start(report[0], &fds)
	if err != nil {
		return nil, err
	}
	proc, err := os.FindProcess(pid) // our child, not yet waited for: the PID is still its own
	if err != nil {
		return nil, err
	}
	return &helper{conn: conn, proc: proc, in: newBuffer()}, nil
}

// start forks, and waits until the child executes our binary, or has told at the other end of report why it does not. fds
// are those of the plan, of which it closes report's.
func (p *plan) start(report int, fds *[]int) (int, error) {
	syscall.ForkLock.Lock() // nobody else's half-made descriptors go along
	pid, errno := fork(p)
	syscall.ForkLock.Unlock()
	runtime.KeepAlive(p)
	if errno != 0 {
		return 0, fmt.Errorf("clone: %w", errno)
	}
	i := slices.Index(*fds, int(p.report))
	unix.Close(int(p.report))
	*fds = slices.Delete(*fds, i, i+1)
	if err := readFailure(report, p.userNS == noNS); err != nil {
		var s unix.WaitStatus
		for {
			if _, e := unix.Wait4(pid, &s, 0, nil); !errors.Is(e, unix.EINTR) {
				return 0, err
			}
		}
	}
	return pid, nil
}

// isOwnUserNS tells whether fd names the user namespace that we are in.
func isOwnUserNS(fd int) (bool, error) {
	var ours, theirs unix.Stat_t
	if err := unix.Fstat(fd, &theirs); err != nil {
		return false, fmt.Errorf("look at its user namespace: %w", err)
	}
	if err := unix.Stat("/proc/self/ns/user", &ours); err != nil {
		return false, fmt.Errorf("look at our own user namespace (there is no /proc to see; a sandbox hides it, and a helper that was lost within "+
			"is not replaced until usernet is started again): %w", err)
	}
	return ours.Dev == theirs.Dev && ours.Ino == theirs.Ino, nil
}

// limit asks for no more than what we have ourselves: nothing is gained by staying where we are.
func (p *plan) limit() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	p.caps &= uintptr(have[0].Permitted)
	p.noRoot = have[0].Effective&(1<<unix.CAP_SETPCAP) != 0
	return nil
}

// helperEnv is the helper's environment: nothing but what the Go runtime reads.
func helperEnv() []string {
	var env []string
	for _, name := range []string{"GOTRACEBACK", "GOCOVERDIR", "GORACE"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	// It works on one call at a time, and a processor that waits in the kernel is given to whoever sees the parent's
	// end. Its live heap is some hundred KiB; Go would let it grow to 4 MiB before the first collection.
	return append(env, "GOMAXPROCS=1", "GOGC=10")
}

// readFailure waits until the child has called execve or failed before.
func readFailure(fd int, ownUser bool) error {
	var raw [8]byte
	var n int
	var err error
	for {
		if n, err = unix.Read(fd, raw[:]); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("read the child's report: %w", err)
	}
	if n < len(raw) {
		return nil
	}
	s := stage(binary.NativeEndian.Uint32(raw[:]))
	errno := unix.Errno(binary.NativeEndian.Uint32(raw[4:]))
	switch {
	case s == stageUserNS && errno == unix.EPERM:
		return fmt.Errorf("%s: it was not made by our user (or a security module forbids it): run usernet as whoever made it, or as root: %w", s, errno)
	case s == stageNetNS && errno == unix.EPERM && ownUser:
		return fmt.Errorf("%s: its user namespace is ours and we lack CAP_SYS_ADMIN there: run usernet as root of that user namespace: %w", s, errno)
	case s == stageNetNS && errno == unix.EPERM:
		return fmt.Errorf("%s: the user namespace that was entered does not own it (is --userns-path right?): %w", s, errno)
	}
	return fmt.Errorf("%s: %w", s, errno)
}

// fork is nosplit to the last call: see above.
//
//go:norace
//go:nosplit
func fork(p *plan) (pid int, errno syscall.Errno) {
	// No CLONE_VM and no CLONE_VFORK: a plain fork, the child on its own copy.
	first, second := uintptr(unix.SIGCHLD), uintptr(0)
	if runtime.GOARCH == "s390x" { // clone's first two arguments are swapped there
		first, second = second, first
	}
	beforeFork() // blocks all signals, and poisons the stack guard
	r, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, first, second, 0, 0, 0, 0)
	if errno != 0 || r != 0 {
		afterFork()
		return int(r), errno
	}
	afterForkInChild() // our handlers off, the signal mask as it was
	child(p)
	return 0, 0
}

// child does not return.
//
//go:norace
//go:nosplit
func child(p *plan) {
	var (
		errno syscall.Errno
		c     uintptr
	)
	s := stageSession
	// Neither the terminal's signals nor its hang-up are for the helper.
	if !p.bare {
		if _, _, errno = syscall.RawSyscall(unix.SYS_SETSID, 0, 0, 0); errno != 0 {
			goto failed
		}
	}
	s = stageUserNS
	if p.userNS != noNS {
		if _, _, errno = syscall.RawSyscall(unix.SYS_SETNS, p.userNS, unix.CLONE_NEWUSER, 0); errno != 0 {
			goto failed
		}
	}
	s = stageNetNS
	if p.netNS != noNS {
		if _, _, errno = syscall.RawSyscall(unix.SYS_SETNS, p.netNS, unix.CLONE_NEWNET, 0); errno != 0 {
			goto failed
		}
	}
	if p.bare {
		goto execute
	}
	// execve takes all capabilities from a uid that is not 0, except ambient ones, and gives all to
	// uid 0 unless told not to.
	s = stageSecurebits
	if p.noRoot {
		if _, _, errno = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_SECUREBITS, secbitNoRoot, 0, 0, 0, 0); errno != 0 {
			goto failed
		}
	}
	s = stageCapset
	if _, _, errno = syscall.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&p.capHeader)), uintptr(unsafe.Pointer(&p.capData)), 0); errno != 0 {
		goto failed
	}
	s = stageAmbient
	for c = 0; c < 32; c++ {
		if p.caps&(1<<c) == 0 {
			continue
		}
		if _, _, errno = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, c, 0, 0, 0); errno != 0 {
			goto failed
		}
	}
	s = stageNoNewPrivs
	if _, _, errno = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		goto failed
	}
	s = stageFiles
	if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, p.null, 0, 0); errno != 0 {
		goto failed
	}
	if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, p.null, 1, 0); errno != 0 {
		goto failed
	}
	if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, p.socket, helperSocket, 0); errno != 0 {
		goto failed
	}
	// What our caller gave to us (a pipe that tells it when we are ready, say) is not the helper's to
	// hold open. Kernels before 5.11 refuse this, and the rest has close-on-exec anyway.
	syscall.RawSyscall(unix.SYS_CLOSE_RANGE, helperSocket+1, ^uintptr(0)>>32, unix.CLOSE_RANGE_CLOEXEC)
execute:
	s = stageExec
	_, _, errno = syscall.RawSyscall6(unix.SYS_EXECVEAT, p.exe, uintptr(unsafe.Pointer(p.empty)),
		uintptr(unsafe.Pointer(&p.argv[0])), uintptr(unsafe.Pointer(&p.envv[0])), unix.AT_EMPTY_PATH, 0)
failed:
	p.failure[0], p.failure[1] = uint32(s), uint32(errno)
	syscall.RawSyscall(unix.SYS_WRITE, p.report, uintptr(unsafe.Pointer(&p.failure)), unsafe.Sizeof(p.failure))
	for {
		syscall.RawSyscall(unix.SYS_EXIT_GROUP, 1, 0, 0)
	}
}

// What the syscall package tells the runtime around a fork. gVisor relies on these names too,
// which is why the runtime promises to keep them (go.dev/issue/67401).

//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

//go:linkname afterForkInChild syscall.runtime_AfterForkInChild
func afterForkInChild()
