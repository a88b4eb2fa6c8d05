package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// A metric is one figure of an axis. The unit names it.
type metric struct {
	unit string
	more bool // is better
}

var (
	gbits     = metric{"Gbit/s", true}
	cpuGiB    = metric{"cpu-s/GiB", false}
	perSecond = metric{"op/s", true}
	p50       = metric{"p50-µs", false}
	p99       = metric{"p99-µs", false}
	cpuOp     = metric{"cpu-µs/op", false}
	lossPart  = metric{"loss-%", false}
	idleMiB   = metric{"idle-MiB", false}
	pssMiB    = metric{"idle-PSS-MiB", false}
	kibConn   = metric{"KiB/conn", false}
	kibFlow   = metric{"KiB/flow", false}
	readyMS   = metric{"ready-ms", false}
	// sourceKept is 1 where the server of a published port saw the client's own address and port, else 0.
	sourceKept  = metric{"source-kept", true}
	addSeconds  = metric{"add-s", false}
	listSeconds = metric{"list-s", false}
	bothSeconds = metric{"add+list-s", false}
	kibPort     = metric{"KiB/port", false}
)

var allMetrics = []metric{gbits, cpuGiB, perSecond, p50, p99, cpuOp, lossPart, sourceKept, idleMiB, pssMiB, kibConn, kibFlow, readyMS,
	addSeconds, listSeconds, bothSeconds, kibPort}

// An axis is something measured of a contender. NaN is a value that a contender does not have.
type axis struct {
	name, title string
	route       route
	everyMTU    bool // else the first MTU's figure serves
	quick       bool
	fresh       bool          // each sample with a new instance; limits have none and are left out
	members     bool          // those of shared networks take part, beside containers with networks of their own
	many        bool          // ports are published in the measurement, not before; at the start by those that cannot else
	part        time.Duration // a load lasts the duration divided by this
	proto       string        // of a published port's client: tcp, udp, or neither
	metrics     []metric
	measure     func(ctx context.Context, c *contender, d time.Duration) (map[string]float64, error)
}

const (
	idleConns = 1000
	idleFlows = 2000
	// steadyRate is one that every peer can be expected to carry without loss, in datagrams a second.
	steadyRate = 10000
	// settle is how long a process is left alone before its memory is read, and settleIdle how long before it counts as
	// idle: what only its start needed is given back by then, if ever.
	settle     = 300 * time.Millisecond
	settleIdle = 5 * time.Second
	// warmConns are opened before the others are counted, so that these do not pay for the code that all share.
	warmConns = 16
)

var axes = func() []*axis {
	all := []*axis{
		tcpAxis("tcp-out-1", outbound, 1, false, true),
		tcpAxis("tcp-in-1", outbound, 1, true, true),
		tcpAxis("tcp-out-8", outbound, 8, false, true),
		tcpAxis("tcp-in-8", outbound, 8, true, true),
		rrAxis("tcp-rr", outbound, true),
		rrAxis("tcp-crr", outbound, true),
		rrAxis("udp-rr", outbound, false),
	}
	for _, way := range []string{"out", "in"} {
		for _, size := range []int{64, 1400} {
			all = append(all, udpAxis("udp", outbound, way, size, 0))
		}
	}
	for _, way := range []string{"out", "in"} {
		for _, size := range []int{64, 1400} {
			all = append(all, udpAxis("udp-steady", outbound, way, size, steadyRate))
		}
	}
	for _, a := range all {
		a.members = slices.Contains([]string{"tcp-out-1", "tcp-in-1", "tcp-rr"}, a.name)
	}
	all = append(all,
		tcpAxis("member-1", among, 1, false, true),
		tcpAxis("member-8", among, 8, false, false),
		rrAxis("member-rr", among, true))
	for _, r := range []route{fromHost, fromAround} {
		where := map[route]string{fromHost: "pub-lo-", fromAround: "pub-net-"}[r]
		all = append(all,
			tcpAxis(where+"in-1", r, 1, false, false),
			tcpAxis(where+"out-1", r, 1, true, false),
			tcpAxis(where+"in-8", r, 8, false, false),
			tcpAxis(where+"out-8", r, 8, true, false),
			rrAxis(where+"rr", r, r == fromAround),
			rrAxis(where+"crr", r, r == fromAround),
			rrAxis(where+"udp-rr", r, false))
		for _, way := range []string{"in", "out"} {
			if r == fromAround {
				all = append(all, udpAxis(where+"udp", r, way, 64, 0))
			}
			all = append(all, udpAxis(where+"udp", r, way, 1400, 0))
		}
	}
	return append(all,
		&axis{name: "pub-many", title: fmt.Sprintf("%d ports published one after the other while it runs, and listed (pasta: at its start; one sample where it takes over 5 s)", manyPorts), route: fromHost, fresh: true, many: true, part: 1,
			metrics: []metric{addSeconds, listSeconds, bothSeconds, idleMiB, pssMiB, kibPort}, measure: measureMany},
		&axis{name: "rss-tcp", title: fmt.Sprintf("memory idle, and more for each of %d idle TCP connections", idleConns), fresh: true, quick: true, part: 1,
			metrics: []metric{idleMiB, pssMiB, kibConn}, measure: measureMemory("tcp-hold", idleConns, kibConn)},
		&axis{name: "rss-udp", title: fmt.Sprintf("memory for each of %d UDP flows", idleFlows), fresh: true, quick: true, part: 1,
			metrics: []metric{idleMiB, pssMiB, kibFlow}, measure: measureMemory("udp-hold", idleFlows, kibFlow)},
		&axis{name: "startup", title: "from exec until it says that it is ready", fresh: true, quick: true, part: 1,
			metrics: []metric{readyMS}, measure: measureStartup},
	)
}()

func axisNamed(name string) *axis {
	for _, a := range axes {
		if a.name == name {
			return a
		}
	}
	return nil
}

// String says in words what a route adds to a title.
func (r route) String() string {
	return map[route]string{outbound: "", fromHost: ", to a published port from the host's loopback", fromAround: ", to a published port from outside",
		among: ", from one member of a network to another"}[r]
}

// tcpAxis is bulk data. reverse: the server sends.
func tcpAxis(name string, r route, streams int, reverse, everyMTU bool) *axis {
	// Seen from the container, out is what it sends.
	way := "out"
	if reverse == (r == outbound) {
		way = "in"
	}
	if r == among {
		way = "bulk"
	}
	part := time.Duration(1)
	if r.published() {
		part = 2
	}
	return published("tcp", &axis{
		name: name, title: fmt.Sprintf("TCP %s, %d streams%s", way, streams, r),
		route: r, everyMTU: everyMTU, quick: streams == 1 && (everyMTU || !reverse), part: part,
		metrics: []metric{gbits, cpuGiB},
		measure: func(ctx context.Context, c *contender, d time.Duration) (map[string]float64, error) {
			var t transfer
			cpu, err := spent(c, func() (err error) {
				t, err = iperf(ctx, c, streams, reverse, d)
				return err
			})
			if err != nil {
				return nil, err
			}
			return map[string]float64{gbits.unit: t.bitsPerSecond() / 1e9, cpuGiB.unit: cpu / (t.Octets / (1 << 30))}, nil
		},
	})
}

// published adds to an axis of a published port whether the client's address arrives: it is asked before each sample.
func published(proto string, a *axis) *axis {
	if !a.route.published() {
		return a
	}
	a.proto, a.metrics = proto, append(a.metrics, sourceKept)
	measure := a.measure
	a.measure = func(ctx context.Context, c *contender, d time.Duration) (map[string]float64, error) {
		kept, err := c.keeps(ctx, proto)
		if err != nil {
			return nil, err
		}
		values, err := measure(ctx, c, d)
		if err == nil {
			values[sourceKept.unit] = kept
		}
		return values, err
	}
	return a
}

// rrAxis is round trips; a name that ends in crr makes a connection for each, and one that has udp in it is UDP.
func rrAxis(name string, r route, quick bool) *axis {
	proto, op, title := "tcp", "tcp-rr", "TCP request and response, one octet each"
	switch {
	case strings.HasSuffix(name, "crr"):
		op, title = "tcp-crr", "TCP connect, request, response, close"
	case strings.Contains(name, "udp"):
		proto, op, title = "udp", "udp-rr", "UDP request and response, one octet each"
	}
	return published(proto, &axis{
		name: name, title: title + r.String(), route: r, quick: quick, part: 2,
		metrics: []metric{perSecond, p50, p99, cpuOp},
		measure: func(ctx context.Context, c *contender, d time.Duration) (map[string]float64, error) {
			var ports []uint16
			for _, p := range echoPorts {
				ports = append(ports, c.port(p))
			}
			var rr rrResult
			cpu, err := spent(c, func() error {
				return c.client.do(ctx, op, rrParams{Addr: c.addr, Ports: ports, Duration: d}, &rr)
			})
			if err != nil {
				return nil, err
			}
			if rr.Failed*100 > rr.Count {
				return nil, fmt.Errorf("%d of %d failed", rr.Failed, rr.Failed+rr.Count)
			}
			return map[string]float64{
				perSecond.unit: float64(rr.Count) / rr.Seconds,
				p50.unit:       float64(rr.P50.Nanoseconds()) / 1e3, p99.unit: float64(rr.P99.Nanoseconds()) / 1e3,
				cpuOp.unit: cpu * 1e6 / float64(rr.Count),
			}, nil
		},
	})
}

// udpAxis is a flood from one socket to another, at a rate or as fast as the sender can.
func udpAxis(kind string, r route, way string, size, rate int) *axis {
	title := fmt.Sprintf("UDP %s, %d octets, as fast as the sender can", way, size)
	if rate > 0 {
		title = fmt.Sprintf("UDP %s, %d octets, %d a second: what is lost", way, size, rate)
	}
	return published("udp", &axis{
		name: fmt.Sprintf("%s-%s-%d", kind, way, size), title: title + r.String(), route: r, part: 4,
		quick:   r == outbound && rate == 0 && size == 1400,
		metrics: []metric{perSecond, gbits, lossPart, cpuOp},
		measure: func(ctx context.Context, c *contender, d time.Duration) (map[string]float64, error) {
			base := floodParams{Run: rand.Uint64(), Size: size, Duration: d, Rate: rate}
			near, far := base, base
			near.To, far.Listen = netip.AddrPortFrom(c.addr, c.port(floodPort)), floodPort
			var s sent
			var got received
			cpu, err := spent(c, func() error {
				// The one that listens begins.
				first, second := c.server.start, c.client.start
				firstOp, secondOp := "udp-recv", "udp-send"
				var firstResult, secondResult any = &got, &s
				if (way == "in") == (r == outbound) {
					firstOp, secondOp = secondOp, firstOp
					firstResult, secondResult = secondResult, firstResult
				}
				one := first(firstOp, far)
				if err := one.waitReady(ctx); err != nil {
					return err
				}
				two := second(secondOp, near)
				return errors.Join(two.wait(ctx, secondResult), one.wait(ctx, firstResult))
			})
			if err != nil {
				return nil, err
			}
			if got.Count < 2 || s.Count == 0 {
				return nil, fmt.Errorf("%d datagrams sent, %d arrived", s.Count, got.Count)
			}
			// A peer that hands on in lumps may deliver all at once: then the sender's time says more.
			seconds := max(got.Seconds, s.Seconds)
			return map[string]float64{
				perSecond.unit: float64(got.Count) / seconds,
				gbits.unit:     float64(got.Octets) * 8 / seconds / 1e9,
				lossPart.unit:  100 * max(0, 1-float64(got.Count)/float64(s.Count)),
				cpuOp.unit:     cpu * 1e6 / float64(got.Count),
			}, nil
		},
	})
}

// measureMemory reads a peer's memory before and while conversations are open.
func measureMemory(op string, count int, per metric) func(context.Context, *contender, time.Duration) (map[string]float64, error) {
	return func(ctx context.Context, c *contender, _ time.Duration) (map[string]float64, error) {
		idle, err := rssAfter(ctx, c, settleIdle)
		if err != nil {
			return nil, err
		}
		shared, err := c.account.pss()
		if err != nil {
			return nil, err
		}
		with := func(count int) (int64, error) {
			held := c.client.start(op, holdParams{To: netip.AddrPortFrom(c.addr, echoPorts[0]), Count: count})
			if err := held.waitReady(ctx); err != nil {
				return 0, err
			}
			rss, err := rssAfter(ctx, c, settle)
			return rss, errors.Join(err, held.release(ctx))
		}
		warm, err := with(warmConns)
		if err != nil {
			return nil, err
		}
		loaded, err := with(count)
		if err != nil {
			return nil, err
		}
		return map[string]float64{
			idleMiB.unit: float64(idle) / (1 << 20), pssMiB.unit: shared / (1 << 20), per.unit: float64(loaded-warm) / 1024 / float64(count-warmConns),
		}, nil
	}
}

func rssAfter(ctx context.Context, c *contender, d time.Duration) (int64, error) {
	select {
	case <-time.After(d):
		return c.account.rss()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func measureStartup(_ context.Context, c *contender, _ time.Duration) (map[string]float64, error) {
	return map[string]float64{readyMS.unit: c.instance.ready.Seconds() * 1e3}, nil
}

// spent is the CPU seconds that the network process used for f; NaN of a limit.
func spent(c *contender, f func() error) (float64, error) {
	before, err := c.account.cpu()
	if err != nil {
		return 0, err
	}
	if err := f(); err != nil {
		return 0, err
	}
	after, err := c.account.cpu()
	if len(c.account.roots) == 0 {
		return math.NaN(), err
	}
	return (after - before).Seconds(), err
}
