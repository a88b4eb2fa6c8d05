package main

import (
	"fmt"
	"math"
)

// A target is what usernet has set out to reach: a ratio of medians of one run, or a bound.
type target struct {
	axis   string
	metric metric
	mtu    int     // 0: whichever was measured first
	than   string  // a peer, or ownBestMTU, or "" for a bound
	value  float64 // at least, of what is better when it is more; else at most
}

// ownBestMTU compares with usernet itself at MTU 65520.
const ownBestMTU = "usernet at MTU 65520"

// easily is how far beyond a target a figure is when the target should be raised: beside the other's best sample too, since
// a peer that stalls in most of them sets no mark.
const easily = 1.5

var targets = func() []target {
	var ts []target
	add := func(axis string, m metric, mtu int, than string, value float64) {
		ts = append(ts, target{axis, m, mtu, than, value})
	}
	for _, n := range []string{"1", "8"} {
		add("tcp-out-"+n, gbits, 65520, "slirp4netns", 2)
		add("tcp-out-"+n, gbits, 1500, "slirp4netns", 10)
		add("tcp-out-"+n, gbits, 65520, "pasta", 1)
		add("tcp-out-"+n, gbits, 1500, "pasta", 1)
		add("tcp-in-"+n, gbits, 65520, "slirp4netns", 1.8)
		add("tcp-in-"+n, gbits, 1500, "slirp4netns", 4)
		add("tcp-in-"+n, gbits, 65520, "pasta", 0.66)
		add("tcp-in-"+n, gbits, 1500, "pasta", 8)
		add("tcp-out-"+n, gbits, 1500, ownBestMTU, 0.85)
		add("tcp-in-"+n, gbits, 1500, ownBestMTU, 0.85)
		add("tcp-out-"+n, cpuGiB, 65520, "slirp4netns", 0.6)
		add("tcp-in-"+n, cpuGiB, 65520, "slirp4netns", 0.95)
	}
	add("tcp-rr", perSecond, 0, "slirp4netns", 1)
	add("tcp-crr", perSecond, 0, "slirp4netns", 1)
	for _, way := range []string{"out", "in"} {
		for _, size := range []string{"64", "1400"} {
			add("udp-"+way+"-"+size, perSecond, 0, "slirp4netns", 2)
			add("udp-"+way+"-"+size, perSecond, 0, "pasta", 1.5)
		}
	}
	for _, way := range []string{"out", "in"} {
		for _, size := range []string{"64", "1400"} {
			add("udp-steady-"+way+"-"+size, lossPart, 0, "slirp4netns", 1)
		}
	}
	add("rss-tcp", idleMiB, 0, "", 16)
	add("rss-tcp", kibConn, 0, "", 16)
	add("rss-udp", kibFlow, 0, "", 3)
	add("startup", readyMS, 0, "", 50)
	return ts
}()

// A verdict is a target beside what was measured.
type verdict struct {
	Target string  `json:"target"`
	Value  float64 `json:"value"`
	Strict float64 `json:"beside_its_best_sample"` // the same, with the other's best sample instead of its median
	Bound  float64 `json:"bound"`
	Met    bool    `json:"met"`
	Raise  bool    `json:"raise"` // passed easily
}

func (t target) String() string {
	sign := "≤"
	if t.metric.more {
		sign = "≥"
	}
	mtu := ""
	if t.mtu != 0 {
		mtu = fmt.Sprintf(" at MTU %d", t.mtu)
	}
	if t.than == "" {
		return fmt.Sprintf("%s%s: %s %s %s", t.axis, mtu, t.metric.unit, sign, short(t.value))
	}
	return fmt.Sprintf("%s%s: %s %s %s × %s", t.axis, mtu, t.metric.unit, sign, short(t.value), t.than)
}

// judge compares; ok is false when a side was not measured.
func (t target) judge(r *report) (v verdict, ok bool) {
	v = verdict{Target: t.String(), Bound: t.value}
	own := r.median(t.axis, t.mtu, "usernet", t.metric)
	v.Strict = math.NaN()
	switch t.than {
	case "":
		v.Value = own
	case ownBestMTU:
		v.Value = ratio(own, r.median(t.axis, 65520, "usernet", t.metric))
	default:
		other := r.median(t.axis, t.mtu, t.than, t.metric)
		v.Value = ratio(own, other)
		if other == 0 { // no loss must be met by no loss
			v.Value = own
			v.Bound = 0
		} else {
			v.Strict = ratio(own, r.best(t.axis, t.mtu, t.than, t.metric))
		}
	}
	if math.IsNaN(v.Value) {
		return v, false
	}
	if math.IsNaN(v.Strict) {
		v.Strict = v.Value
	}
	if t.metric.more {
		v.Met, v.Raise = v.Value >= v.Bound, min(v.Value, v.Strict) >= v.Bound*easily
	} else {
		v.Met, v.Raise = v.Value <= v.Bound, v.Bound > 0 && max(v.Value, v.Strict) <= v.Bound/easily
	}
	return v, true
}
