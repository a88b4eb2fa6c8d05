package forwarder

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// An Outbound says from where the host's sockets speak to the world, per family: from
// an address, or through an interface. The zero value leaves it to the host's routes.
type Outbound struct {
	Addr4, Addr6           netip.Addr
	Interface4, Interface6 string

	// ToLoopback sends from the address also what goes to the host's own loopback, as slirp4netns does. An address that
	// is a loopback one then reaches nothing else.
	ToLoopback bool
}

// ParseOutbound reads an address or the name of an interface for each family; "" leaves
// the family alone.
func ParseOutbound(v4, v6 string) (Outbound, error) {
	var o Outbound
	var err4, err6 error
	o.Addr4, o.Interface4, err4 = parseOutbound(v4, "IPv4", netip.Addr.Is4)
	o.Addr6, o.Interface6, err6 = parseOutbound(v6, "IPv6", netip.Addr.Is6)
	if err := errors.Join(err4, err6); err != nil {
		return Outbound{}, err
	}
	return o, nil
}

func parseOutbound(s, family string, is func(netip.Addr) bool) (netip.Addr, string, error) {
	if s == "" {
		return netip.Addr{}, "", nil
	}
	if a, err := netip.ParseAddr(s); err == nil {
		if a = a.Unmap(); !is(a) || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
			return netip.Addr{}, "", fmt.Errorf("outbound address %q: not an %s address to send from", s, family)
		}
		if a.IsLoopback() {
			return netip.Addr{}, "", fmt.Errorf("outbound address %q: a loopback address, from which nothing leaves the host: give one of the others, see `ip address`", s)
		}
		return a, "", nil
	}
	if s == "lo" {
		return netip.Addr{}, "", errors.New("outbound \"lo\": the loopback interface, by which nothing leaves the host: give one of the others, see `ip link`")
	}
	if len(s) >= unix.IFNAMSIZ || s == "." || s == ".." || strings.ContainsAny(s, "/: \t\n\x00") {
		return netip.Addr{}, "", fmt.Errorf("outbound %q: neither an %s address nor the name of an interface (1 to %d octets, without '/', ':' or space)",
			s, family, unix.IFNAMSIZ-1)
	}
	return netip.Addr{}, s, nil
}

// of is what o says about a family (AF_INET or AF_INET6).
func (o *Outbound) of(family int) (addr netip.Addr, dev string) {
	if family == unix.AF_INET {
		return o.Addr4, o.Interface4
	}
	return o.Addr6, o.Interface6
}

// confined tells whether dst cannot be reached from o's address: that is a loopback one. The kernel would send it out all the
// same, and whoever gets it drops it without a word.
func (o *Outbound) confined(dst netip.Addr) bool {
	addr, _ := o.of(family(dst))
	return addr.IsLoopback() && !dst.IsLoopback()
}

// Check tries o on sockets of its own, so that a wrong address or interface is heard of at
// the start and not from every flow.
func (o *Outbound) Check() error {
	var errs []error
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		if addr, dev := o.of(family); !addr.IsValid() && dev == "" {
			continue
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			errs = append(errs, fmt.Errorf("open a socket to try the outbound address: %w", err))
			continue
		}
		errs = append(errs, o.bind(fd, family), unix.Close(fd))
	}
	return errors.Join(errs...)
}

// Prepare makes fd, a socket of the family (AF_INET or AF_INET6) that is not bound yet, send to
// dst as o says. The host's own loopback is spoken to from the loopback unless ToLoopback says otherwise, and other
// addresses of the host through no particular interface: their answers come by lo.
func (o *Outbound) Prepare(fd, family int, dst netip.Addr) error {
	addr, dev := o.of(family)
	if dst.IsLoopback() && !(o.ToLoopback && addr.IsValid()) || !addr.IsValid() && (dev == "" || isLocal(dst)) {
		return nil
	}
	return o.bind(fd, family)
}

// bind makes fd send from o's address or interface of the family.
func (o *Outbound) bind(fd, family int) error {
	if err := o.bindDevice(fd, family); err != nil {
		return err
	}
	return o.bindAddr(fd, family, 0)
}

// bindDevice binds fd to o's interface, if any. It is allowed without CAP_NET_RAW since
// Linux 5.7, but only once.
func (o *Outbound) bindDevice(fd, family int) error {
	_, dev := o.of(family)
	if dev == "" {
		return nil
	}
	if err := unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, dev); err != nil {
		return outboundError(dev, err)
	}
	return nil
}

// bindAddr binds fd to o's address and to port; without an address and with port 0 to nothing.
func (o *Outbound) bindAddr(fd, family int, port uint16) error {
	addr, _ := o.of(family)
	if !addr.IsValid() {
		if port == 0 {
			return nil
		}
		addr = unspecified(family)
	} else if port == 0 {
		// The port is chosen at connect, by the whole four-tuple, so that the host does
		// not run out of ports. No harm where the kernel or the protocol does not know it.
		_ = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	}
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(addr, port))); err != nil {
		return outboundError(addr.String(), err)
	}
	return nil
}

func unspecified(family int) netip.Addr {
	if family == unix.AF_INET {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// outboundError adds to what the kernel said what the user can do.
func outboundError(from string, err error) error {
	remedy := ""
	switch {
	case errors.Is(err, unix.EADDRNOTAVAIL):
		remedy = " (no interface of the host has this address: see `ip address`)"
	case errors.Is(err, unix.ENODEV):
		remedy = " (the host has no such interface: see `ip link`)"
	case errors.Is(err, unix.EPERM):
		remedy = " (binding to an interface without CAP_NET_RAW needs Linux 5.7: give the interface's address)"
	}
	return fmt.Errorf("send from %s: %w%s", from, err, remedy)
}
