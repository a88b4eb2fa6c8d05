package forwarder

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A port that the container's own flow holds on the host can be published, and the flow goes on elsewhere.
func TestTakeUDPPort(t *testing.T) {
	c, _ := newContainer(t, Config{})
	s := newServer(t, "127.0.0.1:0")
	c.send(web4, s.gateway(), "hello")
	from := s.expect("hello")
	if from.Port() != web4.Port() {
		t.Skipf("port %d of the host is taken", web4.Port())
	}
	at := netip.AddrPortFrom(netip.IPv4Unspecified(), web4.Port())
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	check(t, err)
	if err := unix.Bind(fd, sockaddr(at)); err != unix.EADDRINUSE {
		t.Fatalf("bind: %v", err)
	}
	// Meanwhile the container goes on sending.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				c.send(web4, s.gateway(), "hello")
				// It is read, or the server's buffer overflows.
				s.SetReadDeadline(time.Now().Add(patience))
				if _, _, err := s.ReadFromUDPAddrPort(s.buf); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	check(t, c.f.TakeUDPPort(web4.Port(), func() error {
		if c.f.taking.TryRLock() {
			c.f.taking.RUnlock()
			t.Error("a flow could begin")
		}
		return unix.Bind(fd, sockaddr(at))
	}))
	close(stop)
	wg.Wait()
	p, err := c.f.PublishUDP(fd, web4)
	check(t, err)
	a := visit(t, "127.0.0.1:0", fmt.Sprintf("127.0.0.1:%d", web4.Port()))
	a.say("question")
	c.send(web4, c.heard(web4, "question").Src, "answer")
	a.hear("answer")
	c.send(web4, s.gateway(), "last")
	if from = s.expect("last"); from.Port() == web4.Port() {
		t.Error("the container's own flow still has the port")
	}
	s.send(from, "go on")
	c.heard(web4, "go on")
	if st := p.Stats(); st.In != 1 || st.Out != 1 {
		t.Errorf("counted %+v", st)
	}
	// Somebody at work on the flow is waited for.
	other := netip.AddrPortFrom(me4.Addr(), 8001)
	c.send(other, s.gateway(), "other")
	s.expect("other")
	fl := c.f.udp.table.get(flowKey{proto: protoUDP, src: other})
	taken := make(chan error)
	go func() {
		taken <- c.f.TakeUDPPort(8001, func() error {
			if fl.sock.refs.Load() > 0 {
				t.Error("bound while a flow's socket was open")
			}
			return nil
		})
	}()
	for c.f.udp.table.len() > 1 {
		runtime.Gosched()
	}
	fl.release()
	check(t, <-taken)
	// The caller's error is the caller's.
	if err := c.f.TakeUDPPort(web4.Port(), func() error { return unix.EADDRINUSE }); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("got %v", err)
	}
}
