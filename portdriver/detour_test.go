package portdriver

import (
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// In a detour one client at a time tries lo, ever more rarely while there is no answer, and an answer ends it.
func TestDetour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &forward{d: &Driver{log: slog.New(slog.DiscardHandler), cfg: Config{DialTimeout: 10 * time.Second}}}
		client := func() *conn { return &conn{f: f, socket: -1} }
		want := func(detoured bool) (c *conn) {
			t.Helper()
			c = client()
			if c.detoured(container4) != detoured {
				t.Fatalf("after %v: detoured is not %t", f.detours[0].time, detoured)
			}
			return c
		}
		want(false)
		crowd := []*conn{want(false), want(false), want(false)}
		for _, c := range crowd { // they come at once, and find silence at once
			c.ledAway(container4)
		}
		for length := detourTime; ; length = min(2*length, detourTimeMost) {
			if got := f.detours[0].time; got != length {
				t.Fatalf("a detour of %v, want %v", got, length)
			}
			if f.onDetour(container4) == nil || f.onDetour(container6) != nil {
				t.Fatal("the detour is not where it should be")
			}
			time.Sleep(length - time.Nanosecond)
			want(true)
			time.Sleep(time.Nanosecond)
			one := want(false)
			if one.detoured(container4) {
				t.Fatal("who tries lo takes the detour")
			}
			want(true)
			if one.patience() != shortPatience {
				t.Fatal("who tries lo waits long")
			}
			if length == detourTimeMost {
				one.answered(container4)
				break
			}
			one.ledAway(container4)
		}
		if want(false); f.onDetour(container4) != nil {
			t.Error("the detour goes on")
		}
	})
}

// After a refusal the stack is asked once a second at most, and after a silence always.
func TestRefusedOverLo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &conn{f: new(forward)}
		for i, test := range []struct {
			after time.Duration
			err   error
			want  bool
		}{
			{0, unix.ECONNREFUSED, true},
			{askTime - time.Nanosecond, unix.ECONNREFUSED, false},
			{0, noSocket{unix.ETIMEDOUT}, true},
			{time.Nanosecond, unix.ECONNREFUSED, true},
			{0, unix.ECONNREFUSED, false},
			{0, unix.ECONNRESET, false},
		} {
			time.Sleep(test.after)
			c.asking = false
			if got := c.mayBeAstray(container4, test.err); got != test.want {
				t.Errorf("%d: %v after %v: %t", i, test.err, test.after, got)
			}
			if c.asking != (test.want && test.err == unix.ECONNREFUSED) {
				t.Errorf("%d: asking is %t", i, c.asking)
			}
		}
	})
}
