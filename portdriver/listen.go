package portdriver

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"usernet/forwarder/relay"
)

// backlog is how many connections may wait to be accepted, as far as net.core.somaxconn allows.
const backlog = 4096

// open binds all of specs before any port listens, so that a range is all or nothing.
func (d *Driver) open(specs []Spec) (fs []*forward, err error) {
	defer func() {
		if err != nil {
			for _, f := range fs {
				_ = f.stop()
			}
			fs = nil
		}
	}()
	for _, spec := range specs {
		f := d.newForward(spec)
		fs = append(fs, f)
		if spec.udp() && d.cfg.UDP == nil {
			return fs, fmt.Errorf("publish %v: UDP ports are not published here", spec)
		}
		if spec.udp() && len(f.udpTargets()) == 0 {
			if why := d.noSockets(); why != nil && len(f.loopbacks) > 0 {
				return fs, fmt.Errorf("publish %v: datagrams reach the container's loopback by the kernel path alone (%w): let the server listen on its address, or on all", spec, why)
			} else if why != nil || len(f.loopbacks) == 0 {
				return fs, fmt.Errorf("publish %v: the container has no address that datagrams could go to", spec)
			}
		}
		if err := f.bind(); err != nil {
			return fs, blameRequest(err, fs)
		}
	}
	for _, f := range fs {
		if f.spec.udp() || f.file != nil {
			continue
		}
		for _, fd := range f.fds {
			if err := unix.Listen(fd, backlog); err != nil {
				return fs, blameRequest(d.listenError(f.spec, "listen", err), fs)
			}
		}
	}
	return fs, nil
}

// blameRequest mends the remedy of an address that is in use by another forward of the same request.
func blameRequest(err error, request []*forward) error {
	var e *ErrListen
	if !errors.As(err, &e) || !errors.Is(err, unix.EADDRINUSE) {
		return err
	}
	for _, f := range request {
		if f.spec != e.Spec && overlap(f.spec, e.Spec) {
			e.Remedy = fmt.Sprintf("%v of the same request has it: leave one of them out", f.spec)
		}
	}
	return err
}

// bind makes the forward's sockets and learns the port. A unix socket listens at once.
func (f *forward) bind() error {
	if f.spec.HostPath != "" {
		return f.listenPath()
	}
	sa, family, err := f.spec.sockaddr()
	if err != nil {
		return f.d.listenError(f.spec, "bind", err)
	}
	if f.spec.dual() {
		call, err := f.bindTo(unix.AF_INET6, &unix.SockaddrInet6{Port: int(f.spec.HostPort)}, 0)
		if err == nil {
			return nil
		}
		// A host without IPv6 at all, or whose system calls are filtered.
		if !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return f.d.listenError(f.spec, call, err)
		}
	}
	if call, err := f.bindTo(family, sa, 1); err != nil {
		return f.d.listenError(f.spec, call, err)
	}
	return nil
}

// sockaddr is the address to bind to; of a dual Spec, the IPv4 one.
func (s Spec) sockaddr() (unix.Sockaddr, int, error) {
	_, v4, _ := s.families()
	host := s.Host
	if !host.IsValid() {
		host = netip.IPv4Unspecified()
		if !v4 {
			host = netip.IPv6Unspecified()
		}
	}
	if host.Is4() {
		return &unix.SockaddrInet4{Port: int(s.HostPort), Addr: host.As4()}, unix.AF_INET, nil
	}
	sa := &unix.SockaddrInet6{Port: int(s.HostPort), Addr: host.As16()}
	if zone := host.Zone(); zone != "" {
		index, err := interfaceIndex(zone)
		if err != nil {
			return nil, 0, err
		}
		sa.ZoneId = index
	}
	return sa, unix.AF_INET6, nil
}

// interfaceIndex asks by ioctl, which the sandbox allows where it does not allow netlink.
func interfaceIndex(name string) (uint32, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, unix.ENODEV // no interface has such a name
	}
	s, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(s)
	if err := unix.IoctlIfreq(s, unix.SIOCGIFINDEX, req); err != nil {
		return 0, err
	}
	return req.Uint32(), nil
}

// bindTo makes one socket; call is what failed.
func (f *forward) bindTo(family int, sa unix.Sockaddr, v6only int) (call string, err error) {
	kind, proto := unix.SOCK_STREAM, unix.IPPROTO_TCP
	if f.spec.udp() {
		kind, proto = unix.SOCK_DGRAM, unix.IPPROTO_UDP
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return "socket", err
	}
	keep := false
	defer func() {
		if !keep {
			closeFD(fd)
		}
	}()
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, v6only); err != nil {
			return "setsockopt", err
		}
	}
	if !f.spec.udp() {
		// A port may be published again while old connections of it are in TIME-WAIT.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return "setsockopt", err
		}
		if !relay.Prepare(fd) {
			return "setsockopt", unix.ENOPROTOOPT
		}
	}
	err = unix.Bind(fd, sa)
	if f.spec.udp() && f.spec.HostPort != 0 && errors.Is(err, unix.EADDRINUSE) {
		// A server in the container that has spoken from this port has it on the host too, by its flow.
		err = f.d.cfg.UDP.TakeUDPPort(f.spec.HostPort, func() error { return unix.Bind(fd, sa) })
	}
	if err != nil {
		return "bind", err
	}
	if f.spec.HostPort == 0 {
		port, err := boundPort(fd)
		if err != nil {
			return "getsockname", err
		}
		f.spec.HostPort = port
	}
	keep = true
	f.fds = append(f.fds, fd)
	return "", nil
}

func boundPort(fd int) (uint16, error) {
	sa, err := unix.Getsockname(fd)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port), nil
	case *unix.SockaddrInet6:
		return uint16(sa.Port), nil
	}
	return 0, err
}

func closeFD(fd int) { _ = unix.Close(fd) }
