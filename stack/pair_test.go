package stack_test

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"

	"usernet/stack"
	"usernet/tap/taptest"
)

const allOffloads = stack.OffloadChecksum | stack.OffloadTSO4 | stack.OffloadTSO6 | stack.OffloadUSO

var (
	gateway4   = netip.MustParsePrefix("10.0.2.2/24")
	gateway6   = netip.MustParsePrefix("fd00::2/64")
	container4 = netip.MustParsePrefix("10.0.2.100/24")
	container6 = netip.MustParsePrefix("fd00::100/64")
	world4     = netip.MustParseAddr("203.0.113.7")
	world6     = netip.MustParseAddr("2001:db8::7")

	gatewayMAC   = net.HardwareAddr{0x52, 0x55, 10, 0, 2, 2}
	containerMAC = net.HardwareAddr{0x52, 0x55, 10, 0, 2, 100}
)

// handler is a stack.Handler made of functions; a nil one does nothing.
type handler struct {
	tcp  func(context.Context, *stack.TCPRequest)
	udp  func([]stack.Datagram)
	echo func(stack.Echo)
}

func (h *handler) ServeTCP(ctx context.Context, r *stack.TCPRequest) {
	if h.tcp != nil {
		h.tcp(ctx, r)
	}
}

func (h *handler) ServeUDP(batch []stack.Datagram) {
	if h.udp != nil {
		h.udp(batch)
	}
}

func (h *handler) ServeEcho(e stack.Echo) {
	if h.echo != nil {
		h.echo(e)
	}
}

// pair is a gateway and a container, both netstacks, joined by a cable in memory. They run until the test ends.
type pair struct {
	gateway, container   *stack.Stack
	gatewayEnd, guestEnd *taptest.PipeEnd
}

type pairOption func(gw, ct *stack.Config, gwEnd, ctEnd *taptest.PipeEnd)

func newPair(t testing.TB, offloads uint32, h *handler, options ...pairOption) *pair {
	t.Helper()
	a, b := taptest.Pipe(offloads)
	gw := stack.Config{
		MTU: 65520, MAC: gatewayMAC, Gateway4: gateway4, Gateway6: gateway6,
		Extra: []netip.Addr{netip.MustParseAddr("10.0.2.3"), netip.MustParseAddr("fd00::3")},
	}
	ct := stack.Config{
		MTU: 65520, MAC: containerMAC, Gateway4: container4, Gateway6: container6,
		LinkLocal: netip.MustParseAddr("fe80::100"),
		NextHop4:  gateway4.Addr(), NextHop6: gateway6.Addr(),
	}
	for _, o := range options {
		o(&gw, &ct, a, b)
	}
	p := &pair{gatewayEnd: a, guestEnd: b}
	var err error
	if p.gateway, err = stack.New(gw, []stack.Device{a}, h); err != nil {
		t.Fatal(err)
	}
	if p.container, err = stack.New(ct, []stack.Device{b}, &handler{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, s := range []*stack.Stack{p.gateway, p.container} {
		wg.Go(func() {
			if err := s.Run(ctx); err != nil {
				t.Errorf("run: %v", err)
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return p
}

// dial connects from the container to dst.
func (p *pair) dial(ctx context.Context, dst netip.AddrPort) (*stack.Conn, error) {
	src := container4.Addr()
	if dst.Addr().Is6() {
		src = container6.Addr()
	}
	return p.container.DialFrom(ctx, "tcp", netip.AddrPortFrom(src, 0), dst)
}

func mtu(n int) pairOption {
	return func(gw, ct *stack.Config, _, _ *taptest.PipeEnd) { gw.MTU, ct.MTU = n, n }
}
