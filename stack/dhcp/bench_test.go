package dhcp

import "testing"

func BenchmarkHandle(b *testing.B) {
	s := newServer(b, config())
	for _, m := range []struct {
		name string
		msg  []byte
	}{
		{"discover", message(discover, 1)},
		{"request", message(request, 1, server("10.0.2.2"), requested("10.0.2.100"))},
	} {
		b.Run(m.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, ok := s.Handle(m.msg, start); !ok {
					b.Fatal("no answer")
				}
			}
		})
	}
}
