package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// helperName is argv[0] of the helper: what "ps" shows, and how main knows what it is.
const helperName = "usernet-netns-helper"

// helperSocket is the helper's end of the socketpair.
const helperSocket = 3

// endGrace is how long a helper may take to end after its socket was closed before it is
// killed. It only exits, so that more than this means that it is stuck in the kernel.
const endGrace = 2 * time.Second

// restAfter is how long nothing is asked of a helper before it gives memory back.
const restAfter = 2 * time.Second

// IsHelper tells whether this process was started as a helper. main (and TestMain) asks first of
// all, and then ends with HelperMain's result.
func IsHelper() bool { return len(os.Args) == 1 && os.Args[0] == helperName }

// HelperMain is the helper's life: it answers calls until the socketpair is closed, by NS.Close or
// by the end of the parent, whatever ended it. Every thread is in the namespaces already.
// The result is the exit status.
func HelperMain(ops Ops) int {
	// A service manager signals all processes of a group at once; the parent still needs us then.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGPIPE)
	c, err := newConn(helperSocket)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: started by hand: it is a part of usernet: %v\n", helperName, err)
		return 1
	}
	defer c.Close()
	spare := OpenSpare()
	defer spare.Close()
	err = serve(c, ops, spare)
	// A reset comes instead of an end where the parent died without reading an answer.
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		fmt.Fprintf(os.Stderr, "%s: %v\n", helperName, err)
		return 1
	}
	return 0
}

// An ending is what a helper does last of all.
type ending struct {
	mu sync.Mutex
	do map[string]func()
}

type endingKey struct{}

// AtEnd has a helper call f when it ends, by NS.Close or by the death of its parent, to undo what an
// operation did. ctx is the operation's. Of one name the last f counts, and nil takes it back. It tells whether there
// will be such an end: where the operation runs on a thread of its caller there is none.
func AtEnd(ctx context.Context, name string, f func()) bool {
	e, ok := ctx.Value(endingKey{}).(*ending)
	if !ok {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if f == nil {
		delete(e.do, name)
	} else {
		e.do[name] = f
	}
	return true
}

// run waits for the operation that is under way, which has been told to stop: two must not change
// the namespace at once. One that does not stop is cut off by the end of the process.
func (e *ending) run(idle <-chan struct{}) {
	select {
	case <-idle:
	case <-time.After(endGrace / 2):
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, f := range e.do {
		f()
	}
}

// serve reads while an operation runs, to see the parent's end at once.
func serve(c *net.UnixConn, ops Ops, spare Spare) error {
	last := &ending{do: map[string]func(){}}
	idle := make(chan struct{})
	defer last.run(idle)
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), endingKey{}, last))
	defer cancel()
	type call struct {
		request
		fds []int
	}
	calls := make(chan call)
	defer close(calls)
	go func() {
		defer close(idle)
		rest := time.NewTimer(restAfter)
		defer rest.Stop()
		for {
			var r call
			select {
			case r = <-calls:
			case <-rest.C:
				spare.Trim()
				continue
			}
			if r.Name == "" { // closed
				return
			}
			a, files := do(context.WithValue(ctx, sentKey{}, r.fds), ops, r.request)
			closeFDs(r.fds)
			rest.Reset(restAfter)
			err := send(c, a, numbers(files))
			if err != nil { // too long, too many descriptors under way: the caller shall know. Or nobody is there
				err = send(c, newAnswer(nil, fmt.Errorf("send the answer: %w", err)), nil)
			}
			closeAll(files)
			if err != nil {
				return // the parent is gone, and the reader sees it too
			}
		}
	}()
	b := newBuffer()
	for {
		var r request
		fds, err := b.receive(c, &r)
		if err != nil {
			return err
		}
		select {
		case calls <- call{r, fds}:
		case <-idle:
			closeFDs(fds)
			return io.EOF // the answer before could not be sent
		}
	}
}

func do(ctx context.Context, ops Ops, r request) (answer, []*os.File) {
	if r.Name == opSelf {
		reply, files, err := ownNamespace()
		return newAnswer(reply, err), files
	}
	op, ok := ops[r.Name]
	if !ok {
		return newAnswer(nil, fmt.Errorf("no operation %q", r.Name)), nil
	}
	reply, files, err := op(ctx, r.Args)
	return newAnswer(reply, err), files
}

// helper is the parent's side.
type helper struct {
	conn *net.UnixConn
	proc *os.Process
	in   *buffer
}

// callHelperLocked starts the helper if there is none, asks and waits.
func (n *NS) callHelperLocked(ctx context.Context, name string, args []byte, sent []int) ([]byte, []int, error) {
	if n.helper == nil {
		h, err := startHelper(n.userFd, n.fd)
		if err != nil {
			return nil, nil, fmt.Errorf("start a helper inside: %w", err)
		}
		n.helper = h
	}
	reply, fds, err := n.helper.call(ctx, name, args, sent)
	if err != nil && !errors.As(err, new(*remoteError)) && !errors.Is(err, errCutFiles) {
		// Question and answer are no longer in step, or it is gone.
		err = errors.Join(err, n.helper.close())
		n.helper = nil
		if ctx.Err() != nil {
			err = ctx.Err()
		}
	}
	return reply, fds, err
}

// Answers calls f, if there is a helper, with a descriptor that is readable when that has answered, for a program that keeps
// Go's poller from looking for long. The descriptor is the NS's, and closed with the helper. It waits for a call that is under way.
func (n *NS) Answers(f func(fd int)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.helper == nil {
		return
	}
	if raw, err := n.helper.conn.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { f(int(fd)) })
	}
}

func (h *helper) call(ctx context.Context, name string, args []byte, sent []int) ([]byte, []int, error) {
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		h.conn.SetDeadline(time.Unix(1, 0))
	})
	defer func() {
		if !stop() {
			<-interrupted
		}
	}()
	if err := send(h.conn, request{name, args}, sent); err != nil {
		return nil, nil, fmt.Errorf("ask the helper: %w", err)
	}
	var a answer
	fds, err := h.in.receive(h.conn, &a)
	if errors.Is(err, errCutFiles) {
		return nil, nil, err // the whole answer was read: the next one will be the next call's
	}
	if errors.Is(err, io.EOF) {
		return nil, nil, errors.New("the helper has ended (its stderr is ours)")
	}
	if err != nil {
		return nil, nil, fmt.Errorf("the helper's answer: %w", err)
	}
	reply, err := a.result()
	if err != nil {
		closeFDs(fds)
		return nil, nil, err
	}
	return reply, fds, nil
}

// close ends the helper and reaps it.
func (h *helper) close() error {
	h.conn.Close()
	kill := time.AfterFunc(endGrace, func() { h.proc.Kill() })
	defer kill.Stop()
	_, err := h.proc.Wait()
	return err
}
