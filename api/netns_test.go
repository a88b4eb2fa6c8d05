package api

import (
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap/taptest"
)

// A client in another network namespace is refused though it is our own user and sees the file.
func TestOtherNetns(t *testing.T) {
	if !taptest.Inside(t) {
		return
	}
	g := newGate()
	if g.ns == 0 {
		t.Skip("the kernel tells no cookies of network namespaces: Linux 5.14 does")
	}
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	check := func(leave bool) error {
		errs, done := make(chan error, 1), make(chan struct{})
		var client sync.WaitGroup
		defer client.Wait()
		defer close(done)
		client.Go(func() {
			runtime.LockOSThread() // and never unlocked where it has left: the thread ends with the goroutine
			if leave {
				if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
					errs <- err
					return
				}
			} else {
				defer runtime.UnlockOSThread()
			}
			c, err := net.Dial("unix", path)
			if err == nil {
				defer c.Close()
			}
			errs <- err
			<-done
		})
		if err := <-errs; err != nil {
			t.Fatalf("dial: %v", os.NewSyscallError("unshare or connect", err))
		}
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return g.check(c.(*net.UnixConn))
	}
	if err := check(false); err != nil {
		t.Errorf("from our own namespace: %v", err)
	}
	if err := check(true); err == nil || !strings.Contains(err.Error(), "another network namespace") {
		t.Errorf("from another namespace: %v", err)
	}
}
