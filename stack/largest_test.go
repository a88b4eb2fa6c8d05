package stack_test

import (
	"io"
	"testing"
)

// relay reads from the host what fills four of netstack's largest frames, so that no small one follows: maxFill of
// package forwarder/relay.
func TestAssumeLargestFrame(t *testing.T) {
	const largest, n = 65274, 4
	h, conns := accepting(t)
	p := newPair(t, allOffloads, h)
	c, g := connect(t, p, conns, world4)
	defer g.Close()
	buf := make([]byte, n*largest)
	frames := uint64(0)
	for range 20 { // until the congestion window holds all of it
		before := p.gateway.Stats().FramesOut
		if sent, err := g.Fill(len(buf), func(b []byte) (int, error) { return len(b), nil }); sent != len(buf) || err != nil {
			t.Fatalf("sent %d octets: %v", sent, err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			t.Fatal(err)
		}
		if frames = p.gateway.Stats().FramesOut - before; frames == n {
			return
		}
	}
	t.Errorf("%d octets go in %d frames, want %d of %d", len(buf), frames, n, largest)
}
