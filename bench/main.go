package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// minDuration is the shortest load: in less a sender may not get the processor at all.
const minDuration = 50 * time.Millisecond

// options are what the user asked for.
type options struct {
	only     *regexp.Regexp
	peers    []string // nil: all that are installed
	samples  int
	duration time.Duration // of one load
	mtus     []int
	out      string // directory, absolute
	usernet  string // binary, absolute
	foreign  float64
	quick    bool
}

func main() {
	if len(os.Args) == 2 {
		switch os.Args[1] {
		case agentArg:
			if err := serveAgent(os.Stdin, os.Stdout); err != nil {
				fmt.Fprintln(os.Stderr, "agent:", err)
				os.Exit(1)
			}
			return
		case containArg:
			if err := contain(); err != nil {
				fmt.Fprintln(os.Stderr, "contain:", err)
				os.Exit(1)
			}
			return
		}
	}
	o, err := parse(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer stop()
	if os.Getenv(innerEnv) == "" {
		err = outer(ctx, os.Args[1:])
	} else {
		err = inner(ctx, o)
	}
	if exit := (*exitError)(nil); errors.As(err, &exit) {
		os.Exit(exit.status) // inner has said why
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// parse reads the flags; help goes to w.
func parse(args []string, w io.Writer) (options, error) {
	var o options
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(w)
	f.Usage = func() {
		fmt.Fprintf(w, "Measures usernet beside what else is installed. Usage: bench [flags]\n\nAxes:\n")
		for _, a := range axes {
			fmt.Fprintf(w, "  %-18s %s\n", a.name, a.title)
		}
		fmt.Fprintf(w, "\nContenders: %s\n\nFlags:\n", strings.Join(contenderNames(), " "))
		f.PrintDefaults()
	}
	only := f.String("only", "", "axes whose name this `regexp` matches")
	peers := f.String("peers", "", "`names` of contenders, by commas (default: all that are installed)")
	samples := f.Int("samples", 0, "`number` of samples of each figure (default 5; quick: 3)")
	duration := f.Duration("duration", 0, "`time` of each load (default 2s; quick: 500ms); round trips take half of it, floods a quarter")
	mtu := f.String("mtu", "", "MTU `list`, by commas; the first serves the axes that do not depend on it (default 65520,1500)")
	out := f.String("out", filepath.Join("bench", "results"), "`directory` for the results")
	usernet := f.String("usernet", filepath.Join("bin", "usernet"), "the `binary` to measure")
	f.Float64Var(&o.foreign, "foreign", 0.05, "`share` of the machine's CPU that others may take during a sample, before it is taken again")
	f.BoolVar(&o.quick, "quick", false, "the core of it, in under three minutes")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unknown argument %q: see bench -help", f.Arg(0))
	}
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		return o, fmt.Errorf("-only: %w", err)
	}
	if *peers != "" {
		o.peers = strings.Split(*peers, ",")
		for _, p := range o.peers {
			if !known(p) {
				return o, fmt.Errorf("-peers: no contender %q: there are %s", p, strings.Join(contenderNames(), " "))
			}
		}
	}
	o.samples, o.duration = *samples, *duration
	if o.samples == 0 {
		o.samples = 5
		if o.quick {
			o.samples = 3
		}
	}
	if o.duration == 0 {
		o.duration = 2 * time.Second
		if o.quick {
			o.duration = 500 * time.Millisecond
		}
	}
	// A minute bounds what a load can keep in memory, and a hundred samples how long a typing error takes.
	if o.samples < 1 || o.samples > 100 || o.duration < minDuration || o.duration > time.Minute {
		return o, errors.New("-samples is 1 to 100 and -duration 50ms to 1m")
	}
	if *mtu == "" {
		*mtu = "65520,1500"
	}
	for _, s := range strings.Split(*mtu, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1280 || n > 65520 {
			return o, fmt.Errorf("-mtu %q: 1280 to 65520 octets, by commas", *mtu)
		}
		o.mtus = append(o.mtus, n)
	}
	if o.out, err = filepath.Abs(*out); err != nil {
		return o, err
	}
	o.usernet, err = filepath.Abs(*usernet)
	return o, err
}
