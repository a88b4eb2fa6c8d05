//go:build cgo

package main

import (
	"log/slog"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Half a sandbox makes the program abort when C's library starts its next thread: with cgo there is none, and one
// warning says so. A test that is built without cgo tests the sandbox itself.
func TestNoSandboxWithCgo(t *testing.T) {
	var log strings.Builder
	confine(confinement{}, slog.New(slog.NewTextHandler(&log, nil)))
	if strings.Count(log.String(), "level=WARN") != 1 || !strings.Contains(log.String(), "CGO_ENABLED=0") {
		t.Errorf("it says %q, want one warning with CGO_ENABLED=0", &log)
	}
	for name, option := range map[string]int{"no_new_privs": unix.PR_GET_NO_NEW_PRIVS, "seccomp": unix.PR_GET_SECCOMP} {
		if v, err := unix.PrctlRetInt(option, 0, 0, 0, 0); err != nil || v != 0 {
			t.Errorf("%s is %d, %v", name, v, err)
		}
	}
	if v, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || v == 0 {
		t.Errorf("dumpable is %d, %v", v, err)
	}
}
