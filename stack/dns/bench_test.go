package dns

import (
	"net/netip"
	"testing"

	"github.com/miekg/dns"
)

// What a question costs before it is passed on, or until it is answered here.
func BenchmarkQuestion(b *testing.B) {
	s, err := New(Config{
		Upstreams: StaticUpstreams{},
		Names:     StaticNames(map[string][]netip.Addr{"a.internal": {netip.MustParseAddr("192.0.2.1")}}),
	})
	if err != nil {
		b.Fatal(err)
	}
	for _, test := range []struct {
		name    string
		forward bool
	}{{"a.internal.", false}, {"example.org.", true}} {
		b.Run(test.name, func(b *testing.B) {
			msg := pack(b, new(dns.Msg).SetQuestion(test.name, dns.TypeA))
			b.ReportAllocs()
			for b.Loop() {
				if q, _, forward := s.receive(netip.Addr{}, msg); forward != test.forward {
					b.Fatalf("passed on: %v", forward)
				} else if forward {
					disguise(&q)
				}
			}
		})
	}
}
