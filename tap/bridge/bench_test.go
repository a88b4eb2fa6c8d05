package bridge_test

import (
	"io"
	"testing"
)

// benchKinds are cables to a server; its client is on a veth.
var benchKinds = []int{0, 2}

// What a stream gets to a member on either cable: a mebibyte each time.
func BenchmarkStream(b *testing.B) {
	for _, kind := range benchKinds {
		b.Run(kinds[kind].name, func(b *testing.B) {
			s := newSite(b, 1500)
			x, y := connection(b, s.join(b, 1, 0), s.join(b, 2, kind), false)
			block := make([]byte, 1<<20)
			read := make(chan error)
			b.SetBytes(int64(len(block)))
			b.ReportAllocs()
			go func() {
				_, err := io.Copy(struct{ io.Writer }{io.Discard}, y)
				read <- err
			}()
			for b.Loop() {
				if _, err := x.Write(block); err != nil {
					b.Fatal(err)
				}
			}
			x.Close()
			if err := <-read; err != nil {
				b.Fatal(err)
			}
		})
	}
}

// A datagram there and one back.
func BenchmarkRoundTrip(b *testing.B) {
	for _, kind := range benchKinds {
		b.Run(kinds[kind].name, func(b *testing.B) {
			s := newSite(b, 1500)
			client, server := s.join(b, 1, 0), s.join(b, 2, kind)
			y := server.receiver(b)
			answered := make(chan error)
			go func() {
				buf := make([]byte, 1)
				for {
					_, from, err := y.ReadFrom(buf)
					if err != nil {
						answered <- nil // closed below
						return
					}
					if _, err := y.WriteTo(buf, from); err != nil {
						answered <- err
						return
					}
				}
			}()
			x := client.dial(b, "udp", client.addr, server.addr)
			buf := make([]byte, 1)
			for b.Loop() {
				if _, err := x.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := x.Read(buf); err != nil {
					b.Fatal(err)
				}
			}
			y.Close()
			if err := <-answered; err != nil {
				b.Fatal(err)
			}
		})
	}
}
