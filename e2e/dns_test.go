package e2e

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func TestDig(t *testing.T) {
	needs(t, "dig")
	serveDNS(t, outsideAddr4)
	c := connected(t)
	dig := func(t *testing.T, args ...string) string {
		t.Helper()
		return c.must(t, append([]string{"dig", "+time=10", "+tries=1"}, args...)...)
	}
	for _, server := range []string{"@" + resolver4, "@" + resolver6} {
		for _, test := range []struct {
			name string
			args []string
			want []string
		}{
			{"A", []string{"+short", "a.test"}, []string{"198.51.100.9\n"}},
			{"AAAA", []string{"+short", "a.test", "AAAA"}, []string{"2001:db8:1::9\n"}},
			{"TCP", []string{"+tcp", "+short", "a.test"}, []string{"198.51.100.9\n"}},
			{"large by UDP", []string{"+bufsize=8192", "+ignore", "big.test", "TXT"}, []string{"status: NOERROR", "ANSWER: 40", "(UDP)"}},
			{"large by TCP", []string{"+tcp", "big.test", "TXT"}, []string{"status: NOERROR", "ANSWER: 40", "(TCP)"}},
			{"cut", []string{"+noedns", "+ignore", "big.test", "TXT"}, []string{"status: NOERROR", " tc "}},
			{"cut, then by TCP", []string{"+noedns", "big.test", "TXT"}, []string{"Truncated, retrying in TCP mode", "ANSWER: 40"}},
			{"SERVFAIL", []string{"fail.test"}, []string{"status: SERVFAIL"}},
			{"NXDOMAIN", []string{"absent.test"}, []string{"status: NXDOMAIN"}},
			{"no data", []string{"a.test", "MX"}, []string{"status: NOERROR", "ANSWER: 0"}},
			{"EDNS size kept", []string{"+bufsize=3333", "+short", "edns.test", "TXT"}, []string{`"3333"`}},
			{"no EDNS kept", []string{"+noedns", "+short", "edns.test", "TXT"}, []string{`"0"`}},
			{"the host", []string{"+short", "host.containers.internal"}, []string{alias4}},
			{"the host IPv6", []string{"+short", "host.docker.internal", "AAAA"}, []string{alias6}},
		} {
			t.Run(server+" "+test.name, func(t *testing.T) {
				out := dig(t, append([]string{server}, test.args...)...)
				for _, want := range test.want {
					if !strings.Contains(out, want) {
						t.Errorf("no %q in\n%s", want, out)
					}
				}
			})
		}
	}
	t.Run("many in flight", func(t *testing.T) {
		// Forty questions whose answers do not come must not keep the one whose answer does.
		conn := c.net.connect(t, "udp", resolver4+":53")
		for id := range 40 {
			q := new(dns.Msg)
			q.SetQuestion("mute.test.", dns.TypeA)
			q.Id = uint16(id)
			b, err := q.Pack()
			if err != nil {
				t.Fatal(err)
			}
			conn.Write(b)
		}
		if out := dig(t, "+short", "@"+resolver4, "b.test"); out != "198.51.100.9\n" {
			t.Errorf("got %q", out)
		}
	})
}

// The host's resolv.conf counts as it is now, written over or renamed into place.
func TestResolvConfFollowed(t *testing.T) {
	needs(t, "dig")
	const other, third = "198.51.100.53", "2001:db8:1::53"
	for _, addr := range []string{outsideAddr4, other, third} {
		serveDNS(t, addr)
	}
	restore := "nameserver " + outsideAddr4 + "\n"
	t.Cleanup(func() { writeFile(t, "/etc/resolv.conf", restore) })
	c := connected(t)
	asked := func() string {
		out, _ := c.run(t, "dig", "+short", "+time=5", "+tries=1", "@"+resolver4, "who.test", "TXT")
		return strings.Trim(out, "\"\n")
	}
	if got := asked(); got != outsideAddr4 {
		t.Fatalf("asked %q, want %s", got, outsideAddr4)
	}
	writeFile(t, "/etc/resolv.conf", "nameserver "+other+"\n")
	eventually(t, "resolv.conf written over is followed", func() bool { return asked() == other })
	replaceFile(t, "/etc/resolv.conf", "# a comment\nnameserver "+third+"\n")
	eventually(t, "resolv.conf renamed into place is followed", func() bool { return asked() == third })
	replaceFile(t, "/etc/resolv.conf", restore)
	eventually(t, "and once more", func() bool { return asked() == outsideAddr4 })
}

func writeFile(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func replaceFile(t testing.TB, name, text string) {
	t.Helper()
	next := filepath.Join(filepath.Dir(name), "next")
	writeFile(t, next, text)
	if err := os.Rename(next, name); err != nil {
		t.Fatal(err)
	}
}

// The next resolver is asked where the first is silent, or refuses.
func TestResolverFailover(t *testing.T) {
	needs(t, "dig")
	const working = "198.51.100.53"
	serveDNS(t, working)
	for _, first := range []string{deadAddr4, moreAddr4, badAddr4} {
		t.Run(first, func(t *testing.T) {
			c := connected(t, "--dns", first, "--dns", working)
			out := c.must(t, "dig", "+short", "+time=15", "+tries=1", "@"+resolver4, "who.test", "TXT")
			if strings.TrimSpace(out) != `"`+working+`"` {
				t.Errorf("got %q, want the answer of %s", out, working)
			}
			out = c.must(t, "dig", "+short", "+tcp", "+time=15", "+tries=1", "@"+resolver4, "who.test", "TXT")
			if strings.TrimSpace(out) != `"`+working+`"` {
				t.Errorf("by TCP got %q, want the answer of %s", out, working)
			}
		})
	}
}

// Only the first question waits for resolvers that are dead.
func TestDeadResolversAreRemembered(t *testing.T) {
	needs(t, "dig")
	serveDNS(t, outsideAddr4)
	c := connected(t, "--dns", deadAddr4, "--dns", "192.0.2.2", "--dns", outsideAddr4)
	ask := func() time.Duration {
		t.Helper()
		start := time.Now()
		out := c.must(t, "dig", "+short", "+time=15", "+tries=1", "@"+resolver4, "who.test", "TXT")
		if strings.TrimSpace(out) != `"`+outsideAddr4+`"` {
			t.Errorf("got %q", out)
		}
		return time.Since(start)
	}
	first := ask()
	for range 3 {
		if again := ask(); again > first/2 {
			t.Errorf("%v after %v for the first", again, first)
		}
	}
}

// A resolver on the host's loopback works for names, and opens no door to anything else there.
func TestLoopbackResolver(t *testing.T) {
	needs(t, "dig")
	asked := make(chan netip.AddrPort, 100)
	answer := func(from netip.AddrPort, b []byte) []byte {
		asked <- from
		b[2] |= 0x80 // a response
		b[3] = 5     // REFUSED, which nobody here says but this one
		return b
	}
	lab.host.serveUDP(t, "127.0.0.53:53", answer)
	t.Cleanup(func() { writeFile(t, "/etc/resolv.conf", "nameserver "+outsideAddr4+"\n") })
	writeFile(t, "/etc/resolv.conf", "nameserver 127.0.0.53\n")
	c := connected(t)
	out, _ := c.run(t, "dig", "+time=10", "+tries=1", "@"+resolver4, "a.test")
	if !strings.Contains(out, "status: REFUSED") {
		t.Errorf("want the loopback resolver's own answer:\n%s", out)
	}
	select {
	case from := <-asked:
		if !from.Addr().IsLoopback() {
			t.Errorf("asked from %s", from)
		}
	default:
		t.Error("the resolver on 127.0.0.53 was not asked")
	}

	secret := lab.host.serveTCP(t, "127.0.0.53:0", echo)
	for _, at := range []string{resolver4, gateway4, alias4} {
		addr := netip.AddrPortFrom(netip.MustParseAddr(at), secret.Port())
		if conn, err := c.net.dial("tcp", addr.String()); err == nil {
			conn.Close()
			t.Errorf("%s reaches the host's loopback", addr)
		}
	}
}

func TestNoDNS(t *testing.T) {
	needs(t, "dig")
	serveDNS(t, outsideAddr4)
	c := connected(t, "--no-dns")
	if out, code := c.run(t, "dig", "+short", "+time=2", "+tries=1", "@"+resolver4, "a.test"); code == 0 {
		t.Errorf("a resolver answers %q", out)
	}
}
