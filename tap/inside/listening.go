package inside

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Listening is a socket of the namespace that strangers may talk to: TCP in LISTEN, or UDP that is bound to
// a port and connected to nobody.
type Listening struct {
	Proto  string // "tcp" or "udp"
	Addr   netip.AddrPort
	V6Only bool   // of [::]: not for IPv4
	Device int    // the index of the interface that it is bound to; 0: none
	UID    uint32 // whose it is, as the namespace's owner counts
}

// Listening lists such sockets. It needs nobody inside: a netlink socket of the namespace asks the kernel. It does not wait.
func (k *Kit) Listening(ctx context.Context) ([]Listening, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return k.diag.list()
}

// diag asks sock_diag(7) over a netlink socket that was made inside.
type diag struct {
	mu  sync.Mutex
	fd  int
	seq uint32
	buf []byte
}

// Requests and answers of linux/inet_diag.h.
const (
	sockDiagByFamily = 20
	diagRequestLen   = 56 // struct inet_diag_req_v2
	diagMessageLen   = 72 // struct inet_diag_msg
	diagV6Only       = 11 // INET_DIAG_SKV6ONLY

	stateUnconnected = 1 << 7  // TCP_CLOSE, which is what unconnected UDP is in
	stateListen      = 1 << 10 // TCP_LISTEN

	// diagBuffer holds what the kernel puts into one answer.
	diagBuffer = 32 << 10

	// maxListening bounds the list: a container can open more than anybody would publish.
	maxListening = 16384
)

func (d *diag) list() (out []Listening, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fd < 0 {
		return nil, errEnded
	}
	if d.buf == nil {
		d.buf = make([]byte, diagBuffer)
	}
	for _, q := range []struct {
		proto  int
		name   string
		states uint32
	}{
		{unix.IPPROTO_TCP, "tcp", stateListen},
		{unix.IPPROTO_UDP, "udp", stateUnconnected},
	} {
		for _, family := range families {
			out, err = d.dump(out, family, q.proto, q.name, q.states)
			if err != nil {
				return nil, fmt.Errorf("list who listens in the namespace (sock_diag, %s): %w", q.name, err)
			}
		}
	}
	if len(out) > maxListening {
		return nil, fmt.Errorf("more than %d sockets listen in the namespace: too many to publish", maxListening)
	}
	return out, nil
}

func (d *diag) dump(out []Listening, family, proto int, name string, states uint32) ([]Listening, error) {
	d.seq++
	var req [unix.SizeofNlMsghdr + diagRequestLen]byte
	e := binary.NativeEndian
	e.PutUint32(req[0:], uint32(len(req)))
	e.PutUint16(req[4:], sockDiagByFamily)
	e.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	e.PutUint32(req[8:], d.seq)
	body := req[unix.SizeofNlMsghdr:]
	body[0], body[1] = byte(family), byte(proto)
	e.PutUint32(body[4:], states)
	if err := unix.Sendto(d.fd, req[:], unix.MSG_DONTWAIT, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	for {
		// The kernel makes each part of its answer when it is asked for it, so that nothing is waited for.
		n, _, err := unix.Recvfrom(d.fd, d.buf, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		done := false
		if out, done, err = d.parse(out, d.buf[:n], name); errors.Is(err, unix.ENOENT) && family == unix.AF_INET6 {
			return out, nil // a kernel without IPv6
		} else if done || err != nil {
			return out, err
		}
	}
}

func (d *diag) parse(out []Listening, b []byte, name string) (_ []Listening, done bool, err error) {
	e := binary.NativeEndian
	for len(b) >= unix.SizeofNlMsghdr {
		size, kind, seq := int(e.Uint32(b)), e.Uint16(b[4:]), e.Uint32(b[8:])
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return nil, false, unix.EBADMSG
		}
		body := b[unix.SizeofNlMsghdr:size]
		b = b[min(len(b), (size+3)&^3):]
		switch {
		case seq != d.seq: // of a request before that failed
		case kind == unix.NLMSG_DONE, kind == unix.NLMSG_ERROR: // both with an errno, negative or 0
			if len(body) >= 4 {
				if errno := unix.Errno(-int32(e.Uint32(body))); errno != 0 {
					return out, true, errno
				}
			}
			return out, true, nil
		case kind == sockDiagByFamily && len(body) >= diagMessageLen:
			if len(out) <= maxListening { // one more than that tells that there are more, once all of the answer is read
				out = append(out, parseSocket(body, name))
			}
		}
	}
	return out, false, nil
}

func parseSocket(b []byte, name string) Listening {
	e := binary.NativeEndian
	l := Listening{Proto: name, Device: int(e.Uint32(b[40:])), UID: e.Uint32(b[64:])}
	port := binary.BigEndian.Uint16(b[4:])
	if b[0] == unix.AF_INET6 {
		l.Addr = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), port)
	} else {
		l.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[8:12])), port)
	}
	for a := b[diagMessageLen:]; len(a) >= unix.SizeofNlAttr; {
		size := int(e.Uint16(a))
		if size < unix.SizeofNlAttr || size > len(a) {
			break
		}
		if e.Uint16(a[2:]) == diagV6Only && size > unix.SizeofNlAttr {
			l.V6Only = a[unix.SizeofNlAttr] != 0
		}
		a = a[min(len(a), (size+3)&^3):]
	}
	return l
}

func (d *diag) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fd >= 0 {
		unix.Close(d.fd)
		d.fd = -1
	}
}
