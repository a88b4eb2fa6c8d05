package dns

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// What an upstream says reaches the client octet for octet, whatever it is, and what a client asks
// the upstream, but for the ID.
func TestPassedOnAsItIs(t *testing.T) {
	for _, tt := range []struct {
		name   string
		rcode  int
		change func(q, a *dns.Msg)
	}{
		{"plain", dns.RcodeSuccess, func(q, a *dns.Msg) {}},
		{"nxdomain", dns.RcodeNameError, func(q, a *dns.Msg) {}},
		{"servfail", dns.RcodeServerFailure, func(q, a *dns.Msg) {}},
		{"refused", dns.RcodeRefused, func(q, a *dns.Msg) {}},
		{"formerr", dns.RcodeFormatError, func(q, a *dns.Msg) {}},
		{"badvers", dns.RcodeBadVers, func(q, a *dns.Msg) { q.SetEdns0(1232, false); a.SetEdns0(4096, false) }},
		{"edns and dnssec", dns.RcodeSuccess, func(q, a *dns.Msg) {
			q.SetEdns0(4096, true)
			q.CheckingDisabled = true
			a.SetEdns0(1400, true)
			a.AuthenticatedData = true
			opt := a.IsEdns0()
			opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: 3, ExtraText: "stale"},
				&dns.EDNS0_LOCAL{Code: 65001, Data: []byte("unknown option")})
		}},
		{"unknown type", dns.RcodeSuccess, func(q, a *dns.Msg) {
			q.Question[0].Qtype = 65280
			a.Question[0].Qtype = 65280
			a.Answer = []dns.RR{&dns.RFC3597{
				Hdr:   dns.RR_Header{Name: "Example.ORG.", Rrtype: 65280, Class: dns.ClassINET, Ttl: 1},
				Rdata: "0102ff",
			}}
		}},
		{"chaos class", dns.RcodeSuccess, func(q, a *dns.Msg) { q.Question[0].Qclass = 3; a.Question[0].Qclass = 3 }},
		{"truncated upstream", dns.RcodeSuccess, func(q, a *dns.Msg) { a.Truncated = true }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := new(dns.Msg).SetQuestion("Example.ORG.", dns.TypeA)
			a := new(dns.Msg)
			a.SetReply(q)
			a.Rcode = tt.rcode
			tt.change(q, a)
			asked := make(chan []byte, 1)
			want := pack(t, a)
			_, addr := serve(t, with(raw(t, func(question []byte) [][]byte {
				asked <- question
				answer := bytes.Clone(want)
				copy(answer, question[:2])
				return [][]byte{answer}
			})))
			sent := pack(t, q)
			got := talk(t, addr, sent)
			if !bytes.Equal(got[:2], sent[:2]) || !bytes.Equal(got[2:], want[2:]) {
				t.Errorf("answer\n got %x\nwant %x", got, want)
			}
			if question := <-asked; !bytes.Equal(question[2:], sent[2:]) {
				t.Errorf("question\n got %x\nwant %x", question[2:], sent[2:])
			}
		})
	}
}

func TestIDAndPortDifferPerQuestion(t *testing.T) {
	var mu sync.Mutex
	ids, ports := map[uint16]bool{}, map[string]bool{}
	_, addr := serve(t, with(resolver(t, func(w dns.ResponseWriter, q *dns.Msg) {
		mu.Lock()
		ids[q.Id], ports[w.RemoteAddr().String()] = true, true
		mu.Unlock()
		give("192.0.2.1")(w, q)
	})))
	for range 32 {
		m := new(dns.Msg).SetQuestion("example.org.", dns.TypeA)
		m.Id = 7
		if r := exchange(t, "udp", addr, m); r.Id != 7 {
			t.Fatalf("ID %d", r.Id)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(ids) < 30 || len(ports) < 20 { // two may be equal by chance
		t.Errorf("32 questions had %d IDs and %d ports", len(ids), len(ports))
	}
}

func TestBothFamiliesBothProtocols(t *testing.T) {
	s, err := New(with(resolver(t, give("192.0.2.1"))))
	if err != nil {
		t.Fatal(err)
	}
	pc4, ln4 := listen(t, "127.0.0.1")
	pc6, ln6 := listen(t, "::1")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, []net.PacketConn{pc4, pc6}, []net.Listener{ln4, ln6}) }()
	for _, addr := range []net.Addr{pc4.LocalAddr(), pc6.LocalAddr()} {
		for _, network := range []string{"udp", "tcp"} {
			if got := address(t, query(t, network, addr.String(), "example.org", dns.TypeA)); got != "192.0.2.1" {
				t.Errorf("%s %s: %s", network, addr, got)
			}
		}
	}
	if got := s.Stats(); got != (Stats{Queries: 4, Answers: 4}) {
		t.Errorf("stats %+v", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

func TestFailover(t *testing.T) {
	quiet := silence(t)
	for _, tt := range []struct {
		name    string
		servers func(t *testing.T) []netip.AddrPort
		rcode   int
		addr    string
	}{
		{"refused port", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1"), resolver(t, give("192.0.2.2"))}
		}, 0, "192.0.2.2"},
		{"silent", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{quiet, resolver(t, give("192.0.2.3"))}
		}, 0, "192.0.2.3"},
		{"servfail first", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{resolver(t, code(dns.RcodeServerFailure)), resolver(t, give("192.0.2.4"))}
		}, 0, "192.0.2.4"},
		{"refused first", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{resolver(t, code(dns.RcodeRefused)), resolver(t, give("192.0.2.5"))}
		}, 0, "192.0.2.5"},
		{"all refuse: the first one's word", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{resolver(t, code(dns.RcodeRefused)), resolver(t, code(dns.RcodeServerFailure))}
		}, dns.RcodeRefused, ""},
		{"nxdomain is an answer", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{resolver(t, code(dns.RcodeNameError)), resolver(t, give("192.0.2.6"))}
		}, dns.RcodeNameError, ""},
		{"none", func(t *testing.T) []netip.AddrPort { return nil }, dns.RcodeServerFailure, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, network := range []string{"udp", "tcp"} {
				cfg := with(tt.servers(t)...)
				cfg.AttemptTimeout = 50 * time.Millisecond
				_, addr := serve(t, cfg)
				r := query(t, network, addr, "example.org", dns.TypeA)
				if r.Rcode != tt.rcode {
					t.Fatalf("%s: rcode %d, want %d", network, r.Rcode, tt.rcode)
				}
				if tt.addr != "" && address(t, r) != tt.addr {
					t.Errorf("%s: %v, want %s", network, r.Answer, tt.addr)
				}
			}
		})
	}
}

// An upstream that answers late is still heard while the next one is asked.
func TestLateAnswerCounts(t *testing.T) {
	release := make(chan struct{})
	first := resolver(t, func(w dns.ResponseWriter, q *dns.Msg) { <-release; give("192.0.2.1")(w, q) })
	second := resolver(t, func(w dns.ResponseWriter, q *dns.Msg) { close(release) })
	cfg := with(first, second)
	cfg.AttemptTimeout = 20 * time.Millisecond
	_, addr := serve(t, cfg)
	if got := address(t, query(t, "udp", addr, "example.org", dns.TypeA)); got != "192.0.2.1" {
		t.Error(got)
	}
}

func TestForgeriesAreIgnored(t *testing.T) {
	forge := func(change func(q, a *dns.Msg)) func([]byte) []byte {
		return func(question []byte) []byte {
			q, a := new(dns.Msg), new(dns.Msg)
			q.Unpack(question)
			give("203.0.113.66")(writer{a}, q)
			change(q, a)
			out, err := a.Pack()
			if err != nil {
				panic(err)
			}
			return out
		}
	}
	forgeries := []func([]byte) []byte{
		forge(func(q, a *dns.Msg) { a.Id++ }),
		forge(func(q, a *dns.Msg) { a.Response = false }),
		forge(func(q, a *dns.Msg) { a.Question[0].Name = "example.net." }),
		forge(func(q, a *dns.Msg) { a.Question[0].Name = "xxample.org." }),
		forge(func(q, a *dns.Msg) { a.Question[0].Qtype = dns.TypeAAAA }),
		forge(func(q, a *dns.Msg) { a.Question[0].Qclass = 3 }),
		forge(func(q, a *dns.Msg) { a.Question = nil }),
		forge(func(q, a *dns.Msg) { a.Question = append(a.Question, a.Question[0]) }),
		forge(func(q, a *dns.Msg) { a.Opcode = dns.OpcodeNotify }),
		func(q []byte) []byte { return q[:4] },
		func(q []byte) []byte { return nil },
		func(q []byte) []byte { return q }, // the question itself
	}
	honest := forge(func(q, a *dns.Msg) { a.Answer[0].(*dns.A).A = net.IPv4(192, 0, 2, 1) })
	_, addr := serve(t, with(raw(t, func(question []byte) [][]byte {
		var out [][]byte
		for _, f := range forgeries {
			out = append(out, f(question))
		}
		return append(out, honest(question))
	})))
	if got := address(t, query(t, "udp", addr, "example.org", dns.TypeA)); got != "192.0.2.1" {
		t.Error(got)
	}
}

// An answer from another address than the one asked is none, though it has the right ID.
func TestWrongSourceIsIgnored(t *testing.T) {
	stranger, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	sent := make(chan struct{})
	server := resolver(t, func(w dns.ResponseWriter, q *dns.Msg) {
		a := new(dns.Msg)
		give("203.0.113.66")(writer{a}, q)
		b, _ := a.Pack()
		stranger.WriteTo(b, w.RemoteAddr())
		close(sent)
		give("192.0.2.1")(w, q)
	})
	_, addr := serve(t, with(server))
	if got := address(t, query(t, "udp", addr, "example.org", dns.TypeA)); got != "192.0.2.1" {
		t.Error(got)
	}
	<-sent
}

// writer keeps an answer in place of sending it.
type writer struct{ to *dns.Msg }

func (w writer) WriteMsg(m *dns.Msg) error   { *w.to = *m; return nil }
func (w writer) LocalAddr() net.Addr         { return nil }
func (w writer) RemoteAddr() net.Addr        { return nil }
func (w writer) Write(b []byte) (int, error) { return 0, errTest }
func (w writer) Close() error                { return nil }
func (w writer) TsigStatus() error           { return nil }
func (w writer) TsigTimersOnly(bool)         {}
func (w writer) Hijack()                     {}

// big answers with a TXT record set of so many octets at least.
func big(size int) dns.HandlerFunc {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		m.Compress = true
		for m.Len() < size {
			m.Answer = append(m.Answer, &dns.TXT{
				Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60},
				Txt: []string{strings.Repeat("x", 200)},
			})
		}
		if opt := q.IsEdns0(); opt != nil {
			m.SetEdns0(4096, opt.Do())
		}
		w.WriteMsg(m)
	}
}

// The upstream here ignores sizes; the client's is kept to all the same.
func TestAnswersFitTheClient(t *testing.T) {
	for _, tt := range []struct {
		edns   int // 0: none
		answer int
		cut    bool
	}{
		{0, 300, false},
		{0, 700, true},
		{100, 400, false}, // below 512 means 512: RFC 6891 §6.2.3
		{1232, 700, false},
		{1232, 1500, true},
		{1232, 30000, true},
		{4096, 3500, false},
		{65535, 50000, false},
	} {
		s, addr := serve(t, with(resolver(t, big(tt.answer))))
		m := new(dns.Msg).SetQuestion("example.org.", dns.TypeTXT)
		if tt.edns > 0 {
			m.SetEdns0(uint16(tt.edns), true)
		}
		out := talk(t, addr, pack(t, m))
		r := new(dns.Msg)
		if err := r.Unpack(out); err != nil {
			t.Fatalf("%+v: %v", tt, err)
		}
		if len(out) > max(512, tt.edns) {
			t.Errorf("%+v: %d octets", tt, len(out))
		}
		if r.Truncated != tt.cut || (len(r.Answer) == 0) != tt.cut || r.Id != m.Id || r.Question[0] != m.Question[0] {
			t.Errorf("%+v: %v", tt, r.MsgHdr)
		}
		if opt := r.IsEdns0(); (opt != nil) != (tt.edns > 0) || opt != nil && !opt.Do() {
			t.Errorf("%+v: OPT %v", tt, opt)
		}
		if got := s.Stats().Truncated; (got == 1) != tt.cut {
			t.Errorf("%+v: counted %d", tt, got)
		}
		// By TCP it comes whole.
		if r := exchange(t, "tcp", addr, m); r.Truncated || r.Len() < tt.answer {
			t.Errorf("%+v by tcp: %d octets", tt, r.Len())
		}
	}
}

func TestLongestAnswerByTCP(t *testing.T) {
	_, addr := serve(t, with(resolver(t, big(65200))))
	if r := query(t, "tcp", addr, "example.org", dns.TypeTXT); r.Len() < 65200 {
		t.Errorf("%d octets", r.Len())
	}
}

func TestMalformed(t *testing.T) {
	var asked atomic.Int32
	s, addr := serve(t, with(resolver(t, func(w dns.ResponseWriter, q *dns.Msg) {
		asked.Add(1)
		give("192.0.2.1")(w, q)
	})))
	good := pack(t, new(dns.Msg).SetQuestion("example.org.", dns.TypeA))
	edit := func(f func(b []byte) []byte) []byte { return f(bytes.Clone(good)) }
	for _, tt := range []struct {
		name  string
		msg   []byte
		rcode int // drop: no answer
	}{
		{"empty", nil, drop},
		{"short", good[:11], drop},
		{"a response", edit(func(b []byte) []byte { b[2] |= 0x80; return b }), drop},
		{"no question", edit(func(b []byte) []byte { b[5] = 0; return b[:12] }), rcodeFormat},
		{"two questions", edit(func(b []byte) []byte { b[5] = 2; return append(b, b[12:]...) }), rcodeFormat},
		{"cut in the name", good[:20], rcodeFormat},
		{"cut in the type", good[:len(good)-3], rcodeFormat},
		{"pointer", edit(func(b []byte) []byte { b[12] = 0xc0; return b }), rcodeFormat},
		{"name of 256", append(append(bytes.Clone(good[:12]), bytes.Repeat([]byte{1, 'a'}, 128)...), 0, 0, 1, 0, 1), rcodeFormat},
		{"missing record", edit(func(b []byte) []byte { b[11] = 1; return b }), rcodeFormat},
		{"record too long", edit(func(b []byte) []byte {
			b[11] = 1
			return append(b, 0, 0, 41, 4, 0, 0, 0, 0, 0, 0, 9)
		}), rcodeFormat},
		{"notify", edit(func(b []byte) []byte { b[2] |= 4 << 3; return b }), rcodeNotImpl},
		{"update", edit(func(b []byte) []byte { b[2] |= 5 << 3; return b }), rcodeNotImpl},
		{"zone transfer", edit(func(b []byte) []byte { b[len(b)-3] = 252; return b }), rcodeRefused},
	} {
		before := s.Stats()
		var r dns.Msg
		if tt.rcode == drop {
			// Whatever comes back belongs to the good question behind it.
			conn, err := net.Dial("udp", addr)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write(tt.msg)
			conn.Write(good)
			buf := make([]byte, 512)
			n, err := conn.Read(buf)
			conn.Close()
			if err != nil || r.Unpack(buf[:n]) != nil || len(r.Answer) != 1 || s.Stats().Queries != before.Queries+1 {
				t.Errorf("%s: answered %x", tt.name, buf[:n])
			}
			continue
		}
		asked.Store(0)
		out := talk(t, addr, tt.msg)
		if err := r.Unpack(out); err != nil || r.Rcode != tt.rcode || r.Id != uint16(good[0])<<8|uint16(good[1]) || !r.Response {
			t.Errorf("%s: %x %v", tt.name, out, err)
		}
		if asked.Load() != 0 || s.Stats().Malformed != before.Malformed+1 {
			t.Errorf("%s: asked elsewhere, or not counted", tt.name)
		}
	}
}

func TestServeEndsWhenOneSocketFails(t *testing.T) {
	s, err := New(with())
	if err != nil {
		t.Fatal(err)
	}
	pc, ln := listen(t, "127.0.0.1")
	pc2, ln2 := listen(t, "127.0.0.1")
	ln2.Close()
	if err := s.Serve(t.Context(), []net.PacketConn{pc, pc2}, []net.Listener{ln, ln2}); err == nil {
		t.Error("no error")
	}
	if _, _, err := pc.ReadFrom(make([]byte, 1)); err == nil {
		t.Error("the others are still open")
	}
}

// Shutdown with questions out, by both protocols, to upstreams that never answer.
func TestShutdownLeavesNothing(t *testing.T) {
	var asked sync.WaitGroup
	asked.Add(20)
	server := raw(t, func([]byte) [][]byte { asked.Done(); return nil })
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts in the backlog and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	dialled := make(chan struct{}, 10)
	cfg := with(server)
	var d net.Dialer
	cfg.Dial = func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
		if network == "udp" {
			return d.DialContext(ctx, network, addr.String())
		}
		conn, err := d.DialContext(ctx, network, silent.Addr().String())
		dialled <- struct{}{}
		return conn, err
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	pc, ln := listen(t, "127.0.0.1")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, []net.PacketConn{pc}, []net.Listener{ln}) }()
	q := pack(t, new(dns.Msg).SetQuestion("example.org.", dns.TypeA))
	udp, err := net.Dial("udp", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	tcp, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	for range 20 {
		udp.Write(q)
	}
	for range 10 {
		tcp.Write(frame(q))
	}
	asked.Wait()
	for range 10 {
		<-dialled
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := leakedIn("(*Server)"); got != "" {
		t.Errorf("still running:\n%s", got)
	}
}

func leakedIn(what string) string {
	if all := leaked(); strings.Contains(all, what) {
		return all
	}
	return ""
}

func TestNewRefusesNonsense(t *testing.T) {
	for _, cfg := range []Config{
		{},
		{Upstreams: StaticUpstreams{}, Timeout: -1},
		{Upstreams: StaticUpstreams{}, Timeout: time.Minute},
		{Upstreams: StaticUpstreams{}, MaxInFlight: -1},
		{Upstreams: StaticUpstreams{}, MaxConns: -1},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%+v taken", cfg)
		}
	}
}
