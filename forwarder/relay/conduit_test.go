package relay

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lent counts the conduits that all workers have lent.
func lent(l *Loop) (n int) {
	for _, w := range l.workers {
		n += int(w.conduits.lent.Load())
	}
	return n
}

// needPipes skips the test where the host never gives a user a pipe of a conduit's size.
func needPipes(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/fs/pipe-max-size")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := strconv.Atoi(strings.TrimSpace(string(text))); err != nil || n < conduitSize {
		t.Skipf("the host gives no pipes of a megabyte: fs.pipe-max-size is %s", text)
	}
}

// lendNow is lend, again until other programs of the same user have left pipes to us (fs.pipe-user-pages-soft).
func lendNow(t *testing.T, cs *conduits) (c *conduit) {
	t.Helper()
	until(t, "there is a pipe of a megabyte", func() bool {
		cs.refused = false
		c = cs.lend()
		return c != nil
	})
	return c
}

// plugged makes pairs whose directions are poured from the first octet on, as busy ones are.
func plugged(t *testing.T, l *Loop, o Options) (client, server net.Conn, j *Joint) {
	t.Helper()
	needPipes(t)
	h, client := tcpSide(t)
	c, server := tcpSide(t)
	p := l.newPair(h, c, o)
	for i := range p.sides {
		cs := &p.w.conduits
		cs.takeBack(lendNow(t, cs)) // which keeps it for the next
		if p.plug(&p.sides[i], &p.sides[1-i]); p.sides[i].pipe == nil {
			t.Fatal("there is a conduit, and it was not lent")
		}
	}
	if err := p.watch(); err != nil {
		t.Fatal(err)
	}
	return client, server, &p.Joint
}

// carry sends octets from one to the other, and the end behind them.
func carry(t *testing.T, from io.Writer, to io.Reader, octets []byte) {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		_, err := from.Write(octets)
		sent <- errors.Join(err, from.(interface{ CloseWrite() error }).CloseWrite())
	}()
	got := sha256.New()
	n, err := io.Copy(got, to)
	if err := errors.Join(err, <-sent); err != nil || int(n) != len(octets) {
		t.Errorf("%d of %d octets, %v", n, len(octets), err)
	}
	if want := sha256.Sum256(octets); !bytes.Equal(got.Sum(nil), want[:]) {
		t.Error("other octets came than were sent")
	}
}

func TestConduit(t *testing.T) {
	l, stop := running(t)
	o, done := outcome()
	client, server, _ := plugged(t, l, o)
	octets := pattern(48 << 20)
	carry(t, client, server, octets)
	carry(t, server, client, octets[:len(octets)/2])
	if err := <-done; err != nil {
		t.Errorf("ended with %v", err)
	}
	if in, out := o.Count.In.Load(), o.Count.Out.Load(); in != uint64(len(octets)) || out != uint64(len(octets)/2) {
		t.Errorf("counted %d in and %d out", in, out)
	}
	stop()
	if n := lent(l); n != 0 {
		t.Errorf("%d conduits are still lent", n)
	}
}

// A direction in which little comes is copied again, and nothing is lost between.
func TestConduitThins(t *testing.T) {
	l, stop := running(t)
	o, done := outcome()
	client, server, _ := plugged(t, l, o)
	b := make([]byte, 1)
	for i := range 4 * thinEnough {
		if _, err := client.Write([]byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
		if _, err := server.Read(b); err != nil || b[0] != byte(i) {
			t.Fatalf("octet %d: %d, %v", i, b[0], err)
		}
		if _, err := server.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Read(b); err != nil || b[0] != byte(i) {
			t.Fatalf("octet %d back: %d, %v", i, b[0], err)
		}
	}
	stop()
	<-done
	if n := lent(l); n != 0 {
		t.Errorf("%d conduits are still lent", n)
	}
}

// Who stops reading is waited for, loses nothing, and is cut off with all that is on its way when the other resets.
func TestConduitClogs(t *testing.T) {
	l, stop := running(t)
	o, done := outcome()
	client, server, _ := plugged(t, l, o)
	sent := clog(t, l, client)
	closeWrite(t, client)
	if n, err := io.Copy(io.Discard, server); err != nil || int(n) != sent {
		t.Errorf("read %d of %d octets, %v", n, sent, err)
	}
	closeWrite(t, server)
	if err := <-done; err != nil {
		t.Errorf("ended with %v", err)
	}

	o, done = outcome()
	client, server, _ = plugged(t, l, o)
	clog(t, l, client)
	reset(t, server)
	if err := <-done; !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Errorf("ended with %v", err)
	}
	client.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client: %v", err)
	}

	o, done = outcome()
	client, _, j := plugged(t, l, o)
	clog(t, l, client)
	j.Abort()
	if err := <-done; !errors.Is(err, ErrAborted) {
		t.Errorf("aborted: %v", err)
	}
	stop()
	if n := lent(l); n != 0 {
		t.Errorf("%d conduits are still lent", n)
	}
}

// An urgent octet stays in its place among the others.
func TestConduitUrgent(t *testing.T) {
	l, _ := running(t)
	client, server, _ := plugged(t, l, Options{})
	raw, err := client.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write([]byte("before")); err != nil {
		t.Fatal(err)
	}
	var serr error
	if err := raw.Control(func(fd uintptr) { serr = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) }); err != nil || serr != nil {
		t.Fatal(err, serr)
	}
	if _, err := client.Write([]byte("after")); err != nil {
		t.Fatal(err)
	}
	closeWrite(t, client)
	server.SetReadDeadline(time.Now().Add(20 * time.Second))
	got, err := io.ReadAll(server)
	if err != nil || string(got) != "before!after" {
		t.Errorf("%q, %v", got, err)
	}
}

// More busy directions than there are conduits are copied.
func TestConduitsEnd(t *testing.T) {
	needPipes(t)
	cs := conduits{most: maxConduits}
	var all []*conduit
	for range maxConduits {
		all = append(all, lendNow(t, &cs))
	}
	if c := cs.lend(); c != nil {
		t.Error("there is no end to them")
	}
	for _, c := range all {
		cs.takeBack(c)
	}
	if cs.lent.Load() != 0 || len(cs.spare) != maxSpare {
		t.Errorf("%d are lent, %d are kept", cs.lent.Load(), len(cs.spare))
	}
	cs.close()
}
