package tap_test

import (
	"fmt"
	"log/slog"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap"
)

// frameSizes are payloads in octets, and the length of the datagrams in them where they are trains.
var frameSizes = []struct{ payload, segment int }{{64, 0}, {1400, 0}, {64 * 1000, 1000}}

// silent is quiet without a log, whose lines would stand among the figures.
func silent() tap.Config {
	cfg := quiet()
	cfg.Log = slog.New(slog.DiscardHandler)
	return cfg
}

// What a frame down costs: the write, and the container's kernel, which has nobody for it.
func BenchmarkQueueWrite(b *testing.B) {
	for _, size := range frameSizes {
		b.Run(fmt.Sprint(size.payload), func(b *testing.B) {
			d := open(b, newNS(b), silent())
			q := d.Queues()[0]
			f := frameTo(d, make([]byte, size.payload), size.segment)
			vec := [][]byte{f[:10], f[10:52], f[52:]}
			b.ReportAllocs()
			b.SetBytes(int64(size.payload))
			for b.Loop() {
				if err := q.Write(vec); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// What a frame up costs: the container's sendto, and the read.
func BenchmarkQueueRead(b *testing.B) {
	for _, size := range frameSizes {
		b.Run(fmt.Sprint(size.payload), func(b *testing.B) {
			n := newNS(b)
			q := open(b, n, silent()).Queues()[0]
			fd := int(call(b, n, "udp", "10.0.2.100:1000", nil)[0].Fd())
			if err := unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, size.segment); err != nil {
				b.Fatal(err)
			}
			// Connected, because an address with each datagram is an allocation of the benchmark's own.
			if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: everybody.As4()}); err != nil {
				b.Fatal(err)
			}
			payload := make([]byte, size.payload)
			up := [][]byte{make([]byte, 10), make([]byte, 2048), make([]byte, 65536)}
			b.ReportAllocs()
			b.SetBytes(int64(size.payload))
			for b.Loop() {
				if _, err := unix.Write(fd, payload); err != nil {
					b.Fatal(err)
				}
				read(b, q, up)
			}
		})
	}
}

// read takes a frame, which is there or about to be.
func read(b *testing.B, q *tap.Queue, vec [][]byte) {
	for {
		switch _, err := q.Read(vec); err {
		case nil:
			return
		case unix.EAGAIN:
			if err := q.Wait(); err != nil {
				b.Fatal(err)
			}
		default:
			b.Fatal(err)
		}
	}
}
