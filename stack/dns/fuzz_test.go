package dns

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/miekg/dns"
)

// Whatever a client sends: no crash; what we answer ourselves parses, is a response with the client's
// ID, and is no longer than the client takes; what we pass on keeps its octets.
func FuzzQuestion(f *testing.F) {
	name := new(dns.Msg).SetQuestion("a.internal.", dns.TypeA)
	name.SetEdns0(1232, true)
	ptr := new(dns.Msg).SetQuestion("1.2.0.192.in-addr.arpa.", dns.TypePTR)
	six := new(dns.Msg).SetQuestion("1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.", dns.TypePTR)
	other := new(dns.Msg).SetQuestion("example.org.", dns.TypeAAAA)
	transfer := new(dns.Msg).SetAxfr("example.org.")
	update := new(dns.Msg).SetUpdate("example.org.")
	private := new(dns.Msg).SetQuestion("lb._dns-sd._udp.1.89.10.in-addr.arpa.", dns.TypePTR)
	for i, m := range []*dns.Msg{name, ptr, six, other, transfer, update, private} {
		m.Id = uint16(i) // seeds are the same in every run
		b := pack(f, m)
		f.Add(b)
		f.Add(b[:len(b)-3])
	}
	f.Add([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 1, 0, 1})
	f.Add([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0xc0, 12, 0, 41, 0xff, 0xff, 0, 0, 0, 0, 0, 0})

	s, err := New(Config{
		Upstreams: StaticUpstreams{},
		Names: zoned{StaticNames(map[string][]netip.Addr{
			"a.internal": {netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
		})},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		before := bytes.Clone(msg)
		q, answer, forward := s.receive(netip.Addr{}, msg)
		if !bytes.Equal(msg, before) {
			t.Fatal("the message was changed")
		}
		if forward {
			if answer != nil {
				t.Fatal("forwarded and answered")
			}
			sent, id := disguise(&q)
			if !bytes.Equal(sent[2:], msg[2:]) {
				t.Fatal("not passed on as it is")
			}
			back := bytes.Clone(sent)
			back[2] |= flagQR
			if !q.answeredBy(back, id) || q.answeredBy(sent, id) || q.answeredBy(back, id+1) {
				t.Error("an answer is not told from others")
			}
			check(t, &q, q.truncate(back))
			answer = q.refuse(rcodeFailure)
		}
		if answer != nil {
			check(t, &q, answer)
		}
	})
}

func check(t *testing.T, q *question, answer []byte) {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(answer); err != nil {
		t.Fatalf("%x\nto %x: %v", answer, q.wire, err)
	}
	if !m.Response || !bytes.Equal(answer[:2], q.wire[:2]) || len(answer) > q.size {
		t.Errorf("%x\nto %x", answer, q.wire)
	}
	if (m.IsEdns0() != nil) != q.edns {
		t.Errorf("EDNS in one of the two:\n%x\n%x", answer, q.wire)
	}
}

// Whatever an upstream sends to a question is taken or passed over, and what is taken can be cut.
func FuzzAnswer(f *testing.F) {
	ask := new(dns.Msg).SetQuestion("example.org.", dns.TypeA)
	ask.Id = 0x1234
	question := pack(f, ask)
	f.Add(question)
	answer := bytes.Clone(question)
	answer[2] |= flagQR
	f.Add(answer)
	f.Add(append(answer[:5:5], 0, 0, 0, 0, 0, 0, 0))
	f.Fuzz(func(t *testing.T, msg []byte) {
		q, rcode := parse(question)
		if rcode != rcodeNone {
			t.Fatal(rcode)
		}
		id := uint16(question[0])<<8 | uint16(question[1])
		if !q.answeredBy(msg, id) {
			return
		}
		refuses(msg)
		check(t, &q, q.truncate(msg))
	})
}
