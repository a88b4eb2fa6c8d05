package spin

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// polls is a poll function that has n events at its k-th call, and counts those that could sleep.
func polls(k, n int, slept *[]time.Duration) func(time.Duration) (int, error) {
	calls := 0
	return func(timeout time.Duration) (int, error) {
		if timeout > 0 {
			*slept = append(*slept, timeout)
		}
		if calls++; calls >= k {
			return n, nil
		}
		return 0, nil
	}
}

func TestWait(t *testing.T) {
	var w Waiter
	var slept []time.Duration
	if n, err := w.Wait(time.Second, polls(1, 3, &slept)); n != 3 || err != nil || w.Slept() != 0 || slept != nil {
		t.Errorf("an event that is there: %d, %v; %d sleeps, %v", n, err, w.Slept(), slept)
	}
	if n, err := w.Wait(time.Second, polls(2, 1, &slept)); n != 1 || err != nil || w.Slept() != 1 || len(slept) != 1 || slept[0] != time.Second {
		t.Errorf("one that is not: %d, %v; %d sleeps, %v", n, err, w.Slept(), slept)
	}
	slept = nil
	if n, err := w.Wait(time.Second, polls(5, 1, &slept)); n != 0 || err != nil || len(slept) != 1 {
		t.Errorf("nobody looks before waits were short: %d, %v; %v", n, err, slept)
	}
	broken := errors.New("broken")
	if _, err := w.Wait(time.Second, func(time.Duration) (int, error) { return 0, broken }); err != broken {
		t.Errorf("an error: %v", err)
	}
}

// Who gives the processor away for long with each yield looks less and less often, and more often again once that is over.
func TestWaitRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := Waiter{short: 256}
		looks, hog := 0, true
		wait := func() {
			looks = -1
			w.Wait(time.Second, func(timeout time.Duration) (int, error) {
				if timeout > 0 {
					return 1, nil
				}
				looks++
				switch {
				case looks == 0:
					return 0, nil
				case hog:
					time.Sleep(taken + time.Microsecond)
					return 0, nil
				}
				return 1, nil
			})
		}
		for want := leastRest; want <= longestRest; want *= 2 {
			w.short = 256
			if wait(); looks != 1 || w.rest != want {
				t.Fatalf("%d looks beside a hog, then a rest of %v; want 1, %v", looks, w.rest, want)
			}
			if wait(); looks != 0 {
				t.Fatalf("%d looks during a rest of %v", looks, want)
			}
			time.Sleep(want + 1)
		}
		w.short = 256
		if wait(); looks != 1 || w.rest != longestRest {
			t.Errorf("%d looks, then a rest of %v; want 1, %v", looks, w.rest, longestRest)
		}
		hog = false
		time.Sleep(longestRest + 1)
		if wait(); looks != 1 || w.rest != longestRest/2 {
			t.Errorf("%d looks without the hog, and the next rest follows one of %v; want 1, %v", looks, w.rest, longestRest/2)
		}
	})
}

// Events that come soon are looked for without sleeping, once there have been some, and no more after some that did not.
func TestWaitLooksWhereItPays(t *testing.T) {
	var w Waiter
	now := time.Now()
	if w.pays(now) {
		t.Error("looks before anything has happened")
	}
	var slept []time.Duration
	for range 8 {
		w.Wait(time.Second, polls(1, 1, &slept))
	}
	if !w.pays(now) {
		t.Errorf("does not look after eight short waits: %d of 256", w.short)
	}
	w.pause = now.Add(time.Millisecond)
	if w.pays(now) || !w.pays(now.Add(2*time.Millisecond)) {
		t.Error("a pause is not kept, or for ever")
	}
	w.pause = time.Time{}
	for range 4 {
		w.Wait(time.Second, polls(1<<30, 0, &slept))
	}
	if len(slept) != 4 {
		t.Errorf("%d sleeps in four waits for nothing", len(slept))
	}
	if w.pays(now) {
		t.Errorf("looks after four long waits: %d of 256", w.short)
	}
}
