package spin

import (
	"errors"
	"testing"
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
