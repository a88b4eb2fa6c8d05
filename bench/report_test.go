package main

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// sampleReport is a small run with all that a report can have.
func sampleReport() *report {
	r := &report{
		Date: "2026-01-02T03:04:05Z", Seconds: 61, Kernel: "6.1", CPU: "Some CPU", CPUs: 2, Go: "go1",
		Congestion: "cubic", Home: "an ordinary user", Samples: 3, Duration: time.Second.String(), MTUs: []int{65520, 1500},
		ForeignBefore: 0.01, ForeignLimit: 0.05, Versions: map[string]string{"usernet": "usernet 1", "slirp4netns": "slirp4netns 1.2"},
	}
	r.leaveOut("pasta", "not installed (Debian's passt)")
	add := func(axis string, mtu int, who string, m metric, values ...float64) {
		row := r.row(axisNamed(axis), mtu, who)
		for _, v := range values {
			row.add(map[string]float64{m.unit: v, cpuGiB.unit: math.NaN()}, 0.02)
		}
	}
	add("tcp-out-1", 65520, "usernet", gbits, 12, 13, 14)
	add("tcp-out-1", 65520, "slirp4netns", gbits, 6, 5, 4)
	add("tcp-out-1", 65520, "veth", gbits, 26, 26, 26)
	add("tcp-out-1", 1500, "usernet", gbits, 10, 10, 10)
	add("tcp-out-1", 1500, "slirp4netns", gbits, 1.1, 1, 1.2)
	add("tcp-rr", 65520, "usernet", perSecond, 8000)
	add("tcp-rr", 65520, "slirp4netns", perSecond, 10000)
	add("udp-steady-in-64", 65520, "usernet", lossPart, 0.25)
	add("udp-steady-in-64", 65520, "slirp4netns", lossPart, 0)
	add("rss-tcp", 65520, "usernet", idleMiB, 10)
	add("pub-lo-in-1", 65520, "pasta", gbits, 17, 16, 15)
	add("pub-net-in-1", 65520, "usernet", gbits, 24, 25, 23)
	add("pub-net-in-1", 65520, "usernet", sourceKept, 1, 1, 1)
	add("pub-net-in-1", 65520, "usernet-stack", gbits, 12)
	add("pub-net-in-1", 65520, "pasta", gbits, 8)
	add("pub-net-in-1", 65520, "pasta", sourceKept, 1, 0)
	add("pub-net-in-1", 65520, "veth", gbits, 48)
	add("pub-lo-crr", 65520, "usernet", perSecond, 2900)
	add("tcp-out-1", 65520, sharedVeth, gbits, 12, 12, 13)
	add("member-1", 65520, sharedVeth, gbits, 30, 34, 32)
	add("member-1", 65520, sharedTAP, gbits, 10, 4, 4.5)
	add("member-1", 65520, limitBridge, gbits, 40, 41, 39)
	r.Sightings = []sighting{
		{Contender: "usernet", Proto: "tcp", From: vantages[0].name, Client: outsideAddr, Seen: outsideAddr, Kept: true},
		{Contender: "pasta", Proto: "tcp", From: vantages[0].name, Client: outsideAddr, Seen: outsideAddr},
		{Contender: "pasta", Proto: "udp", From: vantages[4].name, Client: "127.0.0.1", Seen: hostAddr},
		{Contender: "pasta", Proto: "udp", From: vantages[5].name},
	}
	slow := r.row(axisNamed("tcp-rr"), 65520, "veth")
	slow.Errors = append(slow.Errors, "not one round trip:\ntimed out")
	slow.Repeated = 2
	return r
}

func TestGoldenReport(t *testing.T) {
	r := sampleReport()
	dir := t.TempDir()
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"results.txt", "results.md", "results.json"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(got), "\ngoarch: "+goarch()+"\n", "\ngoarch: ARCH\n")
		golden := filepath.Join("testdata", name+".golden")
		if *update {
			if err := os.WriteFile(golden, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if text != string(want) {
			t.Errorf("%s is not as in %s (make golden):\n%s", name, golden, text)
		}
	}
	for _, name := range []string{"tcp-65520.svg", "tcp-1500.svg", "roundtrips.svg", "udp-steady.svg", "members.svg"} {
		if text, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !strings.Contains(string(text), "</svg>") {
			t.Errorf("%s: %d octets, %v", name, len(text), err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "published-udp.svg")); err == nil {
		t.Error("there is a chart of what was not measured")
	}
}

func goarch() string {
	text := sampleReport().benchLines()
	_, after, _ := strings.Cut(text, "goarch: ")
	arch, _, _ := strings.Cut(after, "\n")
	return arch
}

func TestJudge(t *testing.T) {
	r := sampleReport()
	for _, c := range []struct {
		target
		value      float64
		met        bool
		raise      float64
		unmeasured bool
	}{
		{target: target{axis: "tcp-out-1", metric: gbits, mtu: 65520, than: "slirp4netns", value: 2}, value: 2.6, met: true},
		{target: target{axis: "tcp-out-1", metric: gbits, mtu: 65520, than: "slirp4netns", value: 1}, value: 2.6, met: true, raise: 1.8},
		{target: target{axis: "tcp-out-1", metric: gbits, mtu: 65520, than: "slirp4netns", value: 1.6}, value: 2.6, met: true}, // beside its best it is 2.17
		{target: target{axis: "tcp-out-1", metric: gbits, mtu: 1500, than: ownBestMTU, value: 0.85}, value: 10.0 / 13},
		{target: target{axis: "tcp-rr", metric: perSecond, mtu: 0, than: "slirp4netns", value: 1}, value: 0.8},
		{target: target{axis: "udp-steady-in-64", metric: lossPart, mtu: 0, than: "slirp4netns", value: 1}, value: 0.25}, // it lost none
		{target: target{axis: "rss-tcp", metric: idleMiB, mtu: 0, than: "", value: 16}, value: 10, met: true, raise: 12},
		{target: target{axis: "rss-tcp", metric: idleMiB, mtu: 0, than: "", value: 9}, value: 10},
		{target: target{axis: "pub-net-in-1", metric: gbits, than: "pasta", value: 1.3, other: "pub-lo-in-1"}, value: 24.0 / 16, met: true},
		{target: target{axis: "pub-lo-crr", metric: perSecond, than: "", value: 300}, value: 2900, met: true, raise: 2500},
		{target: target{axis: "pub-net-in-1", metric: sourceKept, than: "", value: 1}, value: 1, met: true},
		{target: target{axis: "member-1", metric: gbits, than: limitBridge, value: 0.8, who: sharedVeth}, value: 0.8, met: true},
		{target: target{axis: "member-1", metric: gbits, value: 5, who: sharedTAP}, value: 4.5},
		{target: target{axis: "tcp-out-1", metric: gbits, than: "usernet", value: 0.95, who: sharedVeth}, value: 12.0 / 13},
		{target: target{axis: "member-1", metric: gbits, value: 5}, unmeasured: true}, // usernet itself has no members
		{target: target{axis: "tcp-rr", metric: perSecond, mtu: 0, than: "pasta", value: 1}, unmeasured: true},
		{target: target{axis: "rss-tcp", metric: kibConn, mtu: 0, than: "", value: 16}, unmeasured: true},
	} {
		v, ok := c.judge(r)
		if ok == c.unmeasured {
			t.Errorf("%v: measured %v", c.target, ok)
		} else if ok && (math.Abs(v.Value-c.value) > 1e-9 || v.Met != c.met || math.Abs(v.Raise-c.raise) > 1e-9) {
			t.Errorf("%v: %+v", c.target, v)
		}
	}
}

// A figure that a target is raised to is one that was reached, to two digits.
func TestTwoDigits(t *testing.T) {
	for _, c := range []struct{ v, down, up float64 }{
		{0, 0, 0}, {1.999, 1.9, 2}, {0.5, 0.5, 0.5}, {0.01234, 0.012, 0.013}, {13.9, 13, 14}, {45678, 45000, 46000}, {99.9, 99, 100},
	} {
		if down, up := twoDigits(c.v, math.Floor), twoDigits(c.v, math.Ceil); math.Abs(down-c.down) > 1e-12 || math.Abs(up-c.up) > 1e-12 {
			t.Errorf("%v: %v, %v", c.v, down, up)
		}
	}
}

// Every target and every chart speaks of an axis that there is, and of a metric that it has.
func TestNames(t *testing.T) {
	check := func(what, axis string, m metric) {
		a := axisNamed(axis)
		if a == nil {
			t.Errorf("%s: no axis %s", what, axis)
			return
		}
		for _, has := range a.metrics {
			if has == m {
				return
			}
		}
		t.Errorf("%s: %s has no %s", what, axis, m.unit)
	}
	for _, g := range targets {
		check(g.String(), g.axis, g.metric)
		if g.other != "" {
			check(g.String(), g.other, g.metric)
		}
		if g.than != "" && g.than != ownBestMTU && !known(g.than) {
			t.Errorf("%v: who is %s?", g, g.than)
		}
		if g.who != "" && !(known(g.who) && ours(g.who)) {
			t.Errorf("%v: %s is not usernet", g, g.who)
		}
	}
	for _, c := range sampleReport().charts() {
		for _, a := range c.axes {
			check(c.file, a, c.metric)
		}
	}
	seen := map[string]bool{}
	for _, a := range axes {
		if a.part < 1 {
			t.Errorf("%s has no duration", a.name)
		}
		if seen[a.name] {
			t.Errorf("two axes are %s", a.name)
		}
		seen[a.name] = true
	}
}
