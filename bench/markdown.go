package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// markdown is the report for people: conditions, targets, then a table for each MTU.
func (r *report) markdown() string {
	var b strings.Builder
	b.WriteString("# Benchmarks\n\n")
	r.conditions(&b)
	r.verdicts(&b)
	for _, mtu := range r.MTUs {
		r.table(&b, mtu)
	}
	r.troubles(&b)
	return b.String()
}

func (r *report) conditions(b *strings.Builder) {
	fmt.Fprintf(b, "- %s, %.0f s; Linux %s; %d × %s; %s\n", r.Date, r.Seconds, r.Kernel, r.CPUs, r.CPU, r.Go)
	for _, name := range contenderNames() {
		if v := r.Versions[name]; v != "" {
			fmt.Fprintf(b, "- %s: %s\n", name, v)
		}
	}
	fmt.Fprintf(b, "- Congestion control of every namespace: %s", r.Congestion)
	if r.CongestionNote != "" {
		fmt.Fprintf(b, " (%s)", r.CongestionNote)
	}
	fmt.Fprintf(b, "\n- Peers and containers are run by %s.\n", r.Home)
	fmt.Fprintf(b, "- Medians of %d samples of %s, in turns; in parentheses min and max. Bulk TCP by iperf3, in whole seconds; the rest by bench's own clients "+
		"and servers (UDP by sendmmsg of %d and recvmmsg of %d, without UDP_SEGMENT).\n", r.Samples, r.Duration, sendBatch, recvBatch)
	fmt.Fprintf(b, "- CPU is the network process's, user and system, from /proc/PID/stat with all threads and children; memory is VmRSS.\n")
	fmt.Fprintf(b, "- Other processes used %.1f %% of the machine's CPU before; %s\n", 100*r.ForeignBefore, r.disturbed())
	for _, s := range r.LeftOut {
		fmt.Fprintf(b, "- Left out: %s\n", s)
	}
	if r.Quick {
		b.WriteString("- This is the quick run: few and short samples, for a look and not for a claim.\n")
	}
	if r.Interrupted {
		b.WriteString("- **Interrupted**: not everything was measured.\n")
	}
	b.WriteByte('\n')
}

func (r *report) disturbed() string {
	all, bad, again := 0, 0, 0
	for _, row := range r.Rows {
		again += row.Repeated
		for _, f := range row.Foreign {
			all++
			if f > r.ForeignLimit {
				bad++
			}
		}
	}
	return fmt.Sprintf("%d of %d samples had more than %.0f %% of it taken by others, after %d repeats.", bad, all, 100*r.ForeignLimit, again)
}

func (r *report) verdicts(b *strings.Builder) {
	if len(r.Targets) == 0 {
		return
	}
	met := 0
	for _, v := range r.Targets {
		if v.Met {
			met++
		}
	}
	fmt.Fprintf(b, "## Targets: %d of %d met\n\n| target | measured | beside its best sample | |\n|---|---|---|---|\n", met, len(r.Targets))
	for _, v := range r.Targets {
		word := "**missed**"
		switch {
		case v.Raise:
			word = "met, easily: raise it"
		case v.Met:
			word = "met"
		}
		fmt.Fprintf(b, "| %s | %s | %s | %s |\n", v.Target, short(v.Value), short(v.Strict), word)
	}
	b.WriteByte('\n')
}

// columns are the contenders that have something at this MTU.
func (r *report) columns(mtu int) []string {
	var names []string
	for _, name := range contenderNames() {
		if slices.ContainsFunc(r.Rows, func(row *row) bool { return row.MTU == mtu && row.Contender == name && len(row.Foreign) > 0 }) {
			names = append(names, name)
		}
	}
	return names
}

func (r *report) table(b *strings.Builder, mtu int) {
	columns := r.columns(mtu)
	if len(columns) == 0 {
		return
	}
	fmt.Fprintf(b, "## MTU %d\n\n| axis | unit |", mtu)
	for _, c := range columns {
		fmt.Fprintf(b, " %s |", c)
	}
	b.WriteString(" usernet ÷ best peer | usernet ÷ limit |\n|---|---|")
	b.WriteString(strings.Repeat("---|", len(columns)+2))
	b.WriteByte('\n')
	for _, a := range axes {
		for _, m := range a.metrics {
			cells, any := make([]string, 0, len(columns)), false
			for _, c := range columns {
				cell := "–"
				if row := r.find(a.name, mtu, c); row != nil && row.Figures[m.unit] != nil {
					f := row.Figures[m.unit]
					cell = fmt.Sprintf("%s (%s–%s)", short(f.Median), short(f.Min), short(f.Max))
					any = true
				}
				cells = append(cells, cell)
			}
			if !any {
				continue
			}
			own := r.median(a.name, mtu, "usernet", m)
			best, value := r.bestPeer(a.name, mtu, m)
			fmt.Fprintf(b, "| %s | %s | %s | %s | %s |\n", a.name, m.unit, strings.Join(cells, " | "),
				times(ratio(own, value), " "+best), times(ratio(own, r.limit(a.name, mtu, m)), ""))
		}
	}
	b.WriteString("\nThe limit is veth, and of what does not cross it loopback. The axes:\n\n")
	for _, a := range axes {
		if slices.ContainsFunc(r.Rows, func(row *row) bool { return row.MTU == mtu && row.Axis == a.name }) {
			fmt.Fprintf(b, "- %s: %s\n", a.name, a.title)
		}
	}
	b.WriteByte('\n')
}

func times(v float64, whose string) string {
	if math.IsNaN(v) {
		return "–"
	}
	return fmt.Sprintf("%.2f×%s", v, whose)
}

func (r *report) troubles(b *strings.Builder) {
	said := false
	for _, row := range r.Rows {
		for _, e := range row.Errors {
			if !said {
				b.WriteString("## Samples that failed\n\n")
				said = true
			}
			fmt.Fprintf(b, "- %s, MTU %d, %s: %s\n", row.Axis, row.MTU, row.Contender, strings.ReplaceAll(e, "\n", " "))
		}
	}
}
