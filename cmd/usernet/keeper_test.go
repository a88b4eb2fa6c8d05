package main

import (
	"testing"
	"time"
)

// Docs promise that members are back in the world two seconds after the daemon's death, be it the tenth in a row.
func TestDaemonThatIsKilledAgainAndAgainComesBackSoon(t *testing.T) {
	var pause time.Duration
	for death := range 10 {
		before := pause
		if pause = nextPause(pause, shortLife/2); pause > time.Second || pause < before || pause == 0 {
			t.Errorf("death %d: a pause of %v after one of %v, want one that grows up to a second", death, pause, before)
		}
	}
	if pause = nextPause(pause, 2*shortLife); pause != 0 {
		t.Errorf("a pause of %v after a long life, want none", pause)
	}
	if pause = nextPause(pause, 0); pause != firstPause {
		t.Errorf("a pause of %v then, want %v", pause, firstPause)
	}
}
