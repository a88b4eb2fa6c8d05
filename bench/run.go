package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	// maxRepeats is how often a sample is taken again because of foreign load.
	maxRepeats = 2
	// repeatShare is how many of all samples are repeated, so that a busy machine does not double the time of a run: there repeats
	// are worth no more than what they repeat.
	repeatShare = 0.1
	// maxErrors is how many samples of an axis a contender may fail before it is left out of the axis, and how many
	// times in a row a peer may fail to start before it is left out of the rest.
	maxErrors = 2
)

// A runner takes the samples.
type runner struct {
	options
	lab      *lab
	progress io.Writer
	begin    time.Time
	report   *report
	peers    []*peer
	limits   []string
	live     map[string]*instance // by the peer's name
	failed   map[string]int       // starts in a row, by the peer's name
	sighted  map[string]bool      // whose clients' addresses are known, by the peer's name
	done     int
	total    int
	repeated int
}

// run measures all that o asks for, and writes the report: also of what there is when it was interrupted.
func run(ctx context.Context, o options, l *lab) error {
	r := &runner{options: o, lab: l, progress: os.Stderr, begin: time.Now(), live: map[string]*instance{}, failed: map[string]int{}, sighted: map[string]bool{}}
	for _, a := range []*agent{l.host, l.outside} {
		if err := startEcho(ctx, a); err != nil {
			return err
		}
	}
	r.report = newReport(o, l)
	if err := r.choose(); err != nil {
		return err
	}
	if err := r.quietBefore(ctx); err != nil {
		return err
	}
	err := r.sample(ctx)
	r.stopAll()
	r.report.Interrupted = ctx.Err() != nil
	r.report.Seconds = time.Since(r.begin).Seconds()
	if len(r.report.Rows) == 0 {
		return errors.Join(err, ctx.Err(), errors.New("nothing was measured: see -help for the names of axes and contenders"))
	}
	err = errors.Join(err, r.report.write(o.out))
	if err == nil {
		r.summary()
	}
	return err
}

// summary says in a few lines what the files say in many.
func (r *runner) summary() {
	met := 0
	for _, v := range r.report.Targets {
		if v.Met {
			met++
			continue
		}
		fmt.Fprintf(r.progress, "missed: %s, measured %s\n", v.Target, short(v.Value))
	}
	fmt.Fprintf(r.progress, "%d of %d targets met; written: %s\n", met, len(r.report.Targets), r.out)
}

func (r *runner) wanted(name string) bool {
	return r.options.peers == nil || slices.Contains(r.options.peers, name)
}

// choose decides who takes part, and says who does not.
func (r *runner) choose() error {
	for _, p := range peers {
		if !r.wanted(p.name) || r.quick && p.thorough && r.options.peers == nil {
			continue
		}
		if err := p.present(r.lab); err != nil {
			r.report.leaveOut(p.name, err.Error())
			fmt.Fprintf(r.progress, "left out: %s: %v\n", p.name, err)
			continue
		}
		r.peers = append(r.peers, p)
		r.report.Versions[p.name] = p.version(r.lab)
		if !p.among && !p.publishes(r.lab) {
			r.report.leaveOut(p.name+", published ports", "it has none, or they are not measured")
		}
	}
	for _, name := range limits {
		if r.wanted(name) && (!r.quick || name == limitVeth || r.options.peers != nil) {
			r.limits = append(r.limits, name)
		}
	}
	if len(r.peers)+len(r.limits) == 0 {
		return errors.New("no contender is left")
	}
	return nil
}

// quietBefore notes what others do while we do nothing.
func (r *runner) quietBefore(ctx context.Context) error {
	watch, err := watchForeign()
	if err != nil {
		return err
	}
	select {
	case <-time.After(time.Second):
	case <-ctx.Done():
		return ctx.Err()
	}
	if r.report.ForeignBefore, err = watch.share(); err != nil {
		return err
	}
	fmt.Fprintf(r.progress, "congestion control %s; others use %.0f %% of the machine's CPU\n", r.lab.cc, 100*r.report.ForeignBefore)
	if r.report.ForeignBefore > r.foreign {
		fmt.Fprintf(r.progress, "the machine is busy: samples will be repeated, and figures are worth little\n")
	}
	return nil
}

// A turn is an axis and who takes part in it.
type turn struct {
	axis  *axis
	mtu   int
	peers []*peer
}

// turns of one MTU, in the order of axes. first: it is the MTU of those that do not depend on it.
func (r *runner) turns(mtu int, first bool) []turn {
	var ts []turn
	for _, a := range axes {
		if r.only != nil && !r.only.MatchString(a.name) || r.quick && !a.quick || !first && (!a.everyMTU || r.quick && a.route == among) {
			continue
		}
		t := turn{axis: a, mtu: mtu}
		for _, p := range r.peers {
			if r.takes(p, a) {
				t.peers = append(t.peers, p)
			}
		}
		if len(t.peers)+r.limitsIn(t) > 0 {
			ts = append(ts, t)
		}
	}
	return ts
}

// takes tells whether a peer takes part in an axis.
func (r *runner) takes(p *peer, a *axis) bool {
	switch {
	case a.route == among:
		return p.among
	case p.among:
		return a.members && p.outward && !r.quick
	case a.route == outbound:
		return p.plain
	}
	return p.publishes(r.lab) && (a.proto == "tcp" || !p.streams)
}

// sample goes through MTUs, and in each through the axes: peers live as long as their kind of axis lasts.
func (r *runner) sample(ctx context.Context) error {
	for i, mtu := range r.mtus {
		for _, t := range r.turns(mtu, i == 0) {
			r.total += r.samples * (len(t.peers) + r.limitsIn(t))
		}
	}
	for i, mtu := range r.mtus {
		published := false
		for _, t := range r.turns(mtu, i == 0) {
			if is := t.axis.route.published(); is != published || t.axis.fresh {
				r.stopAll()
				published = is
			}
			if err := r.takeTurns(ctx, t); err != nil {
				return err
			}
		}
		r.stopAll()
	}
	return nil
}

func (r *runner) limitsIn(t turn) int {
	n := 0
	for _, name := range r.limits {
		if takesPart(name, t.axis) {
			n++
		}
	}
	return n
}

// takesPart: the cable is no limit of what does not cross it, and of what does the loopback is one that is asked after for
// bulk data only.
func takesPart(limit string, a *axis) bool {
	switch {
	case a.fresh || a.route == among: // whose limit is a bridge
		return false
	case a.route == fromHost:
		return limit == limitLoopback
	case limit == limitLoopback:
		return slices.Contains(a.metrics, cpuGiB)
	}
	return true
}

// settled: of publishing many ports one sample says enough when it takes longer than slow and is not usernet's.
func (r *runner) settled(t turn, p *peer) bool {
	const slow = 5 // seconds
	return t.axis.many && !ours(p.name) && r.report.median(t.axis.name, t.mtu, p.name, addSeconds) > slow
}

// takeTurns samples one axis, A B C A B C.
func (r *runner) takeTurns(ctx context.Context, t turn) error {
	for i := range r.samples {
		for _, p := range t.peers {
			if r.settled(t, p) {
				r.done++
				continue
			}
			r.one(ctx, t, i, p.name, func() (*contender, error) {
				in, err := r.instance(ctx, p, t)
				if err != nil {
					return nil, err
				}
				return in.contender(r.lab, p, t.axis.route), nil
			})
			if t.axis.fresh {
				r.stop(p.name)
			}
		}
		for _, name := range r.limits {
			if takesPart(name, t.axis) {
				r.one(ctx, t, i, name, func() (*contender, error) { return r.lab.limit(name, t.axis.route), nil })
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// instance is the peer's running one, or a new one.
func (r *runner) instance(ctx context.Context, p *peer, t turn) (*instance, error) {
	if in := r.live[p.name]; in != nil {
		return in, nil
	}
	var publish []forward
	switch {
	case t.axis.many && p.manage == nil:
		publish = manyForwards()
	case t.axis.many:
		publish = []forward{}
	case t.axis.route.published():
		publish = p.forwards()
	}
	in, err := p.start(ctx, r.lab, t.mtu, publish)
	if err != nil {
		if r.failed[p.name]++; r.failed[p.name] == maxErrors {
			r.report.leaveOut(p.name+", from "+t.axis.name+" on", "it does not start: "+clip(err.Error()))
		}
		return nil, err
	}
	r.failed[p.name] = 0
	r.live[p.name] = in
	if err := startEcho(ctx, in.container); err != nil || len(publish) == 0 || t.axis.many || r.sighted[p.name] {
		return in, err
	}
	r.sighted[p.name] = true
	seen, err := in.sightings(ctx, r.lab, p)
	r.report.Sightings = append(r.report.Sightings, seen...)
	return in, err
}

func (r *runner) stop(name string) {
	if in := r.live[name]; in != nil {
		delete(r.live, name)
		in.stop()
	}
}

func (r *runner) stopAll() {
	for _, p := range r.peers {
		r.stop(p.name)
	}
}

// one takes a sample, again while others disturb it, of which the least disturbed counts.
func (r *runner) one(ctx context.Context, t turn, i int, name string, make func() (*contender, error)) {
	row := r.report.row(t.axis, t.mtu, name)
	r.done++
	if ctx.Err() != nil || len(row.Errors) >= maxErrors || r.failed[name] >= maxErrors {
		return
	}
	repeats := maxRepeats
	if r.quick || float64(r.repeated) > repeatShare*float64(r.total) {
		repeats = 0 // the time of a run is promised
	}
	var best map[string]float64
	foreign := math.Inf(1)
	for try := 0; try <= repeats && foreign > r.foreign; try++ {
		if try > 0 {
			row.Repeated++
			r.repeated++
			if t.axis.fresh {
				r.stop(name)
			}
		}
		values, share, err := r.observe(ctx, t, make)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			why := clip(err.Error())
			row.Errors = append(row.Errors, why)
			fmt.Fprintf(r.progress, "%s %s: %s\n", t.axis.name, name, why)
			r.stop(name) // the next sample gets one that is new
			return
		}
		if share < foreign {
			best, foreign = values, share
		}
	}
	row.add(best, foreign)
	var said []string
	for _, m := range t.axis.metrics {
		if v, ok := best[m.unit]; ok && !math.IsNaN(v) {
			said = append(said, short(v)+" "+m.unit)
		}
	}
	mark := ""
	if foreign > r.foreign {
		mark = fmt.Sprintf("  (others: %.0f %% CPU)", 100*foreign)
	}
	fmt.Fprintf(r.progress, "%3d %% %5s  %-17s mtu %-5d %d/%d  %-11s %s%s\n", 100*r.done/max(r.total, 1),
		time.Since(r.begin).Round(time.Second), t.axis.name, t.mtu, i+1, r.samples, name, strings.Join(said, "  "), mark)
}

// observe measures once, and what others did meanwhile.
func (r *runner) observe(ctx context.Context, t turn, make func() (*contender, error)) (map[string]float64, float64, error) {
	// A load that hangs is an error of the contender's, not the end of bench.
	ctx, cancel := context.WithTimeout(ctx, r.duration+40*time.Second)
	defer cancel()
	c, err := make()
	if err != nil {
		return nil, 0, err
	}
	watch, err := watchForeign()
	if err != nil {
		return nil, 0, err
	}
	values, err := t.axis.measure(ctx, c, max(r.duration/t.axis.part, minDuration))
	if err != nil {
		return nil, 0, err
	}
	share, err := watch.share()
	return values, share, err
}

// clip keeps the end of what a peer said, which has the reason.
func clip(s string) string {
	const most = 300
	if len(s) > most {
		s = "… " + strings.ToValidUTF8(s[len(s)-most:], "")
	}
	return strings.ReplaceAll(s, "\n", " ")
}
