package forwarder

import (
	"bytes"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fewFiles lets this process open n more files until the returned function is called.
func fewFiles(t *testing.T, n int) (again func()) {
	t.Helper()
	var old unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	// The limit is on numbers, and the next file gets the lowest free one.
	next, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
	check(t, err)
	unix.Close(next)
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(next + n), Max: old.Max}))
	again = func() { unix.Setrlimit(unix.RLIMIT_NOFILE, &old) }
	t.Cleanup(again)
	return again
}

// Without files a new flow takes the place of an idle one; without any flow it is dropped, and that
// is said once.
func TestUDPOutOfFiles(t *testing.T) {
	var log bytes.Buffer
	c, _ := newContainer(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	s := newServer(t, "127.0.0.1:0")
	again := fewFiles(t, 0)
	for range 3 {
		c.send(me4, s.gateway(), "dropped")
	}
	again()
	if n := c.f.Stats().UDP.Drops["files"]; n != 3 {
		t.Errorf("%d dropped", n)
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 {
		t.Errorf("%d warnings: %s", n, log.String())
	}
	again = fewFiles(t, 4)
	for i := range 20 {
		c.send(netip.AddrPortFrom(me4.Addr(), uint16(30000+i)), s.gateway(), "hello")
		s.expect("hello")
	}
	again()
	if st := c.f.Stats().UDP; st.Sent != 20 || st.Flows != 4 || st.Evicted != 16 {
		t.Errorf("counted %+v", st)
	}
}

// The same where all older flows are in use and of one source.
func TestUDPOutOfFilesAllBusy(t *testing.T) {
	c, now := newContainer(t, Config{})
	s := newServer(t, "127.0.0.1:0")
	again := fewFiles(t, 4)
	const first = 30000
	for i := range 10 {
		for port := max(i-3, 0); port <= i; port++ { // the new one last
			now.advance(time.Second)
			c.send(netip.AddrPortFrom(me4.Addr(), uint16(first+port)), s.gateway(), "hello")
			s.expect("hello")
		}
	}
	again()
	if st := c.f.Stats().UDP; st.Drops["files"] != 0 || st.Flows != 4 || st.Sent != 4*10-6 {
		t.Errorf("counted %+v", st)
	}
}

// An idle flow is small: 1 KiB of ours, beside the kernel's socket.
func TestUDPFlowMemory(t *testing.T) {
	f, err := New(Config{Policy: testPolicy(true)})
	check(t, err)
	defer f.Close()
	s := newServer(t, "127.0.0.1:0")
	s.SetReadBuffer(1 << 20)
	const flows = 500
	heap := func() int {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	c := &container{t: t, f: f, changed: make(chan struct{})}
	c.send(me4, s.gateway(), "warm")
	before := heap()
	for i := range flows {
		c.send(netip.AddrPortFrom(me4.Addr(), uint16(30000+i)), s.gateway(), "hello")
	}
	if n := f.Stats().UDP.Flows; n != flows+1 {
		t.Fatalf("%d flows", n)
	}
	each := (heap() - before) / flows
	t.Logf("%d octets per flow", each)
	if each > 1024 {
		t.Errorf("%d octets per idle flow", each)
	}
	runtime.KeepAlive(f)
}

// Up and down through the loopback of the host, per datagram of 1400 octets.
func BenchmarkUDP(b *testing.B) {
	f, err := New(Config{Policy: testPolicy(true)})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	f.Bind(sink{})
	conn, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(conn)
	if err := unix.Bind(conn, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		b.Fatal(err)
	}
	sa, err := unix.Getsockname(conn)
	if err != nil {
		b.Fatal(err)
	}
	to := netip.AddrPortFrom(f.cfg.Policy.Gateway4, uint16(sa.(*unix.SockaddrInet4).Port))
	batch := trains(numbered(44, 1400, 1400), me4, to)["datagrams"]
	f.ServeUDP(batch[:1])
	fl := f.udp.table.get(flowKey{proto: protoUDP, src: me4})
	defer fl.release()
	b.Run("up", func(b *testing.B) {
		b.SetBytes(1400)
		for n := 0; n < b.N; n += len(batch) {
			f.ServeUDP(batch) // what the server's buffer cannot hold is lost there
		}
	})
	b.Run("down", func(b *testing.B) {
		b.SetBytes(1400)
		if err := unix.SetsockoptInt(conn, unix.SOL_UDP, unix.UDP_SEGMENT, 1400); err != nil {
			b.Skip(err)
		}
		payload := make([]byte, 44*1400)
		back := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(me4.Port())}
		for n := 0; n < b.N; n += 44 {
			if err := unix.Sendto(conn, payload, 0, back); err != nil {
				b.Fatal(err)
			}
			f.ready(fl.sock, unix.EPOLLIN)
		}
		if f.Stats().UDP.Received == 0 {
			b.Fatal("nothing was received")
		}
	})
}
