package dhcp

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var update = flag.Bool("update", false, "write testdata/*.golden")

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func config() Config {
	return Config{
		Subnet:  netip.MustParsePrefix("10.0.2.0/24"),
		Gateway: netip.MustParseAddr("10.0.2.2"),
		DNS:     netip.MustParseAddr("10.0.2.3"),
		Client:  netip.MustParseAddr("10.0.2.100"),
		MTU:     65520,
		Search:  []string{"example.org", "lab.example.org."},
		Lease:   time.Hour,
	}
}

func newServer(t testing.TB, cfg Config) *Server {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A message from the client with the given number, as its MAC's last octet.
func message(kind dhcpv4.MessageType, client byte, options ...dhcpv4.Modifier) []byte {
	m := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootRequest, HWType: 1, ClientHWAddr: net.HardwareAddr{2, 0, 0, 0, 0, client},
		TransactionID: dhcpv4.TransactionID{1, 2, 3, 4}, Options: dhcpv4.Options{},
	}
	m.UpdateOption(dhcpv4.OptMessageType(kind))
	for _, o := range options {
		o(m)
	}
	return m.ToBytes()
}

func requested(ip string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.ParseIP(ip)))
}

func server(ip string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.ParseIP(ip)))
}

func has(ip string) dhcpv4.Modifier { return dhcpv4.WithClientIP(net.ParseIP(ip)) }

func id(s string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptClientIdentifier([]byte(s)))
}

const (
	discover = dhcpv4.MessageTypeDiscover
	request  = dhcpv4.MessageTypeRequest
	decline  = dhcpv4.MessageTypeDecline
	release  = dhcpv4.MessageTypeRelease
	inform   = dhcpv4.MessageTypeInform
)

// outcome is what became of a message, in words: "OFFER 10.0.2.100 to everybody".
func outcome(t testing.TB, s *Server, msg []byte, now time.Time) string {
	t.Helper()
	reply, dst, ok := s.Handle(msg, now)
	if !ok {
		if reply != nil || dst.IsValid() {
			t.Errorf("no reply, but %x to %s", reply, dst)
		}
		return "nothing"
	}
	m, err := dhcpv4.FromBytes(reply)
	if err != nil {
		t.Fatal(err)
	}
	to := dst.String()
	if to == "255.255.255.255:68" {
		to = "everybody"
	}
	return fmt.Sprintf("%s %s to %s", m.MessageType(), m.YourIPAddr, to)
}

func TestConversations(t *testing.T) {
	type step struct {
		after time.Duration // since the step before
		msg   []byte
		want  string
	}
	us := server("10.0.2.2")
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"first client, from discovery to renewal", []step{
			{0, message(discover, 1), "OFFER 10.0.2.100 to everybody"},
			{0, message(request, 1, us, requested("10.0.2.100")), "ACK 10.0.2.100 to everybody"},
			{30 * time.Minute, message(request, 1, has("10.0.2.100")), "ACK 10.0.2.100 to 10.0.2.100:68"},
			{59 * time.Minute, message(discover, 2), "OFFER 10.0.2.15 to everybody"},
			{0, message(discover, 1), "OFFER 10.0.2.100 to everybody"},
		}},
		{"further clients", []step{
			{0, message(discover, 1), "OFFER 10.0.2.100 to everybody"},
			{0, message(discover, 2), "OFFER 10.0.2.15 to everybody"},
			{0, message(discover, 3, requested("10.0.2.20")), "OFFER 10.0.2.20 to everybody"},
			{0, message(discover, 4, requested("10.0.2.20")), "OFFER 10.0.2.16 to everybody"},
			{0, message(discover, 5, requested("192.0.2.1")), "OFFER 10.0.2.17 to everybody"},
			{0, message(discover, 6, requested("10.0.2.2")), "OFFER 10.0.2.18 to everybody"},
			{0, message(discover, 2), "OFFER 10.0.2.15 to everybody"},
		}},
		{"the first client gets the container's address whatever it asks for", []step{
			{0, message(discover, 1, requested("10.0.2.20")), "OFFER 10.0.2.100 to everybody"},
		}},
		{"an offer that nobody takes is over in a minute", []step{
			{0, message(discover, 1), "OFFER 10.0.2.100 to everybody"},
			{59 * time.Second, message(discover, 2), "OFFER 10.0.2.15 to everybody"},
			{time.Second, message(discover, 3), "OFFER 10.0.2.100 to everybody"},
		}},
		{"identifier before hardware address", []step{
			{0, message(discover, 1, id("a")), "OFFER 10.0.2.100 to everybody"},
			{0, message(discover, 1, id("b")), "OFFER 10.0.2.15 to everybody"},
			{0, message(discover, 2, id("a")), "OFFER 10.0.2.100 to everybody"},
			{0, message(discover, 1), "OFFER 10.0.2.16 to everybody"},
		}},
		{"another server was chosen", []step{
			{0, message(discover, 1), "OFFER 10.0.2.100 to everybody"},
			{0, message(request, 1, server("10.0.2.9"), requested("10.0.2.100")), "nothing"},
			{0, message(discover, 2), "OFFER 10.0.2.100 to everybody"},
		}},
		{"not what was offered", []step{
			{0, message(discover, 1), "OFFER 10.0.2.100 to everybody"},
			{0, message(discover, 2), "OFFER 10.0.2.15 to everybody"},
			{0, message(request, 2, us, requested("10.0.2.100")), "NAK 0.0.0.0 to everybody"},
			{0, message(request, 2, us), "NAK 0.0.0.0 to everybody"},
		}},
		{"reboot", []step{
			{0, message(request, 1, requested("10.0.2.100")), "ACK 10.0.2.100 to everybody"},
			{0, message(request, 1, requested("10.0.2.100")), "ACK 10.0.2.100 to everybody"},
			{0, message(request, 2, requested("10.0.2.100")), "NAK 0.0.0.0 to everybody"},
			{0, message(request, 2, requested("192.168.1.5")), "NAK 0.0.0.0 to everybody"},
			{0, message(request, 2, requested("10.0.2.2")), "NAK 0.0.0.0 to everybody"},
			{0, message(request, 2, requested("10.0.2.200")), "NAK 0.0.0.0 to everybody"},
			{0, message(request, 2), "NAK 0.0.0.0 to everybody"},
		}},
		{"renewal after a restart of ours", []step{
			{0, message(request, 2, has("10.0.2.16")), "ACK 10.0.2.16 to 10.0.2.16:68"},
			{0, message(discover, 1), "OFFER 10.0.2.100 to everybody"},
		}},
		{"renewal of what is another's, or foreign", []step{
			{0, message(request, 1, has("10.0.2.100")), "ACK 10.0.2.100 to 10.0.2.100:68"},
			{0, message(request, 2, has("10.0.2.100")), "NAK 0.0.0.0 to everybody"},
			{0, message(request, 2, has("192.0.2.1")), "NAK 0.0.0.0 to everybody"},
		}},
		{"a lease that is over is another's", []step{
			{0, message(request, 1, requested("10.0.2.100")), "ACK 10.0.2.100 to everybody"},
			{time.Hour, message(discover, 2), "OFFER 10.0.2.100 to everybody"},
			{0, message(discover, 1), "OFFER 10.0.2.15 to everybody"},
		}},
		{"release, and the same again", []step{
			{0, message(request, 1, requested("10.0.2.100")), "ACK 10.0.2.100 to everybody"},
			{0, message(request, 2, requested("10.0.2.20")), "ACK 10.0.2.20 to everybody"},
			{0, message(release, 2, us, has("10.0.2.20")), "nothing"},
			{0, message(discover, 2), "OFFER 10.0.2.20 to everybody"},
		}},
		{"release frees", []step{
			{0, message(request, 1, requested("10.0.2.100")), "ACK 10.0.2.100 to everybody"},
			{0, message(release, 2, us, has("10.0.2.100")), "nothing"}, // not its own
			{0, message(release, 1, server("10.0.2.9"), has("10.0.2.100")), "nothing"},
			{0, message(request, 2, requested("10.0.2.100")), "NAK 0.0.0.0 to everybody"},
			{0, message(release, 1, us, has("10.0.2.100")), "nothing"},
			{0, message(request, 2, requested("10.0.2.100")), "ACK 10.0.2.100 to everybody"},
		}},
		{"decline", []step{
			{0, message(discover, 1), "OFFER 10.0.2.100 to everybody"},
			{0, message(decline, 2, us, requested("10.0.2.100")), "nothing"}, // not its own
			{0, message(discover, 1), "OFFER 10.0.2.100 to everybody"},
			{0, message(decline, 1, us, requested("10.0.2.100")), "nothing"},
			{0, message(discover, 1), "OFFER 10.0.2.15 to everybody"},
			{0, message(request, 1, us, requested("10.0.2.100")), "NAK 0.0.0.0 to everybody"},
			{10 * time.Minute, message(discover, 2), "OFFER 10.0.2.100 to everybody"},
		}},
		{"inform", []step{
			{0, message(inform, 1, has("10.0.2.77")), "ACK 0.0.0.0 to 10.0.2.77:68"},
			{0, message(inform, 1, has("192.0.2.1")), "nothing"},
			{0, message(inform, 1, has("10.0.2.255")), "nothing"},
			{0, message(inform, 1), "nothing"},
		}},
		{"no business of ours", []step{
			{0, nil, "nothing"},
			{0, message(discover, 1)[:200], "nothing"},
			{0, message(discover, 1, dhcpv4.WithRelay(net.IPv4(10, 0, 2, 9))), "nothing"},
			{0, message(dhcpv4.MessageTypeOffer, 1), "nothing"},
			{0, message(dhcpv4.MessageTypeNone, 1), "nothing"},
			{0, message(discover, 1, func(m *dhcpv4.DHCPv4) { m.OpCode = dhcpv4.OpcodeBootReply }), "nothing"},
			{0, message(discover, 1, func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = nil }), "nothing"},
			{0, message(discover, 1, id(strings.Repeat("x", 256))), "nothing"},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, now := newServer(t, config()), start
			for i, st := range tt.steps {
				now = now.Add(st.after)
				if got := outcome(t, s, st.msg, now); got != st.want {
					t.Fatalf("step %d: %s, want %s", i, got, st.want)
				}
			}
		})
	}
}

// The container's address and sixteen more, then nothing; the one that has been free for longest comes first.
func TestPool(t *testing.T) {
	s := newServer(t, config())
	for i := range 17 {
		want := "10.0.2.100"
		if i > 0 {
			want = fmt.Sprintf("10.0.2.%d", 14+i)
		}
		now := start.Add(time.Duration(i) * time.Second)
		if got := outcome(t, s, message(request, byte(i), requested(want)), now); got != "ACK "+want+" to everybody" {
			t.Fatal(got)
		}
	}
	now := start.Add(17 * time.Second)
	if got := outcome(t, s, message(discover, 99), now); got != "nothing" {
		t.Error(got)
	}
	outcome(t, s, message(release, 5, server("10.0.2.2"), has("10.0.2.19")), now)
	outcome(t, s, message(release, 3, server("10.0.2.2"), has("10.0.2.17")), now.Add(time.Second))
	now = now.Add(2 * time.Second)
	for i, want := range []string{"OFFER 10.0.2.19 to everybody", "OFFER 10.0.2.17 to everybody", "nothing"} {
		if got := outcome(t, s, message(discover, byte(100+i)), now); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// A small network has what it has: neither its own address nor its broadcast is given out.
// Where others know the addresses, each client gets that of its MAC and no other, and strangers get none.
func TestLookup(t *testing.T) {
	cfg := config()
	cfg.Client, cfg.NoRoute = netip.Addr{}, true
	cfg.Lookup = func(client net.HardwareAddr) (netip.Addr, bool) {
		if client[5] > 2 {
			return netip.Addr{}, false
		}
		return netip.AddrFrom4([4]byte{10, 0, 2, 200 + client[5]}), true
	}
	s := newServer(t, cfg)
	for _, c := range []struct{ what, want, got string }{
		{"discover", "OFFER 10.0.2.201 to everybody", outcome(t, s, message(discover, 1), start)},
		{"another's discover", "OFFER 10.0.2.202 to everybody", outcome(t, s, message(discover, 2, requested("10.0.2.201")), start)},
		{"a stranger's", "nothing", outcome(t, s, message(discover, 3), start)},
		{"request", "ACK 10.0.2.201 to everybody", outcome(t, s, message(request, 1, server("10.0.2.2"), requested("10.0.2.201")), start)},
		{"renewal", "ACK 10.0.2.201 to 10.0.2.201:68", outcome(t, s, message(request, 1, has("10.0.2.201")), start)},
		{"request of another's", "NAK 0.0.0.0 to everybody", outcome(t, s, message(request, 2, server("10.0.2.2"), requested("10.0.2.201")), start)},
		{"a stranger's request", "NAK 0.0.0.0 to everybody", outcome(t, s, message(request, 3, requested("10.0.2.202")), start)},
	} {
		if c.got != c.want {
			t.Errorf("%s: %s, want %s", c.what, c.got, c.want)
		}
	}
	reply, _, _ := s.Handle(message(discover, 1), start)
	m, err := dhcpv4.FromBytes(reply)
	if err != nil || len(m.Router()) != 0 {
		t.Errorf("router %v of a network that has none: %v", m.Router(), err)
	}
}

func TestSmallSubnets(t *testing.T) {
	for prefix, want := range map[string]int{"10.0.2.0/24": 17, "10.0.2.0/27": 17, "10.0.2.0/28": 1, "10.0.2.0/30": 1, "10.0.0.0/8": 17} {
		cfg := Config{Subnet: netip.MustParsePrefix(prefix)}
		cfg.Gateway = cfg.Subnet.Addr().Next()
		cfg.Client = cfg.Gateway.Next()
		s := newServer(t, cfg)
		if n := len(s.table.entries); n != want {
			t.Errorf("%s: %d addresses, want %d", prefix, n, want)
		}
		for _, e := range s.table.entries {
			if !s.host(e.addr) {
				t.Errorf("%s: gives out %s", prefix, e.addr)
			}
		}
	}
}

func TestNewRefusesNonsense(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no subnet":        func(c *Config) { c.Subnet = netip.Prefix{} },
		"IPv6":             func(c *Config) { c.Subnet = netip.MustParsePrefix("fd00::/64") },
		"/31":              func(c *Config) { c.Subnet = netip.MustParsePrefix("10.0.2.0/31") },
		"gateway outside":  func(c *Config) { c.Gateway = netip.MustParseAddr("10.0.3.2") },
		"no gateway":       func(c *Config) { c.Gateway = netip.Addr{} },
		"client broadcast": func(c *Config) { c.Client = netip.MustParseAddr("10.0.2.255") },
		"client network":   func(c *Config) { c.Client = netip.MustParseAddr("10.0.2.0") },
		"both the same":    func(c *Config) { c.Client = c.Gateway },
		"IPv6 DNS":         func(c *Config) { c.DNS = netip.MustParseAddr("fd00::3") },
		"MTU":              func(c *Config) { c.MTU = 65536 },
		"lease":            func(c *Config) { c.Lease = time.Millisecond },
		"endless lease":    func(c *Config) { c.Lease = 1<<63 - 1 },
	} {
		cfg := config()
		change(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// A search list that does not fit is left out; the addresses never are.
func TestLongNamesStayOut(t *testing.T) {
	cfg := config()
	for i := range 40 {
		cfg.Search = append(cfg.Search, fmt.Sprintf("d%d.a-long-domain.example", i))
	}
	reply, _, ok := newServer(t, cfg).Handle(message(discover, 1, id(strings.Repeat("i", 255))), start)
	m, err := dhcpv4.FromBytes(reply)
	if !ok || err != nil || len(reply) > minMessage+255 {
		t.Fatalf("%d octets, %v", len(reply), err)
	}
	if m.DomainSearch() != nil || len(m.Router()) != 1 || len(m.DNS()) != 1 {
		t.Error(m.Summary())
	}
}

func TestGolden(t *testing.T) {
	s := newServer(t, config())
	for _, tt := range []struct {
		name string
		msg  []byte
	}{
		{"offer", message(discover, 1, id("\x01\x02\x00\x00\x00\x00\x01"), dhcpv4.WithBroadcast(true))},
		{"ack", message(request, 1, id("\x01\x02\x00\x00\x00\x00\x01"), server("10.0.2.2"), requested("10.0.2.100"))},
		{"renewed", message(request, 1, id("\x01\x02\x00\x00\x00\x00\x01"), has("10.0.2.100"))},
		{"nak", message(request, 2, requested("192.0.2.1"))},
		{"inform", message(inform, 3, has("10.0.2.77"))},
	} {
		reply, _, ok := s.Handle(tt.msg, start)
		if !ok {
			t.Fatalf("%s: no reply", tt.name)
		}
		file := "testdata/" + tt.name + ".golden"
		if *update {
			if err := os.WriteFile(file, []byte(hex.Dump(reply)), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got := hex.Dump(reply); !bytes.Equal([]byte(got), want) {
			t.Errorf("%s:\n%s", tt.name, got)
		}
	}
}

// Whatever a client sends: no crash; a reply parses, repeats the transaction and goes nowhere but into the subnet; an
// address that is given is one of ours, and two clients never have the same one.
func FuzzHandle(f *testing.F) {
	us := server("10.0.2.2")
	for _, m := range [][]byte{
		message(discover, 1), message(discover, 1, id("x"), requested("10.0.2.20")),
		message(request, 1, us, requested("10.0.2.100")), message(request, 1, has("10.0.2.15")),
		message(release, 1, us, has("10.0.2.100")), message(decline, 1, us, requested("10.0.2.100")), message(inform, 1, has("10.0.2.77")),
	} {
		f.Add(m, m)
		f.Add(m[:len(m)-60], m)
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		s := newServer(t, config())
		outcome(t, s, message(request, 77, requested("10.0.2.30")), start)
		for i, msg := range [][]byte{a, b, a} {
			before := bytes.Clone(msg)
			reply, dst, ok := s.Handle(msg, start.Add(time.Duration(i)*time.Second))
			if !bytes.Equal(msg, before) {
				t.Fatal("the message was changed")
			}
			if !ok {
				continue
			}
			m, err := dhcpv4.FromBytes(reply)
			if err != nil {
				t.Fatalf("%x: %v", reply, err)
			}
			if !bytes.Equal(reply[4:8], msg[4:8]) || m.OpCode != dhcpv4.OpcodeBootReply {
				t.Errorf("%x to %x", reply, msg)
			}
			if dst.Port() != 68 || dst != everybody && !s.cfg.Subnet.Contains(dst.Addr()) {
				t.Errorf("sent to %s", dst)
			}
			if y := addrOf(m.YourIPAddr); !unset(m.YourIPAddr) && (!s.host(y) || y.String() == "10.0.2.30" && !bytes.Equal(msg[28:34], []byte{2, 0, 0, 0, 0, 77})) {
				t.Errorf("gives out %s", y)
			}
		}
		seen := map[string]bool{}
		for _, e := range s.table.entries {
			if e.client != "" && !e.declined && seen[e.client] {
				t.Errorf("%q has two addresses", e.client)
			}
			seen[e.client] = seen[e.client] || !e.declined
		}
	})
}
