// Tally reads the output of any number of `go test -json` runs, prints what a person wants to see of
// it, and closes with "N passed, N failed, N skipped". It fails when a test failed, when none ran,
// and, with CI=true, when one was skipped: on the CI machine nothing is missing.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

// An event is a line of `go test -json` (go doc test2json).
type event struct {
	Action, Package, Test, Output string
	ImportPath                    string // of a build event
	Elapsed                       float64
}

type tally struct {
	out                     io.Writer
	passed, failed, skipped int
	output                  map[string][]string // of tests that run, by package and name
	failedTests             map[string]int      // failed tests of each running package
}

func main() {
	t := &tally{out: os.Stdout, output: map[string][]string{}, failedTests: map[string]int{}}
	if err := t.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "tally:", err)
		os.Exit(1)
	}
	fmt.Printf("%d passed, %d failed, %d skipped\n", t.passed, t.failed, t.skipped)
	if t.failed > 0 || t.passed == 0 || os.Getenv("CI") == "true" && t.skipped > 0 {
		os.Exit(1)
	}
}

func (t *tally) read(r io.Reader) error {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			t.line(line)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (t *tally) line(line string) {
	var e event
	if json.Unmarshal([]byte(line), &e) != nil {
		fmt.Fprint(t.out, line) // the go command's own words
		return
	}
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output":
		t.output[key] = append(t.output[key], e.Output)
	case "build-output":
		fmt.Fprint(t.out, e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			t.endPackage(e)
		} else {
			t.endTest(e)
		}
		delete(t.output, key)
	}
}

func (t *tally) endTest(e event) {
	switch e.Action {
	case "pass":
		t.passed++
		return
	case "fail":
		t.failed++
		t.failedTests[e.Package]++
	case "skip":
		t.skipped++
	}
	fmt.Fprintf(t.out, "--- %s: %s %s (%.1fs)\n%s", strings.ToUpper(e.Action), e.Package, e.Test, e.Elapsed,
		strings.Join(t.output[e.Package+" "+e.Test], ""))
}

// endPackage counts a package that failed without a failed test of its own: it did not build, or it
// left something behind after its tests.
func (t *tally) endPackage(e event) {
	defer delete(t.failedTests, e.Package)
	if e.Action == "skip" {
		return // no test files
	}
	fmt.Fprintf(t.out, "%-4s %s (%.1fs)\n", e.Action, e.Package, e.Elapsed)
	if e.Action != "fail" {
		return
	}
	fmt.Fprint(t.out, strings.Join(t.output[e.Package+" "], ""))
	for key, output := range t.output {
		// Tests that were running when the package died, by a panic or its time limit.
		if strings.HasPrefix(key, e.Package+" ") && key != e.Package+" " {
			fmt.Fprintf(t.out, "--- UNFINISHED: %s\n%s", key, strings.Join(output, ""))
			delete(t.output, key)
		}
	}
	if t.failedTests[e.Package] == 0 {
		t.failed++
	}
}
