package portdriver

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"golang.org/x/sys/unix"

	"usernet/tap/inside"
)

// asked is whom a UDP server of the container sees in a new client at host.
func asked(t *testing.T, host netip.Addr, f Forward) netip.AddrPort {
	t.Helper()
	conn, err := net.Dial("udp", at(host, f))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got := make([]byte, 100)
	n := 0
	until(t, "an answer comes", func() bool {
		if _, err := conn.Write([]byte("who am I?")); err != nil {
			return false // nobody was there a moment ago
		}
		conn.SetReadDeadline(time.Now().Add(time.Second))
		n, err = conn.Read(got)
		return err == nil
	})
	who, err := netip.ParseAddrPort(string(got[:n]))
	if err != nil {
		t.Fatalf("%s: %v", got[:n], err)
	}
	return netip.AddrPortFrom(who.Addr().Unmap(), who.Port())
}

// UDP servers on the container's loopback alone are reached, those that the TAP leads to see their clients.
func TestUDPLoopback(t *testing.T) {
	l := newLab(t, labConfig{})
	for _, addr := range []string{"127.0.0.1:53", "[::1]:54", "127.0.0.1:55", "10.0.2.100:55", "127.0.0.1:56", "[::1]:56", "[::]:57"} {
		go repeat(l.listenUDP("udp", addr))
	}
	fs := l.add("0:53/udp", "0:54/udp", "0:55/udp", "0:56/udp", "0:57/udp", "0:10.0.2.100:53/udp", "0:[fd00::7]:54/udp")
	for i, path := range []string{PathKernel, PathKernel, PathTAP, PathKernel, PathTAP, PathKernel, PathTAP} {
		if fs[i].Path != path || (fs[i].Note != "") != (path == PathKernel) {
			t.Errorf("%v: path %s, note %q", fs[i].Spec, fs[i].Path, fs[i].Note)
		}
	}
	for _, c := range []struct {
		f          Forward
		host, want netip.Addr
	}{
		{fs[0], host4, loopback4}, {fs[0], host6, loopback4}, {fs[0], localhost, loopback4},
		{fs[1], host4, loopback6}, {fs[1], host6, loopback6}, {fs[1], localhost6, loopback6},
		{fs[2], host4, host4}, {fs[2], localhost, gateway4},
		{fs[3], host4, loopback4}, {fs[3], host6, loopback6},
		{fs[4], host4, host4}, {fs[4], host6, host6},
		{fs[5], host4, loopback4},
	} {
		if who := asked(t, c.host, c.f); who.Addr() != c.want {
			t.Errorf("%v by %v: seen as %v, want %v", c.f.Spec, c.host, who, c.want)
		}
	}
	f, _ := l.driver.Get(fs[0].ID)
	if f.Active != 3 || f.Total != 3 || f.OctetsIn < 3*9 || f.OctetsOut == 0 {
		t.Errorf("%+v", f)
	}
}

// Where a port is bound is noticed when it changes.
func TestUDPLoopbackChanges(t *testing.T) {
	l := newLab(t, labConfig{})
	f := l.add("0:53/udp")[0]
	if f.Path != PathTAP || f.Note != "" {
		t.Errorf("with no server: %+v", f)
	}
	takes := func(path string) {
		t.Helper()
		until(t, "the path is "+path, func() bool { f, _ := l.driver.Get(f.ID); return f.Path == path })
	}
	client, err := net.Dial("udp", at(host4, f))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for range 2 {
		// Who has spoken in vain before there is a server is heard as well.
		if _, err := client.Write([]byte("anybody?")); err != nil {
			t.Fatal(err)
		}
		lo := l.listenUDP("udp4", "127.0.0.1:53")
		takes(PathKernel)
		served := make(chan struct{})
		go func() { repeat(lo); close(served) }()
		got := make([]byte, 100)
		until(t, "an answer comes", func() bool {
			client.Write([]byte("anybody?"))
			client.SetReadDeadline(time.Now().Add(time.Second))
			n, err := client.Read(got)
			return err == nil && strings.HasPrefix(string(got[:n]), "127.0.0.1:")
		})
		lo.Close()
		<-served
		takes(PathTAP)
		wide := l.listenUDP("udp", "[::]:53")
		served = make(chan struct{})
		go func() { repeat(wide); close(served) }()
		until(t, "the client is seen", func() bool { return asked(t, host4, f).Addr() == host4 })
		wide.Close()
		<-served
		if f, _ := l.driver.Get(f.ID); f.Path != PathTAP {
			t.Errorf("%+v", f)
		}
	}
}

// Who names an address of the loopback is led there whoever else has the port; dockerd does where rootlesskit's API says that
// the loopback is reached.
func TestUDPLoopbackByName(t *testing.T) {
	l := newLab(t, labConfig{})
	for _, addr := range []string{"127.0.0.1:53", "10.0.2.100:53", "[::1]:54", "127.0.0.9:55", "0.0.0.0:56"} {
		go repeat(l.listenUDP("udp", addr))
	}
	fs := l.add("0:127.0.0.1:53/udp", "0:[::1]:54/udp", "0:127.0.0.9:55/udp", "0:127.0.0.1:56/udp")
	added, err := l.driver.Manager().AddPort(t.Context(), port.Spec{Proto: "udp", ParentIP: "203.0.113.1", ParentPort: 5353, ChildIP: "127.0.0.1", ChildPort: 53})
	if err != nil {
		t.Fatal(err)
	}
	last, _ := l.driver.Get(added.ID)
	for i, f := range append(fs, last) {
		want := loopback4
		if i == 1 {
			want = loopback6
		}
		// As it was led at first, and after who listens was looked at.
		for range 2 {
			if f, _ := l.driver.Get(f.ID); f.Path != PathKernel || !strings.Contains(f.Note, want.String()) {
				t.Errorf("%v: path %s, note %q", f.Spec, f.Path, f.Note)
			}
			if who := asked(t, host4, f); who.Addr() != want {
				t.Errorf("%v: seen as %v, want %v", f.Spec, who, want)
			}
			if _, err := l.driver.look(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []labConfig{{path: PathStack}, {noKit: true}} {
		l := newLab(t, c)
		f, err := l.driver.Add(t.Context(), Spec{Proto: "udp", Container: loopback4, ContainerPort: 53})
		if err == nil || !strings.Contains(err.Error(), "by the kernel path alone") {
			t.Errorf("without the kernel path: %+v, %v", f, err)
		}
	}
}

func TestUDPLoopbackStackOnly(t *testing.T) {
	for _, c := range []labConfig{{path: PathStack}, {noKit: true}} {
		l := newLab(t, c)
		l.listenUDP("udp", "127.0.0.1:53")
		if f := l.add("0:53/udp")[0]; f.Path != PathTAP || !strings.Contains(f.Note, "not reached") {
			t.Errorf("%+v", f)
		}
	}
}

// Who listens is looked at while somebody wants to know, and not otherwise.
func TestUDPLoopbackLooks(t *testing.T) {
	k := &fakeKit{}
	d := bare(t, nil)
	d.kit = k
	looks := func() int {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.looks
	}
	watching := func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.watching
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { d.watch(ctx); close(ended) }()
	defer func() { cancel(); <-ended }()

	publish(t, d, "0:80", "0:[fd00::7]:53/udp")
	if n := looks(); n != 0 || watching() {
		t.Errorf("%d looks for TCP, and for UDP to an address of its own", n)
	}
	k.listen(inside.Listening{Proto: "udp", Addr: netip.MustParseAddrPort("127.0.0.1:53")},
		inside.Listening{Proto: "tcp", Addr: netip.MustParseAddrPort("0.0.0.0:53")},
		inside.Listening{Proto: "udp", Addr: netip.MustParseAddrPort("127.0.0.53:54")})
	f := publish(t, d, "0:53/udp", "0:54/udp")
	if f[0].Path != PathKernel || f[1].Path != PathTAP || looks() == 0 {
		t.Errorf("%+v", f)
	}
	n := looks()
	until(t, "there are further looks", func() bool { return looks() > n+1 })
	k.listen(inside.Listening{Proto: "udp", Addr: netip.MustParseAddrPort("[::ffff:127.0.0.1]:53")},
		inside.Listening{Proto: "udp", Addr: netip.MustParseAddrPort("[::1]:53")})
	u := d.cfg.UDP.(*fakeUDP)
	through := func() string {
		u.mu.Lock()
		defer u.mu.Unlock()
		return fmt.Sprint(u.through)
	}
	until(t, "both loopbacks are led to", func() bool { return through() == "[[127.0.0.1:53] [127.0.0.1:53 [::1]:53]]" })
	k.listen(inside.Listening{Proto: "udp", Addr: netip.MustParseAddrPort("127.0.0.1:53")},
		inside.Listening{Proto: "udp", Addr: netip.MustParseAddrPort("192.0.2.9:53")})
	until(t, "it goes by the TAP", func() bool { return through() == "[[127.0.0.1:53] [127.0.0.1:53 [::1]:53] []]" })
	k.mu.Lock()
	if got := fmt.Sprint(k.prepared); got != fmt.Sprint([]inside.Kind{{UDP: true}, {UDP: true}, {V6: true, UDP: true}}) {
		t.Errorf("prepared: %s", got)
	}
	k.mu.Unlock()
	if fd, err := d.udpSocket(false); err == nil {
		unix.Close(fd)
		t.Error("a socket where none is ready")
	}
	for _, f := range f {
		if err := d.Remove(t.Context(), f.ID, false); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "nobody looks any more", func() bool { return !watching() })
}
