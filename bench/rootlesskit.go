package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
)

// rootlesskitPresent wants, besides the programs, a user with subordinate IDs, whom only the machine's root can make up.
func rootlesskitPresent(l *lab) error {
	for program, debian := range map[string]string{"rootlesskit": "rootlesskit", "slirp4netns": "slirp4netns", "newuidmap": "uidmap"} {
		if err := installed(program, debian)(l); err != nil {
			return fmt.Errorf("%s: %w", program, err)
		}
	}
	if !l.root {
		return errors.New("needs subordinate IDs, which bench gives it only as the machine's root")
	}
	return l.rootlesskit
}

// startRootlesskit differs from the others: rootlesskit makes the container, so the agent is its command.
func startRootlesskit(ctx context.Context, l *lab, mtu int, publish []forward) (*instance, error) {
	args := []string{"rootlesskit", "--net=slirp4netns", "--mtu=" + strconv.Itoa(mtu), "--port-driver=builtin",
		"--state-dir=" + filepath.Join(l.scratch, "home", "rootlesskit")}
	for _, f := range publish {
		args = append(args, "--publish", fmt.Sprintf("0.0.0.0:%d:%d/tcp", f.host, f.container))
	}
	cmd := l.homeCommand(append(args, l.self(), agentArg)...)
	container, err := startAgent(ctx, "rootlesskit's container", cmd, func() error { return cmd.Start() })
	if err != nil {
		return nil, err
	}
	in := &instance{container: container, stop: container.close}
	in.account = account{roots: []int{cmd.Process.Pid}, except: []int{container.pid}}
	if err := prepareContainer(ctx, l, container); err != nil {
		in.stop()
		return nil, err
	}
	return in, nil
}
