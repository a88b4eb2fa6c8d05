package runtimes

import (
	"strings"
	"testing"
)

// TestLab is of the lab itself: who one is there, that its machines reach each other, and that the names are known.
func TestLab(t *testing.T) {
	lab := needLab(t)
	if got := lab.user(t, "id", "-un"); got != "usernet-lab" {
		t.Errorf("the user is %q", got)
	}
	lab.outside.serve(t, "tcp", outsideAddr4+":8000")
	if got, err := lab.host.get("http://" + outsideAddr4 + ":8000/"); got != hostAddr4 {
		t.Errorf("outside sees a client at %q: %v", got, err)
	}
	if got := lab.user(t, "getent", "ahostsv4", "outside.test"); !strings.HasPrefix(got, outsideAddr4) {
		t.Errorf("outside.test is at %q", got)
	}
}
