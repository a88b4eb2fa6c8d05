package main

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"syscall"
	"testing"
	"time"
)

// The test binary starts itself in one of these roles, by an environment variable.
var roles = map[string]func() int{
	"confined": confinedRole,
	"mounts":   mountsRole,
	"terminal": terminalRole,
}

const roleVariable = "USERNET_TEST_ROLE"

func TestMain(m *testing.M) {
	if isGuard(os.Args) {
		os.Exit(guardMain())
	}
	if role := roles[os.Getenv(roleVariable)]; role != nil {
		os.Exit(role())
	}
	// os/signal's goroutine stays once it has begun, and a run of fuzzing begins it.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGWINCH)
	files, goroutines := openFiles(), runtime.NumGoroutine()
	code := m.Run()
	if code == 0 && !settles(func() bool { return openFiles() <= files && runtime.NumGoroutine() <= goroutines }) {
		fmt.Fprintf(os.Stderr, "left behind: %d files, %d goroutines more than before\n", openFiles()-files, runtime.NumGoroutine()-goroutines)
		pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
		code = 1
	}
	os.Exit(code)
}

// openFiles counts regular files, pipes, terminals and sockets: the poller's own descriptors come and stay.
func openFiles() int {
	n := 0
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && to != "" && to[0] != 'a' {
			n++
		}
	}
	return n
}

// settles waits for a condition that goroutines on their way out bring about.
func settles(ok func() bool) bool {
	for range 500 {
		if ok() {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}
