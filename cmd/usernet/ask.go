package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"usernet/portdriver"
)

// A question is what "usernet port" and "usernet info" ask of a running usernet over its control socket.
type question struct {
	verb   string   // add, list, remove or info
	socket string   // "" looks for the only one
	json   bool     // the answer as the API gave it
	drain  bool     // remove: let connections end by themselves
	ids    []int    // remove
	specs  []string // add: checked where they are carried out

	network, name string // a member of a shared network, in the place of socket
}

// questionFlags are the flags of one verb.
type questionFlags struct {
	set  *pflag.FlagSet
	q    *question
	help bool
}

func newQuestionFlags(verb string) *questionFlags {
	f := &questionFlags{set: pflag.NewFlagSet("usernet", pflag.ContinueOnError), q: &question{verb: verb}}
	f.set.SortFlags = false
	f.set.StringVar(&f.q.socket, "socket", "", "`FILE` of the control socket (default: $USERNET_SOCKET, else the only one in $XDG_RUNTIME_DIR/usernet)")
	f.set.StringVar(&f.q.network, "network", "", "shared network whose `NAME` that is, in the place of --socket")
	f.set.StringVar(&f.q.name, "name", "", "`NAME` of a member of --network")
	if verb == "remove" {
		f.set.BoolVar(&f.q.drain, "drain", false, "let connections end by themselves instead of resetting them")
	} else {
		f.set.BoolVar(&f.q.json, "json", false, "the answer as JSON")
	}
	f.set.BoolVarP(&f.help, "help", "h", false, "print usernet's help")
	return f
}

// parseQuestion reads what follows "port" or "info".
func parseQuestion(args []string, env func(string) string) (*options, error) {
	verb, args := args[0], args[1:]
	if verb == "port" {
		if len(args) == 0 {
			return nil, errors.New("port what? add, list or remove")
		}
		verb, args = args[0], args[1:]
		switch verb {
		case "add", "list", "remove":
		case "ls":
			verb = "list"
		case "rm":
			verb = "remove"
		case "-h", "--help", "help":
			return &options{command: cmdHelp}, nil
		default:
			return nil, fmt.Errorf("port %s: must be add, list or remove", verb)
		}
	}
	f := newQuestionFlags(verb)
	f.set.Usage = func() {}
	if err := f.set.Parse(args); err != nil {
		return nil, err
	}
	if f.help {
		return &options{command: cmdHelp}, nil
	}
	q := f.q
	if f.set.Changed("socket") && q.socket == "" {
		return nil, errors.New("--socket is empty")
	}
	if (q.network == "") != (q.name == "") {
		return nil, errors.New("--network and --name belong together: they say which member of which shared network")
	}
	if q.network != "" && q.socket != "" {
		return nil, errors.New("--socket and --network contradict each other")
	}
	if q.network == "" {
		q.socket = or(q.socket, env("USERNET_SOCKET"))
	}
	rest := f.set.Args()
	switch verb {
	case "add":
		if len(rest) == 0 {
			return nil, errors.New("port add: which? for example 8080:80, 127.0.0.1:5353:53/udp or [::1]:9000-9010:9000-9010")
		}
		for _, s := range rest {
			if _, auto, _ := portdriver.ParseAuto(s); auto {
				return nil, fmt.Errorf("port add %s: auto is for --publish, when usernet starts", s)
			}
		}
		q.specs = rest
	case "remove":
		if len(rest) == 0 {
			return nil, errors.New("port remove: which? give the numbers that port list shows")
		}
		for _, s := range rest {
			id, err := strconv.Atoi(strings.TrimPrefix(s, "#"))
			if err != nil || id < 1 {
				return nil, fmt.Errorf("port remove %s: must be a number that port list shows", s)
			}
			q.ids = append(q.ids, id)
		}
	default:
		if len(rest) > 0 {
			return nil, fmt.Errorf("unexpected argument %q", rest[0])
		}
	}
	return &options{command: cmdAsk, question: q}, nil
}
