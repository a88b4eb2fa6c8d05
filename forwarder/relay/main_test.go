package relay

import (
	"testing"

	"usernet/tap/taptest"
)

func TestMain(m *testing.M) { taptest.Main(m, nil) }
