package portdriver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"usernet/forwarder"
	"usernet/forwarder/relay"
	"usernet/stack"
	"usernet/tap"
	"usernet/tap/inside"
	"usernet/tap/netns"
	"usernet/tap/taptest"
)

const patience = 20 * time.Second // what a loaded machine may need

var (
	net4, net6            = netip.MustParsePrefix("10.0.2.0/24"), netip.MustParsePrefix("fd00::/64")
	container4            = netip.MustParseAddr("10.0.2.100")
	container6            = netip.MustParseAddr("fd00::100")
	gateway4, gateway6    = netip.MustParseAddr("10.0.2.2"), netip.MustParseAddr("fd00::2")
	host4, host6          = netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:1::1")
	localhost, localhost6 = loopback4, loopback6
)

// A lab is a container with all that serves it.
type lab struct {
	t      testing.TB
	space  *taptest.Namespace
	ns     *netns.NS
	kit    *inside.Kit
	stack  *stack.Stack
	loop   *relay.Loop
	driver *Driver
	log    *logBuffer
}

// labConfig changes a lab; zero is one with everything.
type labConfig struct {
	path   string
	noKit  bool
	noTAP  bool               // no stack path either
	change func(c *Config)    // last
	space  *taptest.Namespace // nil: a new one
	pid    int                // instead of space
}

// hostAddresses gives the host an address that is no loopback.
var hostAddresses = sync.OnceValue(func() error {
	for _, args := range []string{
		"link add ext0 type veth peer name ext1",
		"link set ext1 up",
		"link set ext0 up",
		"address add 203.0.113.1/24 dev ext0",
		"address add 2001:db8:1::1/64 dev ext0 nodad",
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
	}
	return nil
})

func newLab(t testing.TB, cfg labConfig) *lab {
	t.Helper()
	if err := hostAddresses(); err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, space: cfg.space, log: &logBuffer{}}
	if cfg.pid == 0 {
		if l.space == nil {
			l.space = taptest.NewNS(t, taptest.OwnerRoot)
		}
		cfg.pid = l.space.PID
	}
	log := slog.New(slog.NewTextHandler(l.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	t.Cleanup(func() {
		if t.Failed() {
			log := l.log.String()
			t.Logf("log, its end:\n%s", log[max(0, len(log)-4000):])
		}
	})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	l.ns, err = netns.Open(netns.Config{PID: cfg.pid, Helper: true})
	must(err)
	t.Cleanup(func() { l.ns.Close() })
	c := Config{
		Container4: container4, Container6: container6, Gateway4: gateway4, Gateway6: gateway6,
		Subnets: []netip.Prefix{net4, net6}, Path: cfg.path, Log: log,
	}
	var parts []func(context.Context) error
	if cfg.noTAP {
		l.loop, err = relay.NewLoop()
		must(err)
		t.Cleanup(l.loop.Close)
		parts = append(parts, l.loop.Run)
	} else {
		taptest.NeedTUN(t)
		device, err := tap.Open(t.Context(), l.ns, tap.Config{
			Name: "tap0", MTU: 1500, Configure: true,
			IPv4: netip.PrefixFrom(container4, 24), Gateway4: gateway4,
			IPv6: netip.PrefixFrom(container6, 64), Gateway6: gateway6, Log: log,
		})
		must(err)
		t.Cleanup(func() { device.Close() })
		f, err := forwarder.New(forwarder.Config{
			Policy: forwarder.Policy{Subnet4: net4, Subnet6: net6, Gateway4: gateway4, Gateway6: gateway6}, Log: log, MaxFiles: 4096,
		})
		must(err)
		t.Cleanup(func() { f.Close() })
		var devices []stack.Device
		for _, q := range device.Queues() {
			devices = append(devices, q)
		}
		l.stack, err = stack.New(stack.Config{
			MTU: device.MTU(), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, Log: log,
			Gateway4: netip.PrefixFrom(gateway4, 24), Gateway6: netip.PrefixFrom(gateway6, 64),
			MaxDials: f.MaxDials(), Beside: f.Sources(),
		}, devices, f)
		must(err)
		f.Bind(l.stack)
		l.loop = f.Relay()
		c.Stack, c.UDP = stackDialer{l.stack}, udpPublisher{f}
		parts = append(parts, f.Run, l.stack.Run)
	}
	if !cfg.noKit {
		l.kit, err = inside.Open(t.Context(), l.ns, inside.Config{IPv6: true, Log: log})
		must(err)
		t.Cleanup(func() {
			if err := l.kit.Close(); err != nil {
				t.Error("close the kit:", err)
			}
		})
		c.Kit = l.kit
		parts = append(parts, l.kit.Run)
	} else {
		c.WhyNoKernel = errors.New("the test has none")
	}
	c.Loop = l.loop
	if cfg.change != nil {
		cfg.change(&c)
	}
	l.driver, err = New(c)
	must(err)

	// The driver ends first, so that it is what resets its connections, and not the end of the relay. (In the program
	// all end at once.)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, run := range parts {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				t.Error("run:", err)
			}
		})
	}
	driverCtx, stopDriver := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- l.driver.Run(driverCtx) }()
	t.Cleanup(func() {
		stopDriver()
		if err := <-ended; err != nil {
			t.Error("Run:", err)
		}
		cancel()
		wg.Wait()
		if n := l.driver.connections.Load(); n != 0 {
			t.Errorf("%d connections are counted at the end", n)
		}
	})
	return l
}

type stackDialer struct{ *stack.Stack }

func (s stackDialer) DialFrom(ctx context.Context, src, dst netip.AddrPort) (relay.End, error) {
	c, err := s.Stack.DialFrom(ctx, "tcp", src, dst)
	if err != nil {
		return nil, err
	}
	return c, nil
}

type udpPublisher struct{ *forwarder.Forwarder }

func (u udpPublisher) PublishUDP(fd int, to ...netip.AddrPort) (UDPForward, error) {
	p, err := u.Forwarder.PublishUDP(fd, to...)
	if err != nil {
		return nil, err
	}
	return udpForward{p}, nil
}

type udpForward struct{ *forwarder.PublishedUDP }

func (u udpForward) Stats() UDPStats {
	s := u.PublishedUDP.Stats()
	out := UDPStats{Clients: s.Clients, Total: s.Opened, OctetsIn: s.InOctets, OctetsOut: s.OutOctets}
	for n := range maps.Values(s.Drops) {
		out.Dropped += n
	}
	return out
}

// logBuffer keeps what was logged.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// listen makes a TCP listener in the container.
func (l *lab) listen(network, address string) net.Listener {
	l.t.Helper()
	files, err := l.ns.Call(l.t.Context(), netns.Ops{opServe: netns.Handle(serveInside)}, opServe, serveArgs{network, address}, nil)
	if err != nil {
		l.t.Fatal(err)
	}
	defer files[0].Close()
	ln, err := net.FileListener(files[0])
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { ln.Close() })
	return ln
}

// listenUDP makes a UDP socket in the container.
func (l *lab) listenUDP(network, address string) net.PacketConn {
	l.t.Helper()
	files, err := l.ns.Call(l.t.Context(), netns.Ops{opServe: netns.Handle(serveInside)}, opServe, serveArgs{network, address}, nil)
	if err != nil {
		l.t.Fatal(err)
	}
	defer files[0].Close()
	pc, err := net.FilePacketConn(files[0])
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { pc.Close() })
	return pc
}

// sayWho has a server tell each client which address it has, and then repeat what it says.
func (l *lab) sayWho(network, address string) net.Listener {
	l.t.Helper()
	ln := l.listen(network, address)
	ending, end := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				defer context.AfterFunc(ending, func() { c.SetDeadline(time.Now().Add(patience)) })()
				fmt.Fprintln(c, c.RemoteAddr())
				if _, err := io.Copy(c, c); errors.Is(err, os.ErrDeadlineExceeded) {
					l.t.Errorf("the connection of %v was never ended", c.RemoteAddr())
				}
			})
		}
	})
	l.t.Cleanup(func() { ln.Close(); l.driver.Close(); end(); wg.Wait() })
	return ln
}

// add publishes specs and fails the test where they cannot be.
func (l *lab) add(specs ...string) []Forward {
	l.t.Helper()
	var all []Spec
	for _, s := range specs {
		parsed, err := ParseSpec(s)
		if err != nil {
			l.t.Fatal(err)
		}
		all = append(all, parsed...)
	}
	fs, err := l.driver.Add(l.t.Context(), all...)
	if err != nil {
		l.t.Fatal(err)
	}
	return fs
}

// idle waits until a forward has no connection.
func (l *lab) idle(id int) (f Forward) {
	l.t.Helper()
	until(l.t, "its connections have ended", func() bool { f, _ = l.driver.Get(id); return f.Active == 0 })
	return f
}

// at is a forward's port of the host.
func at(addr netip.Addr, f Forward) string {
	return netip.AddrPortFrom(addr, f.Spec.HostPort).String()
}

func dial(t testing.TB, network, address string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout(network, address, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// until waits until ok.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
		<-tick.C
	}
}
