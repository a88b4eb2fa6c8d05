package main

import (
	"log/slog"
	"os"
	"strings"
	"testing"

	"usernet/tap/netns"
)

// A slip must not turn the host's own default route towards us.
func TestOwnNamespaceIsRefused(t *testing.T) {
	o, err := parse([]string{"1"}, environment(nil))
	if err != nil {
		t.Fatal(err)
	}
	for _, where := range []netns.Config{{PID: os.Getpid()}, {Path: "/proc/self/ns/net"}} {
		e, err := openEngine(t.Context(), o, where, slog.New(slog.DiscardHandler))
		if err == nil {
			t.Fatal("opened", e.close())
		}
		if !strings.Contains(err.Error(), "usernet itself is in") {
			t.Error(err)
		}
	}
}
