package main

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// The set is readable while one of its members is, and forgets what is closed.
func TestTAPSet(t *testing.T) {
	set, err := newTAPSet()
	if err != nil {
		t.Fatal(err)
	}
	readable := func() bool {
		t.Helper()
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(set.fd), Events: unix.POLLIN}}, 0)
		if err != nil {
			t.Fatal(err)
		}
		return n == 1
	}
	var reads, writes []*os.File
	for range 2 {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		reads, writes = append(reads, r), append(writes, w)
		if err := set.add(int(r.Fd())); err != nil {
			t.Fatal(err)
		}
	}
	if readable() {
		t.Error("readable before anything was written")
	}
	if _, err := writes[1].Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	if !readable() {
		t.Error("not readable though a member is")
	}
	for _, r := range reads {
		r.Close()
	}
	if readable() {
		t.Error("readable by what is closed")
	}
	if err := set.close(); err != nil {
		t.Error(err)
	}
	if err := set.add(0); err == nil {
		t.Error("a closed set takes members")
	}
}
