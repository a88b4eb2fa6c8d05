package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// An ending is why a life ends well. It is the error by which the parts of a group tell each other to stop.
type ending struct{ why string }

func (e ending) Error() string { return e.why }

// newLog logs to standard error. A reader who has gone must not end us: SIGPIPE is caught, so that the
// write fails and the line is lost.
func newLog(o *options) *slog.Logger { return newLogTo(os.Stderr, o) }

func newLogTo(w io.Writer, o *options) *slog.Logger {
	fmt.Fprint(io.Discard, time.Now()) // reads the time zone, while there are files to read
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	opts := &slog.HandlerOptions{Level: o.logLevel}
	if o.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// minFiles are the descriptors without which nothing works: 30 or so that are ours, and a few flows.
const minFiles = 64

// checkFiles refuses a limit on open files with which something would fail later, and less plainly.
// Go's runtime has made the hard limit the soft one.
func checkFiles() error {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return fmt.Errorf("getrlimit(RLIMIT_NOFILE): %w", err)
	}
	if r.Cur < minFiles {
		return fmt.Errorf("the limit of open files is %d, and usernet needs %d, better 1024 or more, as each connection takes one: "+
			"ulimit -n 1024, LimitNOFILE= of a systemd unit, --ulimit nofile= of a container", r.Cur, minFiles)
	}
	return nil
}

// raiseFiles makes the hard limit on open files the soft one, and returns it: each flow holds one.
func raiseFiles() (int, error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, fmt.Errorf("getrlimit(RLIMIT_NOFILE): %w", err)
	}
	r.Cur = r.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, fmt.Errorf("setrlimit(RLIMIT_NOFILE, %d): %w", r.Max, err)
	}
	return int(min(r.Cur, 1<<20)), nil
}

// endOnHangUp waits for the other end of f to be closed; nil f never is.
func endOnHangUp(ctx context.Context, f *os.File) error {
	if f == nil {
		return nil
	}
	switch err := hungUp(ctx, int(f.Fd())); {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	return ending{f.Name() + " hung up"}
}

// goEach runs functions until all have returned; the first error cancels the others' context.
func goEach(ctx context.Context, fs ...func(context.Context) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, f := range fs {
		g.Go(func() error { return f(ctx) })
	}
	return g.Wait()
}

// checkProc refuses a mount namespace without /proc, where what follows would name one missing file or the other.
func checkProc() error {
	if _, err := os.Lstat("/proc/self/ns"); err != nil {
		return fmt.Errorf("/proc is not mounted, and usernet needs it: mount -t proc proc /proc: %w", err)
	}
	return nil
}
