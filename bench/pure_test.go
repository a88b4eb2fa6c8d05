package main

import (
	"context"
	"errors"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestFigure(t *testing.T) {
	for _, c := range []struct {
		values           []float64
		median, min, max float64
	}{
		{[]float64{7}, 7, 7, 7},
		{[]float64{3, 1}, 2, 1, 3},
		{[]float64{9, 1, 5}, 5, 1, 9},
		{[]float64{4, 1, 3, 100, 2}, 3, 1, 100},
	} {
		var f figure
		for _, v := range c.values {
			f.add(v)
		}
		if f.Median != c.median || f.Min != c.min || f.Max != c.max || !slices.Equal(f.Values, c.values) {
			t.Errorf("%v: %+v", c.values, f)
		}
	}
	if r := ratio(6, 3); r != 2 {
		t.Errorf("6/3 = %v", r)
	}
	for _, r := range []float64{ratio(1, 0), ratio(math.NaN(), 1), ratio(1, math.NaN())} {
		if !math.IsNaN(r) {
			t.Errorf("a ratio that says nothing is %v", r)
		}
	}
}

func TestTrips(t *testing.T) {
	n := 0
	r, err := trips(context.Background(), 20*time.Millisecond, func(int) error {
		if n++; n%2 == 0 {
			return errors.New("lost")
		}
		return nil
	})
	if err != nil || r.Count+r.Failed != n || r.Failed > r.Count || r.P99 < r.P50 || r.Seconds <= 0 {
		t.Errorf("%d trips: %+v, %v", n, r, err)
	}
	lost := errors.New("lost")
	if _, err := trips(context.Background(), time.Minute, func(int) error { return lost }); !errors.Is(err, lost) {
		t.Errorf("trips that all fail end with %v", err)
	}
}

func TestParseIperf(t *testing.T) {
	for _, c := range []struct {
		file string
		want transfer
		bad  bool
	}{
		{file: "iperf-out-1.json", want: transfer{Octets: 2616328192, Seconds: 1.000384, Retransmits: 3}},
		{file: "iperf-in-8.json", want: transfer{Octets: 2458910720, Seconds: 1.001542, Retransmits: 12}},
		{file: "iperf-refused.json", bad: true},
	} {
		text, err := os.ReadFile(filepath.Join("testdata", c.file))
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseIperf(text)
		if got != c.want || (err != nil) != c.bad {
			t.Errorf("%s: %+v, %v", c.file, got, err)
		}
	}
	for _, text := range []string{"", "{}", `{"end":{"sum_received":{"seconds":1,"bytes":0}}}`} {
		if _, err := parseIperf([]byte(text)); err == nil {
			t.Errorf("%q is taken for a report", text)
		}
	}
}

// The fields of what iperf3 prints here are those that parseIperf reads.
func TestAssumeIperf(t *testing.T) {
	if _, err := exec.LookPath("iperf3"); err != nil {
		t.Skip("iperf3 is not installed")
	}
	ctx, cancel := context.WithCancel(t.Context())
	ready := make(chan struct{})
	release := make(chan struct{})
	ended := make(chan error)
	const port = 15201
	go func() {
		_, err := opIperfServer(ctx, iperfParams{Port: port, Timeout: 20 * time.Second}, func() { close(ready) }, release)
		ended <- err
	}()
	defer cancel()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	out, err := opRun(ctx, runParams{Args: []string{"iperf3", "-c", "127.0.0.1", "-p", "15201", "-J", "-n", "16M"}, Timeout: 10 * time.Second}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	// Fewer octets than were asked for is no error: the receiver stops counting when the sender is done. Nor are a block or two more, of
	// 128 KiB: the sender may count late.
	if moved, err := parseIperf([]byte(out.(runResult).Stdout)); err != nil || moved.Octets <= 0 || moved.Octets > 17<<20 {
		t.Errorf("%+v, %v", moved, err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestParseStat(t *testing.T) {
	s, err := parseStat([]byte("42 (a (b) c) S 7 42 42 0 -1 4194560 1 2 3 4 100 20 3 1 20 0 1 0 5 6 7\n"))
	if want := (stat{pid: 42, parent: 7, cpu: 1240 * time.Millisecond}); err != nil || s != want {
		t.Errorf("%+v, %v", s, err)
	}
	for _, bad := range []string{"", "42", "42 (x) S 7", "42 )x( S 7", "x (y) S 7 42 42 0 -1 0 1 2 3 4 1 2 3 4", "1 (y) S 7 42 42 0 -1 0 1 2 3 4 one 2 3 4"} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q is taken for a stat", bad)
		}
	}
	if n, err := parseRSS([]byte("Name:\tx\nVmRSS:\t    2048 kB\n")); n != 2<<20 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := parseKiB([]byte("Rss:                2048 kB\nPss:                1024 kB\nPss_Dirty:   7 kB\n"), "Pss:"); n != 1<<20 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if d, err := parseStolen([]byte("cpu  1 2 3 4 5 6 7 250 0 0\ncpu0 1\n")); d != 2500*time.Millisecond || err != nil {
		t.Errorf("%v, %v", d, err)
	}
}

func TestAccounts(t *testing.T) {
	all := map[int]stat{
		1: {1, 0, 1}, 2: {2, 0, 10}, 3: {3, 2, 100}, // init, kthreadd and a kernel thread
		10: {10, 1, 1000}, 11: {11, 10, 10000}, 12: {12, 11, 100000}, 20: {20, 1, 1000000},
	}
	if tree := below(all, 10); len(tree) != 3 || !tree[10] || !tree[11] || !tree[12] {
		t.Errorf("below 10 are %v", tree)
	}
	if cpu := othersCPU(all, 10); cpu != 1000001 {
		t.Errorf("others used %d", cpu)
	}
	// A child of ours is in the account until it is excepted.
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	// Once it has answered it has all its memory.
	if _, err := in.Write([]byte{'\n'}); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	with, err := account{roots: []int{os.Getpid()}}.processes()
	if _, there := with[cmd.Process.Pid]; err != nil || !there {
		t.Errorf("the child is not in %v, %v", with, err)
	}
	without, err := account{roots: []int{os.Getpid()}, except: []int{cmd.Process.Pid}}.processes()
	if _, there := without[cmd.Process.Pid]; err != nil || there || len(without) == 0 {
		t.Errorf("the child is in %v, %v", without, err)
	}
	if rss, err := (account{roots: []int{cmd.Process.Pid}}).rss(); err != nil || rss == 0 {
		t.Errorf("cat has %d octets, %v", rss, err)
	}
	// cat shares its pages with nobody, or with other cats.
	rss, err := account{roots: []int{cmd.Process.Pid}}.rss()
	if err != nil {
		t.Fatal(err)
	}
	if pss, err := (account{roots: []int{cmd.Process.Pid}}).pss(); err != nil || pss <= 0 || pss > float64(rss) {
		t.Errorf("cat's share is %v of %d octets, %v", pss, rss, err)
	}
	if _, err := (account{roots: []int{1 << 30}}).cpu(); err == nil {
		t.Error("the CPU of nobody is known")
	}
	if cpu, err := (account{}).cpu(); cpu != 0 || err != nil {
		t.Errorf("a limit used %v, %v", cpu, err)
	}
}

// The loads meet each other over lo, without a lab.
func TestLoads(t *testing.T) {
	ready, release, ended := make(chan struct{}), make(chan struct{}), make(chan error)
	const port = 15301
	go func() {
		_, err := opEcho(t.Context(), echoParams{TCP: []uint16{port}, UDP: []uint16{port}}, func() { close(ready) }, release)
		ended <- err
	}()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	p := rrParams{Addr: loopbackIP, Ports: []uint16{port}, Duration: 20 * time.Millisecond}
	for name, f := range map[string]func() (any, error){
		"tcp-rr":  func() (any, error) { return opTCPRR(t.Context(), p, nil, nil) },
		"tcp-crr": func() (any, error) { return opTCPCRR(t.Context(), p, nil, nil) },
		"udp-rr":  func() (any, error) { return opUDPRR(t.Context(), p, nil, nil) },
	} {
		if r, err := f(); err != nil || r.(rrResult).Count == 0 {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
	let := make(chan struct{})
	if _, err := opTCPHold(t.Context(), holdParams{To: netip.AddrPortFrom(loopbackIP, port), Count: 20}, func() { close(let) }, let); err != nil {
		t.Error(err)
	}
	close(release)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := opTCPRR(t.Context(), p, nil, nil); err == nil {
		t.Error("the server answers after its end")
	}
}

// All that is sent arrives, whichever side listens: it is no more than the smallest receive buffer holds, so that
// a receiver that is not run loses nothing.
func TestFlood(t *testing.T) {
	base := floodParams{Run: 99, Size: 100, Duration: 100 * time.Millisecond, Rate: 1000}
	const port = 15401
	listen, to := base, base
	listen.Listen, to.To = port, netip.AddrPortFrom(loopbackIP, port)
	for _, way := range []string{"out", "in"} {
		recv, send := listen, to
		if way == "in" {
			recv, send = to, listen
		}
		ready := make(chan struct{})
		results := make(chan any, 1)
		first, second := opUDPRecv, opUDPSend
		firstParams, secondParams := recv, send
		if way == "in" {
			first, second = second, first
			firstParams, secondParams = secondParams, firstParams
		}
		go func() {
			r, err := first(t.Context(), firstParams, func() { close(ready) }, nil)
			if err != nil {
				t.Error(way, err)
			}
			results <- r
		}()
		<-ready
		b, err := second(t.Context(), secondParams, func() {}, nil)
		if err != nil {
			t.Fatal(way, err)
		}
		a := <-results
		if way == "in" {
			a, b = b, a
		}
		r, _ := a.(received)
		s, _ := b.(sent)
		if s.Count == 0 || r.Count != s.Count || r.Octets != int64(r.Count)*100 || r.Buffer == 0 {
			t.Errorf("%s: sent %+v, received %+v", way, s, r)
		}
		if most := int(s.Seconds*1000) + sendBatch; s.Count > most {
			t.Errorf("%s: %d were sent where %d were due", way, s.Count, most)
		}
	}
}

// A member is found by its name, and one that has another cable than it should is not measured.
func TestParseMember(t *testing.T) {
	text := []byte(`{"name": "bench", "members": [
		{"name": "client", "ipv4": "10.89.0.2", "cable": "veth"}, {"name": "server", "ipv4": "10.89.0.3", "cable": "tap"}]}`)
	if addr, err := parseMember(text, "server", onTAP); err != nil || addr != netip.MustParseAddr("10.89.0.3") {
		t.Errorf("%v, %v", addr, err)
	}
	for _, bad := range []struct{ text, name, cable string }{
		{string(text), "server", onVeth}, {string(text), "other", onVeth}, {`{"members": []}`, "client", onVeth}, {"no network", "client", onVeth},
	} {
		if addr, err := parseMember([]byte(bad.text), bad.name, bad.cable); err == nil {
			t.Errorf("%+v: %v", bad, addr)
		}
	}
}

// Members take part between themselves and in three ways out, and nobody else between them.
func TestTakes(t *testing.T) {
	published := func(*lab) bool { return true }
	for _, c := range []struct {
		p     peer
		quick bool
		takes []string
	}{
		{p: peer{among: true, outward: true}, takes: []string{"tcp-out-1", "tcp-in-1", "tcp-rr", "member-1", "member-8", "member-rr"}},
		{p: peer{among: true, outward: true}, quick: true, takes: []string{"member-1", "member-8", "member-rr"}},
		{p: peer{among: true}, takes: []string{"member-1", "member-8", "member-rr"}},
		{p: peer{publishes: published, streams: true}, takes: []string{"pub-lo-in-1", "pub-lo-out-1", "pub-lo-in-8", "pub-lo-out-8", "pub-lo-rr", "pub-lo-crr",
			"pub-net-in-1", "pub-net-out-1", "pub-net-in-8", "pub-net-out-8", "pub-net-rr", "pub-net-crr"}},
	} {
		r := runner{options: options{quick: c.quick}}
		var takes []string
		for _, a := range axes {
			if r.takes(&c.p, a) {
				takes = append(takes, a.name)
			}
			for _, l := range limits {
				if a.route == among && takesPart(l, a) {
					t.Errorf("%s is a limit of %s", l, a.name)
				}
			}
		}
		if !slices.Equal(takes, c.takes) {
			t.Errorf("%+v: %v", c.p, takes)
		}
	}
}
