package main

import (
	"slices"
	"testing"

	"github.com/elastic/go-seccomp-bpf/arch"
)

func TestCallsAreSorted(t *testing.T) {
	seen := map[string]bool{}
	known := func(name string) bool {
		for _, info := range []*arch.Info{arch.X86_64, arch.AARCH64} {
			if _, ok := info.SyscallNames[name]; ok {
				return true
			}
		}
		return false
	}
	for _, g := range calls {
		if !slices.IsSorted(g.names) {
			t.Errorf("%s: not in alphabetical order", g.why)
		}
		for _, n := range g.names {
			if seen[n] {
				t.Errorf("%s is there twice", n)
			}
			if seen[n] = true; !known(n) {
				t.Errorf("%s is no system call", n)
			}
		}
	}
}

// What would lead out of the sandbox is not in the table, whoever edits it.
func TestNoWayOut(t *testing.T) {
	p, err := policy(confinement{child: 1})
	if err != nil {
		t.Skip(err)
	}
	allowed := slices.Clone(p.Syscalls[0].Names)
	for _, bad := range []string{
		"bpf", "chroot", "clone", "clone3", "execve", "execveat", "fork", "io_uring_setup", "keyctl", "kill", "mount", "mount_setattr", "move_mount",
		"open", "openat", "openat2", "open_by_handle_at", "perf_event_open", "pidfd_getfd", "pivot_root", "prctl", "process_vm_readv", "process_vm_writev",
		"ptrace", "rename", "renameat2", "setns", "setresuid", "setuid", "socket", "socketpair", "tgkill", "tkill", "umount2", "unshare", "userfaultfd", "vfork", "ioctl",
	} {
		if slices.Contains(allowed, bad) {
			t.Errorf("%s is allowed whatever its arguments", bad)
		}
	}
	for _, r := range p.Syscalls[0].NamesWithCondtions {
		if last := r.Conditions[len(r.Conditions)-1]; last.Operation == "BitsNotSet" {
			t.Errorf("%s: BitsNotSet is the last condition", r.Name)
		}
	}
}
