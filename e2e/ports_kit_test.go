package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// portPaths are the data paths of published TCP.
var portPaths = []string{"kernel", "stack"}

// A publisher is a usernet that publishes a container's ports, with its control socket.
type publisher struct {
	*usernet
	c      *container
	socket string
}

// A forward is what usernet says of one.
type forward struct {
	ID                     int
	Proto, Host, HostPath  string
	HostPort               uint16
	Container              string
	ContainerPort          uint16
	Path, Note             string
	Auto, Draining         bool
	Active, Total, Refused uint64
	OctetsIn, OctetsOut    uint64
}

// portsInfo is what usernet says of its data paths.
type portsInfo struct {
	PID   int
	Ports struct {
		IPv4, IPv6 *struct {
			Path, WhyNotKernel string
			Loopback           bool
		}
		Forwards, Connections, MaxConnections, MaxForwards, Dials int
	}
}

// publish attaches usernet to a new container.
func publish(t testing.TB, flags ...string) *publisher {
	t.Helper()
	return publishFor(t, newContainer(t), flags...)
}

func publishFor(t testing.TB, c *container, flags ...string) *publisher {
	t.Helper()
	p := &publisher{c: c, socket: socketPath(t)}
	p.usernet = attach(t, c, append([]string{"--api-socket", p.socket}, flags...)...)
	return p
}

// socketPath is a short name for a socket, in a directory of its own.
func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(scratch, "s")
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "api.sock")
}

// ask is what a person says to a usernet that runs: "port", "add", … without the socket.
func (p *publisher) ask(t testing.TB, args ...string) (string, int) {
	t.Helper()
	return lab.home.run(t, append([]string{binary}, append(args, "--socket", p.socket)...)...)
}

func (p *publisher) mustAsk(t testing.TB, args ...string) string {
	t.Helper()
	out, code := p.ask(t, args...)
	if code != 0 {
		t.Fatalf("usernet %s: status %d: %s", strings.Join(args, " "), code, out)
	}
	return out
}

func (p *publisher) add(t testing.TB, specs ...string) []forward {
	t.Helper()
	return forwards(t, p.mustAsk(t, append([]string{"port", "add", "--json"}, specs...)...))
}

func (p *publisher) list(t testing.TB) []forward {
	t.Helper()
	return forwards(t, p.mustAsk(t, "port", "list", "--json"))
}

func (p *publisher) info(t testing.TB) portsInfo {
	t.Helper()
	var i portsInfo
	unmarshal(t, p.mustAsk(t, "info", "--json"), &i)
	return i
}

func forwards(t testing.TB, text string) []forward {
	t.Helper()
	var all struct{ Forwards []forward }
	unmarshal(t, text, &all)
	return all.Forwards
}

// idle waits until no connection is left, and nothing of them.
func (p *publisher) idle(t testing.TB) {
	t.Helper()
	eventually(t, "no connection is left", func() bool {
		i := p.info(t)
		return i.Ports.Connections == 0 && i.Ports.Dials == 0
	})
}

// get asks the control socket by curl.
func (p *publisher) get(t testing.TB, path string) string {
	t.Helper()
	return lab.home.must(t, "curl", "-sS", "--fail-with-body", "--unix-socket", p.socket, "http://usernet"+path)
}

// metric is the sum of a metric's values.
func (p *publisher) metric(t testing.TB, name string) (sum float64) {
	t.Helper()
	found := false
	for line := range strings.Lines(p.get(t, "/v1/usernet/metrics")) {
		f := strings.Fields(line)
		if base, _, _ := strings.Cut(f[0], "{"); base == name {
			v, err := strconv.ParseFloat(f[len(f)-1], 64)
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			sum, found = sum+v, true
		}
	}
	if !found {
		t.Fatalf("there is no metric %s", name)
	}
	return sum
}

// serveOnly is serveTCP on the family of the address alone: package net takes 0.0.0.0 for both.
func (p *place) serveOnly(t testing.TB, addr string, handle func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	network := "tcp"
	if strings.HasPrefix(addr, "0.0.0.0:") {
		network = "tcp4"
	}
	return p.serve(t, network, addr, handle)
}

// tellPeer is a server that says whom it sees.
func tellPeer(c *net.TCPConn) { fmt.Fprint(c, c.RemoteAddr()) }

// peerSeen connects and reads what tellPeer says, beside the address that the client has itself.
func peerSeen(p *place, to string) (seen, own netip.AddrPort, err error) {
	c, err := p.dial("tcp", to)
	if err != nil {
		return seen, own, err
	}
	defer c.Close()
	own = unmap(c.LocalAddr())
	b, err := io.ReadAll(c)
	if err != nil {
		return seen, own, err
	}
	seen, err = netip.ParseAddrPort(string(b))
	return netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port()), own, err
}

func unmap(a net.Addr) netip.AddrPort {
	ap := netip.MustParseAddrPort(a.String())
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// linkLocal is a link-local address of the host's as outside reaches it, once both ends of the link have one.
func linkLocal(t testing.TB) string {
	t.Helper()
	addr, index := "", ""
	eventually(t, "the link has its own addresses", func() bool {
		theirs, err1 := at(lab.host, "ip", "-6", "-o", "addr", "show", "dev", "world", "scope", "link", "-tentative")
		ours, err2 := at(lab.outside, "ip", "-6", "-o", "addr", "show", "dev", "host0", "scope", "link", "-tentative")
		if err1 != nil || err2 != nil {
			t.Fatalf("%v: %s, %v: %s", err1, theirs, err2, ours)
		}
		if len(strings.Fields(theirs)) < 4 || ours == "" {
			return false
		}
		addr = netip.MustParsePrefix(strings.Fields(theirs)[3]).Addr().String()
		index, _, _ = strings.Cut(ours, ":")
		return true
	})
	return addr + "%" + index
}

// hostPort is a port of the host as outside reaches it.
func hostPort(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(hostAddr4), port)
}

// resets tells why a connection was not reset without an octet, as one is whose server refuses; nil: it was.
func resets(p *place, to string) error {
	c, err := p.dial("tcp", to)
	n := 0
	if err == nil {
		defer c.Close()
		n, err = c.Read(make([]byte, 1))
	}
	if n != 0 || !errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("%d octets and %v, want none and ECONNRESET", n, err)
	}
	return nil
}

func isThere(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
