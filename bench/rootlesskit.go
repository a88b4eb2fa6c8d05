package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
)

// debianRootlesskit and builtRootlesskit name the program, or "" where there is none: the distribution's, of the first
// version, and the one that bench/setup has built of the module that usernet's own API is of.
func debianRootlesskit(*lab) string  { return "rootlesskit" }
func builtRootlesskit(l *lab) string { return l.rootlesskit3 }

// rootlesskitPresent wants, besides the programs, a user with subordinate IDs, whom only the machine's root can make up.
func rootlesskitPresent(program func(*lab) string) func(*lab) error {
	return func(l *lab) error {
		if program(l) == "" {
			return errors.New("not built (bench/setup builds it)")
		}
		for program, debian := range map[string]string{program(l): "rootlesskit", "slirp4netns": "slirp4netns", "newuidmap": "uidmap"} {
			if err := installed(program, debian)(l); err != nil {
				return fmt.Errorf("%s: %w", filepath.Base(program), err)
			}
		}
		if !l.root {
			return errors.New("needs subordinate IDs, which bench gives it only as the machine's root")
		}
		return l.rootlesskit
	}
}

func rootlesskitVersion(program func(*lab) string) func(*lab) string {
	return func(l *lab) string {
		return firstLine(program(l), "--version") + " with slirp4netns and its builtin port driver"
	}
}

// startRootlesskit differs from the others: rootlesskit makes the container, so the agent is its command.
func startRootlesskit(name string, program func(*lab) string) func(context.Context, *lab, int, []forward) (*instance, error) {
	return func(ctx context.Context, l *lab, mtu int, publish []forward) (*instance, error) {
		state := filepath.Join(l.scratch, "home", name)
		args := []string{program(l), "--net=slirp4netns", "--mtu=" + strconv.Itoa(mtu), "--port-driver=builtin", "--state-dir=" + state}
		for _, f := range publish {
			args = append(args, "--publish", fmt.Sprintf("0.0.0.0:%d:%d/%s", f.host, f.container, f.proto))
		}
		cmd := l.homeCommand(append(args, l.self(), agentArg)...)
		container, err := startAgent(ctx, name+"'s container", cmd, cmd.Start)
		if err != nil {
			return nil, err
		}
		in := &instance{container: container, stop: container.close, socket: filepath.Join(state, "api.sock")}
		in.account = account{roots: []int{cmd.Process.Pid}, except: []int{container.pid}}
		if err := prepareContainer(ctx, l, container); err != nil {
			in.stop()
			return nil, err
		}
		return in, nil
	}
}
