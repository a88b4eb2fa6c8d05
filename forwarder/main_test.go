package forwarder

import (
	"os"
	"os/signal"
	"testing"

	"usernet/tap/taptest"
)

// The tests run in namespaces of their own: routes, interfaces and sysctls are theirs to set.
func TestMain(m *testing.M) {
	// The goroutine behind os/signal never ends. Fuzzing would start it and leave it to be
	// taken for a leak of ours.
	c := make(chan os.Signal, 1)
	signal.Notify(c, os.Interrupt)
	signal.Stop(c)
	taptest.Main(m, nil)
}
