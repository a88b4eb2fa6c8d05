package portdriver

import (
	"golang.org/x/sys/unix"
)

const (
	// filesKept are left for all else, as the forwarder does.
	filesKept = 128

	// minLimit of forwards and of connections are granted however few files there are; EMFILE then pauses.
	minLimit = 16

	// keptForOthers: this part of the connections is not for a forward that has half of them, whose clients could
	// otherwise keep those of all others out for as long as they like.
	keptForOthers = 8

	// maxDials: a dial that hangs holds two files, a goroutine and its client's patience. A listener's queue in the
	// container that is full is what makes dials hang, and no more than this many at a time can be of use then.
	maxDials = 1024
)

// Limits bound what a Driver holds at a time.
type Limits struct {
	Files       int // of the host that forwards and connections may have, from which the following come
	Forwards    int // each forward holds one file, or two
	Connections int // of TCP; each holds two files on the kernel path, and one on the stack path
	Dials       int // connections whose end in the container is not known yet
}

// LimitsFor divides files among forwards and connections: half of them is for listeners at most, which ten thousand
// ports need, and the other half for connections, at two files each. With 0 it takes half of the
// process's own limit (RLIMIT_NOFILE): the other half is the container's own flows'.
func LimitsFor(files int) Limits {
	if files <= 0 {
		var r unix.Rlimit
		files = 1024
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) == nil {
			files = int(min(r.Cur, 1<<20))
		}
		files = max(files-filesKept, 0) / 2
	}
	l := Limits{Files: files, Forwards: max(files/2, minLimit)}
	l.Connections = max((files-l.Forwards)/2, minLimit)
	l.Dials = min(max(l.Connections/2, 1), maxDials)
	return l
}
