package portdriver

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rootless-containers/rootlesskit/v3/pkg/api"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port/testsuite"

	"golang.org/x/sys/unix"

	"usernet/tap/inside"
	"usernet/tap/taptest"
)

// rootlesskit's own suite for port drivers, on both data paths.
func TestRootlesskitSuite(t *testing.T) {
	for _, path := range []string{PathAuto, PathStack} {
		for _, proto := range []string{"tcp", "tcp4", "udp", "udp4"} {
			t.Run(path+"/"+proto, func(t *testing.T) {
				testsuite.TestProto(t, proto, newSuiteParent(t, path))
			})
		}
	}
	// Their servers listen on the container's loopback alone.
	t.Run("transparent", func(t *testing.T) {
		testsuite.TestTCPTransparent(t, newSuiteParent(t, PathAuto))
		testsuite.TestUDPTransparent(t, newSuiteParent(t, PathAuto))
	})
}

// suiteParent is the driver as the suite wants it: it learns from the suite's child which namespace it serves.
type suiteParent struct {
	port.Manager
	t    *testing.T
	path string
	fifo string
}

func newSuiteParent(t *testing.T, path string) *suiteParent {
	taptest.NeedTUN(t)
	if err := hostAddresses(); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(t.TempDir(), "pid")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	return &suiteParent{t: t, path: path, fifo: fifo}
}

func (p *suiteParent) Info(context.Context) (*api.PortDriverInfo, error) {
	return &api.PortDriverInfo{Driver: "usernet", Protos: Protos}, nil
}

func (p *suiteParent) OpaqueForChild() map[string]string { return map[string]string{"fifo": p.fifo} }

func (p *suiteParent) RunParentDriver(initComplete chan struct{}, quit <-chan struct{}, _ *port.ChildContext) error {
	b, err := os.ReadFile(p.fifo)
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return err
	}
	p.Manager = noManager{} // what the suite finds if the lab fails the test
	defer close(initComplete)
	l := newLab(p.t, labConfig{path: p.path, pid: pid})
	p.Manager = suiteManager{l.driver.Manager(), l}
	initComplete <- struct{}{}
	<-quit
	return nil
}

// suiteManager waits for the suite's server, which the suite itself does not: it counts on a slow driver.
type suiteManager struct {
	port.Manager
	l *lab
}

func (m suiteManager) AddPort(ctx context.Context, s port.Spec) (*port.Status, error) {
	until(m.l.t, "the suite's server listens", func() bool {
		all, err := m.l.kit.Listening(ctx)
		return err != nil || slices.ContainsFunc(all, func(l inside.Listening) bool {
			return int(l.Addr.Port()) == s.ChildPort && l.Proto == s.Proto[:3]
		})
	})
	return m.Manager.AddPort(ctx, s)
}

type noManager struct{ port.Manager }

func (noManager) AddPort(context.Context, port.Spec) (*port.Status, error) {
	return nil, errors.New("there is no lab")
}

// suiteChild is the suite's process in the container.
type suiteChild struct{}

func (suiteChild) RunChildDriver(opaque map[string]string, quit <-chan struct{}, _ string) error {
	if err := os.WriteFile(opaque["fifo"], []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
		return err
	}
	<-quit
	return nil
}
