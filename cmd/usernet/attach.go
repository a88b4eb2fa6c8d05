package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"usernet/tap/netns"
)

// attach is usernet PID|PATH: it serves that namespace until an end comes, which is no error.
func attach(o *options, log *slog.Logger) (err error) {
	given, err := takeInherited(o)
	if err != nil {
		return err
	}
	if err := errors.Join(checkFiles(), checkProc()); err != nil {
		return err
	}
	// SIGHUP ends as well, unless nohup(1) has it ignored: a terminal that is closed is no reason to
	// leave a TAP behind. SIGINT does even where it is ignored, as shells without job control start what is
	// behind "&".
	ends := append(notIgnored([]os.Signal{unix.SIGHUP}), unix.SIGTERM, unix.SIGINT)
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	defer stop()

	warnShadowed(o.plan, log)
	e, err := openEngine(ctx, o, netns.Config{PID: o.pid, Path: o.path, UserPath: o.usernsPath}, log)
	if err != nil {
		return endedBySignal(ctx, err, log)
	}
	defer func() { err = errors.Join(err, e.close()) }()
	var pid *pidFile
	if o.pidFile != "" {
		if pid, err = writePIDFile(o.pidFile); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, pid.remove()) }()
	}
	if o.sandbox {
		confine(e.confinement(pid), log)
	}
	err = goEach(ctx,
		func(ctx context.Context) error {
			return e.run(ctx, func() error {
				fmt.Print(o.banner)
				if err := sayReady(given.ready); err != nil {
					log.Warn("nobody listens on --ready-fd", "error", err)
				}
				return nil
			})
		},
		func(ctx context.Context) error { return endOnHangUp(ctx, given.exit) },
		e.endWithNamespace,
	)
	err = endedBySignal(ctx, err, log)
	logStats(log, e)
	return err
}

// endedBySignal makes of an error none if it is an ending, or came of a signal's.
func endedBySignal(ctx context.Context, err error, log *slog.Logger) error {
	var why ending
	switch {
	case ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)):
		log.Info("ending", "reason", context.Cause(ctx))
		return nil
	case errors.As(err, &why):
		log.Info("ending", "reason", why)
		return nil
	}
	return err
}

// inheritedFiles are what --ready-fd and --exit-fd name; nil: not given.
type inheritedFiles struct{ ready, exit *os.File }

// takeInherited comes before anything else is opened: a number that nobody gave to us must not
// turn out to be a file of ours.
func takeInherited(o *options) (given inheritedFiles, err error) {
	if o.tapFD >= 0 {
		if err := takeTAP(o); err != nil {
			return given, err
		}
	}
	if o.looseFDs {
		return takeLoose(o)
	}
	if o.readyFD >= 0 {
		if given.ready, err = inherited("ready-fd", o.readyFD); err != nil {
			return given, err
		}
	}
	if o.exitFD >= 0 {
		given.exit, err = inherited("exit-fd", o.exitFD)
	}
	return given, err
}
