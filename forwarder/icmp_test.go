package forwarder

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"usernet/stack"
)

// allowPing lets the tests' group (0 in their user namespace) use ping sockets. It is for good:
// with one group in the user namespace there is no way back.
func allowPing(t *testing.T) {
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0); err != nil {
		t.Fatal(err)
	}
}

func echo(dst string, id, seq uint16, payload string) stack.Echo {
	e := stack.Echo{Src: me4.Addr(), Dst: netip.MustParseAddr(dst), ID: id, Seq: seq, Payload: []byte(payload)}
	if e.Dst.Is6() {
		e.Src = me6.Addr()
	}
	return e
}

func (c *container) nextEcho() stack.Echo {
	c.t.Helper()
	c.wait("an echo", func() bool { return len(c.echoes) > 0 })
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.echoes[0]
	c.echoes = c.echoes[1:]
	return e
}

// The host answers by its alias and by its own address; each ping gets its own answers.
func TestEcho(t *testing.T) {
	allowPing(t)
	addHostAddress(t, "192.0.2.7/24", "2001:db8:1::7/64")
	c, _ := newContainer(t, Config{})
	for i, dst := range []string{"169.254.1.2", "fd00::4", "192.0.2.7", "2001:db8:1::7"} {
		for id := range uint16(3) {
			for _, payload := range []string{"", "payload", strings.Repeat("x", 60000)} {
				ask := echo(dst, 1000*id+7, uint16(i), payload)
				c.f.ServeEcho(ask)
				got := c.nextEcho()
				if got.Src != ask.Dst || got.Dst != ask.Src || got.ID != ask.ID || got.Seq != ask.Seq || !bytes.Equal(got.Payload, ask.Payload) || got.TTL == 0 {
					t.Errorf("%s: asked %v id %d seq %d, got %v → %v id %d seq %d ttl %d and %d octets", dst, ask.Dst, ask.ID, ask.Seq, got.Src, got.Dst, got.ID, got.Seq, got.TTL, len(got.Payload))
				}
			}
		}
	}
	if st := c.f.Stats().Echo; st.Flows != 6 || st.Sent != 36 || st.Received != 36 {
		t.Errorf("counted %+v", st)
	}
}

// Whoever is not there stays silent, and whoever cannot be reached says so.
func TestEchoHonest(t *testing.T) {
	allowPing(t)
	c, _ := newContainer(t, Config{})
	for _, v := range []struct {
		dst       string
		typ, code uint8
		proto     uint8
	}{
		{"198.51.100.1", 3, 0, protoICMP}, // the host has no route
		{"2001:db8::1", 1, 0, protoICMPv6},
		{"10.0.2.77", 3, 1, protoICMP}, // nobody on the link
		{"fd00::77", 1, 3, protoICMPv6},
		{"169.254.1.2", 3, 1, protoICMP}, // the host has no address
		{"127.0.0.1", 3, 0, protoICMP},
	} {
		ask := echo(v.dst, 77, 5, "payload")
		c.f.ServeEcho(ask)
		e := c.nextError()
		if e.Type != v.typ || e.Code != v.code || e.Protocol != v.proto || e.Src != ask.Src || e.Dst != ask.Dst {
			t.Errorf("%s: %+v", v.dst, e)
		}
		checkEchoQuote(t, e, 77, 5, "payload")
	}
	if st := c.f.Stats().Echo; st.Received != 0 || st.Errors != 6 {
		t.Errorf("counted %+v", st)
	}
}

func checkEchoQuote(t *testing.T, e stack.ICMPError, id, seq uint16, payload string) {
	t.Helper()
	want := byte(echoRequest4)
	if e.Dst.Is6() {
		want = echoRequest6
	}
	q := e.Transport
	if len(q) < echoHeaderLen || q[0] != want || binary.BigEndian.Uint16(q[4:]) != id || binary.BigEndian.Uint16(q[6:]) != seq || string(q[8:]) != payload {
		t.Errorf("quotes % x, want type %d id %d seq %d and %q", q, want, id, seq, payload)
	}
}

// The remedy is logged once; the container is told each time.
func TestEchoForbidden(t *testing.T) {
	newNetNS(t) // nobody may ping in a new one
	addHostAddress(t, "192.0.2.7/24")
	var log bytes.Buffer
	c, _ := newContainer(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	for seq := range uint16(3) {
		c.f.ServeEcho(echo("192.0.2.7", 1, seq, "payload"))
		if e := c.nextError(); e.Type != 3 || e.Code != 13 {
			t.Errorf("type %d code %d", e.Type, e.Code)
		}
	}
	c.f.ServeEcho(echo("2001:db8::1", 1, 0, "payload"))
	if e := c.nextError(); e.Type != 1 || e.Code != 1 {
		t.Errorf("type %d code %d", e.Type, e.Code)
	}
	if n := strings.Count(log.String(), "ping_group_range"); n != 1 {
		t.Errorf("remedy logged %d times: %s", n, log.String())
	}
	// No restart is needed once it is allowed.
	allowPing(t)
	c.f.ServeEcho(echo("192.0.2.7", 1, 3, "payload"))
	c.nextEcho()
}

func TestEchoIdleAndLimit(t *testing.T) {
	allowPing(t)
	addHostAddress(t, "192.0.2.7/24")
	c, now := newContainer(t, Config{Echo: EchoConfig{MaxFlows: 3}})
	for id := range uint16(5) {
		c.f.ServeEcho(echo("192.0.2.7", id, 0, "payload"))
		c.nextEcho()
	}
	if st := c.f.Stats().Echo; st.Evicted != 2 || st.Opened != 5 {
		t.Errorf("counted %+v", st)
	}
	c.waitStats("three flows", func(s Stats) bool { return s.Echo.Flows == 3 })
	now.advance(32 * time.Second)
	c.waitStats("the end of all flows", func(s Stats) bool { return s.Echo.Flows == 0 })
}
