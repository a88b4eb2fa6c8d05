package capture_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"golang.org/x/sys/unix"

	"usernet/tap/capture"
)

// A fake is a device whose frames are given and whose writes succeed.
type fake struct {
	frames [][]byte // with header
	err    error    // of Write
	closed bool
}

func (f *fake) Read(vec [][]byte) (int, error) {
	if len(f.frames) == 0 {
		return 0, unix.EAGAIN
	}
	frame, n := f.frames[0], 0
	f.frames = f.frames[1:]
	for _, b := range vec {
		n += copy(b, frame[n:])
	}
	return n, nil
}

func (f *fake) Wait() error          { return os.ErrClosed }
func (f *fake) Write([][]byte) error { return f.err }
func (f *fake) Offloads() uint32     { return 0x67 }
func (f *fake) Close() error         { f.closed = true; return nil }

// frame is header and payload of n octets.
func frame(n int, fill byte) []byte {
	return append(bytes.Repeat([]byte{0xee}, 10), bytes.Repeat([]byte{fill}, n)...)
}

// begin makes a writer to a new file, and returns where it logs.
func begin(t *testing.T, cfg capture.Config) (*capture.Writer, string, *bytes.Buffer) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	log := new(bytes.Buffer)
	cfg.File, cfg.Log = f, slog.New(slog.NewTextHandler(log, nil))
	w, err := capture.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w, f.Name(), log
}

type packet struct {
	data   []byte
	length int
	dir    pcapgo.NgEpbFlag
	at     time.Time
}

// read returns what the file has, which must be a whole number of blocks.
func read(t *testing.T, name string) (pcapgo.NgInterface, []packet) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := pcapgo.NewNgReader(f, pcapgo.DefaultNgReaderOptions)
	if err != nil {
		t.Fatal(err)
	}
	var all []packet
	for {
		data, ci, opts, err := r.ReadPacketDataWithOptions()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		p := packet{data: data, length: ci.Length, at: ci.Timestamp}
		if opts.Flags != nil {
			p.dir = opts.Flags.Direction
		}
		all = append(all, p)
	}
	intf, err := r.Interface(0)
	if err != nil {
		t.Fatal(err)
	}
	return intf, all
}

func TestBothWays(t *testing.T) {
	w, name, log := begin(t, capture.Config{Interface: "tap0", SnapLen: 100})
	dev := &fake{frames: [][]byte{frame(60, 1), frame(200, 2)}}
	c := w.Around(dev)
	before := time.Now()
	vec := [][]byte{make([]byte, 13), make([]byte, 20), make([]byte, 1000)}
	for _, want := range []int{70, 210} {
		if n, err := c.Read(vec); n != want || err != nil {
			t.Fatalf("read %d, %v; want %d", n, err, want)
		}
	}
	if _, err := c.Read(vec); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("read of nothing: %v", err)
	}
	down := frame(61, 3)
	if err := c.Write([][]byte{down[:4], down[4:11], nil, down[11:]}); err != nil {
		t.Fatal(err)
	}
	dev.err = unix.EIO
	if err := c.Write([][]byte{frame(5, 4)}); !errors.Is(err, unix.EIO) {
		t.Errorf("a refused write: %v", err)
	}
	if c.Offloads() != 0x67 || c.Close() != nil || !dev.closed {
		t.Error("the rest is not passed on")
	}
	for range 2 {
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	intf, got := read(t, name)
	if intf.Name != "tap0" || intf.LinkType != layers.LinkTypeEthernet || intf.SnapLength != 100 || intf.TimestampResolution != 9 {
		t.Errorf("%+v", intf)
	}
	out, in := pcapgo.NgEpbFlagDirectionOutbound, pcapgo.NgEpbFlagDirectionInbound
	for i, want := range []packet{
		{data: frame(60, 1)[10:], length: 60, dir: out},
		{data: frame(100, 2)[10:], length: 200, dir: out},
		{data: frame(61, 3)[10:], length: 61, dir: in},
		{data: frame(5, 4)[10:], length: 5, dir: in},
	} {
		if i >= len(got) {
			t.Fatalf("%d frames", len(got))
		}
		g := got[i]
		if !bytes.Equal(g.data, want.data) || g.length != want.length || g.dir != want.dir {
			t.Errorf("frame %d: %+v, want %+v", i, g, want)
		}
		if g.at.Before(before.Truncate(0)) || g.at.After(time.Now()) {
			t.Errorf("frame %d is of %v", i, g.at)
		}
	}
	if log.Len() != 0 {
		t.Error(log)
	}
}

// The file is as large as allowed and not larger, says so once, and the traffic goes on.
func TestLimit(t *testing.T) {
	const limit = 20_000
	w, name, log := begin(t, capture.Config{Limit: limit})
	c := w.Around(&fake{})
	for i := range 300 {
		if err := c.Write([][]byte{frame(90+i%7, 1)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() > limit || st.Size() < limit-150 {
		t.Errorf("%d octets, want %d less at most a frame", st.Size(), limit)
	}
	if _, got := read(t, name); len(got) < 100 {
		t.Errorf("%d frames", len(got))
	}
	if n := strings.Count(log.String(), "is full"); n != 1 {
		t.Errorf("said %d times:\n%s", n, log)
	}
}

func TestFileTrouble(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	if _, err := capture.New(capture.Config{File: full}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a full disk at the beginning: %v", err)
	}
	w, _, log := begin(t, capture.Config{})
	// The reading end is gone: a fifo, as --pcap /dev/fd/3 may be.
	r, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	w, err = capture.New(capture.Config{File: pw, Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r.Close()
	c := w.Around(&fake{})
	for range 20 { // more than the buffer takes
		if err := c.Write([][]byte{frame(60_000, 1)}); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(log.String(), "cannot be written"); n != 1 {
		t.Errorf("said %d times:\n%s", n, log)
	}
}

// What was captured is in the file a second later, without Close.
func TestFlushedWithinASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, name, _ := begin(t, capture.Config{})
		c := w.Around(&fake{})
		for i := range 3 {
			if err := c.Write([][]byte{frame(60, 1)}); err != nil {
				t.Fatal(err)
			}
			if _, got := read(t, name); len(got) != i {
				t.Errorf("%d frames at once, want them buffered", len(got))
			}
			time.Sleep(time.Second) // virtual
			synctest.Wait()
			if _, got := read(t, name); len(got) != i+1 {
				t.Errorf("%d frames after a second, want %d", len(got), i+1)
			}
		}
		w.Close()
	})
}

func TestManyWriters(t *testing.T) {
	w, name, _ := begin(t, capture.Config{})
	var wg sync.WaitGroup
	for i := range 8 {
		c := w.Around(&fake{})
		wg.Go(func() {
			for range 100 {
				c.Write([][]byte{frame(60+i, byte(i))})
			}
		})
	}
	wg.Wait()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	_, got := read(t, name)
	if len(got) != 800 {
		t.Errorf("%d frames", len(got))
	}
	for _, p := range got {
		if want := bytes.Repeat([]byte{byte(p.length - 60)}, p.length); !bytes.Equal(p.data, want) {
			t.Fatalf("a frame of %d octets is mixed up: %x", p.length, p.data)
		}
	}
}
