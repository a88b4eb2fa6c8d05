package network

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestLock(t *testing.T) {
	d := openDir(t)
	held, err := d.Lock(t.Context(), "usernet attach")
	want(t, err, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = d.Lock(ctx, "usernet run")
	want(t, err, context.Canceled, d.Path()+"/state.lock", fmt.Sprint("process ", os.Getpid()), "usernet attach")
	ctx, cancel = context.WithTimeoutCause(t.Context(), time.Millisecond, errors.New("the starter is slow"))
	defer cancel()
	_, err = d.Lock(ctx, "usernet run")
	if err == nil || !strings.Contains(err.Error(), "the starter is slow") || !strings.Contains(err.Error(), "usernet attach") {
		t.Error(err)
	}
	got := make(chan error, 1)
	go func() {
		l, err := d.Lock(t.Context(), "usernet run")
		if err == nil {
			err = l.Unlock()
		}
		got <- err
	}()
	want(t, held.Unlock(), nil)
	want(t, <-got, nil)
}

// One at a time, in one process as in several.
func TestLockExcludes(t *testing.T) {
	d := openDir(t)
	var wg sync.WaitGroup
	inside := make(chan struct{}, 1)
	for range 8 {
		wg.Go(func() {
			for range 5 {
				l, err := d.Lock(t.Context(), "usernet test")
				if err != nil {
					t.Error(err)
					return
				}
				select {
				case inside <- struct{}{}:
					<-inside
				default:
					t.Error("two are inside")
				}
				if err := l.Unlock(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// Whatever ends the holder, its lock is gone; while it lives, who waits is told of it.
func TestLockOfKilled(t *testing.T) {
	d := openDir(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "TEST_LOCK="+d.Path())
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	want(t, err, nil)
	want(t, cmd.Start(), nil)
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "locked\n" {
		t.Fatal(line, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = d.Lock(ctx, "usernet run")
	want(t, err, context.Canceled, fmt.Sprint("process ", cmd.Process.Pid), "usernet test", "end it")
	want(t, cmd.Process.Kill(), nil)
	l, err := d.Lock(t.Context(), "usernet run")
	want(t, err, nil)
	want(t, l.Unlock(), nil)
}

// A file that somebody has filled is no reason not to lock it.
func TestLockHolderNonsense(t *testing.T) {
	for _, data := range []string{"", "{", `{"pid":-1}`, `{"pid":"x"}`, strings.Repeat("x", 10_000)} {
		d := openDir(t)
		put(t, d, lockFile, data, 0o600)
		f, err := os.Open(d.Path() + "/" + lockFile)
		want(t, err, nil)
		if got := heldBy(f); got != "" {
			t.Errorf("%q: %s", data, got)
		}
		want(t, f.Close(), nil)
		l, err := d.Lock(t.Context(), "usernet run")
		want(t, err, nil)
		want(t, l.Unlock(), nil)
	}
}
