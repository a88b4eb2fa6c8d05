package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"time"
)

// debianRootlesskit and builtRootlesskit name the program, or "" where there is none: the distribution's, of the first
// version, and the one that bench/setup has built of the module that usernet's own API is of.
func debianRootlesskit(*lab) string  { return "rootlesskit" }
func builtRootlesskit(l *lab) string { return l.rootlesskit3 }

// A kit is a way to have rootlesskit bring a network into a container: its drivers for the network and for published ports.
type kit struct {
	name         string
	program      func(*lab) string
	net, publish string
}

var (
	debianKit = kit{"rootlesskit", debianRootlesskit, "slirp4netns", "builtin"}
	builtKit  = kit{"rootlesskit3", builtRootlesskit, "slirp4netns", "builtin"}
	// vsockKit is gvisor-tap-vsock, whose library rootlesskit has: the same netstack as usernet's.
	vsockKit = kit{"gvisor-tap-vsock", builtRootlesskit, "gvisor-tap-vsock", "gvisor-tap-vsock"}
)

// present wants, besides the programs, a user with subordinate IDs, whom only the machine's root can make up.
func (k kit) present(l *lab) error {
	if k.program(l) == "" {
		return errors.New("not built (bench/setup builds it)")
	}
	for program, debian := range map[string]string{k.program(l): "rootlesskit", "slirp4netns": "slirp4netns", "newuidmap": "uidmap"} {
		if err := installed(program, debian)(l); err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(program), err)
		}
	}
	if !l.root {
		return errors.New("needs subordinate IDs, which bench gives it only as the machine's root")
	}
	return l.rootlesskit
}

func (k kit) version(l *lab) string {
	return fmt.Sprintf("%s with the network driver %s and the port driver %s", firstLine(k.program(l), "--version"), k.net, k.publish)
}

// start differs from the others: rootlesskit makes the container, so the agent is its command.
func (k kit) start(ctx context.Context, l *lab, mtu int, publish []forward) (*instance, error) {
	state := filepath.Join(l.scratch, "home", k.name)
	args := []string{k.program(l), "--net=" + k.net, "--mtu=" + strconv.Itoa(mtu), "--port-driver=" + k.publish, "--state-dir=" + state}
	for _, f := range publish {
		args = append(args, "--publish", fmt.Sprintf("0.0.0.0:%d:%d/%s", f.host, f.container, f.proto))
	}
	cmd := l.homeCommand(append(args, l.self(), agentArg)...)
	begin := time.Now()
	container, err := startAgent(ctx, k.name+"'s container", cmd, cmd.Start)
	if err != nil {
		return nil, err
	}
	in := &instance{container: container, stop: container.close, socket: filepath.Join(state, "api.sock"), ready: time.Since(begin)}
	in.account = account{roots: []int{cmd.Process.Pid}, except: []int{container.pid}}
	if err := prepareContainer(ctx, l, container); err != nil {
		in.stop()
		return nil, err
	}
	return in, nil
}
