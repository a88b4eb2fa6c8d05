package inside

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// turnName is an abstract unix socket of the namespace. Whoever has changed the routing holds it until it is undone: a
// usernet that was killed has a helper that is still undoing it for a millisecond, while the next one may
// already set up.
const turnName = "@usernet-inside"

// turnPatience is how long one waits for another's end; as long as a parent gives a helper. Somebody of the container may
// hold the name for ever, and spares himself nothing but the wait.
const turnPatience = 2 * time.Second

// takeTurn waits until no other holds the name, and takes it. It returns nil where it could not.
func takeTurn(ctx context.Context) *os.File {
	deadline := time.Now().Add(turnPatience)
	for {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return nil
		}
		name := &unix.SockaddrUnix{Name: turnName}
		if err = unix.Bind(fd, name); err == nil {
			err = unix.Listen(fd, 1)
		}
		left := time.Until(deadline)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), "turn")
		case !errors.Is(err, unix.EADDRINUSE), left <= 0, ctx.Err() != nil:
			unix.Close(fd)
			return nil
		}
		// A connection that nobody will accept hangs up when the other ends. Where there can be none, as the other is
		// about to listen, or to end, a moment will do.
		left = min(left, 100*time.Millisecond) // and look at ctx
		if unix.Connect(fd, name) != nil {
			left = min(left, 5*time.Millisecond)
		}
		unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, int(left.Milliseconds())+1)
		unix.Close(fd)
	}
}
