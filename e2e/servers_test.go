package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"testing"
	"time"
)

// listen opens a TCP listener in a place.
func (p *place) listen(t testing.TB, addr string) net.Listener {
	t.Helper()
	return p.listenOn(t, "tcp", addr)
}

func (p *place) listenOn(t testing.TB, network, addr string) net.Listener {
	t.Helper()
	var l net.Listener
	var err error
	p.do(func() { l, err = net.Listen(network, addr) })
	if err != nil {
		t.Fatalf("listen on %s in %s: %v", addr, p.name, err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// listenUDP opens a UDP socket in a place.
func (p *place) listenUDP(t testing.TB, addr string) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	var err error
	p.do(func() { c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr))) })
	if err != nil {
		t.Fatalf("listen on udp %s in %s: %v", addr, p.name, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// dial connects from a place. The address is numeric: a resolver would run elsewhere.
func (p *place) dial(network, addr string) (c net.Conn, err error) {
	d := net.Dialer{Timeout: patience}
	p.do(func() { c, err = d.DialContext(context.Background(), network, addr) })
	if err == nil {
		err = c.SetDeadline(time.Now().Add(patience))
	}
	return c, err
}

// connect is dial that must work.
func (p *place) connect(t testing.TB, network, addr string) net.Conn {
	t.Helper()
	c, err := p.dial(network, addr)
	if err != nil {
		t.Fatalf("%s: %v", p.name, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// serveTCP answers each connection with handle, and waits for all of them at the end of the test.
func (p *place) serveTCP(t testing.TB, addr string, handle func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	return p.serve(t, "tcp", addr, handle)
}

func (p *place) serve(t testing.TB, network, addr string, handle func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l := p.listenOn(t, network, addr)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				handle(c.(*net.TCPConn))
			}()
		}
	}()
	return netip.MustParseAddrPort(l.Addr().String())
}

func echo(c *net.TCPConn) { io.Copy(c, c) }

// serveHTTP serves in a place and returns the URL without a path.
func (p *place) serveHTTP(t testing.TB, addr string, h http.Handler) string {
	t.Helper()
	l := p.listen(t, addr)
	s := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return "http://" + l.Addr().String()
}

// files is a server of patterns: GET /N sends the first N octets, PUT / answers with the hash of what it got,
// GET /slow?for=D sends a word, says nothing for D, and sends another. GET /peer tells the client's address.
func files() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{n}", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.PathValue("n"), 10, 64)
		if err != nil {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		writePattern(w, n)
	})
	mux.HandleFunc("PUT /", func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintf(w, "%d %s\n", n, hex.EncodeToString(h.Sum(nil)))
	})
	mux.HandleFunc("GET /slow", func(w http.ResponseWriter, r *http.Request) {
		pause, _ := time.ParseDuration(r.FormValue("for"))
		fmt.Fprintln(w, "first")
		w.(http.Flusher).Flush()
		select {
		case <-time.After(pause):
			fmt.Fprintln(w, "last")
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("GET /peer", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, r.RemoteAddr) })
	return mux
}

// pattern is repeated to make octets that are the same on every run. Its length is a prime, so that what is lost,
// doubled or swapped in sizes that computers like does not go unseen.
var pattern = func() []byte {
	b := make([]byte, 1048583)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}()

func writePattern(w io.Writer, n int64) error {
	for n > 0 {
		m, err := w.Write(pattern[:min(n, int64(len(pattern)))])
		if err != nil {
			return err
		}
		n -= int64(m)
	}
	return nil
}

// patternHash is the SHA-256 of the first n octets.
func patternHash(n int64) string {
	h := sha256.New()
	writePattern(h, n)
	return hex.EncodeToString(h.Sum(nil))
}

// serveUDP answers each datagram with what answer makes of it; nil is no answer.
func (p *place) serveUDP(t testing.TB, addr string, answer func(from netip.AddrPort, b []byte) []byte) netip.AddrPort {
	t.Helper()
	c := p.listenUDP(t, addr)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			if out := answer(from, b[:n]); out != nil {
				c.WriteToUDPAddrPort(out, from)
			}
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	return netip.MustParseAddrPort(c.LocalAddr().String())
}

func same(_ netip.AddrPort, b []byte) []byte { return b }
