package relay

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A conduit is a pipe through which splice(2) moves octets from one TCP socket to another: by reference, where a copy
// would pass each of them through the processor twice. It costs two system calls for a copy's two, and
// two descriptors, so that it is for the directions that are busy.
type conduit struct {
	r, w int
	held int // octets in it
}

const (
	// conduitSize is what a pipe may have without privileges (fs.pipe-max-size), octets. With less, four as
	// many calls cost more than copying.
	conduitSize = 1 << 20

	// maxConduits are lent by a worker: the pipes of one user, all programs together, are as large as that only while
	// they have less than 64 MiB (fs.pipe-user-pages-soft). The connections beyond them are copied.
	maxConduits = 16

	// filesPerConduit: of a few files none are to be missing for connections.
	filesPerConduit = 64

	// maxSpare are kept open for the next.
	maxSpare = 2

	// busyRead is when a direction is busy: so much was read from it at once, octets, and taken.
	busyRead = 512 << 10

	// A direction is busy no more when so little came so many times in a row.
	thinPour   = 64 << 10
	thinEnough = 16
)

// conduits are a worker's.
type conduits struct {
	spare   []*conduit
	lent    atomic.Int32 // what else is here only the worker touches
	most    int32
	refused bool // the host gives none
}

func newConduits() conduits {
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) != nil {
		return conduits{}
	}
	return conduits{most: int32(min(r.Cur/filesPerConduit, maxConduits))}
}

// lend returns an empty conduit, or nil.
func (cs *conduits) lend() *conduit {
	if n := len(cs.spare); n > 0 {
		c := cs.spare[n-1]
		cs.spare = cs.spare[:n-1]
		cs.lent.Add(1)
		return c
	}
	if cs.refused || cs.lent.Load() >= cs.most {
		return nil
	}
	var p [2]int
	if unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC) != nil {
		return nil // out of descriptors; that passes
	}
	c := &conduit{r: p[0], w: p[1]}
	if n, err := unix.FcntlInt(uintptr(c.w), unix.F_SETPIPE_SZ, conduitSize); err != nil || n < conduitSize {
		c.close()
		cs.refused = true
		return nil
	}
	cs.lent.Add(1)
	return c
}

// takeBack takes one that was lent, and what is in it is lost.
func (cs *conduits) takeBack(c *conduit) {
	cs.lent.Add(-1)
	if c.held > 0 || len(cs.spare) >= maxSpare {
		c.close()
		return
	}
	cs.spare = append(cs.spare, c)
}

func (cs *conduits) close() {
	for _, c := range cs.spare {
		c.close()
	}
	cs.spare = nil
}

func (c *conduit) close() {
	sysClose(c.r)
	sysClose(c.w)
}

// sysSplice moves at most n octets and never waits. Where the socket's peer has gone it raises SIGPIPE, which the
// runtime ignores for sockets.
func sysSplice(from, to, n int) (int, error) {
	return rawCall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
}

// pour is move for a busy direction.
func (p *pair) pour(i int) (more bool, err error) {
	from, to := &p.sides[i], &p.sides[1-i]
	for range 2 * turn {
		c := from.pipe
		switch {
		case from.ended:
			return false, nil
		case c.held > 0:
			if !to.writable {
				p.stuck()
				return false, nil
			}
			n, err := sysSplice(c.r, to.fd, c.held)
			if n, err = p.sent(1-i, n, err); err != nil {
				return false, err
			}
			c.held -= n
			continue
		case from.urgent || from.thin >= thinEnough:
			// Splice stops before an urgent octet, and does not tell (net/ipv4/tcp.c, tcp_read_sock).
			p.unplug(from)
			return true, nil
		case !from.readable:
			return false, nil
		case !to.writable:
			p.stuck()
			return false, nil
		}
		n, err := sysSplice(from.fd, c.w, conduitSize)
		switch {
		case err == unix.EAGAIN:
			from.readable = false
			return false, nil
		case err != nil || n == 0:
			// The end, in one way or the other, is told by a read.
			p.unplug(from)
			return true, nil
		}
		c.held = n
		if from.thin++; n >= thinPour {
			from.thin = 0
		}
	}
	return true, nil
}

// plug has what comes from a side poured from now on, if a conduit can be had.
func (p *pair) plug(from, to *side) {
	if from.tcp && to.tcp && !from.urgent && from.rest.octets == nil {
		from.pipe, from.thin = p.w.conduits.lend(), 0
	}
}

// unplug ends that.
func (p *pair) unplug(from *side) {
	if from.pipe != nil {
		p.w.conduits.takeBack(from.pipe)
		from.pipe, from.most = nil, firstRead
	}
}
