package forwarder

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// plainSocket makes sockets as a container's helper does; its namespace is ours.
func plainSocket(v6 bool) (int, error) {
	family := unix.AF_INET
	if v6 {
		family = unix.AF_INET6
	}
	return unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
}

// A server on loopback alone hears each client from a socket of its own, and the client hears the address that it spoke to.
func TestThrough(t *testing.T) {
	addHostAddress(t, "192.0.2.7/24", "2001:db8:7::7/64")
	run(t, "ip", "address", "add", "192.0.2.8/24", "dev", "world0")
	c, _ := newContainer(t, Config{})
	for _, v := range []struct {
		servers  []string
		from, to string
		reached  int // which of the servers
	}{
		{[]string{"127.0.0.1:0"}, "192.0.2.7:0", "192.0.2.8", 0},
		{[]string{"127.0.0.1:0"}, "127.0.0.1:0", "127.0.0.9", 0},
		{[]string{"[::1]:0"}, "[2001:db8:7::7]:0", "2001:db8:7::7", 0},
		{[]string{"[::1]:0"}, "[::1]:0", "::1", 0},
		{[]string{"127.0.0.1:0"}, "[2001:db8:7::7]:0", "2001:db8:7::7", 0},
		{[]string{"[::1]:0"}, "192.0.2.7:0", "192.0.2.8", 0},
		{[]string{"127.0.0.1:0", "[::1]:0"}, "192.0.2.7:0", "192.0.2.8", 0},
		{[]string{"127.0.0.1:0", "[::1]:0"}, "[::1]:0", "::1", 1},
	} {
		t.Run(fmt.Sprintf("%s to %s at %v", v.from, v.to, v.servers), func(t *testing.T) {
			p := c.publish("[::]:0", web4, web6)
			defer p.Close()
			var to []netip.AddrPort
			var servers []*server
			for _, addr := range v.servers {
				s := newServer(t, addr)
				servers, to = append(servers, s), append(to, s.addr)
			}
			check(t, p.Through(plainSocket, to...))
			s := servers[v.reached]
			var seen [2]netip.AddrPort
			for i := range seen {
				a := visit(t, v.from, net.JoinHostPort(v.to, fmt.Sprint(p.num)))
				for _, payload := range []string{"question", "", "x", strings.Repeat("long", 60000/4) + "end", ""} {
					a.say(payload)
					seen[i] = s.expect(payload)
					if seen[i].Addr() != s.addr.Addr() || seen[i] == a.addr {
						t.Fatalf("the server sees %v", seen[i])
					}
					s.send(seen[i], payload)
					a.hear(payload)
				}
			}
			if seen[0] == seen[1] {
				t.Error("two clients are one to the server")
			}
			c.counted(p, "five each way, twice", func(st PublishedStats) bool {
				return st.Clients == 2 && st.Opened == 2 && st.In == 10 && st.Out == 10 && st.InOctets == st.OutOctets
			})
			if got := c.datagrams(); len(got) > 0 {
				t.Errorf("by the TAP came %v", got)
			}
		})
	}
}

// Trains stay trains both ways, with their TOS.
func TestThroughTrains(t *testing.T) {
	for _, addr := range []string{"127.0.0.1", "::1"} {
		t.Run(addr, func(t *testing.T) {
			c, _ := newContainer(t, Config{})
			p := c.publish("[::]:0", web4, web6)
			s := newServer(t, net.JoinHostPort(addr, "0"))
			check(t, p.Through(plainSocket, s.addr))
			a := visit(t, net.JoinHostPort(addr, "0"), net.JoinHostPort(addr, fmt.Sprint(p.num)))
			a.say("hello")
			as := s.expect("hello")
			for _, conn := range []*net.UDPConn{a.UDPConn, s.UDPConn} {
				raw, err := conn.SyscallConn()
				check(t, err)
				check(t, raw.Control(func(fd uintptr) {
					err = errors.Join(
						unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_GRO, 1), unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, 100))
					if s.addr.Addr().Is4() {
						err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TOS, 0x2d),
							unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVTOS, 1))
					} else {
						err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TCLASS, 0x2d),
							unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVTCLASS, 1))
					}
				}))
				check(t, err)
			}
			heard := func(what string, conn *net.UDPConn, want string) {
				t.Helper()
				buf, oob := make([]byte, 1<<16), make([]byte, 1<<10)
				conn.SetReadDeadline(time.Now().Add(patience))
				n, m, _, _, err := conn.ReadMsgUDPAddrPort(buf, oob)
				check(t, err)
				var anc ancillary
				anc.parse(oob[:m])
				if string(buf[:n]) != want || anc.segment != 100 || anc.tos != 0x2d {
					t.Errorf("%s got %d octets in segments of %d with TOS %#x, want %d of 100 with 0x2d", what, n, anc.segment, anc.tos, len(want))
				}
			}
			in, out := strings.Join(numbered(20, 100, 7), ""), strings.Join(numbered(30, 100, 9), "")
			a.say(in)
			heard("the server", s.UDPConn, in)
			s.send(as, out)
			heard("the client", a.UDPConn, out)
		})
	}
}

// A server that ends takes its clients along; where it comes back, or another that the TAP leads to, they are new ones.
func TestThroughRefused(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		c, _ := newContainer(t, Config{})
		p := c.publish("[::]:0", web4, web6)
		s := newServer(t, addr)
		check(t, p.Through(plainSocket, s.addr))
		a := visit(t, "127.0.0.1:0", fmt.Sprintf("127.0.0.1:%d", p.num))
		for range 3 {
			a.say("hello")
			s.send(s.expect("hello"), "answer")
			a.hear("answer")
			s.Close()
			a.say("anybody?")
			c.waitStats("the end of the client", publishedStats(p, func(st PublishedStats) bool { return st.Clients == 0 }))
			s = newServer(t, s.addr.String())
		}
		s.Close()
		check(t, p.Through(nil))
		a.say("by the TAP")
		c.heard(web4, "by the TAP")
		if st := p.Stats(); st.Opened != 4 || st.Clients != 1 {
			t.Errorf("counted %+v", st)
		}
	}
}

// Clients keep their way when it changes for others, but those that nobody has answered by the TAP.
func TestThroughChanges(t *testing.T) {
	c, _ := newContainer(t, Config{})
	p := c.publish("127.0.0.1:0", web4)
	s := newServer(t, "127.0.0.1:0")
	var all []*visitor
	for range 4 {
		all = append(all, visit(t, "127.0.0.1:0", fmt.Sprintf("127.0.0.1:%d", p.num)))
	}
	answered, silent, answered2, silent2 := all[0], all[1], all[2], all[3]
	silent.say("hello")
	c.heard(web4, "hello")
	answered.say("hello")
	as := c.heard(web4, "hello").Src
	c.send(web4, as, "answer")
	answered.hear("answer")

	check(t, p.Through(plainSocket, s.addr))
	answered.say("more")
	if d := c.heard(web4, "more"); d.Src != as {
		t.Errorf("the client is %v, and was %v", d.Src, as)
	}
	silent.say("again")
	s.expect("again")
	answered2.say("hello")
	as2 := s.expect("hello")
	s.send(as2, "answer")
	answered2.hear("answer")
	silent2.say("hello")
	as3 := s.expect("hello")
	c.send(web4, as, "still")
	answered.hear("still")

	check(t, p.Through(nil))
	s.send(as3, "late") // the answer of a server that has ended since
	silent2.hear("late")
	answered2.say("more")
	if got := s.expect("more"); got != as2 {
		t.Errorf("the client is %v, and was %v", got, as2)
	}
	s.send(as2, "still")
	answered2.hear("still")
}

// Too many clients make room for each other, idle ones end, and their sockets with them; a datagram that comes before there
// is a socket is lost, and the next is not.
func TestThroughLimits(t *testing.T) {
	c, now := newContainer(t, Config{UDP: UDPConfig{MaxInside: 3}})
	p := c.publish("127.0.0.1:0", web4)
	s := newServer(t, "127.0.0.1:0")
	ready := false
	var mu sync.Mutex
	var made []int
	check(t, p.Through(func(v6 bool) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		if !ready {
			return -1, errors.New("none lies ready")
		}
		fd, err := plainSocket(v6)
		made = append(made, fd)
		return fd, err
	}, s.addr))
	to := fmt.Sprintf("127.0.0.1:%d", p.num)
	a := visit(t, "127.0.0.1:0", to)
	a.say("too early")
	c.waitStats("a drop", publishedStats(p, func(st PublishedStats) bool { return st.Drops["files"] == 1 && st.Clients == 0 }))
	mu.Lock()
	ready = true
	mu.Unlock()
	a.say("hello")
	s.expect("hello")
	for range 5 {
		visit(t, "127.0.0.1:0", to).say("hello")
		s.expect("hello")
	}
	c.waitStats("three clients", publishedStats(p, func(st PublishedStats) bool {
		return st.Clients == 3 && st.Opened == 6 && st.Evicted == 3
	}))
	now.advance(32 * time.Second)
	c.waitStats("their end", publishedStats(p, func(st PublishedStats) bool { return st.Clients == 0 }))
	mu.Lock()
	defer mu.Unlock()
	if len(made) != 6 {
		t.Errorf("%d sockets were made, want 6", len(made))
	}
	for _, fd := range made {
		if sa, err := unix.Getpeername(fd); err == nil {
			if in, ok := sa.(*unix.SockaddrInet4); ok && in.Port == int(s.addr.Port()) {
				t.Errorf("socket %d is still open", fd)
			}
		}
	}
}

func TestThroughErrors(t *testing.T) {
	c, _ := newContainer(t, Config{})
	p := c.publish("127.0.0.1:0", web4)
	for _, to := range [][]netip.AddrPort{{{}}, {netip.MustParseAddrPort("127.0.0.1:0")}, {web4, web4}, {netip.MustParseAddrPort("[::ffff:127.0.0.1]:53")}} {
		if err := p.Through(plainSocket, to...); err == nil {
			t.Errorf("to %v is possible", to)
		}
	}
	check(t, p.Through(nil))
	check(t, p.Close())
	check(t, p.Through(plainSocket, netip.MustParseAddrPort("127.0.0.1:53"))) // it has no clients any more
	check(t, p.Through(nil))
}

// Everything at once: clients, answers, servers that end, changes of the way, and the end in the midst.
func TestThroughConcurrent(t *testing.T) {
	c, _ := newContainer(t, Config{UDP: UDPConfig{MaxInside: 8}})
	for range 5 {
		fd, num := boundSocket(t, "127.0.0.1:0")
		p, err := c.f.PublishUDP(fd, web4)
		check(t, err)
		s := newServer(t, "127.0.0.1:0")
		check(t, p.Through(plainSocket, s.addr))
		var wg sync.WaitGroup
		stop := make(chan struct{})
		until := func(what func()) {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						what()
						runtime.Gosched()
					}
				}
			})
		}
		speak := func() *visitor {
			a := visit(t, "127.0.0.1:0", fmt.Sprintf("127.0.0.1:%d", num))
			until(func() { a.Write([]byte("hello")) })
			return a
		}
		var heard sync.WaitGroup
		for range 6 {
			a := speak()
			heard.Add(1)
			wg.Go(func() { // each is answered at some time
				defer heard.Done()
				a.SetReadDeadline(time.Now().Add(patience))
				buf := make([]byte, 100)
				for {
					if _, err := a.Read(buf); err == nil {
						return
					} else if errors.Is(err, unix.ECONNREFUSED) {
						continue
					}
					t.Errorf("%v hears nothing", a.addr)
					return
				}
			})
		}
		wg.Go(func() {
			buf := make([]byte, 100)
			for {
				_, from, err := s.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				s.WriteToUDPAddrPort([]byte("answer"), from)
			}
		})
		heard.Wait()
		for range 6 { // more than there may be
			speak()
		}
		until(func() { p.Through(nil); p.Through(plainSocket, s.addr) })
		until(func() { c.datagrams(); c.f.Stats() })
		c.waitStats("evictions", func(Stats) bool { return p.Stats().Evicted > 10 })
		s.Close()
		check(t, p.Close())
		close(stop)
		wg.Wait()
		if st := p.Stats(); st.Clients != 0 || st.In == 0 || st.Out == 0 {
			t.Errorf("closed: %+v", st)
		}
	}
}

// Once a client is there nothing is allocated either way.
func TestThroughAllocs(t *testing.T) {
	f, err := New(Config{Policy: testPolicy(true)})
	check(t, err)
	defer f.Close()
	f.Bind(sink{})
	for _, addr := range []string{"127.0.0.1", "::1"} {
		fd, num := boundSocket(t, net.JoinHostPort(addr, "0"))
		p, err := f.PublishUDP(fd, web4, web6)
		check(t, err)
		s, serverPort := boundSocket(t, net.JoinHostPort(addr, "0"))
		defer unix.Close(s)
		check(t, p.Through(plainSocket, netip.AddrPortFrom(netip.MustParseAddr(addr), serverPort)))
		a, _ := boundSocket(t, net.JoinHostPort(addr, "0"))
		defer unix.Close(a)
		check(t, unix.Connect(a, sockaddr(netip.AddrPortFrom(netip.MustParseAddr(addr), num))))
		buf := make([]byte, 1<<16)
		in := func(segment, octets int) {
			check(t, unix.SetsockoptInt(a, unix.SOL_UDP, unix.UDP_SEGMENT, segment))
			if _, err := unix.Write(a, buf[:octets]); err != nil {
				t.Fatal(err)
			}
			f.ready(p.sock, unix.EPOLLIN)
		}
		in(0, 100)
		_, from, err := unix.Recvfrom(s, buf, 0)
		check(t, err)
		check(t, unix.Connect(s, from))
		all := f.inside.table.of(ownerKey{forward: p})
		if len(all) != 1 {
			t.Fatalf("%d clients", len(all))
		}
		client := all[0].sock
		defer all[0].release()
		if n := testing.AllocsPerRun(200, func() {
			for _, segment := range []int{0, 500} {
				in(segment, 5000)
				if _, err := unix.Write(s, buf[:5000]); err != nil {
					t.Fatal(err)
				}
				f.ready(client, unix.EPOLLIN)
			}
			for _, fd := range []int{a, s} {
				for {
					if _, err := unix.Read(fd, buf); err != nil {
						break
					}
				}
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", addr, n)
		}
		if st := p.Stats(); st.In < 11*200 || st.Out < 2*200 || st.Opened != 1 {
			t.Errorf("counted %+v", st)
		}
	}
}
