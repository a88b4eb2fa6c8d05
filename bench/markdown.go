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
		r.table(&b, fmt.Sprintf("MTU %d", mtu), "usernet", mtu, func(a *axis) bool { return a.route == outbound })
	}
	for _, mtu := range r.MTUs {
		r.table(&b, fmt.Sprintf("Between members of a network, MTU %d", mtu), sharedVeth, mtu, func(a *axis) bool { return a.route == among })
	}
	for _, mtu := range r.MTUs {
		r.table(&b, fmt.Sprintf("Published ports, MTU %d", mtu), "usernet", mtu, func(a *axis) bool { return a.route.published() })
	}
	r.sources(&b)
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
	fmt.Fprintf(b, "- Medians of %d samples of %s (round trips half of it, floods a quarter), in turns; in parentheses min and max. Bulk TCP by iperf3, in whole seconds; "+
		"the rest by bench's own clients and servers (UDP by sendmmsg of %d and recvmmsg of %d, without UDP_SEGMENT).\n", r.Samples, r.Duration, sendBatch, recvBatch)
	fmt.Fprintf(b, "- CPU is the network process's, user and system, from /proc/PID/stat with all threads and helper processes; memory is VmRSS, summed over the same, in which pages that they share count twice; PSS counts them once.\n")
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
	fmt.Fprintf(b, "## Targets: %d of %d met\n\n| target | measured | beside its best sample | | raised to |\n|---|---|---|---|---|\n", met, len(r.Targets))
	for _, v := range r.Targets {
		word, raised := "**missed**", ""
		if v.Met {
			word = "met"
		}
		if v.Raise != 0 {
			raised = short(v.Raise)
		}
		fmt.Fprintf(b, "| %s | %s | %s | %s | %s |\n", v.Target, short(v.Value), short(v.Strict), word, raised)
	}
	b.WriteByte('\n')
}

// columns are the contenders that have something at this MTU in the axes that are in.
func (r *report) columns(mtu int, in func(*axis) bool) []string {
	var names []string
	for _, name := range contenderNames() {
		if slices.ContainsFunc(r.Rows, func(row *row) bool {
			return row.MTU == mtu && row.Contender == name && len(row.Foreign) > 0 && in(axisNamed(row.Axis))
		}) {
			names = append(names, name)
		}
	}
	return names
}

// table has the axes that are in; whose figures are set beside the others' is own.
func (r *report) table(b *strings.Builder, title, own string, mtu int, in func(*axis) bool) {
	columns := r.columns(mtu, in)
	if len(columns) == 0 {
		return
	}
	fmt.Fprintf(b, "## %s\n\n| axis | unit |", title)
	for _, c := range columns {
		fmt.Fprintf(b, " %s |", c)
	}
	fmt.Fprintf(b, " %s ÷ best peer | %s ÷ limit |\n|---|---|", own, own)
	b.WriteString(strings.Repeat("---|", len(columns)+2))
	b.WriteByte('\n')
	for _, a := range axes {
		if !in(a) {
			continue
		}
		for _, m := range a.metrics {
			cells, any := make([]string, 0, len(columns)), false
			for _, c := range columns {
				cell := "–"
				if row := r.find(a.name, mtu, c); row != nil && row.Figures[m.unit] != nil {
					f := row.Figures[m.unit]
					cell = m.cell(f)
					any = true
				}
				cells = append(cells, cell)
			}
			if !any {
				continue
			}
			is := r.median(a.name, mtu, own, m)
			best, value := r.bestPeer(a.name, mtu, m)
			if m == sourceKept {
				is = math.NaN() // yes or no is no ratio
			}
			fmt.Fprintf(b, "| %s | %s | %s | %s | %s |\n", a.name, m.unit, strings.Join(cells, " | "),
				times(ratio(is, value), " "+best), times(ratio(is, r.limit(a.name, mtu, m)), ""))
		}
	}
	b.WriteString("\nThe limit is veth, and of what does not cross it bridge or loopback. The axes:\n\n")
	for _, a := range axes {
		if in(a) && slices.ContainsFunc(r.Rows, func(row *row) bool { return row.MTU == mtu && row.Axis == a.name }) {
			fmt.Fprintf(b, "- %s: %s\n", a.name, a.title)
		}
	}
	b.WriteByte('\n')
}

// cell is a figure in a table.
func (m metric) cell(f *figure) string {
	if m != sourceKept {
		return fmt.Sprintf("%s (%s–%s)", short(f.Median), short(f.Min), short(f.Max))
	}
	switch {
	case f.Min == 1:
		return "yes"
	case f.Max == 0:
		return "no"
	}
	return "not always"
}

// sources is whom a server in the container sees.
func (r *report) sources(b *strings.Builder) {
	var names []string
	seen := map[[3]string]sighting{}
	for _, s := range r.Sightings {
		seen[[3]string{s.Proto, s.From, s.Contender}] = s
		if !slices.Contains(names, s.Contender) {
			names = append(names, s.Contender)
		}
	}
	if len(names) == 0 {
		return
	}
	fmt.Fprintf(b, "## The address that a published port's server sees\n\n| client | %s |\n|---|%s\n", strings.Join(names, " | "), strings.Repeat("---|", len(names)))
	for _, proto := range []string{"tcp", "udp"} {
		for _, v := range vantages {
			cells := make([]string, len(names))
			for i, name := range names {
				s, asked := seen[[3]string{proto, v.name, name}]
				switch {
				case !asked:
					cells[i] = "–"
				case s.Seen == "":
					cells[i] = "no connection"
				case s.Kept:
					cells[i] = "its own"
				case s.Seen == s.Client:
					cells[i] = "its own, another port"
				default:
					cells[i] = s.Seen
				}
			}
			fmt.Fprintf(b, "| %s, %s | %s |\n", strings.ToUpper(proto), v.name, strings.Join(cells, " | "))
		}
	}
	b.WriteString("\nA client on the host's loopback that keeps its address is one of the container's own loopback to the server.\n\n")
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
