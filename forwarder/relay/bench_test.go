package relay

import (
	"io"
	"net"
	"runtime"
	"testing"
)

// pairLoop is a Loop as usernet has it: one processor, lingering.
func pairLoop(b *testing.B) *Loop {
	b.Helper()
	procs := runtime.GOMAXPROCS(1)
	l, err := NewLoop()
	if err != nil {
		b.Fatal(err)
	}
	if err := l.Linger(); err != nil {
		b.Fatal(err)
	}
	runtime.GOMAXPROCS(procs) // the client and the server have the others
	run(b, l)
	return l
}

// BenchmarkPairRoundTrip is one octet there and back through a pair.
func BenchmarkPairRoundTrip(b *testing.B) {
	client, server, _ := joined(b, pairLoop(b), tcpSide, tcpSide, Options{Count: new(Count)})
	go func() {
		buf := make([]byte, 1)
		for {
			if _, err := server.Read(buf); err != nil {
				return
			}
			if _, err := server.Write(buf); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := client.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(client, buf); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPairThroughput is 128 KiB from the client to the server, of a stream.
func BenchmarkPairThroughput(b *testing.B) {
	client, server, _ := joined(b, pairLoop(b), tcpSide, tcpSide, Options{Count: new(Count)})
	benchmarkStream(b, client, server)
}

// BenchmarkDirectThroughput is the same without a pair between: what there is to reach.
func BenchmarkDirectThroughput(b *testing.B) {
	fd, client := tcpSide(b)
	benchmarkStream(b, client, netConn(b, fd))
}

func benchmarkStream(b *testing.B, client, server net.Conn) {
	const piece = 128 << 10
	received := make(chan int)
	go func() {
		buf := make([]byte, piece)
		n := 0
		for {
			m, err := server.Read(buf)
			if n += m; err != nil {
				received <- n
				return
			}
		}
	}()
	buf := make([]byte, piece)
	b.SetBytes(piece)
	b.ReportAllocs()
	sent := 0
	for b.Loop() {
		n, err := client.Write(buf)
		if err != nil {
			b.Fatal(err)
		}
		sent += n
	}
	closeWrite(b, client)
	if n := <-received; n != sent {
		b.Errorf("received %d of %d octets", n, sent)
	}
}

// BenchmarkPublishedConnect is one connection through a listener and a pair: dialled, one octet there and back, closed.
func BenchmarkPublishedConnect(b *testing.B) {
	at := forward(b, pairLoop(b), echo(b), Options{})
	buf := make([]byte, 1)
	b.ReportAllocs()
	for b.Loop() {
		c, err := net.Dial("tcp", at)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
		if err := c.(*net.TCPConn).SetLinger(0); err != nil { // no TIME-WAIT: the ports would run out
			b.Fatal(err)
		}
		c.Close()
	}
}

// BenchmarkJoinRoundTrip is one octet from a container's end to the host and back.
func BenchmarkJoinRoundTrip(b *testing.B) {
	l := pairLoop(b)
	e := newMemoryEnd()
	fd, peer := hostPair(b)
	if _, err := l.Join(e, fd, Options{}); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 1)
	b.ReportAllocs()
	for b.Loop() {
		e.send(buf, false)
		if _, err := io.ReadFull(peer, buf); err != nil {
			b.Fatal(err)
		}
		if _, err := peer.Write(buf); err != nil {
			b.Fatal(err)
		}
		e.mu.Lock()
		for len(e.received) == 0 {
			e.cond.Wait()
		}
		e.received = e.received[:0]
		e.mu.Unlock()
	}
}
