package main

import (
	"os"
	"testing"
)

// The test binary starts itself in one of these roles, by an environment variable.
var roles = map[string]func() int{
	"confined": confinedRole,
	"terminal": terminalRole,
}

const roleVariable = "USERNET_TEST_ROLE"

func TestMain(m *testing.M) {
	if isGuard(os.Args) {
		os.Exit(guardMain())
	}
	if role := roles[os.Getenv(roleVariable)]; role != nil {
		os.Exit(role())
	}
	os.Exit(m.Run())
}
