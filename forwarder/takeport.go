package forwarder

import (
	"golang.org/x/sys/unix"
)

// TakeUDPPort calls bind when none of the container's own flows has port of the host, and none can get one. A flow
// keeps the container's port where the host has it free, so a port that a server in the container has spoken
// from is in use by us when it is to be published. Such flows end, and go on from another port.
// bind must not block; its error is returned.
func (f *Forwarder) TakeUDPPort(port uint16, bind func() error) error {
	f.taking.Lock()
	defer f.taking.Unlock()
	var ended []chan struct{}
	for _, fl := range f.udp.table.all() {
		fl.mu.Lock()
		if fl.sock != nil && holds(fl.sock.fd, port) {
			fl.gone = true
			if fl.sock.closed == nil {
				fl.sock.closed = make(chan struct{})
			}
			ended = append(ended, fl.sock.closed)
		}
		gone := fl.gone
		fl.mu.Unlock()
		if gone {
			f.drop(&f.udp, fl)
		}
		fl.release()
	}
	for _, c := range ended {
		<-c // who is at work on one does not wait for anything of ours
	}
	return bind()
}

func holds(fd int, port uint16) bool {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return false
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return sa.Port == int(port)
	case *unix.SockaddrInet6:
		return sa.Port == int(port)
	}
	return false
}
