package portdriver

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrClosed is what Add returns once the driver has ended.
var ErrClosed = errors.New("the port driver has ended")

// ErrUnknownID is what Remove returns for an ID that no forward has.
type ErrUnknownID struct{ ID int }

func (e ErrUnknownID) Error() string { return fmt.Sprintf("unknown id: %d", e.ID) }

// ErrConflict is what Add returns for what another forward publishes already.
type ErrConflict struct{ ID int }

// Error begins with rootlesskit's words.
func (e ErrConflict) Error() string {
	return fmt.Sprintf("conflict with ID %d: remove that forward, or choose another port", e.ID)
}

// ErrLimit is what Add returns where there are as many forwards as may be.
type ErrLimit struct{ Max, Files int }

func (e ErrLimit) Error() string {
	return fmt.Sprintf("%d ports are published at most with %d files: raise the limit of files (ulimit -n, LimitNOFILE=)", e.Max, e.Files)
}

// ErrListen is what Add returns where the host's kernel refuses an address. It wraps the errno.
type ErrListen struct {
	Spec   Spec
	Remedy string // how to fix it; may be empty
	Err    error  // in the words of package net: "listen tcp4 127.0.0.1:80: bind: permission denied"
}

func (e *ErrListen) Error() string {
	if e.Remedy == "" {
		return e.Err.Error()
	}
	return e.Err.Error() + ": " + e.Remedy
}

func (e *ErrListen) Unwrap() error { return e.Err }

// listenError tells what call said about spec.
func (d *Driver) listenError(spec Spec, call string, errno error) error {
	var addr net.Addr = hostAddr{spec}
	err := &net.OpError{Op: "listen", Net: spec.Proto, Addr: addr, Err: os.NewSyscallError(call, errno)}
	if spec.HostPath != "" {
		err.Net = "unix"
	}
	return &ErrListen{Spec: spec, Err: err, Remedy: d.remedy(spec, errno)}
}

// hostAddr is a Spec's host side as an address for an error: ":80", "[::1]:80", a path.
type hostAddr struct{ Spec }

func (a hostAddr) Network() string { return a.Proto }

func (a hostAddr) String() string {
	if a.HostPath != "" {
		return a.HostPath
	}
	host := ""
	if a.Host.IsValid() {
		host = a.Host.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(a.HostPort)))
}

// remedy says how to get rid of errno.
func (d *Driver) remedy(spec Spec, errno error) string {
	switch {
	case spec.HostPath != "" && errors.Is(errno, unix.EADDRINUSE):
		return "a live program listens there: choose another path, or stop it"
	case spec.HostPath != "" && errors.Is(errno, unix.EEXIST):
		return "there is a file that is no socket: choose another path, or remove it"
	case spec.HostPath != "" && (errors.Is(errno, unix.EACCES) || errors.Is(errno, unix.ENOENT) || errors.Is(errno, unix.EROFS) || errors.Is(errno, unix.EPERM)):
		return "the folder must be there and ours to write; a confined usernet sees none, so give the path when it starts"
	case errors.Is(errno, unix.EADDRINUSE):
		if id := d.overlapping(spec); id != 0 {
			return fmt.Sprintf("the forward with ID %d has it: remove that one, or choose another port", id)
		}
		transport, _, _ := spec.families()
		return fmt.Sprintf("another program of the host has it (ss -Hn%slp 'sport = %d' names it): stop it, or choose another port or address", transport[:1], spec.HostPort)
	case errors.Is(errno, unix.EADDRNOTAVAIL):
		return fmt.Sprintf("the host has no address %v now (ip address shows what it has); without an address all are listened on", spec.Host)
	case errors.Is(errno, unix.EACCES) && d.privileged(spec) != 0:
		start := d.privileged(spec)
		return fmt.Sprintf("ports below %d are privileged here: choose one from %d on, or let root set sysctl net.ipv4.ip_unprivileged_port_start=%d", start, start, spec.HostPort)
	case errors.Is(errno, unix.EAFNOSUPPORT):
		return "the host has no IPv6: publish on IPv4"
	case errors.Is(errno, unix.EMFILE), errors.Is(errno, unix.ENFILE):
		return "no file is left: raise the limit (ulimit -n, LimitNOFILE=)"
	case errors.Is(errno, unix.ENODEV):
		return fmt.Sprintf("the host has no interface %s", spec.Host.Zone())
	}
	return ""
}

// privileged is the first port that needs no privilege, if spec's does; else 0.
func (d *Driver) privileged(spec Spec) int {
	start := portStart()
	if start == 0 {
		start = d.portStart // no /proc in the sandbox
	}
	if int(spec.HostPort) >= start {
		return 0
	}
	return start
}

// portStart is net.ipv4.ip_unprivileged_port_start, which holds for IPv6 too; 0: unknown.
func portStart() int {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return n
}

// rootlesskitText is an error in rootlesskit's words, which its clients show and some search.
func (d *Driver) rootlesskitText(err error) error {
	var conflict ErrConflict
	if errors.As(err, &conflict) {
		return fmt.Errorf("conflict with ID %d", conflict.ID)
	}
	var e *ErrListen
	if !errors.As(err, &e) {
		return err
	}
	start := d.privileged(e.Spec)
	if !errors.Is(err, unix.EACCES) || start == 0 {
		return e.Err
	}
	return fmt.Errorf("cannot expose privileged port %d, you can add 'net.ipv4.ip_unprivileged_port_start=%d' to /etc/sysctl.conf (currently %d), "+
		"or set CAP_NET_BIND_SERVICE on %s binary, or choose a larger port number (>= %d): %w",
		e.Spec.HostPort, e.Spec.HostPort, start, filepath.Base(os.Args[0]), start, e.Err)
}

// overlapping is the ID of a forward that takes the place of spec, or 0.
func (d *Driver) overlapping(spec Spec) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, f := range d.forwards {
		if !f.draining && overlap(f.spec, spec) {
			return id
		}
	}
	return 0
}

// overlap tells whether the host's kernel lets only one of two have its place.
func overlap(a, b Spec) bool {
	ta, a4, a6 := a.families()
	tb, b4, b6 := b.families()
	if ta != tb || a.HostPort != b.HostPort || a.HostPath != "" || b.HostPath != "" || !(a4 && b4 || a6 && b6) {
		return false
	}
	wild := func(h netip.Addr) bool { return !h.IsValid() || h.IsUnspecified() }
	switch {
	case a.Host.IsValid() && b.Host.IsValid() && a.Host.Is4() != b.Host.Is4():
		return false
	case wild(a.Host) || wild(b.Host):
		return true
	}
	return a.Host == b.Host
}
