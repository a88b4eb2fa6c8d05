package main

import (
	"errors"
	"fmt"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// A call that is not in the table fails with EPERM, and the kernel logs it. Killing the process, as
// pasta does, would be the stronger answer to a break-in, but the table is about a Go runtime: the
// next release, or another kernel, may try a new call first and fall back when it fails, and
// then every container would lose its network at once. An attacker gains nothing from the errno.

// A rule allows a system call where each of its conditions holds. Rules of one name add up.
type rule struct {
	name string
	when []seccomp.Condition
}

// calls are allowed with whatever arguments, group by group, each in alphabetical order. Names that an
// architecture does not have are skipped.
var calls = []struct {
	why   string
	names []string
}{
	{"the Go runtime: memory, threads, timers, signals, the poller", []string{
		"arch_prctl", "brk", "clock_getres", "clock_gettime", "clock_nanosleep", "close", "dup", "dup3",
		"epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait", "eventfd2", "exit", "exit_group",
		"fcntl", "futex", "getpid", "getrandom", "gettid", "gettimeofday", "lseek", "madvise", "membarrier", "mincore",
		"mlock", "mmap", "mprotect", "munmap", "nanosleep", "pipe2", "poll", "ppoll", "pread64", "read", "restart_syscall",
		"rseq", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield",
		"set_robust_list", "sigaltstack", "timerfd_create", "timerfd_settime", "uname", "write",
	}},
	{"flows: sockets of the host, copied from and to", []string{
		"accept4", "bind", "connect", "getpeername", "getsockname", "getsockopt", "listen", "readv",
		"recvfrom", "recvmmsg", "recvmsg", "sendmmsg", "sendmsg", "sendto", "setsockopt", "shutdown",
		"splice", "writev",
	}},
	{"capture and log: files that are open", []string{
		"fdatasync", "fsync", "ftruncate", "pwrite64",
	}},
	{"following resolv.conf, the namespace's path and removing the PID file; Landlock says where", []string{
		"faccessat", "fstat", "fstatat", "fstatfs", "getdents64", "inotify_add_watch", "inotify_init1", "inotify_rm_watch",
		"newfstatat", "readlinkat", "statx", "unlinkat",
	}},
	{"the end: the helper and run's command are waited for, the namespace's lock is given up", []string{
		"flock", "pidfd_open", "pidfd_send_signal", "wait4", "waitid",
	}},
	{"giving capabilities up, which is all that capset can do once they are few: see confineBounds", []string{
		"capget", "capset",
	}},
	{"who we are", []string{
		"getegid", "geteuid", "getgid", "getpgid", "getpgrp", "getppid", "getuid",
	}},
}

// namespaces are the flags of clone(2) that make new ones.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
	unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP

func equal(arg uint32, v int) seccomp.Condition {
	return seccomp.Condition{Argument: arg, Operation: seccomp.Equal, Value: uint64(v)}
}

// rules are the calls whose arguments decide. In one rule "BitsNotSet" comes before others: the library
// forgets to jump to the action when it is the last (TestConfinedProcess would see it).
func rules(c confinement) []rule {
	r := []rule{
		// A thread, and no process and no namespace. clone3 hides its flags in memory, so that it is not allowed;
		// the runtime does not use it.
		{"clone", []seccomp.Condition{
			{Argument: 0, Operation: seccomp.BitsNotSet, Value: namespaces},
			{Argument: 0, Operation: seccomp.BitsSet, Value: unix.CLONE_THREAD},
		}},
		// For reading only. openat2 hides its flags.
		{"openat", []seccomp.Condition{
			{Argument: 2, Operation: seccomp.BitsNotSet, Value: unix.O_WRONLY | unix.O_RDWR | unix.O_CREAT | unix.O_TRUNC},
			{Argument: 2, Operation: seccomp.LessOrEqual, Value: 1<<32 - 1},
		}},
		// IP, and rtnetlink to look addresses and routes up. No AF_UNIX: a container that broke out must not talk to the
		// services of the user's session, nor to container engines.
		{"socket", []seccomp.Condition{equal(0, unix.AF_INET)}},
		{"socket", []seccomp.Condition{equal(0, unix.AF_INET6)}},
		{"socket", []seccomp.Condition{equal(0, unix.AF_NETLINK), equal(2, unix.NETLINK_ROUTE)}},
		// The runtime preempts its own threads and names its memory; the sandbox looks whether it is in force.
		{"tgkill", []seccomp.Condition{equal(0, unix.Getpid())}},
		{"prctl", []seccomp.Condition{equal(0, unix.PR_SET_VMA)}},
		{"prctl", []seccomp.Condition{equal(0, unix.PR_GET_SECCOMP)}},
		// confineBounds; there is nothing to be had by it.
		{"prctl", []seccomp.Condition{equal(0, unix.PR_CAPBSET_DROP)}},
		// Reading limits, not setting them.
		{"prlimit64", []seccomp.Condition{equal(2, 0)}},
	}
	for _, request := range []int{
		unix.TIOCINQ, unix.TIOCOUTQ, // sockets: what lies in their buffers
		unix.TUNGETIFF, unix.TUNSETOFFLOAD, unix.TUNSETPERSIST, unix.TUNSETQUEUE, // the TAP's end
		unix.TUNSETVNETHDRSZ, unix.TUNSETVNETLE, // of one that is given back
		unix.SIOCGIFINDEX, unix.SIOCGIFNAME, // --outbound-addr=INTERFACE, zones
	} {
		r = append(r, rule{"ioctl", []seccomp.Condition{equal(1, request)}})
	}
	if c.profile {
		// The clock of a CPU profile, which the runtime gives each thread.
		for _, name := range []string{"setitimer", "timer_create", "timer_settime", "timer_delete"} {
			r = append(r, rule{name, []seccomp.Condition{{Argument: 0, Operation: seccomp.LessOrEqual, Value: 1<<64 - 1}}})
		}
	}
	if c.child == 0 {
		return r
	}
	// run passes signals to its command and that one's group, stops with its own group, and hands the terminal over.
	for _, pid := range []int{c.child, -c.child, 0} {
		r = append(r, rule{"kill", []seccomp.Condition{equal(0, pid)}})
	}
	for _, request := range []int{unix.TIOCGPGRP, unix.TIOCSPGRP} {
		r = append(r, rule{"ioctl", []seccomp.Condition{equal(1, request)}})
	}
	return r
}

// policy is the table for this architecture.
func policy(c confinement) (seccomp.Policy, error) {
	info, err := arch.GetInfo("")
	if err != nil {
		return seccomp.Policy{}, err
	}
	// One group: the library lets the first one decide alone.
	allow := seccomp.SyscallGroup{Action: seccomp.ActionAllow}
	known := func(name string) bool { _, ok := info.SyscallNames[name]; return ok }
	for _, group := range calls {
		for _, name := range group.names {
			if known(name) {
				allow.Names = append(allow.Names, name)
			}
		}
	}
	for _, r := range rules(c) {
		if known(r.name) {
			allow.NamesWithCondtions = append(allow.NamesWithCondtions, seccomp.NameWithConditions{Name: r.name, Conditions: r.when})
		}
	}
	return seccomp.Policy{DefaultAction: seccomp.ActionErrno, Syscalls: []seccomp.SyscallGroup{allow}}, nil
}

// confineCalls puts the table in force for all threads.
func confineCalls(c confinement) error {
	p, err := policy(c)
	if err != nil {
		return err
	}
	outer, err := seccompMode()
	if err != nil {
		return err
	}
	filter := seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync | seccomp.FilterFlagLog, Policy: p}
	if err := seccomp.LoadFilter(filter); err != nil {
		return err
	}
	// Where a thread cannot follow, the kernel answers with its ID and does nothing, which the library takes for
	// success. Inside of somebody else's filter only a harmless call that is not in the table tells;
	// elsewhere it would be a line in the kernel's log for nothing.
	if outer == 0 {
		if mode, err := seccompMode(); err != nil || mode == 0 {
			return errors.Join(errors.New("the filter is not in force: a thread could not follow"), err)
		}
	} else if _, err := unix.Getpriority(unix.PRIO_PROCESS, 0); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("the filter is not in force: getpriority: %v", err)
	}
	return nil
}

// seccompMode is 0 without a filter and 2 with one.
func seccompMode() (int, error) {
	mode, err := unix.PrctlRetInt(unix.PR_GET_SECCOMP, 0, 0, 0, 0)
	if err != nil {
		return 0, fmt.Errorf("prctl(PR_GET_SECCOMP): %w", err)
	}
	return mode, nil
}
