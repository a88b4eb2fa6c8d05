package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A Lock keeps two starters apart. It is flock(2)'s: whatever ends its holder, the lock is gone with it. The file stays, for to remove it
// would let one wait at an old file while another locks a new one.
type Lock struct{ file *os.File }

// A holder is what the file says of who has the lock.
type holder struct {
	PID  int    `json:"pid"`
	What string `json:"what"`
}

// Lock takes the lock, and waits for it as long as ctx lasts. what says for what it is taken, for those who wait. The
// error of one who has waited in vain names the holder.
func (d *Dir) Lock(ctx context.Context, what string) (*Lock, error) {
	f, err := d.root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	if err := wait(ctx, f); err != nil {
		by := ""
		if errors.Is(err, context.Cause(ctx)) {
			by = heldBy(f)
		}
		f.Close()
		return nil, fmt.Errorf("lock %s%s: %w", filepath.Join(d.path, lockFile), by, err)
	}
	if err := (&Lock{f}).write(holder{os.Getpid(), what}); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", filepath.Join(d.path, lockFile), err)
	}
	return &Lock{f}, nil
}

// wait takes the lock of f. It asks again and again, for a thread inside flock could not be called back.
func wait(ctx context.Context, f *os.File) error {
	t := time.NewTicker(5 * time.Millisecond) // well below what a start takes
	defer t.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("flock", err)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// heldBy reads who has the lock; somebody may just have let it go, or not have written yet.
func heldBy(f *os.File) string {
	data := make([]byte, 4096)
	n, err := f.ReadAt(data, 0)
	var h holder
	if err != nil && !errors.Is(err, io.EOF) || json.Unmarshal(data[:n], &h) != nil || h.PID <= 0 {
		return ""
	}
	return fmt.Sprintf(", which process %d (%.80s) has: wait until it is done, or end it", h.PID, h.What)
}

func (l *Lock) write(h holder) error {
	data, err := json.Marshal(h)
	if err != nil {
		return err
	}
	if err := l.file.Truncate(0); err != nil {
		return err
	}
	_, err = l.file.WriteAt(data, 0)
	return err
}

// Unlock lets the next one in. It is called once.
func (l *Lock) Unlock() error {
	return errors.Join(l.file.Truncate(0), l.file.Close())
}
