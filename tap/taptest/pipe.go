package taptest

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// pipeFrames is how many frames wait in each direction of a pipe before it drops, as a
// TAP's transmit queue does.
const pipeFrames = 4096

// PipeEnd is one end of a cable in memory: what is written to one end is read from the other,
// behind the same virtio-net header. It has the methods of stack.Device.
type PipeEnd struct {
	offloads uint32
	in       *frameQueue // read from
	out      *frameQueue // written to

	// Lose, if not nil, says of each frame written here, header included, whether it gets lost.
	// It may delay or change frames too: what it does not lose is sent when it returns. Set it before use.
	Lose func(frame []byte) bool
}

// Pipe returns the two ends of a cable. offloads are what both report, as Offload bits.
func Pipe(offloads uint32) (a, b *PipeEnd) {
	x, y := newFrameQueue(), newFrameQueue()
	return &PipeEnd{offloads: offloads, in: x, out: y}, &PipeEnd{offloads: offloads, in: y, out: x}
}

func (p *PipeEnd) Offloads() uint32 { return p.offloads }

func (p *PipeEnd) Read(vec [][]byte) (int, error) {
	frame, err := p.in.pop()
	if err != nil {
		return 0, err
	}
	n := 0
	for i, v := range vec {
		if i == 0 {
			v = v[:10]
		}
		c := copy(v, frame[n:])
		n += c
	}
	return n, nil
}

func (p *PipeEnd) Wait() error { return p.in.wait() }

func (p *PipeEnd) Write(vec [][]byte) error {
	var frame []byte
	for _, v := range vec {
		frame = append(frame, v...)
	}
	if p.Lose != nil && p.Lose(frame) {
		return nil
	}
	return p.out.push(frame)
}

// Close closes the cable at both ends.
func (p *PipeEnd) Close() error {
	p.in.close()
	p.out.close()
	return nil
}

// frameQueue is one direction of a pipe.
type frameQueue struct {
	mu     sync.Mutex
	cond   sync.Cond
	frames [][]byte
	closed bool
}

func newFrameQueue() *frameQueue {
	q := &frameQueue{}
	q.cond.L = &q.mu
	return q
}

func errClosed() error { return fmt.Errorf("pipe: %w", os.ErrClosed) }

func (q *frameQueue) push(frame []byte) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return errClosed()
	}
	if len(q.frames) < pipeFrames {
		q.frames = append(q.frames, frame)
		q.cond.Signal()
	}
	return nil
}

func (q *frameQueue) pop() ([]byte, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.frames) == 0 {
		if q.closed {
			return nil, errClosed()
		}
		return nil, unix.EAGAIN
	}
	frame := q.frames[0]
	q.frames = q.frames[1:]
	return frame, nil
}

func (q *frameQueue) wait() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.frames) == 0 && !q.closed {
		q.cond.Wait()
	}
	if q.closed {
		return errClosed()
	}
	return nil
}

func (q *frameQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.cond.Broadcast()
}

// Inject puts a frame, header included, where this end reads.
func (p *PipeEnd) Inject(frame []byte) { _ = p.in.push(frame) }
