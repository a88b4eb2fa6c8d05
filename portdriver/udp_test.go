package portdriver

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// repeat has a UDP server answer each datagram with whom it came from.
func repeat(pc net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		_, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		pc.WriteTo([]byte(from.String()), from)
	}
}

func TestUDP(t *testing.T) {
	l := newLab(t, labConfig{})
	go repeat(l.listenUDP("udp", "[::]:53"))
	go repeat(l.listenUDP("udp4", "10.0.2.100:54"))
	fs := l.add("0:53/udp", "0:54/udp4", "127.0.0.1:0:53/udp", "[::1]:0:53/udp6", "0:[fd00::100]:53/udp4")
	for _, c := range []struct {
		f    Forward
		host netip.Addr
		want netip.Addr
	}{
		{fs[0], host4, host4}, {fs[0], host6, host6}, {fs[0], localhost, gateway4}, {fs[0], localhost6, gateway6},
		{fs[1], host4, host4}, {fs[2], localhost, gateway4}, {fs[3], localhost6, gateway6}, {fs[4], host4, gateway6},
	} {
		conn, err := net.Dial("udp", at(c.host, c.f)) // connected: it hears the address that it has asked, and no other
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		got := make([]byte, 100)
		n := 0
		until(t, "an answer comes", func() bool { // the container may not be known on the link yet
			if _, err := conn.Write([]byte("who am I?")); err != nil {
				t.Fatal(err)
			}
			conn.SetReadDeadline(time.Now().Add(time.Second))
			n, err = conn.Read(got)
			return err == nil
		})
		who, err := netip.ParseAddrPort(string(got[:n]))
		if err != nil || who.Addr().Unmap() != c.want {
			t.Errorf("%v by %v: seen as %s, want %v", c.f.Spec, c.host, got[:n], c.want)
		}
	}
	f, _ := l.driver.Get(fs[0].ID)
	if f.Path != PathTAP || f.Active != 4 || f.Total != 4 || f.OctetsIn == 0 || f.OctetsOut == 0 {
		t.Errorf("%+v", f)
	}
	for _, f := range fs {
		if err := l.driver.Remove(t.Context(), f.ID, true); err != nil {
			t.Error(err)
		}
		if got, ok := l.driver.Get(f.ID); ok {
			t.Errorf("after it was removed: %+v", got)
		}
	}
	l.add(fs[0].Spec.String())
}

// A port from which the container has spoken to somebody, so that the host has it too, is published nevertheless; but not
// one that another program has.
func TestUDPPortOfTheContainersOwnFlow(t *testing.T) {
	l := newLab(t, labConfig{})
	peer, err := net.ListenUDP("udp4", &net.UDPAddr{IP: host4.AsSlice()})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	port := freePorts(t, 1)
	server := l.listenUDP("udp4", fmt.Sprintf(":%d", port))
	speak := func() (from netip.AddrPort) {
		t.Helper()
		until(t, "the container is heard", func() bool {
			if _, err := server.WriteTo([]byte("hello"), peer.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			peer.SetReadDeadline(time.Now().Add(time.Second))
			_, from, err = peer.ReadFromUDPAddrPort(make([]byte, 100))
			return err == nil
		})
		return from
	}
	if from := speak(); int(from.Port()) != port {
		t.Fatalf("the container's port %d is %v on the host", port, from)
	}
	f := l.add(fmt.Sprintf("%d:%[1]d/udp", port))[0]
	if from := speak(); int(from.Port()) == port {
		t.Error("the container's own flow still has the port")
	}
	if err := l.driver.Remove(t.Context(), f.ID, false); err != nil {
		t.Fatal(err)
	}
	taken, err := net.ListenUDP("udp4", &net.UDPAddr{IP: host4.AsSlice(), Port: port})
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if _, err := l.driver.Add(t.Context(), Spec{Proto: "udp", HostPort: uint16(port), ContainerPort: uint16(port)}); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a port of another program: %v", err)
	}
}
