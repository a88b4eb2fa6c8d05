package e2e

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// A client of a published port and the address that a server in the container has to see; port tells whether
// the client's port is seen too, as far as it is free inside.
type portClient struct {
	name string
	at   *place
	to   string // the host's address that it connects to
	see  string
	port bool
}

func portClients(t testing.TB) []portClient {
	return []portClient{
		{"outside", lab.outside, hostAddr4, outsideAddr4, true},
		{"outside IPv6", lab.outside, hostAddr6, outsideAddr6, true},
		{"further away", lab.far, hostAddr4, farAddr4, true},
		{"the host", lab.host, hostAddr4, hostAddr4, true},
		{"the host IPv6", lab.host, hostAddr6, hostAddr6, true},
		{"the host's loopback", lab.host, "127.0.0.1", gateway4, false},
		{"the host's loopback IPv6", lab.host, "::1", gateway6, false},
		{"link-local", lab.outside, linkLocal(t), gateway6, false},
	}
}

// A server in the container sees the client's own address, wherever it listens.
func TestPortsSource(t *testing.T) {
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "8080:8080", "-p", "8081:8081", "-p", "8082:8082", "-p", "8083:8083", "-p", "8084:8084")
			for addr, fit := range map[string]func(c portClient) bool{
				":8080":                     func(portClient) bool { return true },
				"0.0.0.0:8081":              func(c portClient) bool { return !strings.Contains(c.to, ":") },
				"[::]:8082":                 func(portClient) bool { return true },
				container4 + ":8083":        func(c portClient) bool { return !strings.Contains(c.to, ":") },
				"[" + container6 + "]:8084": func(c portClient) bool { return strings.Contains(c.to, ":") },
			} {
				server := p.c.net.serveOnly(t, addr, tellPeer)
				for _, client := range portClients(t) {
					if !fit(client) {
						continue
					}
					t.Run(addr+" "+client.name, func(t *testing.T) {
						seen, own, err := peerSeen(client.at, net.JoinHostPort(client.to, port(server)))
						if err != nil {
							t.Fatal(err)
						}
						if seen.Addr() != netip.MustParseAddr(client.see) || client.port && seen != own {
							t.Errorf("the server sees %v, want %s; the client is %v", seen, client.see, own)
						}
					})
				}
			}
			for _, f := range p.list(t) {
				if f.Path != path || f.Total == 0 || f.Refused != 0 {
					t.Errorf("%+v, want connections on the %s path", f, path)
				}
			}
			if strings.Contains(p.out.String(), "level=ERROR") {
				t.Error("an error is in the log")
			}
		})
	}
}

func port(a netip.AddrPort) string {
	return netip.AddrPortFrom(netip.IPv4Unspecified(), a.Port()).String()[len("0.0.0.0:"):]
}

// A server on one family alone is reached by clients of both, as the gateway by those of the other.
func TestPortsOtherFamily(t *testing.T) {
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "8081:8081", "-p", "8082:8082")
			p.c.net.serveOnly(t, "0.0.0.0:8081", tellPeer)
			p.c.net.serveTCP(t, "["+container6+"]:8082", tellPeer)
			for to, want := range map[string]string{"[" + hostAddr6 + "]:8081": gateway4, hostAddr4 + ":8082": gateway6} {
				if seen, _, err := peerSeen(lab.outside, to); err != nil || seen.Addr().String() != want {
					t.Errorf("by way of %s the server sees %v, %v; want %s", to, seen, err, want)
				}
			}
		})
	}
}

// A web server writes whom it has served.
func TestPortsAccessLog(t *testing.T) {
	needs(t, "busybox", "curl")
	dir := t.TempDir()
	writeFile(t, dir+"/index.html", "it works\n")
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "8080:80")
			httpd := p.c.start(t, nil, "busybox", "httpd", "-f", "-vv", "-p", "80", "-h", dir)
			eventually(t, "httpd listens", func() bool {
				c, err := p.c.net.dial("tcp", container4+":80")
				if err == nil {
					c.Close()
				}
				return err == nil
			})
			for _, test := range []struct{ url, see string }{
				{"http://" + hostAddr4 + ":8080/index.html", "[::ffff:" + outsideAddr4 + "]:"},
				{"http://[" + hostAddr6 + "]:8080/index.html", "[" + outsideAddr6 + "]:"},
			} {
				if got := (where{place: lab.outside}).must(t, "curl", "-sS", "--max-time", "20", test.url); got != "it works\n" {
					t.Errorf("curl %s: %q", test.url, got)
				}
				httpd.has(t, test.see)
			}
			// Of the host's own loopback the container hears nothing but the gateway.
			lab.host.connect(t, "tcp", "127.0.0.1:8080").Write([]byte("GET / HTTP/1.0\r\n\r\n"))
			httpd.has(t, "[::ffff:"+gateway4+"]:")
		})
	}
}

// A resolver in the container writes whom it has answered, over UDP and TCP.
func TestPortsDNS(t *testing.T) {
	needs(t, "dnsmasq", "dig")
	p := publish(t, "-p", "5353:5353/udp", "-p", "5353:5353/tcp")
	server := p.c.start(t, nil, "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root",
		"--pid-file=", "--log-queries=extra", "--log-facility=-", "--port=5353", "--address=/svc.test/192.0.2.9")
	server.has(t, "started")
	for _, test := range []struct{ name, to, flag, see string }{
		{"UDP", hostAddr4, "+notcp", outsideAddr4},
		{"UDP IPv6", hostAddr6, "+notcp", outsideAddr6},
		{"TCP", hostAddr4, "+tcp", outsideAddr4},
		{"TCP IPv6", hostAddr6, "+tcp", outsideAddr6},
	} {
		t.Run(test.name, func(t *testing.T) {
			name := strings.ReplaceAll(strings.ToLower(test.name), " ", "-") + ".svc.test"
			// dig takes no answer that comes from another address than it asked.
			out := (where{place: lab.outside}).must(t, "dig", "+short", "+tries=1", "+time=20", test.flag, "@"+test.to, "-p", "5353", name)
			if strings.TrimSpace(out) != "192.0.2.9" {
				t.Errorf("dig says %q", out)
			}
			server.has(t, "query[A] "+name+" from "+test.see)
		})
	}
}

// Datagrams come with the client's address, and answers from the address that the client has sent to.
func TestPortsUDP(t *testing.T) {
	p := publish(t, "-p", "9053:9053/udp", "-p", "127.0.0.1:9054:9053/udp", "-p", "[::1]:9054:9053/udp")
	p.c.net.serveUDP(t, "[::]:9053", func(from netip.AddrPort, b []byte) []byte {
		return []byte(netip.AddrPortFrom(from.Addr().Unmap(), from.Port()).String() + " " + string(b))
	})
	for _, client := range portClients(t) {
		t.Run(client.name, func(t *testing.T) {
			for _, size := range []int{0, 1, 1400, 9000, 60000} {
				conn := client.at.connect(t, "udp", net.JoinHostPort(client.to, "9053"))
				if _, err := conn.Write(pattern[:size]); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, 65536)
				n, err := conn.Read(b)
				if err != nil {
					t.Fatalf("%d octets: %v", size, err)
				}
				peer, rest, _ := strings.Cut(string(b[:n]), " ")
				seen, err := netip.ParseAddrPort(peer)
				if err != nil || seen.Addr() != netip.MustParseAddr(client.see) || seen.Port() != unmap(conn.LocalAddr()).Port() {
					t.Errorf("the server sees %v, want %s with the port of %v", peer, client.see, conn.LocalAddr())
				}
				if rest != string(pattern[:size]) {
					t.Errorf("%d octets: %d came back, or others", size, len(rest))
				}
				conn.Close()
			}
		})
	}
	if got := ask(t, lab.host, netip.MustParseAddrPort("127.0.0.1:9054"), "x"); !strings.HasPrefix(got, gateway4+":") {
		t.Errorf("the server sees %q, want the gateway", got)
	}
	if got := ask(t, lab.host, netip.MustParseAddrPort("[::1]:9054"), "x"); !strings.HasPrefix(got, "["+gateway6+"]:") {
		t.Errorf("the server sees %q, want the gateway", got)
	}
	// Many clients at a time, each of which gets its own answers.
	conns := make([]net.Conn, 200)
	for i := range conns {
		conns[i] = lab.outside.connect(t, "udp", hostAddr4+":9053")
		conns[i].Write([]byte("?"))
	}
	for _, conn := range conns {
		conn.SetDeadline(time.Now().Add(patience))
		b := make([]byte, 100)
		if n, err := conn.Read(b); err != nil || string(b[:n]) != unmap(conn.LocalAddr()).String()+" ?" {
			t.Errorf("client %v: %q, %v", conn.LocalAddr(), b[:n], err)
		}
	}
	// With the port withdrawn nobody is there any more.
	all := p.list(t)
	p.mustAsk(t, "port", "remove", "1", "2", "3")
	if len(all) != 3 || all[0].Path != "tap" || all[0].Total < 200 || all[0].OctetsIn == 0 || all[0].OctetsOut == 0 {
		t.Errorf("%+v", all)
	}
	if err := sendError(t, lab.outside, hostAddr4+":9053"); err == nil {
		t.Error("a datagram to a port that is withdrawn is not refused")
	}
}

// A UDP server on the container's loopback alone is reached where the kernel path is; the list says how it is.
func TestPortsUDPLoopbackOnly(t *testing.T) {
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "9053:9053/udp", "-p", "9054:9054/udp")
			for _, addr := range []string{"127.0.0.1:9053", "[::1]:9054"} {
				p.c.net.serveUDP(t, addr, func(from netip.AddrPort, b []byte) []byte {
					return []byte(from.Addr().Unmap().String() + " " + string(b))
				})
			}
			if path == "stack" {
				if f := p.list(t)[0]; f.Path != "tap" || !strings.Contains(f.Note, "not reached") {
					t.Errorf("%+v", f)
				}
				return
			}
			eventually(t, "the ports are led to the loopback", func() bool {
				all := p.list(t)
				return all[0].Path == "kernel" && all[1].Path == "kernel"
			})
			for _, client := range portClients(t) {
				for _, test := range []struct{ port, see string }{{"9053", "127.0.0.1"}, {"9054", "::1"}} {
					for _, size := range []int{0, 1400, 60000} {
						conn := client.at.connect(t, "udp", net.JoinHostPort(client.to, test.port))
						b := make([]byte, 65536)
						n := 0
						eventually(t, "an answer comes", func() bool { // sockets inside may just be made
							if _, err := conn.Write(pattern[:size]); err != nil {
								t.Fatal(err)
							}
							conn.SetReadDeadline(time.Now().Add(time.Second))
							var err error
							n, err = conn.Read(b)
							return err == nil
						})
						if seen, rest, _ := strings.Cut(string(b[:n]), " "); seen != test.see || rest != string(pattern[:size]) {
							t.Errorf("%s: the server sees %s, want %s; %d octets of %d came back", client.name, seen, test.see, len(rest), size)
						}
						conn.Close()
					}
				}
			}
		})
	}
}
