package tap_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap"
)

// listenSocket is a Socket in a new directory; t.TempDir's names are too long for some.
func listenSocket(t testing.TB, mtu int) (*tap.Socket, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "bess")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	s, err := tap.ListenSocket(path, mtu)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s, path
}

// connect is what a machine's emulator does.
func connect(t testing.TB, path string) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		t.Fatalf("connect: %v", err)
	}
	return fd
}

// pair is a Socket and its client, who have met.
func pair(t testing.TB, mtu int) (s *tap.Socket, client int) {
	t.Helper()
	s, path := listenSocket(t, mtu)
	client = connect(t, path)
	if err := s.Wait(); err != nil {
		t.Fatal(err)
	}
	return s, client
}

// readFrame waits for the next message.
func readFrame(s *tap.Socket) ([]byte, error) {
	b := make([]byte, 1+headerLen+2048+65536)
	for {
		n, err := s.Read([][]byte{b[:headerLen], b[headerLen : headerLen+2048], b[headerLen+2048:]})
		if !errors.Is(err, unix.EAGAIN) {
			return b[:n], err
		}
		if err := s.Wait(); err != nil {
			return nil, err
		}
	}
}

const headerLen = 10

func TestSocketFrames(t *testing.T) {
	s, client := pair(t, 1500)
	defer unix.Close(client)
	select {
	case <-s.Connected():
	default:
		t.Error("Wait has returned, and nobody is connected")
	}
	if s.Offloads() != 0 {
		t.Errorf("offloads %#x", s.Offloads())
	}
	longest := bytes.Repeat([]byte("0123456"), 1514/7+1)[:1514]
	for _, size := range []int{14, 60, 1514} {
		if err := unix.Send(client, longest[:size], 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, size := range []int{14, 60, 1514} {
		f, err := readFrame(s)
		if err != nil || !bytes.Equal(f, append(make([]byte, headerLen), longest[:size]...)) {
			t.Errorf("of %d octets came %d, %v", size, len(f), err)
		}
	}
	header := make([]byte, headerLen)
	for _, vec := range [][][]byte{{header, longest}, {header, longest[:14], longest[14:]}, {append(header[:10:10], longest...)}} {
		if err := s.Write(vec); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4096)
		if n, err := unix.Read(client, b); err != nil || !bytes.Equal(b[:n], longest) {
			t.Errorf("the client read %d octets, %v", n, err)
		}
	}
}

// What is no frame comes up as one that is too short, and the next is whole.
func TestSocketBrokenFrames(t *testing.T) {
	s, client := pair(t, 1500)
	defer unix.Close(client)
	for _, size := range []int{0, 1, 13, 1515, 4000, 80000} {
		for _, message := range [][]byte{make([]byte, size), []byte("a whole frame")} {
			if err := unix.Send(client, message, 0); err != nil {
				t.Fatal(err)
			}
		}
		if f, err := readFrame(s); err != nil || len(f) >= headerLen+14 {
			t.Errorf("of %d octets came %d, %v", size, len(f), err)
		}
		if f, err := readFrame(s); err != nil || string(f[headerLen:]) != "a whole frame" {
			t.Errorf("after %d octets came %q, %v", size, f, err)
		}
	}
}

func TestSocketEnds(t *testing.T) {
	for name, end := range map[string]func(s *tap.Socket, client int) error{
		"close":    func(_ *tap.Socket, client int) error { return unix.Close(client) },
		"shutdown": func(_ *tap.Socket, client int) error { return unix.Shutdown(client, unix.SHUT_WR) },
		// The kernel says ECONNRESET then.
		"close with frames unread": func(s *tap.Socket, client int) error {
			return errors.Join(s.Write([][]byte{make([]byte, headerLen+60)}), unix.Close(client))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, client := pair(t, 1500)
			if name == "shutdown" {
				defer unix.Close(client)
			}
			if err := end(s, client); err != nil {
				t.Fatal(err)
			}
			if _, err := readFrame(s); !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "has hung up") {
				t.Errorf("%v, want ENODEV", err)
			}
		})
	}
}

// A client that does not read loses frames and holds nobody up.
func TestSocketFull(t *testing.T) {
	s, client := pair(t, 65520)
	defer unix.Close(client)
	frame := [][]byte{make([]byte, headerLen), make([]byte, 65000)}
	var err error
	for n := 0; err == nil && n < 10000; n++ {
		err = s.Write(frame)
	}
	if !errors.Is(err, unix.EAGAIN) {
		t.Errorf("%v, want EAGAIN", err)
	}
}

func TestSocketFile(t *testing.T) {
	s, path := listenSocket(t, 1500)
	if st, err := os.Lstat(path); err != nil || st.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if s.Dir().Name() != filepath.Dir(path)+"/" {
		t.Errorf("its directory is %s", s.Dir().Name())
	}
	if second, err := tap.ListenSocket(path, 1500); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second one there: %v, %v", second, err)
	}
	if err := s.Write([][]byte{make([]byte, headerLen+60)}); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("Write without a client: %v", err)
	}
	first, late := connect(t, path), connect(t, path)
	defer unix.Close(first)
	defer unix.Close(late)
	if err := s.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file, with a client: %v", err)
	}
	// The kernel tells the late one, whom nobody has accepted.
	if n, err := unix.Read(late, make([]byte, 10)); n > 0 {
		t.Errorf("the second client read %d octets, %v", n, err)
	}
	if err := s.Write([][]byte{make([]byte, headerLen+60)}); err != nil {
		t.Error(err)
	}
	if n, err := unix.Read(first, make([]byte, 100)); n != 60 || err != nil {
		t.Errorf("the first client read %d octets, %v", n, err)
	}
}

func TestSocketReplacesTheDead(t *testing.T) {
	s, path := listenSocket(t, 1500)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Close(), unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Close(fd)); err != nil {
		t.Fatal(err)
	}
	again, err := tap.ListenSocket(path, 1500)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
}

// Close ends whoever waits, before there is a client and after.
func TestSocketClose(t *testing.T) {
	for _, met := range []bool{false, true} {
		s, path := listenSocket(t, 1500)
		if met {
			client := connect(t, path)
			defer unix.Close(client)
			if err := s.Wait(); err != nil {
				t.Fatal(err)
			}
		}
		waits := make(chan error)
		go func() { waits <- s.Wait() }()
		for range 2 {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := <-waits; !errors.Is(err, os.ErrClosed) {
			t.Errorf("met %v: the Wait that was under way: %v", met, err)
		}
		_, err := s.Read([][]byte{make([]byte, 100)})
		for i, err := range []error{err, s.Wait()} {
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("met %v: call %d after Close: %v", met, i, err)
			}
		}
		if err := s.Write([][]byte{make([]byte, 100)}); err == nil {
			t.Errorf("met %v: Write after Close", met)
		}
	}
}

func TestSocketMTU(t *testing.T) {
	for _, mtu := range []int{67, 65522} {
		if s, err := tap.ListenSocket(filepath.Join(t.TempDir(), "s"), mtu); err == nil {
			t.Errorf("MTU %d: %v", mtu, s.Close())
		}
	}
}

func TestSocketAllocatesNothing(t *testing.T) {
	s, client := pair(t, 1500)
	defer unix.Close(client)
	frame := make([]byte, 1000)
	buf := [][]byte{make([]byte, headerLen), make([]byte, 2048), make([]byte, 65536)}
	out := [][]byte{make([]byte, headerLen), frame}
	if n := testing.AllocsPerRun(100, func() {
		if err := unix.Send(client, frame, 0); err != nil {
			t.Fatal(err)
		}
		if n, err := s.Read(buf); n != headerLen+1000 || err != nil {
			t.Fatal(n, err)
		}
		if err := s.Write(out); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Read(client, frame); n != 1000 || err != nil {
			t.Fatal(n, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations per frame each way", n)
	}
}
