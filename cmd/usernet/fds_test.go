package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func TestHungUp(t *testing.T) {
	t.Run("reader", func(t *testing.T) {
		r, w := pipe(t)
		// What is written is no end: the poll would return for it at once.
		if _, err := w.WriteString("no end"); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- hungUp(context.Background(), int(r.Fd())) }()
		select {
		case err := <-ended:
			t.Fatalf("ended on data: %v", err)
		default:
		}
		w.Close()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		if b := make([]byte, 6); func() int { n, _ := r.Read(b); return n }() != 6 {
			t.Error("what was written has been read")
		}
	})
	t.Run("writer", func(t *testing.T) {
		r, w := pipe(t)
		r.Close()
		if err := hungUp(context.Background(), int(w.Fd())); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("socket", func(t *testing.T) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[0])
		unix.Close(fds[1])
		if err := hungUp(context.Background(), fds[0]); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		r, _ := pipe(t)
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- hungUp(ctx, int(r.Fd())) }()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	})
}

func TestInherited(t *testing.T) {
	r, w := pipe(t)
	file, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(epoll)
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	both, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer both.Close()
	for _, tt := range []struct {
		flag string
		fd   int
		want string
	}{
		{"exit-fd", int(both.Fd()), "would never hang up"},
		{"ready-fd", int(w.Fd()), ""}, {"ready-fd", int(file.Fd()), ""}, {"exit-fd", int(r.Fd()), ""},
		{"ready-fd", int(r.Fd()), "not open for writing"}, {"ready-fd", int(dir.Fd()), "is a directory"},
		{"exit-fd", int(file.Fd()), "never hangs up"}, {"exit-fd", epoll, "is not open"}, {"ready-fd", 1 << 20, "is not open"},
	} {
		f, err := inherited(tt.flag, tt.fd)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("--%s %d: %v", tt.flag, tt.fd, err)
		case tt.want == "":
			if flags, _ := unix.FcntlInt(uintptr(tt.fd), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("--%s %d is passed on to processes of ours", tt.flag, tt.fd)
			}
			// It is the test's: neither closed here nor by a finalizer.
			defer keep(f)
		case err == nil || !strings.Contains(err.Error(), tt.want) || !errors.As(err, new(usageError)):
			t.Errorf("--%s %d: %v, want %q", tt.flag, tt.fd, err, tt.want)
		}
	}
}

var kept []*os.File

// keep holds a file whose descriptor another os.File closes.
func keep(f *os.File) { kept = append(kept, f) }

func TestPIDFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	p, err := writePIDFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := os.ReadFile(path); string(text) != strconv.Itoa(os.Getpid())+"\n" {
		t.Errorf("%q", text)
	}
	if err := p.remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}

	// Another usernet's is not ours to remove.
	if p, err = writePIDFile(path); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(path+"2", []byte("1\n"), 0o644), os.Rename(path+"2", path), p.remove()); err != nil {
		t.Fatal(err)
	}
	if text, _ := os.ReadFile(path); string(text) != "1\n" {
		t.Errorf("%q", text)
	}

	// Nor is a file written to that somebody else points a link at.
	target := path + ".target"
	if err := errors.Join(os.WriteFile(target, []byte("x"), 0o644), os.Remove(path), os.Symlink(target, path)); err != nil {
		t.Fatal(err)
	}
	if _, err := writePIDFile(path); err == nil {
		t.Error("written through a symlink")
	}
	if _, err := writePIDFile(filepath.Join(path, "no", "such")); err == nil || !strings.Contains(err.Error(), "--pid-file") {
		t.Error(err)
	}
	if err := (*pidFile)(nil).remove(); err != nil {
		t.Error(err)
	}
}

func TestSayReady(t *testing.T) {
	r, w := pipe(t)
	if err := sayReady(w); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 10)
	if n, err := r.Read(b); n != 1 || b[0] != '1' {
		t.Errorf("%q, %v", b[:n], err)
	}
	if n, err := r.Read(b); n != 0 || err == nil {
		t.Error("it is still open")
	}
	if err := sayReady(nil); err != nil {
		t.Error(err)
	}
}
