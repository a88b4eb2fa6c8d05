package portdriver

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port/testsuite"

	"golang.org/x/sys/unix"

	"usernet/tap"
	"usernet/tap/inside"
	"usernet/tap/netns"
	"usernet/tap/taptest"
)

// The tests run in namespaces of their own, which are the host; containers are made further in.
func TestMain(m *testing.M) {
	if os.Getenv("rootlesskit-port-testsuite.mode") != "" {
		testsuite.Main(m, func() port.ChildDriver { return suiteChild{} })
		os.Exit(0) // the suite's child
	}
	ops := netns.Ops{opServe: netns.Handle(serveInside)}
	maps.Copy(ops, tap.Ops())
	maps.Copy(ops, inside.Ops())
	taptest.Main(m, ops)
}

const opServe = "test.serve"

type serveArgs struct{ Network, Address string }

// serveInside makes a listening socket in the container.
func serveInside(ctx context.Context, a serveArgs) (struct{}, []*os.File, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			if a.Network == "tcp6" || a.Network == "udp6" {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
			}
		})
		if cerr != nil {
			return cerr
		}
		return err
	}}
	var f *os.File
	switch a.Network {
	case "tcp", "tcp4", "tcp6":
		ln, err := config.Listen(ctx, a.Network, a.Address)
		if err != nil {
			return struct{}{}, nil, err
		}
		defer ln.Close()
		if f, err = ln.(*net.TCPListener).File(); err != nil {
			return struct{}{}, nil, err
		}
	case "udp", "udp4", "udp6":
		pc, err := config.ListenPacket(ctx, a.Network, a.Address)
		if err != nil {
			return struct{}{}, nil, err
		}
		defer pc.Close()
		if f, err = pc.(*net.UDPConn).File(); err != nil {
			return struct{}{}, nil, err
		}
	default:
		return struct{}{}, nil, fmt.Errorf("no network %s", a.Network)
	}
	return struct{}{}, []*os.File{f}, nil
}
