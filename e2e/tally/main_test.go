package main

import (
	"strings"
	"testing"
)

func TestTotals(t *testing.T) {
	for _, c := range []struct {
		name, in                string
		passed, failed, skipped int
		shows                   string
	}{
		{"one of each", `{"Action":"output","Package":"p","Test":"TestB","Output":"why\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"fail","Package":"p","Test":"TestB"}
{"Action":"skip","Package":"p","Test":"TestC"}
{"Action":"fail","Package":"p"}
`, 1, 1, 1, "why"},
		{"a package that does not build", `{"ImportPath":"p","Action":"build-output","Output":"syntax error\n"}
{"ImportPath":"p","Action":"build-fail"}
{"Action":"fail","Package":"p"}
`, 0, 1, 0, "syntax error"},
		{"a leak after the tests", `{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Output":"goroutine left\n"}
{"Action":"fail","Package":"p"}
`, 1, 1, 0, "goroutine left"},
		{"a panic in a test", `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"panic: x\n"}
{"Action":"fail","Package":"p"}
`, 0, 1, 0, "panic: x"},
		{"the same package twice", `{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"fail","Package":"p"}
{"Action":"fail","Package":"p"}
`, 0, 2, 0, ""},
		{"no test files", `{"Action":"skip","Package":"p"}` + "\n", 0, 0, 0, ""},
		{"not JSON", "go: cannot find module\n", 0, 0, 0, "cannot find module"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			got := &tally{out: &out, output: map[string][]string{}, failedTests: map[string]int{}}
			if err := got.read(strings.NewReader(c.in)); err != nil {
				t.Fatal(err)
			}
			if got.passed != c.passed || got.failed != c.failed || got.skipped != c.skipped {
				t.Errorf("%d passed, %d failed, %d skipped; want %d, %d, %d",
					got.passed, got.failed, got.skipped, c.passed, c.failed, c.skipped)
			}
			if !strings.Contains(out.String(), c.shows) {
				t.Errorf("printed %q, without %q", out.String(), c.shows)
			}
		})
	}
}
