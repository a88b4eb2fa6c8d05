package forwarder

import (
	"testing"

	"usernet/tap/taptest"
)

// The tests run in namespaces of their own: routes, interfaces and sysctls are theirs to set.
func TestMain(m *testing.M) { taptest.Main(m, nil) }
