package e2e

import (
	"encoding/json"
	"testing"
)

func unmarshal(t testing.TB, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v: %s", err, tail(text))
	}
}
