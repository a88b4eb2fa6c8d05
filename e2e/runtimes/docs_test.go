package runtimes

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

var (
	fenced  = regexp.MustCompile("(?s)```sh\n(.*?)```\n")
	expects = regexp.MustCompile(`(?m)\s+# (\S.*)$`) // what a line prints, behind it
)

// TestDocs runs the fenced blocks of docs/podman.md in their order, as one who pastes them does. What a line is said to print must be
// printed by its block.
func TestDocs(t *testing.T) {
	page, err := os.ReadFile("../../docs/podman.md")
	if err != nil {
		t.Fatal(err)
	}
	eachPodman(t, func(t *testing.T, p *podman) {
		const conf = home + "/.config/containers"
		p.user(t, "cp", conf+"/containers.conf", conf+"/kept")
		t.Cleanup(func() {
			p.user(t, "mv", conf+"/kept", conf+"/containers.conf")
			p.user(t, "rm", "-r", conf+"/containers.conf.d")
			p.do(t, "rmi", "busybox")
		})
		// Only the page is to say which program it is. And there is no registry that busybox could come from.
		p.user(t, "sed", "-i", "/network_cmd/d", conf+"/containers.conf")
		p.do(t, "tag", image, "localhost/busybox")
		blocks := fenced.FindAllSubmatch(page, -1)
		if len(blocks) < 5 {
			t.Fatalf("%d blocks were found", len(blocks))
		}
		expected := 0
		for _, b := range blocks {
			// The program lies elsewhere in the lab.
			script := strings.ReplaceAll(string(b[1]), "/usr/local/bin", bin)
			got := p.user(t, "bash", "-euo", "pipefail", "-c", script)
			for _, want := range expects.FindAllStringSubmatch(script, -1) {
				expected++
				if !strings.Contains(got, want[1]) {
					t.Errorf("%q is not printed by\n%s\nbut\n%s", want[1], script, got)
				}
			}
		}
		if expected < 5 {
			t.Errorf("the page says of %d lines what they print", expected)
		}
	})
}
