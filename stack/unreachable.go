package stack

import (
	"errors"
	"syscall"
)

// Unreachable is the ICMP (or, for v6, ICMPv6) type and code that tell a sender what
// errno told us. ok is false for errors that no ICMP message stands for, a timeout for
// one: silence is told by silence.
func Unreachable(v6 bool, err error) (typ, code uint8, ok bool) {
	errno, ok := err.(syscall.Errno) // nearly always, and without allocating
	if !ok {
		var wrapped syscall.Errno
		if !errors.As(err, &wrapped) {
			return 0, 0, false
		}
		errno = wrapped
	}
	var m struct{ type4, code4, type6, code6 uint8 }
	switch errno {
	case syscall.ECONNREFUSED:
		m.type4, m.code4 = 3, 3 // port unreachable
		m.type6, m.code6 = 1, 4
	case syscall.EHOSTUNREACH, syscall.EHOSTDOWN:
		m.type4, m.code4 = 3, 1 // host unreachable
		m.type6, m.code6 = 1, 3 // address unreachable
	case syscall.ENETUNREACH, syscall.ENETDOWN, syscall.ENODEV,
		// A host without a usable address of the family says one of these two, by kernel
		// and by call (connect to an IPv6 address: EADDRNOTAVAIL).
		syscall.EADDRNOTAVAIL, syscall.EAFNOSUPPORT:
		m.type4, m.code4 = 3, 0 // net unreachable
		m.type6, m.code6 = 1, 0 // no route to destination
	case syscall.EACCES, syscall.EPERM:
		m.type4, m.code4 = 3, 13 // communication administratively prohibited, RFC 1812 §5.2.7.1
		m.type6, m.code6 = 1, 1
	case syscall.EMSGSIZE:
		m.type4, m.code4 = 3, 4 // fragmentation needed
		m.type6, m.code6 = 2, 0 // packet too big
	default:
		return 0, 0, false
	}
	if v6 {
		return m.type6, m.code6, true
	}
	return m.type4, m.code4, true
}
