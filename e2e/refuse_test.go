package e2e

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What hosts forbid: containers, by seccomp filters of theirs, and old kernels.
var refusable = map[string]uintptr{
	"capset":                  unix.SYS_CAPSET,
	"chroot":                  unix.SYS_CHROOT,
	"clone3":                  unix.SYS_CLONE3,
	"inotify_init1":           unix.SYS_INOTIFY_INIT1,
	"landlock_create_ruleset": unix.SYS_LANDLOCK_CREATE_RULESET,
	"landlock_restrict_self":  unix.SYS_LANDLOCK_RESTRICT_SELF,
	"mount":                   unix.SYS_MOUNT,
	"pidfd_open":              unix.SYS_PIDFD_OPEN,
	"pidfd_send_signal":       unix.SYS_PIDFD_SEND_SIGNAL,
	"pivot_root":              unix.SYS_PIVOT_ROOT,
	"prlimit64":               unix.SYS_PRLIMIT64,
	"ptrace":                  unix.SYS_PTRACE,
	"seccomp":                 unix.SYS_SECCOMP,
	"umount2":                 unix.SYS_UMOUNT2,
	"unshare":                 unix.SYS_UNSHARE,
}

// refuse ERRNO CALL,CALL... -- COMMAND... runs a command for which system calls fail. It is a filter of seccomp's in
// its oldest form, so that every kernel has it.
func helperRefuse(args []string) error {
	errno, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	load := unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0} // seccomp_data.nr
	program := []unix.SockFilter{load}
	for name := range strings.SplitSeq(args[1], ",") {
		nr, known := refusable[name]
		if !known {
			return fmt.Errorf("no call %q", name)
		}
		program = append(program,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(nr), Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)})
	}
	program = append(program, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	runtime.LockOSThread() // the filter is this thread's, which becomes the command
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	f := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&f)), 0, 0); err != nil {
		return err
	}
	return syscall.Exec(args[3], args[3:], os.Environ())
}

// refusing is where calls fail with errno.
func (w where) refusing(errno syscall.Errno, calls ...string) where {
	return where{place: w.place, prefix: slices.Concat(w.prefix, helper("refuse", strconv.Itoa(int(errno)), strings.Join(calls, ","), "--"))}
}

// surroundings are who may start usernet for a container: an ordinary user with no rights, and a runtime that is root in
// a user namespace of its own, which the container's network belongs to as well.
var surroundings = map[string]func(t testing.TB) (where, *container){
	"user": func(t testing.TB) (where, *container) { return lab.home, newContainer(t) },
	"runtime": func(t testing.TB) (where, *container) {
		runtime := newContainerBy(t, "unshare", "--user", "--map-root-user", "--mount")
		enter := []string{"nsenter", "--target", strconv.Itoa(runtime.pid), "--user", "--mount", "--preserve-credentials", "--"}
		c := newContainerBy(t, append(slices.Clone(enter), "unshare", "--net", "--mount")...)
		return where{place: lab.host, prefix: append(slices.Clone(lab.home.prefix), enter...)}, c
	},
}

// A host that refuses a part of the sandbox gets the network with a weaker one and is told, rather than none.
func TestRefusedCalls(t *testing.T) {
	if raceDetector {
		return // it needs cgo, with which there is no sandbox
	}
	servers := echoServers(t)
	all := slices.Sorted(maps.Keys(refusable))
	all = slices.DeleteFunc(all, func(name string) bool { return name == "capset" }) // a helper could not keep its rights
	for _, refused := range []struct {
		name  string
		calls []string
		errno syscall.Errno
		says  string // by a runtime's usernet; an ordinary user has no chroot to lose
	}{
		{"no Landlock", []string{"landlock_create_ruleset"}, unix.ENOSYS, "no Landlock"},
		{"Landlock forbidden", []string{"landlock_restrict_self"}, unix.EPERM, "landlock_restrict_self"},
		{"no seccomp", []string{"seccomp"}, unix.EPERM, "part=seccomp"},
		{"no chroot", []string{"chroot", "pivot_root", "mount", "umount2", "unshare"}, unix.EPERM, "part=root"},
		{"old kernel", []string{"clone3", "pidfd_open", "pidfd_send_signal", "landlock_create_ruleset"}, unix.ENOSYS, "no Landlock"},
		{"everything", all, unix.EPERM, "part=landlock"},
	} {
		for who, make := range surroundings {
			t.Run(refused.name+", "+who, func(t *testing.T) {
				w, c := make(t)
				u := w.refusing(refused.errno, refused.calls...).begin(t, strconv.Itoa(c.pid), "--log-level=warn")
				works(t, c.net, servers)
				if refused.says != "part=root" || who == "runtime" {
					saysAll(t, u.out.String(), "this host refuses a part", refused.says)
				}
				if got := u.status(t, "NoNewPrivs"); got != "1" {
					t.Errorf("NoNewPrivs is %s", got)
				}
				syscall.Kill(c.pid, syscall.SIGKILL) // which is noticed, with whatever means are left
				if code := u.wait(t); code != 0 {
					t.Errorf("status %d", code)
				}
			})
		}
	}
}

// inotify's instances are 128 for a user, and a user may have more containers.
func TestNoInotify(t *testing.T) {
	c := newContainer(t)
	path := filepath.Join(shortDir(t), "ns")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/net", c.pid), path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	u := lab.home.refusing(unix.EMFILE, "inotify_init1").begin(t, "--netns-path", path)
	works(t, c.net, echoServers(t))
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if code := u.wait(t); code != 0 {
		t.Errorf("status %d", code)
	}
}

// Roots that are not as usual: nowhere to write, kernel settings that cannot be changed, as containers and initramfs
// have it, and a /proc that shows each user only its own processes, among which are the container's.
func TestOddRoots(t *testing.T) {
	if raceDetector {
		return // it needs cgo, with which there is no sandbox
	}
	needs(t, "setpriv")
	servers := echoServers(t)
	readOnly := func(dirs string) string {
		return "for d in " + dirs + "; do mount --rbind $d $d; mount -o remount,bind,ro $d; done"
	}
	for name, odd := range map[string]struct{ script, says string }{
		"nowhere to write": {readOnly("/tmp /run /dev/shm") + "; export TMPDIR=/tmp", "part=root"},
		"sysctls":          {readOnly("/proc/sys"), ""},
		"proc":             {readOnly("/proc"), ""},
	} {
		for who, make := range surroundings {
			t.Run(name+", "+who, func(t *testing.T) {
				w, c := make(t)
				w.prefix = slices.Concat(w.prefix, []string{"unshare", "--mount", "sh", "-ec", odd.script + `; exec "$@"`, "sh"})
				if who == "user" { // who cannot mount
					w = withMounts(odd.script)
				}
				u := w.begin(t, strconv.Itoa(c.pid), "--log-level=warn")
				works(t, c.net, servers)
				if who == "runtime" {
					saysAll(t, u.out.String(), odd.says)
				}
				u.end(t)
			})
		}
	}
	if realRoot { // nobody else may mount another /proc of these processes
		t.Run("hidepid", func(t *testing.T) {
			other := []string{"setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups"}
			c := newContainerBy(t, append(other, rootMapped...)...)
			w := withMounts("mount -t proc -o hidepid=2 none /proc")
			w.prefix = append(w.prefix, other...)
			u := w.begin(t, strconv.Itoa(c.pid), "--api-socket=none")
			works(t, c.net, servers)
			syscall.Kill(c.pid, syscall.SIGKILL)
			endsWell(t, u)
		})
	}
}
