package tap

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// DefaultMTU is what the container's IP packets may measure, in octets. 65520 fits a TAP, whose
	// limit is 65535 − 14, and is what slirp4netns and pasta give as well.
	DefaultMTU = 65520

	maxMTU  = 65535 - 14
	minMTU  = 68   // RFC 791 §3.2
	minMTU6 = 1280 // RFC 8200 §5; below it Linux takes IPv6 off the interface

	// maxQueues is the kernel's (MAX_TAP_QUEUES, include/linux/if_tap.h).
	maxQueues = 256
)

// Config says what the TAP shall be.
type Config struct {
	Name string           // of the interface, up to 15 octets
	MTU  int              // IP MTU in octets; 0 means DefaultMTU. An adopted TAP keeps its own
	MAC  net.HardwareAddr // of the container's side; nil means one that the kernel draws

	// Configure brings lo and the TAP up with the addresses and default routes below. Without it the TAP
	// is left down, with MTU and MAC set, for whoever asked for it. A TAP that has
	// addresses already is left as it is.
	Configure bool

	IPv4, IPv6         netip.Prefix // the container's address in its network; zero means none of that family
	Gateway4, Gateway6 netip.Addr   // of the default routes; zero means no route

	// KeepIPv6Off gives no IPv6 address where a sysctl of the namespace has turned IPv6 off. Otherwise it is turned on.
	KeepIPv6Off bool

	Metric int // of the default routes, the lowest of which the kernel takes; zero means the kernel's own

	// Shared: others than usernet are on the link. The kernel tells them of the addresses whenever the interface comes
	// up, and configuring ends when the addresses can be reached. A default route of the same metric that the container has stays.
	Shared bool

	Queues int // 0 means 1

	// Fresh refuses an interface that is there already, also one of a usernet that was killed: EEXIST.
	Fresh bool

	// Unlocked leaves the namespace's lock alone, for a program that has several TAPs in one namespace, and sees
	// to it in its own way that no other of its kind adopts them.
	Unlocked bool

	NoOffload bool // as on a kernel without the virtio-net header
	NoUSO     bool // as on a kernel before 6.2, without UDP segmentation

	Log *slog.Logger `json:"-"` // nil means slog.Default
}

// Check refuses what cannot be.
func (c Config) Check() error { return c.validate() }

// validate fills in defaults and refuses what cannot be.
func (c *Config) validate() error {
	if err := CheckName(c.Name); err != nil {
		return err
	}
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.Queues == 0 {
		c.Queues = 1
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.MTU < minMTU || c.MTU > maxMTU {
		return fmt.Errorf("MTU %d: a TAP takes %d to %d octets", c.MTU, minMTU, maxMTU)
	}
	if c.IPv6.IsValid() && c.MTU < minMTU6 {
		return fmt.Errorf("MTU %d: IPv6 needs at least %d octets: raise it or turn IPv6 off", c.MTU, minMTU6)
	}
	if c.Queues < 1 || c.Queues > maxQueues {
		return fmt.Errorf("%d queues: a TAP takes 1 to %d", c.Queues, maxQueues)
	}
	if c.MAC != nil {
		if len(c.MAC) != 6 || c.MAC[0]&1 != 0 || c.MAC.String() == "00:00:00:00:00:00" {
			return fmt.Errorf("MAC %s: an interface has 6 octets, the first one even, not all zero", c.MAC)
		}
	}
	if err := checkFamily("IPv4", c.IPv4, c.Gateway4, netip.Addr.Is4); err != nil {
		return err
	}
	return checkFamily("IPv6", c.IPv6, c.Gateway6, func(a netip.Addr) bool { return a.Is6() && !a.Is4In6() })
}

func checkFamily(family string, p netip.Prefix, gateway netip.Addr, is func(netip.Addr) bool) error {
	switch {
	case !p.IsValid() && gateway.IsValid():
		return fmt.Errorf("gateway %s without an %s address", gateway, family)
	case p.IsValid() && !is(p.Addr()):
		return fmt.Errorf("%s is no %s address", p, family)
	case gateway.IsValid() && !p.Contains(gateway):
		return fmt.Errorf("gateway %s is not in %s", gateway, p)
	case gateway.IsValid() && gateway == p.Addr():
		return fmt.Errorf("gateway and container are both %s", gateway)
	}
	return nil
}

// CheckName refuses what the kernel refuses as an interface's name, and what it would silently
// cut off or complete ("tap%d").
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("an interface needs a name")
	case len(name) >= unix.IFNAMSIZ:
		return fmt.Errorf("interface name %q has %d octets: at most %d", name, len(name), unix.IFNAMSIZ-1)
	case name == "." || name == "..":
		return fmt.Errorf("interface name %q is reserved", name)
	case strings.ContainsAny(name, "/:%"):
		return fmt.Errorf("interface name %q: no slash, colon or percent sign", name)
	}
	for _, b := range []byte(name) {
		if b <= ' ' || b == 0x7f || b == 0xa0 { // to the kernel, which knows no UTF-8, 0xa0 is a space
			return fmt.Errorf("interface name %q: no space or control character (octet %#x)", name, b)
		}
	}
	return nil
}
