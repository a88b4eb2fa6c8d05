package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Between us and the helper goes one SOCK_SEQPACKET message each way per call: JSON, with the
// caller's descriptors as SCM_RIGHTS beside the request, and the operation's files beside the answer.

const (
	// maxMessage bounds a message, in octets. A unix socket takes one message of up to its send
	// buffer, 208 KiB unless the host's net.core.wmem_default is lower; answers are a few hundred octets.
	maxMessage = 64 << 10

	// maxFiles is the kernel's limit for one message (SCM_MAX_FD).
	maxFiles = 253
)

type request struct {
	Name string
	Args json.RawMessage
}

type answer struct {
	Reply json.RawMessage `json:",omitempty"`
	Err   string          `json:",omitempty"`
	Errno unix.Errno      `json:",omitempty"`
}

// A remoteError is an error of the helper: its text, and the errno in it.
type remoteError struct {
	text  string
	errno unix.Errno
}

func (e *remoteError) Error() string { return e.text }

func (e *remoteError) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}

func newAnswer(reply []byte, err error) answer {
	if err == nil {
		return answer{Reply: reply}
	}
	a := answer{Err: err.Error()}
	errors.As(err, &a.Errno)
	return a
}

func (a answer) result() ([]byte, error) {
	if a.Err != "" {
		return nil, &remoteError{a.Err, a.Errno}
	}
	return a.Reply, nil
}

// send writes v as one message, with descriptors beside it, which stay the caller's.
func send(c *net.UnixConn, v any, fds []int) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(raw) > maxMessage || len(fds) > maxFiles {
		return fmt.Errorf("a message of %d octets and %d descriptors: %w", len(raw), len(fds), unix.EMSGSIZE)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(raw, oob, nil)
	return err
}

// numbers are the files' descriptors, as long as those are open.
func numbers(files []*os.File) []int {
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	return fds
}

// errCutFiles: the kernel found no place in our table of descriptors for what came.
var errCutFiles = fmt.Errorf("no descriptor is free for what the helper sent (raise the limit, ulimit -n): %w", unix.EMFILE)

// A buffer is for one message at a time, and is used again: a helper at rest shall be small.
type buffer struct{ raw, oob []byte }

func newBuffer() *buffer {
	return &buffer{make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxFiles))}
}

// receive reads one message into v, and returns the descriptors beside it, which have close-on-exec.
// io.EOF means that the other end is gone.
func (b *buffer) receive(c *net.UnixConn, v any) ([]int, error) {
	raw, oob := b.raw, b.oob
	n, oobn, flags, _, err := c.ReadMsgUnix(raw, oob) // sets close-on-exec on what it gets
	if err != nil {
		return nil, err
	}
	if n == 0 && oobn == 0 {
		return nil, io.EOF
	}
	fds, err := rights(oob[:oobn])
	switch {
	case err != nil:
	case flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("a message was cut off: %w", unix.EMSGSIZE)
	case flags&unix.MSG_CTRUNC != 0: // there is room for all that the kernel allows
		err = errCutFiles
	}
	if err == nil {
		err = json.Unmarshal(raw[:n], v)
	}
	if err != nil {
		closeFDs(fds)
		return nil, err
	}
	return fds, nil
}

func rights(oob []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, m := range messages {
		if more, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, more...)
		}
	}
	return fds, nil
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// newConn makes a conn of one end of a socketpair, and closes fd.
func newConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "netns helper")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("descriptor %d is no unix socket: %w", fd, unix.ENOTSOCK)
	}
	return u, nil
}
