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
	than   string  // a contender, or ownBestMTU, or "" for a bound
	value  float64 // at least, of what is better when it is more; else at most
	other  string  // than's axis, where it is another
	who    string  // of usernet's contenders; "" means usernet
}

// ownBestMTU compares with usernet itself at MTU 65520.
const ownBestMTU = "usernet at MTU 65520"

const (
	// easily is how far beyond a target a figure is when the target should be raised: beside the other's best sample too, since
	// a peer that stalls in most of them sets no mark.
	easily = 1.5
	// noise is how much better than what it is raised to a figure must have been, so that the next run meets it too.
	noise = 1.15
)

var targets = func() []target {
	var ts []target
	add := func(axis string, m metric, mtu int, than string, value float64) {
		ts = append(ts, target{axis: axis, metric: m, mtu: mtu, than: than, value: value})
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
		for _, way := range []string{"out", "in"} {
			add("tcp-"+way+"-"+n, gbits, 65520, "gvisor-tap-vsock", 1)
			add("tcp-"+way+"-"+n, gbits, 1500, "gvisor-tap-vsock", 1)
		}
		add("tcp-out-"+n, gbits, 1500, ownBestMTU, 0.85)
		add("tcp-in-"+n, gbits, 1500, ownBestMTU, 0.85)
		add("tcp-out-"+n, cpuGiB, 65520, "slirp4netns", 0.6)
		add("tcp-in-"+n, cpuGiB, 65520, "slirp4netns", 0.95)
	}
	add("tcp-rr", perSecond, 0, "slirp4netns", 1)
	add("tcp-crr", perSecond, 0, "slirp4netns", 1)
	add("tcp-rr", perSecond, 0, "gvisor-tap-vsock", 1)
	add("tcp-crr", perSecond, 0, "gvisor-tap-vsock", 1)
	for _, way := range []string{"out", "in"} {
		for _, size := range []string{"64", "1400"} {
			add("udp-"+way+"-"+size, perSecond, 0, "slirp4netns", 2)
			add("udp-"+way+"-"+size, perSecond, 0, "pasta", 1.5)
			add("udp-"+way+"-"+size, perSecond, 0, "gvisor-tap-vsock", 1)
		}
	}
	for _, way := range []string{"out", "in"} {
		for _, size := range []string{"64", "1400"} {
			add("udp-steady-"+way+"-"+size, lossPart, 0, "slirp4netns", 1)
			add("udp-steady-"+way+"-"+size, lossPart, 0, "pasta", 1)
		}
	}
	add("rss-tcp", idleMiB, 0, "", 16)
	add("rss-tcp", kibConn, 0, "", 16)
	add("rss-udp", kibFlow, 0, "", 3)
	add("startup", readyMS, 0, "", 50)

	// Published ports, by the kernel path. pasta joins sockets by splice for clients on the loopback only, and that is the mark
	// for clients from outside as well.
	for _, where := range []string{"pub-lo-", "pub-net-"} {
		for _, load := range []string{"in-1", "out-1", "in-8", "out-8"} {
			ts = append(ts, target{axis: where + load, metric: gbits, than: "pasta", value: 1.3, other: "pub-lo-" + load})
			add(where+load, gbits, 0, "rootlesskit", 2.5)
			add(where+load, gbits, 0, limitLoopback, 0.6)
		}
		add(where+"rr", perSecond, 0, "pasta", 1)
		add(where+"crr", perSecond, 0, "pasta", 0.8)
		add(where+"crr", perSecond, 0, "", 3000)
	}
	for _, load := range []string{"in-1", "udp-in-1400"} {
		add("pub-net-"+load, sourceKept, 0, "", 1)
	}
	add("pub-many", bothSeconds, 0, "", 2)

	// Members of a network. Frames between veths are the kernel's alone, and what it may lose is the way to usernet's own port of the bridge.
	// Of a way out the bridge is a small part: a tenth is what it may cost.
	members := func(who, axis string, mtu int, than string, value float64) {
		ts = append(ts, target{axis: axis, metric: gbits, mtu: mtu, than: than, value: value, who: who})
	}
	for _, mtu := range []int{65520, 1500} {
		members(sharedVeth, "member-1", mtu, limitBridge, 0.8)
		members(sharedTAP, "member-1", mtu, "", 5)
		members(sharedVeth, "tcp-out-1", mtu, "usernet", 0.9)
		members(sharedVeth, "tcp-in-1", mtu, "usernet", 0.9)
	}
	members(sharedVeth, "member-8", 0, limitBridge, 0.8)
	members(sharedTAP, "member-8", 0, "", 5)
	return ts
}()

// A verdict is a target beside what was measured.
type verdict struct {
	Target string  `json:"target"`
	Value  float64 `json:"value"`
	Strict float64 `json:"beside_its_best_sample"` // the same, with the other's best sample instead of its median
	Bound  float64 `json:"bound"`
	Met    bool    `json:"met"`
	Raise  float64 `json:"raise_to,omitempty"` // what to set out for next, where it was passed easily
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
	axis := t.axis
	if t.who != "" {
		axis = t.who + " in " + axis
	}
	if t.than == "" {
		return fmt.Sprintf("%s%s: %s %s %s", axis, mtu, t.metric.unit, sign, short(t.value))
	}
	than := t.than
	if t.other != "" && t.other != t.axis {
		than += " in " + t.other
	}
	return fmt.Sprintf("%s%s: %s %s %s × %s", axis, mtu, t.metric.unit, sign, short(t.value), than)
}

// judge compares; ok is false when a side was not measured.
func (t target) judge(r *report) (v verdict, ok bool) {
	v = verdict{Target: t.String(), Bound: t.value}
	who := t.who
	if who == "" {
		who = "usernet"
	}
	own := r.median(t.axis, t.mtu, who, t.metric)
	v.Strict = math.NaN()
	switch t.than {
	case "":
		v.Value = own
	case ownBestMTU:
		v.Value = ratio(own, r.median(t.axis, 65520, who, t.metric))
	default:
		axis := t.axis
		if t.other != "" {
			axis = t.other
		}
		other := r.median(axis, t.mtu, t.than, t.metric)
		v.Value = ratio(own, other)
		if other == 0 && t.metric == lossPart { // no loss must be met by no loss; no CPU is a sample that was too short
			v.Value = own
			v.Bound = 0
		} else {
			v.Strict = ratio(own, r.best(axis, t.mtu, t.than, t.metric))
		}
	}
	if math.IsNaN(v.Value) {
		return v, false
	}
	if math.IsNaN(v.Strict) {
		v.Strict = v.Value
	}
	if t.metric.more {
		v.Met = v.Value >= v.Bound
		if least := min(v.Value, v.Strict); least >= v.Bound*easily {
			v.Raise = twoDigits(least/noise, math.Floor)
		}
	} else {
		v.Met = v.Value <= v.Bound
		if most := max(v.Value, v.Strict); v.Bound > 0 && most <= v.Bound/easily {
			v.Raise = twoDigits(most*noise, math.Ceil)
		}
	}
	return v, true
}

// twoDigits rounds to two digits that count.
func twoDigits(v float64, round func(float64) float64) float64 {
	if v == 0 {
		return 0
	}
	digits := 1 - int(math.Floor(math.Log10(math.Abs(v))))
	if digits < 0 { // a power of ten that is whole, so that nothing is lost by it
		unit := math.Pow10(-digits)
		return round(v/unit) * unit
	}
	return round(v*math.Pow10(digits)) / math.Pow10(digits)
}
