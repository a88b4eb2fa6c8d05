package e2e

import (
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A port where nobody listens inside resets its clients, who get not one octet; and other forwards go on.
func TestPortsRefused(t *testing.T) {
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "8080:8080", "-p", "8081:8081")
			p.c.net.serveTCP(t, ":8081", echo)
			for name, client := range map[string]struct {
				at *place
				to string
			}{
				"outside": {lab.outside, hostAddr4 + ":8080"}, "outside IPv6": {lab.outside, "[" + hostAddr6 + "]:8080"},
				"loopback": {lab.host, "127.0.0.1:8080"}, "loopback IPv6": {lab.host, "[::1]:8080"},
			} {
				for range 5 {
					if err := resets(client.at, client.to); err != nil {
						t.Errorf("%s: %v", name, err)
					}
				}
			}
			if err := reaches(lab.outside, hostPort(8081)); err != nil {
				t.Errorf("another port: %v", err)
			}
			all := p.list(t)
			if len(all) != 2 || all[0].Refused != 20 || all[0].OctetsOut != 0 || all[1].Refused != 0 {
				t.Errorf("%+v, want 20 connections of the first refused", all)
			}
			p.idle(t)
		})
	}
}

// A server on the container's loopback alone is reached by the kernel path; without it, clients are reset, and info says so.
func TestPortsLoopbackOnly(t *testing.T) {
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "8081:8081", "-p", "8082:8082")
			p.c.net.serveTCP(t, "127.0.0.1:8081", tellPeer)
			p.c.net.serveTCP(t, "[::1]:8082", tellPeer)
			for _, test := range []struct {
				at      *place
				to, see string
			}{
				{lab.outside, hostAddr4 + ":8081", outsideAddr4},
				{lab.host, "127.0.0.1:8081", gateway4},
				{lab.outside, "[" + hostAddr6 + "]:8082", outsideAddr6},
				{lab.host, "[::1]:8082", gateway6},
				{lab.outside, "[" + hostAddr6 + "]:8081", gateway4},
				{lab.outside, hostAddr4 + ":8082", gateway6},
			} {
				if path == "stack" {
					if err := resets(test.at, test.to); err != nil {
						t.Errorf("%s: %v", test.to, err)
					}
					continue
				}
				if seen, _, err := peerSeen(test.at, test.to); err != nil || seen.Addr().String() != test.see {
					t.Errorf("by way of %s the server sees %v, %v; want %s", test.to, seen, err, test.see)
				}
			}
			i := p.info(t).Ports
			if i.IPv4.Loopback != (path == "kernel") || i.IPv6.Loopback != (path == "kernel") || i.IPv4.Path != path || i.IPv6.Path != path {
				t.Errorf("info says %+v and %+v", *i.IPv4, *i.IPv6)
			}
			said := strings.Contains(p.mustAsk(t, "info"), "servers on the container's loopback alone are not reached")
			if said != (path == "stack") {
				t.Errorf("info says that the loopback is not reached: %v", said)
			}
		})
	}
}

// Half of a published connection ends and the other half goes on; an abort stays one.
func TestPortsHalfCloseAndReset(t *testing.T) {
	const size = 1 << 20
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "8081:8081", "-p", "8082:8082", "-p", "8083:8083")
			// It answers only once it has seen the end.
			p.c.net.serveTCP(t, ":8081", func(c *net.TCPConn) {
				if b, err := io.ReadAll(c); err == nil {
					c.Write(b)
				}
			})
			// It ends first, and then counts.
			counted := make(chan int64, 1)
			p.c.net.serveTCP(t, ":8082", func(c *net.TCPConn) {
				io.WriteString(c, "over to you")
				c.CloseWrite()
				n, _ := io.Copy(io.Discard, c)
				counted <- n
			})
			for name, to := range map[string]string{"IPv4": hostAddr4, "IPv6": hostAddr6} {
				conn := lab.outside.connect(t, "tcp", net.JoinHostPort(to, "8081")).(*net.TCPConn)
				conn.Write(pattern[:size])
				conn.CloseWrite()
				if b, err := io.ReadAll(conn); err != nil || string(b) != string(pattern[:size]) {
					t.Errorf("%s: %d octets came back, or others: %v", name, len(b), err)
				}
				conn = lab.outside.connect(t, "tcp", net.JoinHostPort(to, "8082")).(*net.TCPConn)
				if b, err := io.ReadAll(conn); err != nil || string(b) != "over to you" {
					t.Errorf("%s: got %q, %v", name, b, err)
				}
				conn.Write(pattern[:size])
				conn.Close()
				select {
				case n := <-counted:
					if n != size {
						t.Errorf("%s: the server got %d octets after its end, want %d", name, n, size)
					}
				case <-time.After(patience):
					t.Fatalf("%s: the server sees no end", name)
				}
			}

			got := make(chan error, 1)
			p.c.net.serveTCP(t, ":8083", func(c *net.TCPConn) {
				b := make([]byte, 1)
				c.SetDeadline(time.Now().Add(patience))
				c.Read(b)
				if b[0] == 'r' {
					c.SetLinger(0)
					return
				}
				c.Write(b)
				_, err := c.Read(b)
				got <- err
			})
			conn := lab.outside.connect(t, "tcp", hostAddr4+":8083").(*net.TCPConn)
			conn.Write([]byte("r"))
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the server's abort is %v to the client, want ECONNRESET", err)
			}
			conn = lab.outside.connect(t, "tcp", hostAddr4+":8083").(*net.TCPConn)
			if err := ping(conn); err != nil {
				t.Fatal(err)
			}
			conn.SetLinger(0)
			conn.Close()
			if err := <-got; !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the client's abort is %v to the server, want ECONNRESET", err)
			}
		})
	}
}

// Much goes through as it was sent, both ways at once.
func TestPortsOctets(t *testing.T) {
	needs(t, "curl", "sha256sum")
	const size = 64 << 20
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "8080:8080")
			p.c.net.serveHTTP(t, ":8080", files())
			url, outside := "http://"+hostAddr4+":8080/", where{place: lab.outside}
			up := outside.start(t, nil, "sh", "-ec", strings.Join(helper("pattern", "67108864"), " ")+" | curl -sS -T - "+url)
			if got := outside.sh(t, "curl -sS "+url+"67108864 | sha256sum"); !strings.HasPrefix(got, patternHash(size)+" ") {
				t.Errorf("download: hash %s, want %s", got, patternHash(size))
			}
			if code := up.wait(t); code != 0 || up.out.String() != "67108864 "+patternHash(size)+"\n" {
				t.Errorf("upload: status %d, the server got %s", code, up.out)
			}
			f := p.list(t)[0]
			if f.OctetsIn < size || f.OctetsOut < size || f.Total != 2 {
				t.Errorf("counted %+v", f)
			}
		})
	}
}

// A unix socket of the host leads to a port of the container. Its file goes with the forward, and with usernet.
func TestPortsUnixSocket(t *testing.T) {
	dir := filepath.Dir(socketPath(t))
	first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", first+":8080", "-p", second+":8080")
			p.c.net.serveTCP(t, ":8080", tellPeer)
			conn := lab.host.connect(t, "unix", first).(*net.UnixConn)
			conn.CloseWrite()
			if b, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(b), gateway4+":") {
				t.Errorf("the server sees %q, %v; want the gateway", b, err)
			}
			if mode := lab.root.must(t, "stat", "-c", "%a %F", first); mode != "600 socket\n" {
				t.Errorf("the socket is %q, want 600 socket", mode)
			}
			p.mustAsk(t, "port", "remove", "1")
			if isThere(first) || !isThere(second) {
				t.Errorf("after the removal of the first: %v %v", isThere(first), isThere(second))
			}
			// A confined usernet sees no files, and says so.
			if out, code := p.ask(t, "port", "add", filepath.Join(dir, "third")+":8080"); code == 0 && !raceDetector {
				t.Errorf("a path was published from within the sandbox: %s", out)
			} else if !raceDetector {
				saysAll(t, out, "give the path when it starts")
			}
			p.end(t)
			if isThere(second) || isThere(p.socket) {
				t.Error("a socket's file is left after the end")
			}
		})
	}
}

// auto publishes what listens in the container, while it does.
func TestPortsAuto(t *testing.T) {
	p := publish(t, "-p", "auto:^8082")
	published := func(proto string, port uint16) bool {
		for _, f := range p.list(t) {
			if strings.HasPrefix(f.Proto, proto) && f.ContainerPort == port && f.HostPort == port && f.Auto {
				return true
			}
		}
		return false
	}
	var conns []net.Listener
	p.c.net.do(func() {
		for _, addr := range []string{":8081", ":8082", "127.0.0.1:8083"} {
			l, err := net.Listen("tcp", addr)
			if err != nil {
				t.Error(err)
				return
			}
			conns = append(conns, l)
			go func() {
				for c, err := l.Accept(); err == nil; c, err = l.Accept() {
					tellPeer(c.(*net.TCPConn))
					c.Close()
				}
			}()
		}
	})
	udp := p.c.net.listenUDP(t, "[::]:8084")
	eventually(t, "all are published", func() bool { return published("tcp", 8081) && published("tcp", 8083) && published("udp", 8084) })
	if seen, _, err := peerSeen(lab.outside, hostAddr4+":8081"); err != nil || seen.Addr().String() != outsideAddr4 {
		t.Errorf("the server sees %v, %v", seen, err)
	}
	if seen, _, err := peerSeen(lab.host, "127.0.0.1:8083"); err != nil || seen.Addr().String() != gateway4 {
		t.Errorf("the server sees %v, %v", seen, err)
	}
	// What is the container's loopback is not the world's, and what is excluded nobody's.
	for _, addr := range []string{hostAddr4 + ":8083", hostAddr4 + ":8082"} {
		if _, err := lab.outside.dial("tcp", addr); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("dial %s: %v, want ECONNREFUSED", addr, err)
		}
	}
	for _, l := range conns {
		l.Close()
	}
	udp.Close()
	eventually(t, "all are withdrawn", func() bool { return len(p.list(t)) == 0 })
	if _, err := lab.outside.dial("tcp", hostAddr4+":8081"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial a port that is withdrawn: %v, want ECONNREFUSED", err)
	}
}

// A forward that is removed ends its connections, or lets them end with --drain; its port is free at once.
func TestPortsRemove(t *testing.T) {
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "8080:8080", "-p", "8081:8080")
			p.c.net.serveTCP(t, ":8080", echo)
			var conns []net.Conn
			for _, to := range []string{":8080", ":8081"} {
				conn := lab.outside.connect(t, "tcp", hostAddr4+to)
				if err := ping(conn); err != nil {
					t.Fatal(err)
				}
				conns = append(conns, conn)
			}
			p.mustAsk(t, "port", "remove", "1")
			p.mustAsk(t, "port", "remove", "--drain", "2")
			for _, to := range []string{":8080", ":8081"} {
				if _, err := lab.outside.dial("tcp", hostAddr4+to); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("dial %s: %v, want ECONNREFUSED", to, err)
				}
			}
			if _, err := conns[0].Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("a connection of the forward that is removed: %v, want ECONNRESET", err)
			}
			if err := ping(conns[1]); err != nil {
				t.Errorf("a connection of the forward that drains: %v", err)
			}
			if all := p.list(t); len(all) != 1 || !all[0].Draining || all[0].Active != 1 {
				t.Errorf("%+v, want one that drains", all)
			}
			// The port can be had again meanwhile.
			if again := p.add(t, "8081:8080"); again[0].ID != 3 {
				t.Errorf("%+v", again)
			}
			conns[1].Close()
			eventually(t, "what has drained is gone", func() bool { return len(p.list(t)) == 1 })
			if out, code := p.ask(t, "port", "remove", "2"); code != 1 || !strings.Contains(out, "unknown id: 2") {
				t.Errorf("status %d: %s", code, out)
			}
		})
	}
}
