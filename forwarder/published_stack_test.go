package forwarder

import (
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"usernet/stack"

	"golang.org/x/sys/unix"
)

// The whole way: a socket of the host, the forwarder, a stack, a cable, and a server on another stack.
func TestPublishedUDPThroughStacks(t *testing.T) {
	addHostAddress(t, "192.0.2.7/24", "2001:db8:7::7/64")
	w := newTCPWorld(t, Config{})
	fd, num := boundSocket(t, "[::]:0")
	p, err := w.f.PublishUDP(fd, web4, web6)
	check(t, err)
	for _, at := range []netip.AddrPort{web4, web6} {
		s, err := w.container.ListenPacket(at)
		check(t, err)
		defer s.Close()
		go func() { // ends with s
			buf := make([]byte, 1<<16)
			for {
				n, from, err := s.ReadFrom(buf)
				if err != nil {
					return
				}
				s.WriteTo(fmt.Appendf(nil, "%v said %s", from, buf[:n]), from)
			}
		}()
	}
	for _, v := range []struct{ from, to, as string }{
		{"192.0.2.7:0", "192.0.2.7", "192.0.2.7"},
		{"127.0.0.1:0", "127.0.0.1", "10.0.2.2"},
		{"[2001:db8:7::7]:0", "2001:db8:7::7", "2001:db8:7::7"},
		{"[::1]:0", "::1", "fd00::2"},
	} {
		a := visit(t, v.from, net.JoinHostPort(v.to, fmt.Sprint(num)))
		for _, said := range []string{"hello", "", strings.Repeat("long", 16000)} {
			a.say(said)
			a.hear(fmt.Sprintf("%s said %s", net.JoinHostPort(v.as, fmt.Sprint(a.addr.Port())), said))
		}
	}
	(&container{t: t}).counted(port{p, num}, "all", func(st PublishedStats) bool {
		return st.Clients == 4 && st.In == 12 && st.Out == 12
	})
}

// A port that is shut in the container is silence for its client, and harms nobody.
func TestPublishedUDPShutPort(t *testing.T) {
	w := newTCPWorld(t, Config{})
	fd, num := boundSocket(t, "127.0.0.1:0")
	p, err := w.f.PublishUDP(fd, web4)
	check(t, err)
	a := visit(t, "127.0.0.1:0", fmt.Sprintf("127.0.0.1:%d", num))
	for i := range uint64(5) {
		a.say("anybody there?") // the container's kernel answers with ICMP
		for deadline := time.Now().Add(patience); p.Stats().In <= i; runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatalf("counted %+v", p.Stats())
			}
		}
	}
	s, err := w.container.ListenPacket(web4)
	check(t, err)
	defer s.Close()
	a.say("now?")
	buf := make([]byte, 64)
	s.SetReadDeadline(time.Now().Add(patience))
	n, from, err := s.ReadFrom(buf)
	for err == nil && string(buf[:n]) == "anybody there?" { // the last of them may have come only now
		n, from, err = s.ReadFrom(buf)
	}
	check(t, err)
	if string(buf[:n]) != "now?" {
		t.Errorf("container got %q", buf[:n])
	}
	s.WriteTo([]byte("yes"), from)
	a.hear("yes")
	(&container{t: t}).counted(port{p, num}, "one client", func(st PublishedStats) bool {
		return st.Clients == 1 && st.Opened == 1 && st.In == 6
	})
}

// A bench is a Forwarder whose stack forgets, with a published port and one client of it.
type bench struct {
	f      *Forwarder
	p      *PublishedUDP
	client int // socket, connected
	as     netip.AddrPort
}

func newBench(t testing.TB, listen, from string) *bench {
	t.Helper()
	f, err := New(Config{Policy: testPolicy(true)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	f.Bind(sink{})
	fd, num := boundSocket(t, listen)
	b := &bench{f: f}
	if b.p, err = f.PublishUDP(fd, web4, web6); err != nil {
		t.Fatal(err)
	}
	var port uint16
	b.client, port = boundSocket(t, netip.AddrPortFrom(netip.MustParseAddr(from), 0).String())
	t.Cleanup(func() { unix.Close(b.client) })
	to := sockaddr(netip.AddrPortFrom(netip.MustParseAddr(from), num))
	if err := unix.Connect(b.client, to); err != nil {
		t.Fatal(err)
	}
	b.as = netip.AddrPortFrom(f.cfg.Policy.Gateway4, port)
	_ = unix.SetsockoptInt(b.client, unix.SOL_UDP, unix.UDP_GRO, 1) // less to do for drain
	b.in(t, []byte("hello"))
	fl := f.published.table.get(flowKey{proto: protoUDP, src: web4, peer: b.as})
	if fl == nil {
		t.Fatal("no client")
	}
	fl.release()
	return b
}

// in has the client send and the Forwarder receive.
func (b *bench) in(t testing.TB, payload []byte) {
	if _, err := unix.Write(b.client, payload); err != nil {
		t.Fatal(err)
	}
	b.f.ready(b.p.sock, unix.EPOLLIN)
}

// batch is what the container answers in one go.
func (b *bench) batch(n, size int) (all []stack.Datagram) {
	for range n {
		all = append(all, stack.Datagram{Src: web4, Dst: b.as, Payload: [][]byte{make([]byte, size)}})
	}
	return all
}

// drain empties the client's socket.
func (b *bench) drain(buf []byte) (n int) {
	for {
		if _, err := unix.Read(b.client, buf); err != nil {
			return n
		}
		n++
	}
}

// Once a client is there nothing is allocated, in or out, alone or in trains, and no more for what is nobody's.
func TestPublishedUDPAllocs(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "[::]:0"} {
		b := newBench(t, listen, "127.0.0.1")
		payload, buf := make([]byte, 512), make([]byte, 1<<16)
		if n := testing.AllocsPerRun(200, func() {
			b.in(t, payload)
		}); n != 0 {
			t.Errorf("%s: %v allocations in", listen, n)
		}
		batch := trains(numbered(32, 512, 100), web4, b.as)["datagrams"]
		if n := testing.AllocsPerRun(200, func() {
			b.f.ServeUDP(batch)
			b.f.ServeUDP(batch[:1])
			b.drain(buf)
		}); n != 0 {
			t.Errorf("%s: %v allocations out", listen, n)
		}
		st := b.p.Stats()
		if st.In < 200 || st.Out < 33*200 || st.Opened != 1 {
			t.Errorf("counted %+v", st)
		}
	}
}

// A client costs 1 KiB.
func TestPublishedUDPMemory(t *testing.T) {
	f, err := New(Config{Policy: testPolicy(true)})
	check(t, err)
	defer f.Close()
	f.Bind(sink{})
	fd, _ := boundSocket(t, "127.0.0.1:0")
	p, err := f.PublishUDP(fd, web4)
	check(t, err)
	heap := func() int {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	before := heap()
	const clients = 1 << 14
	at := local{addr: netip.MustParseAddr("192.0.2.7")}
	for i := range clients {
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), 4000)
		if _, _, ok := p.came(from, at, f.now()); !ok {
			t.Fatalf("%v is no client", from)
		}
	}
	if n := p.Stats().Clients; n != clients {
		t.Fatalf("%d clients", n)
	}
	each := (heap() - before) / clients
	t.Logf("%d octets per client", each)
	if each > 1024 {
		t.Errorf("%d octets per client", each)
	}
	runtime.KeepAlive(f)
}

// Per datagram, in and out by the host's loopback: alone, and in trains.
func BenchmarkPublishedUDP(b *testing.B) {
	for _, size := range []int{64, 1400} {
		w := newBench(b, "0.0.0.0:0", "127.0.0.1")
		buf := make([]byte, 1<<16)
		b.Run(fmt.Sprintf("in/%d", size), func(b *testing.B) {
			payload := make([]byte, size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				w.in(b, payload)
			}
		})
		b.Run(fmt.Sprintf("out/%d", size), func(b *testing.B) {
			batch := w.batch(1, size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				w.f.ServeUDP(batch)
				w.drain(buf)
			}
		})
		count := min(44, maxTrain/size)
		b.Run(fmt.Sprintf("in in trains/%d", size), func(b *testing.B) {
			if err := unix.SetsockoptInt(w.client, unix.SOL_UDP, unix.UDP_SEGMENT, size); err != nil {
				b.Skip(err)
			}
			payload := make([]byte, count*size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for n := 0; n < b.N; n += count {
				w.in(b, payload)
			}
		})
		b.Run(fmt.Sprintf("out in trains/%d", size), func(b *testing.B) {
			batch := w.batch(count, size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for n := 0; n < b.N; n += count {
				w.f.ServeUDP(batch)
				w.drain(buf)
			}
		})
		if st := w.p.Stats(); st.In == 0 || st.Out == 0 || st.Opened != 1 {
			b.Fatalf("counted %+v", st)
		}
	}
}

// Finding the client among ten thousand, by what the host and by what the container knows; and what a
// datagram that answers no client pays for the question.
func BenchmarkPublishedUDPLookup(b *testing.B) {
	w := newBench(b, "0.0.0.0:0", "127.0.0.1")
	at := local{addr: netip.MustParseAddr("192.0.2.7")}
	const clients = 10000
	from := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), 4000)
	}
	for i := range clients {
		w.p.came(from(i), at, w.f.now())
	}
	b.Run("in", func(b *testing.B) {
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			if _, _, ok := w.p.came(from(i%clients), at, 1); !ok {
				b.Fatal("not found")
			}
			i += 7
		}
	})
	lookup := func(b *testing.B, found bool, peer func(int) netip.AddrPort) {
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			fl := w.f.published.table.get(flowKey{proto: protoUDP, src: web4, peer: peer(i % clients)})
			if (fl != nil) != found {
				b.Fatalf("found %v", fl)
			}
			if fl != nil {
				fl.replied(1)
				fl.release()
			}
			i += 7
		}
	}
	b.Run("out", func(b *testing.B) { lookup(b, true, from) })
	b.Run("out to nobody", func(b *testing.B) {
		lookup(b, false, func(i int) netip.AddrPort { return netip.AddrPortFrom(from(i).Addr(), 5000) })
	})
	b.Run("new client", func(b *testing.B) {
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			i++
			from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}), 4000)
			if _, _, ok := w.p.came(from, at, 1); !ok {
				b.Fatal("refused")
			}
		}
	})
}
