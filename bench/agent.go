package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

const agentArg = "agent" // bench as an agent: not for people

// An operation is what an agent can do. ready may be called once others may begin, release is closed when
// whatever is held should be let go; an operation that needs neither ends by itself within its own bounds.
type operation func(ctx context.Context, params json.RawMessage, ready func(), release <-chan struct{}) (any, error)

// op makes an operation of a function with typed parameters.
func op[P any](f func(ctx context.Context, p P, ready func(), release <-chan struct{}) (any, error)) operation {
	return func(ctx context.Context, raw json.RawMessage, ready func(), release <-chan struct{}) (any, error) {
		var p P
		if err := json.Unmarshal(raw, &p); err != nil {
			return nil, fmt.Errorf("parameters: %w", err)
		}
		return f(ctx, p, ready, release)
	}
}

type releaseParams struct{ ID int }

var operations = map[string]operation{
	"hello": op(func(context.Context, *struct{}, func(), <-chan struct{}) (any, error) {
		return struct{ PID int }{os.Getpid()}, nil
	}),
	"sysctl":   op(opSysctl),
	"run":      op(opRun),
	"iperf":    op(opIperfServer),
	"echo":     op(opEcho),
	"tcp-rr":   op(opTCPRR),
	"tcp-crr":  op(opTCPCRR),
	"tcp-hold": op(opTCPHold),
	"udp-rr":   op(opUDPRR),
	"udp-hold": op(opUDPHold),
	"udp-send": op(opUDPSend),
	"udp-recv": op(opUDPRecv),
	"seen":     op(opSeen),
}

// serveAgent does what in tells, each on a goroutine of its own, until in ends.
func serveAgent(in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(context.Background())
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex // out, held
		held = map[int]chan struct{}{}
	)
	defer wg.Wait()
	defer cancel()
	answer := func(m message) {
		line, err := json.Marshal(m)
		if err != nil {
			line, _ = json.Marshal(message{ID: m.ID, Error: err.Error()})
		}
		mu.Lock()
		defer mu.Unlock()
		out.Write(append(line, '\n')) // a reader that is gone has closed in too
	}
	scan := bufio.NewScanner(in)
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		var m message
		if err := json.Unmarshal(scan.Bytes(), &m); err != nil {
			return err
		}
		if m.Op == "release" {
			var p releaseParams
			err := json.Unmarshal(m.Params, &p)
			mu.Lock()
			if c := held[p.ID]; c != nil {
				close(c)
				delete(held, p.ID)
			}
			mu.Unlock()
			answer(last(m.ID, struct{}{}, err))
			continue
		}
		f := operations[m.Op]
		if f == nil {
			answer(message{ID: m.ID, Error: "unknown operation " + m.Op})
			continue
		}
		release := make(chan struct{})
		mu.Lock()
		held[m.ID] = release
		mu.Unlock()
		wg.Go(func() {
			result, err := f(ctx, m.Params, func() { answer(message{ID: m.ID, Ready: true}) }, release)
			mu.Lock()
			delete(held, m.ID)
			mu.Unlock()
			answer(last(m.ID, result, err))
		})
	}
	return scan.Err()
}

// last is the message that ends a call.
func last(id int, result any, err error) message {
	if err != nil {
		return message{ID: id, Error: err.Error()}
	}
	raw, err := json.Marshal(result)
	if err != nil {
		return message{ID: id, Error: err.Error()}
	}
	return message{ID: id, Result: raw}
}

// sysctlParams are files below /proc/sys/net of the agent's namespace, and what to write.
type sysctlParams struct{ Set map[string]string }

// opSysctl sets, and returns the values that are there afterwards.
func opSysctl(_ context.Context, p sysctlParams, _ func(), _ <-chan struct{}) (any, error) {
	is := map[string]string{}
	for name, value := range p.Set {
		text, err := setSysctl(name, value)
		if err != nil {
			return nil, err
		}
		is[name] = text
	}
	return is, nil
}

// setSysctl writes one unless value is empty, and returns what is there then.
func setSysctl(name, value string) (string, error) {
	path := "/proc/sys/net/" + name
	if value != "" {
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			return "", err
		}
	}
	text, err := os.ReadFile(path)
	return strings.Join(strings.Fields(string(text)), " "), err
}

// runParams is a command, given Timeout.
type runParams struct {
	Args    []string
	Timeout time.Duration
}

// runResult is what it printed. Stdout may hold the reason of a failure, as iperf3's does.
type runResult struct {
	Stdout, Stderr string
	Status         int
}

func opRun(ctx context.Context, p runParams, _ func(), _ <-chan struct{}) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, p.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.Args[0], p.Args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && ctx.Err() == nil {
		err = nil
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("%s did not end within %v", p.Args[0], p.Timeout)
	}
	if err != nil {
		return nil, err
	}
	return runResult{out.String(), errs.String(), cmd.ProcessState.ExitCode()}, nil
}
