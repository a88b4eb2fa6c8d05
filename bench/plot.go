package main

import (
	"fmt"
	"math"
	"path/filepath"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// A chart is bars: a group for each axis, a bar for each contender, as high as the median, with a line from min to max.
type chart struct {
	file, title string
	metric      metric
	mtu         int // 0: the first
	axes        []string
}

func (r *report) charts() []chart {
	var cs []chart
	bulk := []string{"tcp-out-1", "tcp-in-1", "tcp-out-8", "tcp-in-8"}
	for _, mtu := range r.MTUs {
		cs = append(cs,
			chart{fmt.Sprintf("tcp-%d", mtu), fmt.Sprintf("TCP at MTU %d", mtu), gbits, mtu, bulk},
			chart{fmt.Sprintf("tcp-cpu-%d", mtu), fmt.Sprintf("CPU of the network process at MTU %d", mtu), cpuGiB, mtu, bulk})
	}
	cs = append(cs,
		chart{"members", "TCP between members of a network", gbits, 0, []string{"member-1", "member-8"}},
		chart{"members-roundtrips", "Round trips between members of a network", perSecond, 0, []string{"member-rr"}})
	trips := []string{"tcp-rr", "tcp-crr", "udp-rr"}
	floods := []string{"udp-out-64", "udp-out-1400", "udp-in-64", "udp-in-1400"}
	steady := []string{"udp-steady-out-64", "udp-steady-out-1400", "udp-steady-in-64", "udp-steady-in-1400"}
	publishedTrips := []string{"pub-lo-rr", "pub-lo-crr", "pub-lo-udp-rr", "pub-net-rr", "pub-net-crr", "pub-net-udp-rr"}
	publishedFloods := []string{"pub-lo-udp-in-1400", "pub-lo-udp-out-1400",
		"pub-net-udp-in-64", "pub-net-udp-in-1400", "pub-net-udp-out-64", "pub-net-udp-out-1400"}
	return append(cs,
		chart{"roundtrips", "Round trips and connections", perSecond, 0, trips},
		chart{"latency-p50", "Latency, median", p50, 0, trips},
		chart{"latency-p99", "Latency, 99th percentile", p99, 0, trips},
		chart{"udp", "UDP datagrams that arrive", perSecond, 0, floods},
		chart{"udp-cpu", "CPU of the network process for a datagram", cpuOp, 0, floods},
		chart{"udp-steady", fmt.Sprintf("UDP loss at %d a second", steadyRate), lossPart, 0, steady},
		chart{"published-lo", "Published ports, clients on the host's loopback", gbits, 0, []string{"pub-lo-in-1", "pub-lo-out-1", "pub-lo-in-8", "pub-lo-out-8"}},
		chart{"published-net", "Published ports, clients from outside", gbits, 0, []string{"pub-net-in-1", "pub-net-out-1", "pub-net-in-8", "pub-net-out-8"}},
		chart{"published-cpu", "Published ports: CPU of the network process", cpuGiB, 0, []string{"pub-lo-in-1", "pub-lo-out-1", "pub-net-in-1", "pub-net-out-1"}},
		chart{"published-roundtrips", "Published ports: round trips and connections", perSecond, 0, publishedTrips},
		chart{"published-p50", "Published ports: latency, median", p50, 0, publishedTrips},
		chart{"published-p99", "Published ports: latency, 99th percentile", p99, 0, publishedTrips},
		chart{"published-udp", "Published ports: UDP datagrams that arrive", perSecond, 0, publishedFloods},
		chart{"published-many", fmt.Sprintf("%d ports published", manyPorts), addSeconds, 0, []string{"pub-many"}},
		chart{"memory", "Memory when idle, without and with a way to publish ports", idleMiB, 0, []string{"rss-tcp", "pub-many"}},
		chart{"memory-conn", "Memory of an idle TCP connection", kibConn, 0, []string{"rss-tcp"}},
		chart{"memory-flow", "Memory of a UDP flow", kibFlow, 0, []string{"rss-udp"}},
		chart{"startup", "From exec to ready", readyMS, 0, []string{"startup"}})
}

// plots writes an SVG for each chart that there is something to draw in.
func (r *report) plots(dir string) error {
	for _, c := range r.charts() {
		if err := c.draw(r, filepath.Join(dir, c.file+".svg")); err != nil {
			return fmt.Errorf("draw %s: %w", c.file, err)
		}
	}
	return nil
}

func (c chart) draw(r *report, file string) error {
	var labels []string
	for _, a := range c.axes {
		for _, name := range contenderNames() {
			if !math.IsNaN(r.median(a, c.mtu, name, c.metric)) {
				labels = append(labels, a)
				break
			}
		}
	}
	if len(labels) == 0 {
		return nil
	}
	var names []string
	var bars []plotter.Values
	var spreads [][]*figure
	for _, name := range contenderNames() {
		values, figures, any := make(plotter.Values, len(labels)), make([]*figure, len(labels)), false
		for i, a := range labels {
			if v := r.median(a, c.mtu, name, c.metric); !math.IsNaN(v) {
				values[i], any = v, true
				figures[i] = r.find(a, c.mtu, name).Figures[c.metric.unit]
			}
		}
		if any {
			names, bars, spreads = append(names, name), append(bars, values), append(spreads, figures)
		}
	}
	p := plot.New()
	p.Title.Text, p.Y.Label.Text = c.title, c.metric.unit
	p.Legend.Top = true
	width := vg.Points(14)
	for i, values := range bars {
		bar, err := plotter.NewBarChart(values, width)
		if err != nil {
			return err
		}
		bar.LineStyle.Width = 0
		bar.Color = plotutil.Color(i)
		bar.Offset = width * vg.Length(float64(i)-float64(len(bars)-1)/2)
		p.Add(bar, spread{spreads[i], bar.Offset})
		p.Legend.Add(names[i], bar)
	}
	p.NominalX(labels...)
	p.Y.Min = 0
	if p.Y.Max == 0 {
		p.Y.Max = 1 // nothing was lost by anybody
	}
	// The legend has the room of a group and a half beside the bars.
	group := max(width*vg.Length(len(bars))+vg.Points(30), vg.Points(80))
	p.X.Min, p.X.Max = -0.5, float64(len(labels))+1
	return p.Save(group*vg.Length(float64(len(labels))+1.5)+vg.Points(50), vg.Points(260), file)
}

// A spread draws the lines from min to max on the bars of a contender.
type spread struct {
	figures []*figure // by group; nil: none
	offset  vg.Length
}

func (s spread) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	for i, f := range s.figures {
		if f != nil {
			at := x(float64(i)) + s.offset
			c.StrokeLine2(plotter.DefaultLineStyle, at, y(f.Min), at, y(f.Max))
		}
	}
}

// DataRange makes room for the maxima.
func (s spread) DataRange() (xmin, xmax, ymin, ymax float64) {
	for _, f := range s.figures {
		if f != nil {
			ymax = max(ymax, f.Max)
		}
	}
	return 0, float64(len(s.figures) - 1), 0, ymax
}
