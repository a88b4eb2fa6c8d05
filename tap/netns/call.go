package netns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// An Op is done inside a network namespace: on a thread of this process, or in the helper. Its
// argument and its reply are JSON; files go to the caller of Call, who closes them, and it returns none
// with an error. It must do its namespace's work on the goroutine that called it, for only
// that one's thread is inside, and it must not change the thread. ctx ends with the caller.
type Op func(ctx context.Context, args []byte) (reply []byte, files []*os.File, err error)

// Ops are the operations that a program knows, by name. The same table goes to Call
// and to HelperMain.
type Ops map[string]Op

// Handle makes an Op of a function whose argument and reply have types that go through JSON.
func Handle[A, R any](f func(ctx context.Context, args A) (R, []*os.File, error)) Op {
	return func(ctx context.Context, raw []byte) ([]byte, []*os.File, error) {
		var args A
		if err := json.Unmarshal(raw, &args); err != nil {
			return nil, nil, fmt.Errorf("arguments: %w", err)
		}
		reply, files, err := f(ctx, args)
		if err != nil {
			return nil, nil, err
		}
		out, err := json.Marshal(reply)
		if err != nil {
			closeAll(files)
			return nil, nil, fmt.Errorf("reply: %w", err)
		}
		return out, files, nil
	}
}

// Call runs the operation of that name inside the namespace and stores its reply in the value
// that reply points to; nil drops it. The files that come back are the caller's to close. An error keeps the
// errno of the system call that failed, wherever that was. Where ctx ends first the helper
// is ended too, and the next call starts another.
func (n *NS) Call(ctx context.Context, ops Ops, name string, args, reply any) ([]*os.File, error) {
	fds, err := n.CallFDs(ctx, ops, name, args, reply)
	var files []*os.File
	for _, fd := range fds {
		files = append(files, os.NewFile(uintptr(fd), name))
	}
	return files, err
}

// CallFDs is Call for whoever wants the bare descriptors, which have close-on-exec and are as
// the operation left them.
func (n *NS) CallFDs(ctx context.Context, ops Ops, name string, args, reply any) ([]int, error) {
	return n.CallWith(ctx, ops, name, args, reply)
}

// CallWith is CallFDs with descriptors that the operation gets by Sent, such as that of another namespace. They
// stay the caller's, and must stay open until it returns.
func (n *NS) CallWith(ctx context.Context, ops Ops, name string, args, reply any, fds ...int) ([]int, error) {
	op, ok := ops[name]
	if !ok {
		return nil, fmt.Errorf("no operation %q", name)
	}
	raw, err := json.Marshal(args)
	if err != nil {
		return nil, fmt.Errorf("arguments of %s: %w", name, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, fmt.Errorf("%s in %s: %w", name, n.name, os.ErrClosed)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := n.settleLocked(ctx); err != nil {
		return nil, err
	}
	out, got, err := n.callLocked(ctx, name, raw, op, fds)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", n.name, err)
	}
	if reply == nil {
		return got, nil
	}
	if err := json.Unmarshal(out, reply); err != nil {
		closeFDs(got)
		return nil, fmt.Errorf("reply of %s: %w", name, err)
	}
	return got, nil
}

type sentKey struct{}

// Sent are the descriptors that came with the call, for the operation whose context ctx is; they are open until that
// returns.
func Sent(ctx context.Context) []int {
	fds, _ := ctx.Value(sentKey{}).([]int)
	return fds
}

// callLocked runs op, which the helper knows by name, in the place for calls.
func (n *NS) callLocked(ctx context.Context, name string, args []byte, op Op, sent []int) (reply []byte, fds []int, err error) {
	if n.direct == placeHelper {
		return n.callHelperLocked(ctx, name, args, sent)
	}
	ctx = context.WithValue(ctx, sentKey{}, sent)
	var files []*os.File
	var opErr error
	if err := n.onThread(func() { reply, files, opErr = op(ctx, args) }); err != nil {
		return nil, nil, fmt.Errorf("enter: %w", err)
	}
	defer closeAll(files)
	if opErr != nil {
		return nil, nil, opErr
	}
	for _, f := range files {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			closeFDs(fds)
			return nil, nil, err
		}
		fds = append(fds, fd)
	}
	return reply, fds, nil
}

// settleLocked finds the place for calls, and replaces our descriptor by one that was opened inside: one
// of a bind mount keeps that mount busy, and whoever made the namespace shall be able to unmount it.
func (n *NS) settleLocked(ctx context.Context) error {
	if n.direct == placeUnknown {
		if err := n.findPlaceLocked(); err != nil {
			return fmt.Errorf("enter %s: %w", n.name, err)
		}
	}
	if n.unpinned || n.life.pidfd >= 0 || n.life.proc { // those of /proc are of no mount
		return nil
	}
	_, fds, err := n.callLocked(ctx, opSelf, nil, func(context.Context, []byte) ([]byte, []*os.File, error) { return ownNamespace() }, nil)
	if err == nil {
		err = unix.Dup3(fds[0], n.fd, unix.O_CLOEXEC)
	}
	closeFDs(fds)
	if err != nil {
		return fmt.Errorf("enter %s: %w", n.name, err)
	}
	n.unpinned = true
	return nil
}

// opSelf is an operation that every helper knows.
const opSelf = "netns.self"

func ownNamespace() ([]byte, []*os.File, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, nil, fmt.Errorf("open it from inside (is /proc mounted?): %w", err)
	}
	return nil, []*os.File{f}, nil
}

// findPlaceLocked tries whether a thread of ours may enter, which needs CAP_SYS_ADMIN both in our own
// user namespace and in the owner: root has it, and so has what runs in podman's namespace.
func (n *NS) findPlaceLocked() error {
	if n.always && n.userFd >= 0 {
		n.direct = placeHelper
		return nil
	}
	err := n.onThread(func() {})
	switch {
	case err == nil:
		n.direct = placeThread
	case errors.Is(err, unix.EPERM) && n.userFd >= 0:
		n.direct = placeHelper
	case errors.Is(err, unix.EPERM):
		return errors.Join(err, n.ownerErr)
	default:
		return err
	}
	return nil
}

// onThread runs f on a thread inside the namespace. The thread is brought home before any other
// goroutine gets it; where that fails it is thrown away, which is what ending a locked goroutine does.
// An error means that f has not run.
func (n *NS) onThread(f func()) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open our own network namespace (is /proc mounted?): %w", err)
			return
		}
		if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			unix.Close(home)
			runtime.UnlockOSThread()
			done <- fmt.Errorf("setns: %w", err)
			return
		}
		defer func() {
			if unix.Setns(home, unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			unix.Close(home) // before the caller goes on, who may count what is open
			done <- nil
		}()
		f()
	}()
	return <-done
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
