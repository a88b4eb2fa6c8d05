// Without this the runtime keeps the files of our control group's CPU limit open, for a GOMAXPROCS that setProcs chooses
// otherwise: they would have a number that --exit-fd or --ready-fd may name although nobody has passed it to us.

//go:debug containermaxprocs=0
package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"

	"usernet/tap"
	"usernet/tap/bridge"
	"usernet/tap/inside"
	"usernet/tap/netns"
)

// Exit statuses. Those of run are env(1)'s, so that the command's own can be told from them.
const (
	statusFailure       = 1
	statusUsage         = 2
	statusOurs          = 125
	statusNotExecutable = 126
	statusNotFound      = 127
	statusSignal        = 128 // plus the signal's number
)

func main() {
	// A thread of our own for all that main does: a child's life hangs on that of the thread
	// which started it (see stage), and a helper's on nothing else than the process.
	runtime.LockOSThread()
	switch {
	case netns.IsHelper():
		os.Exit(netns.HelperMain(ops()))
	case isStage(os.Args):
		os.Exit(stageMain(os.Args))
	case isGuard(os.Args):
		os.Exit(guardMain())
	case isBelow(os.Args):
		os.Exit(belowMain(os.Args))
	case isExec(os.Args):
		os.Exit(execMain(os.Args))
	case isKeeper(os.Args):
		os.Exit(keeperMain(os.Args))
	}
	setProcs()
	if isDaemon(os.Args) {
		os.Exit(daemonMain(os.Args))
	}
	if argv, is := slirpArgv(os.Args); is {
		os.Exit(slirp(argv))
	}
	os.Exit(usernet(os.Args[1:]))
}

// ops are what the helper knows.
func ops() netns.Ops {
	all := tap.Ops()
	maps.Copy(all, inside.Ops())
	maps.Copy(all, bridge.Ops())
	all[opConfine], all[opConfineMore] = confinedHelper(confine), confinedHelper(confineMore)
	return all
}

// setProcs takes a quarter of the machine's cores, at least one and at most four, unless GOMAXPROCS says
// otherwise. A packet passes three or four goroutines, which hand it over on one thread where there is one
// processor for them; with more, each hand-over wakes another thread, which costs more than the work that
// it does: docs/performance.md has the figures. The container and what it talks to need the other cores.
func setProcs() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(min(max(runtime.NumCPU()/4, 1), 4))
	}
}

// usernet does what argv says and returns the exit status.
func usernet(args []string) int {
	o, err := parse(args, os.Getenv)
	if err == nil {
		switch o.command {
		case cmdHelp:
			fmt.Print(helpText())
		case cmdVersion:
			fmt.Print(versionText())
		case cmdAsk:
			err = ask(o.question, os.Stdout)
		case cmdRun:
			var status int
			if status, err = run(o, newLog(o)); err == nil {
				return status
			}
		case cmdOrder:
			var status int
			if status, err = obey(o.order, os.Stdout); err == nil {
				return status
			}
		case cmdAttach:
			err = attach(o, newLog(o))
		}
	}
	if err == nil {
		return 0
	}
	fmt.Fprintf(os.Stderr, "usernet: %v\n", err)
	var usage usageError
	if errors.As(err, &usage) {
		fmt.Fprintln(os.Stderr, `Try "usernet help".`)
	}
	var s statusError
	switch {
	case errors.As(err, &s):
		return s.status
	case len(args) > 0 && args[0] == "run":
		return statusOurs
	case errors.As(err, &usage):
		return statusUsage
	}
	return statusFailure
}

// A statusError ends the process with a status of its own.
type statusError struct {
	error
	status int
}

func (e statusError) Unwrap() error { return e.error }
