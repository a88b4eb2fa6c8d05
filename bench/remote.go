package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// message is a line in either direction between bench and an agent. A call has Op and Params; its
// answers have the call's ID: any number with Ready set, and a last one with Result or Error.
type message struct {
	ID     int             `json:"id"`
	Op     string          `json:"op,omitempty"`
	Params json.RawMessage `json:"params,omitempty"`
	Ready  bool            `json:"ready,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  string          `json:"error,omitempty"`
}

// An agent is the near end of a process that generates load somewhere.
type agent struct {
	name string
	pid  int // of the process in the namespace
	cmd  *exec.Cmd
	in   io.WriteCloser
	errs tail
	done chan struct{} // closed when the process's output has ended

	mu     sync.Mutex
	lastID int
	calls  map[int]*call
}

// A call is something that an agent is doing.
type call struct {
	id    int
	agent *agent
	ready chan struct{} // closed at the first Ready, or at the end
	end   chan struct{}
	once  sync.Once
	last  message
}

// startAgent starts cmd, which must become serveAgent, by start (on the thread of its place).
func startAgent(ctx context.Context, name string, cmd *exec.Cmd, start func() error) (*agent, error) {
	a := &agent{name: name, cmd: cmd, calls: map[int]*call{}, done: make(chan struct{})}
	var err error
	if a.in, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = &a.errs
	if err := start(); err != nil {
		return nil, fmt.Errorf("start the agent of %s: %w", name, err)
	}
	go a.listen(out)
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var hello struct{ PID int }
	if err := a.do(ctx, "hello", nil, &hello); err != nil {
		a.close()
		return nil, fmt.Errorf("the agent of %s: %w", name, err)
	}
	a.pid = hello.PID
	return a, nil
}

func (a *agent) listen(out io.Reader) {
	defer close(a.done)
	scan := bufio.NewScanner(out)
	scan.Buffer(nil, 16<<20) // iperf3's report of 8 streams is 100 KiB
	for scan.Scan() {
		var m message
		if err := json.Unmarshal(scan.Bytes(), &m); err != nil {
			continue // rootlesskit's own words, before its command runs
		}
		a.mu.Lock()
		c := a.calls[m.ID]
		if !m.Ready {
			delete(a.calls, m.ID)
		}
		a.mu.Unlock()
		if c == nil {
			continue // nobody waits any longer
		}
		c.once.Do(func() { close(c.ready) })
		if !m.Ready {
			c.last = m
			close(c.end)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, c := range a.calls {
		delete(a.calls, id)
		c.last.Error = "the agent ended: " + a.errs.String()
		c.once.Do(func() { close(c.ready) })
		close(c.end)
	}
	a.calls = nil
}

// start begins op. Its end is asked for with wait.
func (a *agent) start(op string, params any) *call {
	c := &call{agent: a, ready: make(chan struct{}), end: make(chan struct{})}
	fail := func(err error) *call {
		c.last.Error = err.Error()
		close(c.ready)
		close(c.end)
		return c
	}
	raw, err := json.Marshal(params)
	if err != nil {
		return fail(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.calls == nil {
		return fail(errors.New("the agent has ended: " + a.errs.String()))
	}
	a.lastID++
	c.id = a.lastID
	line, err := json.Marshal(message{ID: c.id, Op: op, Params: raw})
	if err != nil {
		return fail(err)
	}
	a.calls[c.id] = c
	if _, err := a.in.Write(append(line, '\n')); err != nil {
		delete(a.calls, c.id)
		return fail(err)
	}
	return c
}

// do starts op and waits for its result, which may be nil when none is wanted.
func (a *agent) do(ctx context.Context, op string, params, result any) error {
	return a.start(op, params).wait(ctx, result)
}

// waitReady waits until the agent says that others may begin.
func (c *call) waitReady(ctx context.Context) error {
	select {
	case <-c.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-c.end:
		return c.wait(ctx, nil)
	default:
		return nil
	}
}

// wait waits for the last answer.
func (c *call) wait(ctx context.Context, result any) error {
	select {
	case <-c.end:
	case <-ctx.Done():
		return ctx.Err()
	}
	if c.last.Error != "" {
		return fmt.Errorf("in %s: %s", c.agent.name, c.last.Error)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(c.last.Result, result)
}

// release ends a call that holds something until told.
func (c *call) release(ctx context.Context) error {
	return errors.Join(c.agent.do(ctx, "release", releaseParams{ID: c.id}, nil), c.wait(ctx, nil))
}

// close ends the agent, by the end of its input, and what it started.
func (a *agent) close() {
	a.in.Close()
	select {
	case <-a.done:
	case <-time.After(3 * time.Second): // it is bounded, but a load may be in its last second
		a.cmd.Process.Kill()
		<-a.done
	}
	a.cmd.Wait() // its status says nothing more
}

// tail keeps the last few kilobytes written to it.
type tail struct {
	mu   sync.Mutex
	text []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if len(t.text) > 4096 {
		t.text = t.text[len(t.text)-4096:]
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.text))
}
