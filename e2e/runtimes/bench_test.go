package runtimes

import (
	"os/exec"
	"slices"
	"testing"
	"time"
)

// BenchmarkPodmanRun measures podman run with a command that ends at once, with usernet and with the distribution's slirp4netns in
// turn, so that both have the same machine. The metrics are the medians of the whole command, in milliseconds.
//
//	make bench-podman
func BenchmarkPodmanRun(b *testing.B) {
	if missing != "" {
		b.Skip(missing)
	}
	real, err := exec.LookPath("slirp4netns")
	if err != nil {
		b.Skip("slirp4netns is not installed, so there is nothing to compare with")
	}
	ways := map[string][]string{
		"none":        {"--network", "none"},
		"usernet":     {"--network", "slirp4netns"},
		"slirp4netns": {"--network", "slirp4netns"},
	}
	took := map[string][]float64{}
	once := func(name, program string) {
		start := time.Now()
		args := append([]string{"podman", "--network-cmd-path", program, "run", "--rm"}, ways[name]...)
		if out, err := lab.try("user", append(args, image, "true")...); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
		took[name] = append(took[name], float64(time.Since(start).Microseconds())/1000)
	}
	for turn := 0; b.Loop(); turn++ {
		// The order changes, so that neither always comes after the same.
		if turn%2 == 0 {
			once("usernet", bin+"/usernet")
			once("slirp4netns", real)
		} else {
			once("slirp4netns", real)
			once("usernet", bin+"/usernet")
		}
		once("none", real)
	}
	for name, all := range took {
		slices.Sort(all)
		b.ReportMetric(all[len(all)/2], name+"-ms")
	}
}
