// Package capture writes what crosses a device to a pcapng file: a device around a device.
package capture

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

const (
	// headerLen is the length in octets of the virtio-net header in front of every frame, which is not
	// a part of the frame and is not written.
	headerLen = 10

	// DefaultSnapLen keeps whole frames, however many segments the kernel has put into one.
	DefaultSnapLen = 256 << 10

	// DefaultLimit is the size in octets at which a file ends unless told otherwise: what a forgotten
	// --pcap may cost. It is a few seconds of full load, or days of a quiet container.
	DefaultLimit = 100 << 20

	// flushEvery is how far the file may lag behind, so that it can be followed with tail -f.
	flushEvery = time.Second

	// fileBuffer is what goes to the file at once, in octets.
	fileBuffer = 256 << 10
)

// A Device is what a capture goes around and is itself: see stack.Device for the contract.
type Device interface {
	Read(vec [][]byte) (int, error)
	Wait() error
	Write(vec [][]byte) error
	Offloads() uint32
	Close() error
}

// Config says what is written.
type Config struct {
	File      *os.File // opened by the caller, closed by Writer.Close
	Interface string   // the name that the file shows
	SnapLen   int      // octets kept of a frame; 0 means DefaultSnapLen
	Limit     int64    // size of the file in octets; 0 means DefaultLimit
	Log       *slog.Logger
}

// A Writer is one file, for any number of devices. Trouble with the file never reaches the
// traffic: writing stops, and the log says so once.
type Writer struct {
	file  *os.File
	snap  int
	limit int64
	log   *slog.Logger

	mu      sync.Mutex // guards what follows
	out     *bufio.Writer
	left    int64  // octets that may still be written
	block   []byte // where a frame is put together
	flusher *time.Timer
	armed   bool // flusher will run
	stopped bool
}

// New writes the head of the file. The caller closes the Writer, after the devices around which
// it is.
func New(cfg Config) (*Writer, error) {
	w := &Writer{file: cfg.File, snap: cfg.SnapLen, limit: cfg.Limit, log: cfg.Log}
	if w.snap == 0 {
		w.snap = DefaultSnapLen
	}
	if w.limit == 0 {
		w.limit = DefaultLimit
	}
	if w.log == nil {
		w.log = slog.Default()
	}
	head := appendHead(nil, cfg.Interface, w.snap)
	w.left = w.limit - int64(len(head))
	w.out = bufio.NewWriterSize(cfg.File, fileBuffer)
	_, err := w.out.Write(head)
	if err == nil {
		err = w.out.Flush()
	}
	if err != nil {
		return nil, fmt.Errorf("begin capture file %s: %w", cfg.File.Name(), err)
	}
	return w, nil
}

// Around returns a device that writes down every frame of dev.
func (w *Writer) Around(dev Device) Device { return &device{Device: dev, w: w} }

// Close writes what is left and closes the file.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return nil
	}
	var err error
	if !w.stopped {
		err = w.out.Flush()
	}
	w.stopped = true
	if w.flusher != nil {
		w.flusher.Stop()
	}
	err = errors.Join(err, w.file.Close())
	w.file = nil
	return err
}

// record writes the first n octets of vec, header included, as one frame.
func (w *Writer) record(vec [][]byte, n int, dir direction) {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped || n <= headerLen {
		return
	}
	w.block = append(w.block[:0], make([]byte, packetHead)...)
	skip, keep := headerLen, min(n-headerLen, w.snap)
	for _, b := range vec {
		cut := min(skip, len(b))
		b, skip = b[cut:], skip-cut
		b = b[:min(len(b), packetHead+keep-len(w.block))]
		w.block = append(w.block, b...)
	}
	w.block = finishPacket(w.block, now, n-headerLen, dir)
	if w.left -= int64(len(w.block)); w.left < 0 {
		w.stopLocked("the capture file is full: capturing ends, the traffic goes on", "limit", w.limit)
		return
	}
	if _, err := w.out.Write(w.block); err != nil {
		w.stopLocked("the capture file cannot be written: capturing ends, the traffic goes on", "error", err)
		return
	}
	if !w.armed {
		w.armed = true
		if w.flusher == nil {
			w.flusher = time.AfterFunc(flushEvery, w.flush)
		} else {
			w.flusher.Reset(flushEvery)
		}
	}
}

// flush runs a while after the first frame since the last flush.
func (w *Writer) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.armed = false
	if w.stopped {
		return
	}
	if err := w.out.Flush(); err != nil {
		w.stopLocked("the capture file cannot be written: capturing ends, the traffic goes on", "error", err)
	}
}

func (w *Writer) stopLocked(why string, args ...any) {
	w.stopped = true
	w.log.Warn(why, append([]any{"file", w.file.Name()}, args...)...)
	w.out.Flush() // a failure is the reason that was given, or comes too late to matter
}

// A device is the wrapped one, but for Read and Write.
type device struct {
	Device
	w *Writer
}

// Read is stack.Device's: outbound.
func (d *device) Read(vec [][]byte) (int, error) {
	n, err := d.Device.Read(vec)
	if err == nil {
		d.w.record(vec, n, outbound)
	}
	return n, err
}

// Write is stack.Device's: inbound. The frame is written down before it is sent, for the container's answer
// may be read before Write has returned, and belongs behind it.
func (d *device) Write(vec [][]byte) error {
	n := 0
	for _, b := range vec {
		n += len(b)
	}
	d.w.record(vec, n, inbound)
	return d.Device.Write(vec)
}
