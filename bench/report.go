package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A report is all that a run found.
type report struct {
	Date           string            `json:"date"`
	Seconds        float64           `json:"seconds"`
	Kernel         string            `json:"kernel"`
	CPU            string            `json:"cpu"`
	CPUs           int               `json:"cpus"`
	Go             string            `json:"go"`
	Congestion     string            `json:"congestion_control"`
	CongestionNote string            `json:"congestion_control_note,omitempty"`
	Home           string            `json:"peers_run_as"`
	Samples        int               `json:"samples"`
	Duration       string            `json:"duration"`
	MTUs           []int             `json:"mtus"`
	Quick          bool              `json:"quick"`
	Interrupted    bool              `json:"interrupted"`
	ForeignBefore  float64           `json:"foreign_before"` // share of the machine's CPU
	ForeignLimit   float64           `json:"foreign_limit"`
	Versions       map[string]string `json:"versions"`
	LeftOut        []string          `json:"left_out,omitempty"`
	Rows           []*row            `json:"rows"`
	Sightings      []sighting        `json:"sightings,omitempty"`
	Targets        []verdict         `json:"targets,omitempty"`
}

// A row is one contender in one axis.
type row struct {
	Axis      string             `json:"axis"`
	MTU       int                `json:"mtu"`
	Contender string             `json:"contender"`
	Figures   map[string]*figure `json:"figures"` // by unit
	Foreign   []float64          `json:"foreign"` // share of the machine's CPU, of each sample
	Repeated  int                `json:"repeated"`
	Errors    []string           `json:"errors,omitempty"`
}

func newReport(o options, l *lab) *report {
	var uts unix.Utsname
	kernel := "unknown"
	if unix.Uname(&uts) == nil {
		kernel = unix.ByteSliceToString(uts.Release[:])
	}
	home := "an ordinary user"
	if !l.root {
		home = "an ordinary user, in a user namespace"
		if l.home == nil {
			home = "root of a user namespace"
		}
	}
	return &report{
		Date: time.Now().UTC().Format(time.RFC3339), Kernel: kernel, CPU: cpuModel(), CPUs: runtime.NumCPU(), Go: runtime.Version(),
		Congestion: l.cc, CongestionNote: l.ccWhy, Home: home,
		Samples: o.samples, Duration: o.duration.String(), MTUs: o.mtus, Quick: o.quick, ForeignLimit: o.foreign,
		Versions: map[string]string{},
	}
}

func cpuModel() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func (r *report) leaveOut(who, why string) { r.LeftOut = append(r.LeftOut, who+": "+why) }

// row finds or makes one.
func (r *report) row(a *axis, mtu int, contender string) *row {
	if found := r.find(a.name, mtu, contender); found != nil {
		return found
	}
	made := &row{Axis: a.name, MTU: mtu, Contender: contender, Figures: map[string]*figure{}}
	r.Rows = append(r.Rows, made)
	return made
}

// find returns nil when it was not measured. MTU 0 is the first one.
func (r *report) find(axis string, mtu int, contender string) *row {
	for _, row := range r.Rows {
		if row.Axis == axis && row.Contender == contender && (mtu == 0 || row.MTU == mtu) {
			return row
		}
	}
	return nil
}

// add takes a sample. A value that is NaN there is none of.
func (r *row) add(values map[string]float64, foreign float64) {
	for unit, v := range values {
		if math.IsNaN(v) {
			continue
		}
		if r.Figures[unit] == nil {
			r.Figures[unit] = &figure{}
		}
		r.Figures[unit].add(v)
	}
	r.Foreign = append(r.Foreign, foreign)
}

// median is NaN when it was not measured.
func (r *report) median(axis string, mtu int, contender string, m metric) float64 {
	if row := r.find(axis, mtu, contender); row != nil && row.Figures[m.unit] != nil {
		return row.Figures[m.unit].Median
	}
	return math.NaN()
}

// best is the best sample, or NaN.
func (r *report) best(axis string, mtu int, contender string, m metric) float64 {
	row := r.find(axis, mtu, contender)
	if row == nil || row.Figures[m.unit] == nil {
		return math.NaN()
	}
	if m.more {
		return row.Figures[m.unit].Max
	}
	return row.Figures[m.unit].Min
}

// bestPeer is the best median of those that are neither usernet's nor a limit's, and whose it is.
func (r *report) bestPeer(axis string, mtu int, m metric) (string, float64) {
	name, best := "", math.NaN()
	for _, row := range r.Rows {
		if row.Axis != axis || row.MTU != mtu || ours(row.Contender) || isLimit(row.Contender) {
			continue
		}
		v := r.median(axis, mtu, row.Contender, m)
		if !math.IsNaN(v) && (math.IsNaN(best) || m.more == (v > best)) {
			name, best = row.Contender, v
		}
	}
	return name, best
}

// limit is the median of the cable, or where the cable is not crossed of the bridge or the loopback.
func (r *report) limit(axis string, mtu int, m metric) float64 {
	for _, name := range []string{limitVeth, limitBridge} {
		if v := r.median(axis, mtu, name, m); !math.IsNaN(v) {
			return v
		}
	}
	return r.median(axis, mtu, limitLoopback, m)
}

// compare notes what usernet's figures are beside others'.
func (r *report) compare() {
	number := func(v float64) *float64 {
		if math.IsNaN(v) {
			return nil
		}
		return &v
	}
	for _, row := range r.Rows {
		for _, m := range allMetrics {
			if f := row.Figures[m.unit]; f != nil && ours(row.Contender) {
				_, best := r.bestPeer(row.Axis, row.MTU, m)
				f.ToPeer, f.ToLimit = number(ratio(f.Median, best)), number(ratio(f.Median, r.limit(row.Axis, row.MTU, m)))
			}
		}
	}
}

// write puts the report into dir in every form.
func (r *report) write(dir string) error {
	r.compare()
	r.Targets = nil
	for _, t := range targets {
		if v, ok := t.judge(r); ok {
			r.Targets = append(r.Targets, v)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "results.json"), append(text, '\n'), 0o644),
		os.WriteFile(filepath.Join(dir, "results.txt"), []byte(r.benchLines()), 0o644),
		os.WriteFile(filepath.Join(dir, "results.md"), []byte(r.markdown()), 0o644),
		r.plots(dir))
}

// benchLines are in the format of Go's benchmarks: benchstat -col /peer results.txt.
func (r *report) benchLines() string {
	var b strings.Builder
	fmt.Fprintf(&b, "goos: %s\ngoarch: %s\npkg: usernet/bench\ncpu: %s\n", runtime.GOOS, runtime.GOARCH, r.CPU)
	for _, m := range allMetrics {
		better := "lower"
		if m.more {
			better = "higher"
		}
		fmt.Fprintf(&b, "Unit %s better=%s\n", m.unit, better)
	}
	for _, row := range r.Rows {
		a := axisNamed(row.Axis)
		for i := range row.Foreign {
			fmt.Fprintf(&b, "BenchmarkNetwork/axis=%s/mtu=%d/peer=%s 1", row.Axis, row.MTU, row.Contender)
			for _, m := range a.metrics {
				if f := row.Figures[m.unit]; f != nil && i < len(f.Values) {
					fmt.Fprintf(&b, " %s %s", short(f.Values[i]), m.unit)
				}
			}
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// short writes a figure with four digits that count.
func short(v float64) string {
	if a := math.Abs(v); a >= 1000 || v == math.Trunc(v) {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.4g", v)
}
