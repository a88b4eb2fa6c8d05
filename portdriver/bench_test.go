package portdriver

import (
	"io"
	"net"
	"testing"
	"time"
)

// Connections that carry a few octets, one after the other.
func BenchmarkConnect(b *testing.B) {
	for _, path := range []string{PathKernel, PathStack} {
		b.Run(path, func(b *testing.B) {
			l := newLab(b, labConfig{path: path})
			l.sayWho("tcp4", ":80")
			f := l.add("0:80")[0]
			to := at(host4, f)
			b.ReportAllocs()
			for b.Loop() {
				c, err := net.DialTimeout("tcp", to, patience)
				if err != nil {
					b.Fatal(err)
				}
				c.SetDeadline(time.Now().Add(patience))
				if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
					b.Fatal(err)
				}
				c.Close()
			}
		})
	}
}

// One connection that asks and hears, 64 octets at a time.
func BenchmarkRoundTrip(b *testing.B) {
	for _, path := range []string{PathKernel, PathStack} {
		b.Run(path, func(b *testing.B) {
			l := newLab(b, labConfig{path: path})
			l.sayWho("tcp4", "10.0.2.100:80")
			f := l.add("127.0.0.1:0:80")[0]
			c := dial(b, "tcp", at(localhost, f))
			c.SetDeadline(time.Time{})
			buf := make([]byte, 64)
			if _, err := io.ReadAtLeast(c, buf, len("10.0.2.2:1\n")); err != nil {
				b.Fatal(err)
			}
			buf = buf[:32]
			for b.Loop() {
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
