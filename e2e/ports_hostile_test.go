package e2e

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// servedAs waits until a client from outside is served at a port, and returns whom the server saw then.
func servedAs(t testing.TB, port uint16) (seen netip.Addr) {
	t.Helper()
	eventually(t, "a client is served", func() bool {
		s, _, err := peerSeen(lab.outside, hostPort(port).String())
		seen = s.Addr()
		return err == nil
	})
	return seen
}

// A container that takes away or changes what published ports need inside harms its own forwards at most, and these
// come back with it.
func TestPortsHostileRouting(t *testing.T) {
	needs(t, "ip")
	p := publish(t, "-p", "8080:8080", "-p", "9053:9053/udp")
	p.c.net.serveTCP(t, ":8080", tellPeer)
	p.c.net.serveUDP(t, "[::]:9053", same)
	bystander := publish(t, "-p", "8090:8080")
	bystander.c.net.serveTCP(t, ":8080", tellPeer)
	outside := echoServers(t)
	before := p.c.sh(t, "ip rule; ip -6 rule; ip route; ip -6 route | sort")
	if seen := servedAs(t, 8080); seen.String() != outsideAddr4 {
		t.Errorf("before all the server sees %v", seen)
	}
	for _, test := range []struct{ name, harm, undo string }{
		// flush also takes main and default, without which nothing is routed; they are the container's own affair.
		{"rules", "ip rule flush; ip -6 rule flush; ip rule add pref 32766 lookup main; ip -6 rule add pref 32766 lookup main", ":"},
		{"routes", "ip route flush table 30062 || :; ip -6 route flush table 30062 || :", ":"},
		{"other routes", "ip route replace unreachable default table 30062; ip -6 route replace unreachable default table 30062", ":"},
		{"sysctls", "for f in ipv4/tcp_fwmark_accept ipv4/fwmark_reflect ipv6/fwmark_reflect; do echo 0 >/proc/sys/net/$f; done", ":"},
		{"a rule before ours", "ip rule add pref 5 fwmark 0x3000 unreachable; ip -6 rule add pref 5 fwmark 0x3000 unreachable",
			"ip rule del pref 5; ip -6 rule del pref 5"},
		{"martians", "for d in all lo default; do echo 1 >/proc/sys/net/ipv4/conf/$d/rp_filter; done",
			"for d in all lo default; do echo 0 >/proc/sys/net/ipv4/conf/$d/rp_filter; done"},
		{"lo", "ip link set lo down", "ip link set lo up"},
		{"the TAP", "ip link set tap0 down", "ip link set tap0 up; ip addr add " + container6 + "/64 dev tap0 nodad; ip route replace default via " + gateway4 + "; ip -6 route replace default via " + gateway6},
	} {
		t.Run(test.name, func(t *testing.T) {
			p.c.sh(t, test.harm)
			// Meanwhile clients may be served or not, but nobody of another container notices; nor does the control socket.
			for range 3 {
				conn, err := lab.outside.dial("tcp", hostAddr4+":8080")
				if err == nil {
					t.Cleanup(func() { conn.Close() })
				}
				if seen, own, err := peerSeen(lab.outside, hostAddr4+":8090"); err != nil || seen != own {
					t.Errorf("another container's server sees %v of %v, %v", seen, own, err)
				}
			}
			p.list(t)
			p.c.sh(t, test.undo)
			if seen := servedAs(t, 8080); seen.String() != outsideAddr4 {
				t.Errorf("afterwards the server sees %v", seen)
			}
			eventually(t, "the container reaches the outside", func() bool { return errors.Join(reaches(p.c.net, outside[0]), reaches(p.c.net, outside[1])) == nil })
			if got := ask(t, lab.outside, netip.MustParseAddrPort(hostAddr4+":9053"), "x"); got != "x" {
				t.Errorf("over UDP: %q", got)
			}
		})
	}
	// Looked at again after a connection that had to wait, everything is as at first.
	eventually(t, "the kernel path is back", func() bool {
		servedAs(t, 8080)
		if _, _, err := peerSeen(lab.outside, "["+hostAddr6+"]:8080"); err != nil {
			return false
		}
		i := p.info(t).Ports
		return i.IPv4.WhyNotKernel == "" && i.IPv6.WhyNotKernel == ""
	})
	t.Logf("the container's routing before:\n%safter:\n%s", before, p.c.sh(t, "ip rule; ip -6 rule; ip route; ip -6 route | sort"))
	p.idle(t)
	if strings.Contains(p.out.String(), "level=ERROR") {
		t.Error("an error is in the log")
	}
	// At the end nothing of ours is left, and all that is the container's own.
	p.end(t)
	left := p.c.sh(t, "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; cat /proc/sys/net/ipv4/tcp_fwmark_accept")
	if strings.Contains(left, "0x3000") || strings.Contains(left, "30062") || !strings.HasSuffix(left, "\n0\n") {
		t.Errorf("after the end there is still\n%s", left)
	}
}

// Servers that do not accept, do not read or do not answer keep nobody from others.
func TestPortsHostileServers(t *testing.T) {
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "8080:8080", "-p", "8081:8081", "-p", "8082:8082")
			p.c.net.serveTCP(t, ":8080", echo)
			if err := fullQueue(t, p.c.net, 8081); err != nil {
				t.Fatal(err)
			}
			// It reads nothing, and sends without end.
			stop := make(chan struct{})
			defer close(stop)
			p.c.net.serveTCP(t, ":8082", func(c *net.TCPConn) {
				go io.Copy(c, endless{})
				<-stop
			})
			var conns []net.Conn
			for i := range 200 {
				conn := lab.outside.connect(t, "tcp", hostPort(uint16(8081+i%2)).String())
				conn.(*net.TCPConn).SetWriteBuffer(1 << 16)
				conn.SetWriteDeadline(time.Now().Add(2 * time.Millisecond))
				conn.Write(pattern[:300000])
				conns = append(conns, conn)
			}
			for range 20 {
				if err := reaches(lab.outside, hostPort(8080)); err != nil {
					t.Errorf("beside the others: %v", err)
				}
			}
			if err := reaches(p.c.net, echoServers(t)[0]); err != nil {
				t.Errorf("the container's own connection: %v", err)
			}
			p.mustAsk(t, "port", "remove", "2", "3")
			for _, conn := range conns {
				conn.Close()
			}
			p.idle(t)
		})
	}
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// fullQueue makes a server that accepts nobody, and whose queue is full. It ends with the test.
func fullQueue(t testing.TB, p *place, port int) error {
	var fd int
	var err error
	p.do(func() {
		if fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err = unix.Bind(fd, &unix.SockaddrInet6{Port: port}); err != nil {
			return
		}
		err = unix.Listen(fd, 0)
	})
	if err != nil {
		return err
	}
	conn, err := p.dial("tcp", netip.AddrPortFrom(netip.MustParseAddr(container4), uint16(port)).String())
	if err == nil {
		t.Cleanup(func() { conn.Close() })
	}
	return err
}

// A container that floods its gateway, the published ports' clients and itself keeps nobody from the control socket, nor
// its own forwards for longer than it does so.
func TestPortsHostileFlood(t *testing.T) {
	p := publish(t, "-p", "8080:8080", "-p", "9053:9053/udp")
	p.c.net.serveTCP(t, ":8080", tellPeer)
	flooder := p.c.net.listenUDP(t, "[::]:9053")
	client := lab.outside.connect(t, "udp", hostAddr4+":9053")
	client.Write([]byte("?"))
	b := make([]byte, 10)
	_, from, err := flooder.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatal(err)
	}
	// From the published port: to its client, to the gateway, to many who have never asked.
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			flooder.WriteToUDPAddrPort(pattern[:1000], from)
			flooder.WriteToUDPAddrPort(pattern[:100], netip.MustParseAddrPort(gateway4+":9"))
			flooder.WriteToUDPAddrPort(pattern[:10], netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), uint16(1+i%60000)))
		}
	}()
	for range 50 {
		if seen := servedAs(t, 8080); seen.String() != outsideAddr4 {
			t.Errorf("the server sees %v", seen)
		}
		p.list(t)
	}
	close(stop)
	<-done
	if seen, _, err := peerSeen(lab.outside, hostAddr4+":8080"); err != nil || seen.Addr().String() != outsideAddr4 {
		t.Errorf("afterwards the server sees %v, %v", seen, err)
	}
	if strings.Contains(p.out.String(), "level=ERROR") {
		t.Error("an error is in the log")
	}
}
