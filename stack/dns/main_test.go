package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// TestMain holds that no test leaves a goroutine or a descriptor behind.
func TestMain(m *testing.M) {
	if arg := os.Getenv("TEST_SANDBOX"); arg != "" {
		if err := sandboxed(arg); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	before := descriptors()
	code := m.Run()
	deadline := time.Now().Add(5 * time.Second)
	for leaked() != "" || descriptors() > before {
		if time.Now().After(deadline) {
			fmt.Fprintf(os.Stderr, "left behind: %d descriptors and\n%s\n", descriptors()-before, leaked())
			code = 1
			break
		}
		runtime.GC()
		runtime.Gosched()
	}
	os.Exit(code)
}

// leaked returns the stacks of goroutines that are in this package.
func leaked() string {
	buf := make([]byte, 1<<20)
	var out []string
	for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "stack/dns.") && !strings.Contains(g, "TestMain") {
			out = append(out, g)
		}
	}
	return strings.Join(out, "\n\n")
}

// descriptors counts those that are not the runtime's own (epoll and its eventfd come with the first socket).
func descriptors() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	n := 0
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.Contains(to, "anon_inode") && !strings.Contains(to, "/proc/") {
			n++
		}
	}
	return n
}

// listen makes a UDP and a TCP socket on one port of a loopback address.
func listen(t testing.TB, ip string) (net.PacketConn, net.Listener) {
	t.Helper()
	for range 20 {
		ln, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
		if err != nil {
			break
		}
		pc, err := net.ListenPacket("udp", ln.Addr().String())
		if err == nil {
			return pc, ln
		}
		ln.Close() // the port is somebody else's by UDP
	}
	t.Skipf("this machine has no free port on %s", ip)
	return nil, nil
}

func port(addr net.Addr) netip.AddrPort {
	return netip.MustParseAddrPort(addr.String())
}

// serve runs a server on 127.0.0.1 until the test ends, and returns it and its address.
func serve(t testing.TB, cfg Config) (*Server, string) {
	t.Helper()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	pc, ln := listen(t, "127.0.0.1")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, []net.PacketConn{pc}, []net.Listener{ln}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return s, pc.LocalAddr().String()
}

// resolver runs a name server on 127.0.0.1, by UDP and TCP, until the test ends.
func resolver(t testing.TB, h dns.HandlerFunc) netip.AddrPort {
	t.Helper()
	pc, ln := listen(t, "127.0.0.1")
	var wg sync.WaitGroup
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: h, UDPSize: 65535}, {Listener: ln, Handler: h}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		wg.Go(func() { s.ActivateAndServe() })
		<-started
		t.Cleanup(func() { s.Shutdown() })
	}
	t.Cleanup(wg.Wait)
	// Cleanups run last to first: Wait would come before Shutdown.
	t.Cleanup(func() { pc.Close(); ln.Close() })
	return port(pc.LocalAddr())
}

// raw runs a name server on 127.0.0.1 that answers each datagram with what h
// returns for it, in order.
func raw(t testing.TB, h func(question []byte) [][]byte) netip.AddrPort {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			for _, answer := range h(append([]byte(nil), buf[:n]...)) {
				pc.WriteTo(answer, from)
			}
		}
	})
	t.Cleanup(func() { pc.Close(); wg.Wait() })
	return port(pc.LocalAddr())
}

// silence is an upstream that takes questions and says nothing.
func silence(t testing.TB) netip.AddrPort {
	return raw(t, func([]byte) [][]byte { return nil })
}

func with(servers ...netip.AddrPort) Config { return Config{Upstreams: StaticUpstreams(servers)} }

// query asks for a name and returns the answer.
func query(t testing.TB, network, addr, name string, kind uint16) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), kind)
	return exchange(t, network, addr, m)
}

func exchange(t testing.TB, network, addr string, m *dns.Msg) *dns.Msg {
	t.Helper()
	c := dns.Client{Net: network, Timeout: 20 * time.Second, UDPSize: 65535}
	r, _, err := c.Exchange(m, addr)
	if err != nil {
		t.Fatalf("%s %s: %v", network, m.Question[0].Name, err)
	}
	return r
}

// talk sends octets by UDP and returns what comes back.
func talk(t testing.TB, addr string, msg []byte) []byte {
	t.Helper()
	conn, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write(msg); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 65536)
	n, err := conn.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

func pack(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// give answers every question for an address with one.
func give(a string) dns.HandlerFunc {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		m.Answer = append(m.Answer, &dns.A{
			Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60},
			A:   net.ParseIP(a),
		})
		w.WriteMsg(m)
	}
}

func code(rcode int) dns.HandlerFunc {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetRcode(q, rcode)
		w.WriteMsg(m)
	}
}

func address(t testing.TB, m *dns.Msg) string {
	t.Helper()
	if len(m.Answer) != 1 {
		t.Fatalf("answers: %v", m)
	}
	switch a := m.Answer[0].(type) {
	case *dns.A:
		return a.A.String()
	case *dns.AAAA:
		return a.AAAA.String()
	}
	t.Fatalf("answer: %v", m.Answer[0])
	return ""
}

var errTest = errors.New("as the test has it")
