package e2e

import (
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Field by field, usernet has given up at least what slirp4netns gives up for --enable-sandbox and --enable-seccomp, and without
// those flags as well.
func TestSlirpSandbox(t *testing.T) {
	if raceDetector {
		return // it needs cgo, with which there is no sandbox
	}
	real := lab.home.startSlirp(t, realSlirp(t), "-c", "--enable-sandbox", "--enable-seccomp", strconv.Itoa(newContainer(t).pid), "tap0")
	for _, flags := range [][]string{{"--enable-sandbox", "--enable-seccomp"}, nil} {
		c := newContainer(t)
		ours := lab.home.startSlirp(t, asSlirp(t), append(flags, "-c", strconv.Itoa(c.pid), "tap0")...)
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapAmb"} {
			has, may := capSet(t, ours.process, set), capSet(t, real.process, set)|1<<unix.CAP_SETPCAP // see below
			if has&^may != 0 {
				t.Errorf("%v: %s is %#x, slirp4netns has %#x", flags, set, has, may)
			}
		}
		// Only who has CAP_SETPCAP can narrow the bounding set, for an execve that no_new_privs makes harmless and seccomp forbids.
		// It does when the start is over, and then gives up that one.
		if realRoot {
			eventually(t, "the bounding set is narrowed", func() bool {
				return bits.OnesCount64(capSet(t, ours.process, "CapBnd")) <= 1 && capSet(t, ours.process, "CapEff")&(1<<unix.CAP_SETPCAP) == 0
			})
		}
		for _, key := range []string{"NoNewPrivs", "Seccomp"} {
			if has, want := ours.status(t, key), real.status(t, key); has != want {
				t.Errorf("%v: %s is %s, slirp4netns has %s", flags, key, has, want)
			}
		}
		// slirp4netns sees /etc and /run. Root's usernet sees nothing at all; an ordinary user's may not change its root,
		// but is kept from files by Landlock, which TestConfinedProcess tests.
		if realRoot {
			if entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", ours.cmd.Process.Pid)); err != nil && !os.IsNotExist(err) || len(entries) > 0 { // it has been removed
				t.Errorf("%v: its root holds %v, %v", flags, entries, err)
			}
		}
		if text := ours.out.String(); text != "" {
			t.Errorf("%v: it says %q", flags, text)
		}
		works(t, c.net, echoServers(t)[:1])
	}
}

// capSet reads a set of capabilities, bit n for capability n.
func capSet(t testing.TB, p *process, key string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(p.status(t, key), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A resolv.conf that is a symlink out of /etc and /run leaves slirp4netns without names in its sandbox.
func TestSlirpSandboxResolvConfIsALink(t *testing.T) {
	needs(t, "dig")
	serveDNS(t, outsideAddr4)
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "resolv.conf"), "nameserver "+outsideAddr4+"\n")
	c := newContainer(t)
	link := "mount -t tmpfs none /mnt; cp -a /etc /mnt/; ln -sf " + dir + "/resolv.conf /mnt/etc/resolv.conf; mount --bind /mnt/etc /etc"
	s := withMounts(link).startSlirp(t, asSlirp(t), "-c", "--enable-sandbox", "--enable-seccomp", strconv.Itoa(c.pid), "tap0")
	if got := c.must(t, "dig", "+short", "@"+resolver4, "a.test"); strings.TrimSpace(got) == "" || strings.Contains(got, ";;") {
		t.Errorf("%q", got)
	}
	s.hangUp(t)
}

// Where the host refuses a part of the sandbox, slirp4netns refuses to start. We go on with the rest, and say so.
func TestSlirpSandboxRefused(t *testing.T) {
	if !realRoot || raceDetector {
		return // an ordinary user changes no root anyway; the race detector leaves no sandbox
	}
	c := newContainer(t)
	// No directory in which an empty one could be made.
	s := withMounts("for d in ${TMPDIR:-/tmp} /run /dev/shm; do mount --bind $d $d; mount -o remount,bind,ro $d; done").
		startSlirp(t, asSlirp(t), "-c", "--enable-sandbox", "--enable-seccomp", strconv.Itoa(c.pid), "tap0")
	works(t, c.net, echoServers(t)[:1])
	s.has(t, "sandbox: this host refuses a part")
	if got := s.status(t, "Seccomp"); got != "2" {
		t.Errorf("Seccomp is %s: the rest must be in force", got)
	}
}
