package portdriver

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"usernet/tap/inside"
)

func TestAutoSpecs(t *testing.T) {
	listening := func(all ...string) (list []inside.Listening) {
		for _, s := range all {
			s, only := strings.CutSuffix(s, " v6only")
			proto, addr, _ := strings.Cut(s, " ")
			list = append(list, inside.Listening{Proto: proto, Addr: netip.MustParseAddrPort(addr), V6Only: only})
		}
		return list
	}
	all := AutoConfig{TCP: true, UDP: true}
	for name, c := range map[string]struct {
		config AutoConfig
		has    []inside.Listening
		want   []string
	}{
		"IPv4":              {all, listening("tcp 0.0.0.0:80"), []string{"80:80/tcp4"}},
		"IPv6":              {all, listening("tcp [::]:80 v6only"), []string{"80:80/tcp6"}},
		"both by one":       {all, listening("tcp [::]:80"), []string{"80:80/tcp"}},
		"both by two":       {all, listening("tcp 0.0.0.0:80", "tcp [::]:80 v6only", "tcp 10.0.2.100:80"), []string{"80:80/tcp"}},
		"its own address":   {all, listening("tcp 10.0.2.100:80", "udp [fd00::100]:53"), []string{"53:53/udp6", "80:80/tcp4"}},
		"mapped":            {all, listening("tcp [::ffff:10.0.2.100]:80"), []string{"80:80/tcp4"}},
		"loopback":          {all, listening("tcp 127.0.0.1:80", "tcp [::1]:81", "udp 127.0.0.1:53"), []string{"127.0.0.1:53:53/udp", "127.0.0.1:80:80/tcp", "[::1]:81:81/tcp"}},
		"both loopbacks":    {all, listening("tcp 127.0.0.1:80", "tcp [::1]:80"), []string{"127.0.0.1:80:80/tcp", "[::1]:80:80/tcp"}},
		"loopback and else": {all, listening("tcp 127.0.0.1:80", "tcp 10.0.2.100:80"), []string{"80:80/tcp4"}},
		"another address":   {all, listening("tcp 172.17.0.2:80", "tcp 172.17.0.1:80", "udp [fd01::1]:53"), []string{"80:172.17.0.1:80/tcp4", "53:[fd01::1]:53/udp6"}},
		"another and all":   {all, listening("tcp 172.17.0.1:80", "tcp 0.0.0.0:80", "tcp 172.17.0.3:80", "tcp [::]:81", "tcp 172.17.0.1:81"), []string{"80:80/tcp4", "81:81/tcp"}},
		"another loopback":  {all, listening("tcp 127.0.0.53:53", "udp 127.0.0.53:53", "tcp 127.0.0.53:54", "tcp 127.0.0.1:54"), []string{"127.0.0.1:53:127.0.0.53:53/tcp", "127.0.0.1:53:127.0.0.53:53/udp", "127.0.0.1:54:54/tcp"}},
		"clients":           {all, listening("udp 0.0.0.0:40000", "udp 0.0.0.0:68", "tcp 0.0.0.0:40000"), []string{"40000:40000/tcp4"}},
		"not the clients'":  {all, listening("udp 0.0.0.0:29999", "udp 0.0.0.0:50001", "udp [::]:50000"), []string{"29999:29999/udp4", "50001:50001/udp4"}},
		"asked for":         {AutoConfig{Include: []PortRange{{40000, 40000}}}, listening("udp 0.0.0.0:40000", "tcp 0.0.0.0:80"), []string{"40000:40000/udp4"}},
		"left out":          {AutoConfig{Exclude: []PortRange{{1, 79}, {81, 90}}}, listening("tcp 0.0.0.0:79", "tcp 0.0.0.0:80", "tcp 0.0.0.0:81"), []string{"80:80/tcp4"}},
		"UDP alone":         {AutoConfig{UDP: true}, listening("tcp 0.0.0.0:79", "udp 0.0.0.0:80"), []string{"80:80/udp4"}},
		"at an address":     {AutoConfig{Host: host4}, listening("tcp 0.0.0.0:80", "tcp [::]:81", "tcp 127.0.0.1:82"), []string{"203.0.113.1:80:80/tcp", "203.0.113.1:81:81/tcp"}},
		"at loopback":       {AutoConfig{Host: localhost}, listening("tcp [::]:81", "tcp 127.0.0.1:82", "tcp [::1]:83", "tcp [::1]:82"), []string{"127.0.0.1:81:81/tcp", "127.0.0.1:82:82/tcp", "127.0.0.1:83:83/tcp"}},
	} {
		var got []string
		for _, s := range c.config.specs(c.has, PortRange{30000, 50000}, &addresses{container4: container4, container6: container6}) {
			if err := s.check(); err != nil {
				t.Errorf("%s: %v: %v", name, s, err)
			}
			got = append(got, s.String())
		}
		slices.Sort(got)
		slices.Sort(c.want)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestAuto(t *testing.T) {
	l := newLab(t, labConfig{})
	explicit := l.add(fmt.Sprintf("%d", freePorts(t, 1)))[0]
	ln := l.sayWho("tcp", fmt.Sprintf(":%d", explicit.Spec.ContainerPort))
	first := freePorts(t, 4)
	for _, a := range []AutoConfig{{TCP: true, Exclude: []PortRange{{uint16(first + 3), uint16(first + 3)}}}} {
		if err := l.driver.Auto(a); err != nil {
			t.Fatal(err)
		}
	}
	if !l.driver.Info().Auto {
		t.Error("Info does not say so")
	}
	find := func(port int) (f Forward, ok bool) {
		for _, f := range l.driver.List() {
			if f.Auto && f.Spec.ContainerPort == uint16(port) && !f.Draining {
				return f, true
			}
		}
		return f, false
	}
	a := l.sayWho("tcp", fmt.Sprintf(":%d", first))
	l.sayWho("tcp4", fmt.Sprintf("127.0.0.1:%d", first+1))
	taken, err := net.Listen("tcp", fmt.Sprintf(":%d", first+2)) // on the host
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	l.sayWho("tcp", fmt.Sprintf(":%d", first+2))
	l.sayWho("tcp", fmt.Sprintf(":%d", first+3))

	until(t, "two are published", func() bool {
		_, one := find(first)
		_, two := find(first + 1)
		return one && two
	})
	f, _ := find(first)
	if f.Spec.Proto != "tcp" || f.Spec.Host.IsValid() || f.Spec.HostPort != uint16(first) {
		t.Errorf("%+v", f)
	}
	if who := seenBy(t, dial(t, "tcp", at(host6, f))); who.Addr() != host6 {
		t.Errorf("seen as %v", who)
	}
	if f, _ := find(first + 1); f.Spec.Host != localhost {
		t.Errorf("a server on loopback is published on %v", f.Spec)
	} else {
		seenBy(t, dial(t, "tcp", at(localhost, f)))
	}
	until(t, "the log tells of the one that is taken", func() bool {
		return strings.Contains(l.log.String(), fmt.Sprintf("listen tcp :%d: bind: address already in use", first+2))
	})
	taken.Close()
	until(t, "it is published when the host has it no more", func() bool { _, ok := find(first + 2); return ok })

	open := dial(t, "tcp", at(host4, f))
	r := bufio.NewReader(open)
	if _, err := r.ReadString('\n'); err != nil { // the server has accepted it
		t.Fatal(err)
	}
	a.Close()
	until(t, "it is withdrawn", func() bool { _, ok := find(first); return !ok })
	if _, err := io.WriteString(open, "on\n"); err != nil { // it lives on
		t.Error(err)
	}
	if line, err := r.ReadString('\n'); err != nil || line != "on\n" {
		t.Errorf("%q, %v", line, err)
	}
	open.Close()
	until(t, "it is forgotten", func() bool { _, ok := l.driver.Get(f.ID); return !ok })
	if _, ok := find(first + 3); ok {
		t.Error("what is left out is published")
	}
	ln.Close()
	if g, ok := l.driver.Get(explicit.ID); !ok || g.Auto {
		t.Errorf("what was asked for by hand: %+v, %v", g, ok)
	}
	if err := bare(t, nil).Auto(AutoConfig{}); err == nil {
		t.Error("without a kit nobody can look")
	}
}

// A container that listens everywhere leaves room for what is asked for by hand, and the log says so once.
func TestAutoLeavesRoom(t *testing.T) {
	log := &logBuffer{}
	d := bare(t, func(c *Config) { c.MaxFiles, c.Log = 1, slog.New(slog.NewTextHandler(log, nil)) })
	k := &fakeKit{}
	d.kit = k
	first := freePorts(t, minLimit)
	listen := func(n int) {
		var all []inside.Listening
		for i := range n {
			all = append(all, inside.Listening{Proto: "tcp", Addr: netip.AddrPortFrom(container4, uint16(first+i))})
		}
		k.listen(all...)
	}
	w := watcher{d: d, ids: make(map[Spec]int), failed: make(map[Spec]string)}
	look := func(want int) {
		t.Helper()
		w.look(t.Context(), []AutoConfig{{TCP: true}})
		if n := len(d.List()); n != want {
			t.Errorf("%d are published, want %d", n, want)
		}
	}
	told := func(want int) {
		t.Helper()
		if n := strings.Count(log.String(), "more is listened on"); n != want {
			t.Errorf("it was told %d times, want %d:\n%s", n, want, log)
		}
	}
	listen(minLimit / 2)
	look(minLimit / 2)
	told(0)
	listen(minLimit)
	look(minLimit / 2)
	look(minLimit / 2)
	told(1)
	listen(3)
	look(3)
	listen(minLimit)
	look(minLimit / 2)
	told(2)
}
