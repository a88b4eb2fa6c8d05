package inside_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"usernet/tap/inside"
	"usernet/tap/netns"
	"usernet/tap/taptest"
)

// has tells whether a line of the namespace begins so.
func has(lines []string, prefix string) bool {
	return slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, prefix) })
}

var ourRule = fmt.Sprintf("rule 2 mark %#x", inside.Mark)

func TestCloseRestores(t *testing.T) {
	for _, owner := range taptest.Owners {
		for i := range 1 << len(sysctls) { // each of them on or off before
			t.Run(fmt.Sprintf("%s %b", owner, i), func(t *testing.T) {
				b := newBox(t, owner)
				b.set(t, i)
				was := b.look(t)
				for range 2 {
					end := b.open(t, inside.Config{IPv6: true})
					if err := errors.Join(b.Transparent(false), b.Transparent(true)); err != nil {
						t.Fatal(err)
					}
					is := b.look(t)
					if !has(is, ourRule) || !has(is, sysctls[0]+" 1") {
						t.Fatalf("there is no rule or no sysctl:\n%s", strings.Join(is, "\n"))
					}
					for _, line := range was {
						if !strings.HasPrefix(line, "/proc") && !slices.Contains(is, line) {
							t.Errorf("what the container had is gone: %s", line)
						}
					}
					end()
					b.same(t, was, "after Close")
				}
			})
		}
	}
}

// Where a thread of ours may enter, and nobody asked for a helper, none is needed.
func TestWithoutHelper(t *testing.T) {
	space := taptest.NewNS(t, taptest.OwnerRoot)
	b := boxOf(t, space.PID)
	b.ns = space.Open(t)
	was := b.look(t)
	end := b.open(t, inside.Config{IPv6: true})
	b.testSource(t)
	end()
	b.same(t, was, "after Close")
}

// What the container does to it is its own affair, and Close says nothing.
func TestContainerInterferes(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	was := b.look(t)
	end := b.open(t, inside.Config{IPv6: true})
	b.do(t, "spoil", struct{}{}, nil)
	end()
	b.same(t, was, "after the container removed all, and Close,")
}

// TestRepair: what the container took away comes back when a connection finds out.
func TestRepair(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	b.open(t, inside.Config{IPv6: true})
	was := b.look(t)
	b.do(t, "spoil", struct{}{}, nil)
	b.Doubt()
	waitFor(t, "the routing", func() bool { return slices.Equal(b.look(t), was) })
	b.testSource(t)
}

// A namespace whose lo is down is not ready yet.
func TestLoopbackComesUp(t *testing.T) {
	space := taptest.NewNS(t, taptest.OwnerRoot)
	b := &box{ns: openNS(t, space.PID), within: openNS(t, space.PID)}
	b.open(t, inside.Config{IPv6: true})
	for _, v6 := range []bool{false, true} {
		if err := b.Transparent(v6); !errors.Is(err, unix.ENETDOWN) || !strings.Contains(err.Error(), "ip link set lo up") {
			t.Errorf("with lo down: %v", err)
		}
	}
	if _, err := b.Socket(t.Context(), inside.Kind{Transparent: true}); !errors.Is(err, unix.ENETDOWN) {
		t.Errorf("a socket with lo down: %v", err)
	}
	b.do(t, "furnish", struct{}{}, nil)
	b.Doubt()
	waitFor(t, "the routing", func() bool { return b.Transparent(false) == nil && b.Transparent(true) == nil })
	b.testSource(t)
}

func TestWithoutIPv6(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	b.open(t, inside.Config{})
	if b.Transparent(false) != nil || b.Transparent(true) == nil {
		t.Errorf("%v, %v", b.Transparent(false), b.Transparent(true))
	}
	if has(b.look(t), fmt.Sprintf("rule 10 mark %#x", inside.Mark)) {
		t.Error("there is a rule for IPv6 all the same")
	}
}

// victimEnv makes the test binary a usernet with a Kit in the process's namespace, which says who its helper is
// and is killed.
const victimEnv = "USERNET_TEST_VICTIM"

func victim(pid string) int {
	n, _ := strconv.Atoi(pid)
	ns, err := netns.Open(netns.Config{PID: n, Helper: true})
	if err == nil {
		_, err = inside.Open(context.Background(), ns, inside.Config{IPv6: true})
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	children, _ := filepath.Glob("/proc/self/task/*/children")
	for _, name := range children {
		text, _ := os.ReadFile(name)
		for _, f := range strings.Fields(string(text)) {
			fmt.Println(f)
		}
	}
	for { // no deadlock in the eyes of the runtime
		unix.Pause()
	}
}

// startVictim returns it and its helper.
func startVictim(t *testing.T, pid int) (cmd *exec.Cmd, helper *os.Process) {
	t.Helper()
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), victimEnv+"="+strconv.Itoa(pid))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	child, convErr := strconv.Atoi(strings.TrimSpace(line))
	if convErr == nil {
		helper, err = os.FindProcess(child)
	}
	if convErr != nil || err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		t.Fatalf("the victim says %q: %v, %v", line, convErr, err)
	}
	return cmd, helper
}

// gone waits until a process that is not our child has ended.
func gone(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20_000)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n != 1 || err != nil {
			t.Fatalf("process %d does not end: %v", pid, err)
		}
		return
	}
}

func TestKilledParent(t *testing.T) {
	for _, owner := range taptest.Owners {
		t.Run(owner.String(), func(t *testing.T) {
			space := taptest.NewNS(t, owner)
			b := boxOf(t, space.PID)
			was := b.look(t)
			cmd, helper := startVictim(t, space.PID)
			if !has(b.look(t), ourRule) {
				t.Error("the victim has set nothing up")
			}
			cmd.Process.Kill()
			cmd.Wait()
			gone(t, helper.Pid)
			helper.Release()
			b.same(t, was, "after the parent was killed")
		})
	}
}

// Where the helper is killed too, all is left as it was, and the next one knows what the sysctl was before.
func TestKilledBoth(t *testing.T) {
	for i := range 1 << len(sysctls) { // each of them on or off before
		space := taptest.NewNS(t, taptest.OwnerRoot)
		b := boxOf(t, space.PID)
		b.set(t, i)
		was := b.look(t)
		cmd, helper := startVictim(t, space.PID)
		if err := helper.Kill(); err != nil {
			t.Fatal(err)
		}
		gone(t, helper.Pid)
		helper.Release()
		cmd.Process.Kill()
		cmd.Wait()
		left := b.look(t)
		if !has(left, ourRule) || !has(left, sysctls[0]+" 1") {
			t.Fatalf("nothing is left:\n%s", strings.Join(left, "\n"))
		}
		end := b.open(t, inside.Config{IPv6: true})
		b.same(t, left, "adopted,")
		b.testSource(t)
		end()
		b.same(t, was, "after the next one's Close")
	}
}

// A usernet that starts while the helper of one that was killed still undoes its work waits for that.
func TestTakesTurns(t *testing.T) {
	space := taptest.NewNS(t, taptest.OwnerRoot)
	b := boxOf(t, space.PID)
	cmd, helper := startVictim(t, space.PID)
	defer helper.Release()
	defer helper.Kill()                                 // where the test fails before it goes on
	if err := helper.Signal(unix.SIGSTOP); err != nil { // it is slow to end
		t.Fatal(err)
	}
	waitFor(t, "the stop of all threads", func() bool {
		stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", helper.Pid))
		return !slices.ContainsFunc(stats, func(name string) bool {
			_, state, _ := strings.Cut(read(t, name), ") ")
			return !strings.HasPrefix(state, "T")
		})
	})
	cmd.Process.Kill()
	cmd.Wait()
	opened := make(chan struct{})
	go func() {
		defer close(opened)
		b.open(t, inside.Config{IPv6: true})
	}()
	// The other one is in its turn for as long as it is stopped; it goes on when the new one asks for its turn.
	waitFor(t, "a connection to the helper's socket", func() bool {
		return strings.Count(read(t, fmt.Sprintf("/proc/%d/net/unix", space.PID)), "@usernet-inside") > 1
	})
	if err := helper.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	<-opened
	gone(t, helper.Pid)
	if is := b.look(t); !has(is, ourRule) || !has(is, sysctls[0]+" 1") {
		t.Errorf("the old helper undid what the new one did:\n%s", strings.Join(is, "\n"))
	}
}

// Somebody in the container may hold the name for ever.
func TestSquatter(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	defer b.do(t, "squat", struct{}{}, nil)[0].Close()
	was := b.look(t)
	end := b.open(t, inside.Config{IPv6: true})
	b.testSource(t)
	end()
	b.same(t, was, "after Close")
}

func TestHelperDies(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	b.open(t, inside.Config{IPv6: true, Batch: 1})
	fd, err := b.Socket(t.Context(), inside.Kind{})
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	was := b.look(t)
	// What a stuck helper gets: it ends, and undoes its work.
	if err := b.ns.Rest(); err != nil {
		t.Fatal(err)
	}
	if has(b.look(t), ourRule) {
		t.Fatal("a helper that ended left its rule")
	}
	// Here another can be started, and sets all up again.
	b.Doubt()
	waitFor(t, "the routing", func() bool { return slices.Equal(b.look(t), was) })
	b.testSource(t)
}

// Whether sockets can be had is told as the helper has shown it last.
func TestSocketsTellsOfTheHelper(t *testing.T) {
	b := newBox(t, taptest.OwnerRoot)
	b.open(t, inside.Config{IPv6: true, Batch: 1})
	if err := b.Sockets(); err != nil {
		t.Errorf("at first: %v", err)
	}
	var helper int
	if _, err := b.ns.Call(t.Context(), testOps, "pid", struct{}{}, &helper); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(helper, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if fd, err := b.Socket(t.Context(), inside.Kind{}); err == nil {
		unix.Close(fd)
		t.Error("a socket of a helper that was killed")
	}
	waitFor(t, "another helper", func() bool {
		fd, err := b.Socket(t.Context(), inside.Kind{})
		if err == nil {
			unix.Close(fd)
		}
		return err == nil && b.Sockets() == nil
	})
}

func TestSocketsWithoutHelper(t *testing.T) {
	ns, err := netns.Open(netns.Config{PID: taptest.NewNS(t, taptest.OwnerRoot).PID, Helper: true})
	if err != nil {
		t.Fatal(err)
	}
	k, err := inside.Open(t.Context(), ns, inside.Config{IPv6: true})
	if closed := ns.Close(); err != nil || closed != nil { // so that none can be started again, as from a sandbox
		t.Fatal(err, closed)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- k.Run(ctx) }()
	waitFor(t, "the loss to be seen", func() bool {
		if fd, err := k.Socket(t.Context(), inside.Kind{}); err == nil {
			unix.Close(fd)
			t.Error("a socket that nobody can have made")
		}
		return errors.Is(k.Sockets(), os.ErrClosed) && errors.Is(k.Transparent(false), os.ErrClosed) && errors.Is(k.Transparent(true), os.ErrClosed)
	})
	for _, err := range []error{k.Sockets(), k.Transparent(false), k.Transparent(true)} {
		if !strings.Contains(err.Error(), "start usernet again") {
			t.Errorf("%v: without the remedy", err)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error("Run:", err)
	}
	if err := k.Close(); err == nil {
		t.Error("the routing was put back by nobody")
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s did not come", what)
		}
	}
}

// What could not be undone is named, and so is how it goes.
func TestCloseWithoutHelper(t *testing.T) {
	ns, err := netns.Open(netns.Config{PID: taptest.NewNS(t, taptest.OwnerRoot).PID, Helper: true})
	if err != nil {
		t.Fatal(err)
	}
	k, err := inside.Open(t.Context(), ns, inside.Config{IPv6: true})
	if closed := ns.Close(); err != nil || closed != nil {
		t.Fatal(err, closed)
	}
	want := "the rule for mark 0x3000, table 30062 and sysctls may be left in the namespace; the next usernet that serves it removes them"
	if err := k.Close(); err == nil || !strings.Contains(err.Error(), want) {
		t.Fatalf("Close: %v; want: … %s …", err, want)
	}
}
