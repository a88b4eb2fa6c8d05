package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestMain lets the test binary be bench, which runs itself in the lab.
func TestMain(m *testing.M) {
	if os.Getenv(innerEnv) != "" || len(os.Args) == 2 && (os.Args[1] == agentArg || os.Args[1] == containArg) {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestParse(t *testing.T) {
	o, err := parse([]string{"-quick", "-only", "tcp", "-peers", "usernet,veth", "-mtu", "1500", "-out", "x"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if o.samples != 3 || o.duration != 500*time.Millisecond || len(o.peers) != 2 || o.mtus[0] != 1500 || !filepath.IsAbs(o.out) || !o.only.MatchString("tcp-rr") {
		t.Errorf("%+v", o)
	}
	if o, err = parse(nil, io.Discard); err != nil || o.samples != 5 || len(o.mtus) != 2 || o.peers != nil {
		t.Errorf("without flags: %+v, %v", o, err)
	}
	for _, bad := range []string{"-only=(", "-peers=nobody", "-samples=101", "-duration=1h", "-mtu=100", "-mtu=1500,", "word"} {
		if _, err := parse([]string{bad}, io.Discard); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}

// needNamespaces skips where no lab can be made.
func needNamespaces(t *testing.T) {
	t.Helper()
	if !machineRoot() {
		if out, err := exec.Command("unshare", "--user", "--net", "--mount", "true").CombinedOutput(); err != nil {
			t.Skipf("no user namespaces: %v: %s", err, out)
		}
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("iproute2 is not installed")
	}
	if f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
		t.Skipf("no TAP: %v", err)
	} else {
		f.Close()
	}
}

// labArgs are a run as short as it can be, of whom there is.
func labArgs(t *testing.T, out, only, duration string) []string {
	args := []string{"-samples", "1", "-duration", duration, "-mtu", "1500", "-only", only, "-out", out, "-foreign", "1"}
	peers := "loopback,veth,bridge"
	if bin := os.Getenv("USERNET_BIN"); bin != "" {
		args, peers = append(args, "-usernet", bin), peers+",usernet"
		if usernetPublishes(&lab{usernet: bin}) {
			peers += ",usernet-stack"
		}
		if usernetShares(&lab{usernet: bin}) == nil {
			peers += "," + sharedVeth + "," + sharedTAP + "," + sharedMixed
		}
	}
	if installed("slirp4netns", "slirp4netns")(nil) == nil {
		peers += ",slirp4netns"
	}
	t.Log("contenders:", peers)
	return append(args, "-peers", peers)
}

// nothingLeft is what to call in the end: what is below this process before and after is the same, the scratch directory is gone, and
// the congestion controls that are allowed are those that were.
func nothingLeft(t *testing.T) func() {
	t.Helper()
	before, err := os.ReadFile(allowedCC)
	if err != nil {
		t.Logf("%v: whether it is put back is not known", err)
	}
	return func() {
		t.Helper()
		if after, _ := os.ReadFile(allowedCC); string(after) != string(before) {
			t.Errorf("%s was %q and is %q", allowedCC, before, after)
		}
		noneLeft(t)
	}
}

func noneLeft(t *testing.T) {
	t.Helper()
	children, err := childrenOf(os.Getpid())
	if err != nil || len(children) > 0 {
		t.Errorf("children are left: %v, %v", children, err)
	}
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), "usernet-bench-*"))
	if err != nil || len(dirs) > 0 {
		t.Errorf("directories are left: %v, %v", dirs, err)
	}
}

func TestLab(t *testing.T) {
	needNamespaces(t)
	t.Setenv("TMPDIR", openTemp(t))
	check := nothingLeft(t)
	out := t.TempDir()
	plain := []string{"tcp-rr", "tcp-crr", "udp-rr", "udp-out-64", "udp-steady-in-1400", "startup"}
	streams := []string{"pub-lo-rr", "pub-net-crr"}
	datagrams := []string{"pub-lo-udp-rr", "pub-net-udp-in-1400", "pub-net-udp-out-64"}
	members := []string{"member-rr"}
	args := labArgs(t, out, "^("+strings.Join(slices.Concat(plain, streams, datagrams, members), "|")+")$", "50ms")
	if err := outer(context.Background(), args); err != nil {
		t.Fatal(err)
	}
	check()
	text, err := os.ReadFile(filepath.Join(out, "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	var r report
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	contenders := strings.Split(args[len(args)-1], ",")
	for _, c := range contenders {
		wanted := slices.Concat(plain, streams, datagrams)
		switch c {
		case "usernet":
			if !slices.Contains(contenders, "usernet-stack") {
				wanted = plain // it has none
			}
		case "usernet-stack":
			wanted = streams
		case sharedVeth, sharedTAP:
			wanted = append(members, "tcp-rr")
		case sharedMixed, limitBridge:
			wanted = members
		}
		for _, a := range wanted {
			if slices.Contains(limits, c) && !takesPart(c, axisNamed(a)) {
				continue
			}
			row := r.find(a, 1500, c)
			if row == nil || len(row.Errors) > 0 || len(row.Figures) == 0 {
				t.Errorf("%s of %s: %+v", a, c, row)
				continue
			}
			for unit, f := range row.Figures {
				if f.Median < 0 || f.Median == 0 && (unit == perSecond.unit || unit == p50.unit || unit == readyMS.unit) {
					t.Errorf("%s of %s: %v %s", a, c, f.Median, unit)
				}
			}
		}
	}
	// From outside the client's address arrives, through usernet by both ways.
	for _, s := range r.Sightings {
		if strings.HasPrefix(s.From, "outside, IPv4") && !s.Kept {
			t.Errorf("%+v", s)
		}
	}
	if want := 2 * len(vantages); slices.Contains(contenders, "slirp4netns") && len(r.Sightings) < want {
		t.Errorf("%d sightings, wanted at least %d", len(r.Sightings), want)
	}
	for _, name := range []string{"results.txt", "results.md", "roundtrips.svg", "udp.svg", "published-roundtrips.svg", "members-roundtrips.svg"} {
		if info, err := os.Stat(filepath.Join(out, name)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An interrupted run ends what it began, and keeps what it has.
func TestInterrupt(t *testing.T) {
	needNamespaces(t)
	t.Setenv("TMPDIR", openTemp(t))
	check := nothingLeft(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error)
	go func() { ended <- outer(ctx, labArgs(t, t.TempDir(), "^udp", "30s")) }()
	// The lab has agents once there is a process below the inner bench.
	for {
		all, err := processes()
		if err != nil {
			t.Fatal(err)
		}
		if len(below(all, os.Getpid())) >= 4 { // us, inner, host's agent and outside's
			break
		}
		select {
		case err := <-ended:
			t.Fatalf("it ended by itself: %v", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
	cancel()
	var exit *exitError
	if err := <-ended; !errors.As(err, &exit) {
		t.Errorf("an interrupted run ends with %v", err)
	}
	check()
}

// A run that fails leaves as little.
func TestFailure(t *testing.T) {
	needNamespaces(t)
	t.Setenv("TMPDIR", openTemp(t))
	check := nothingLeft(t)
	var exit *exitError
	if err := outer(context.Background(), labArgs(t, t.TempDir(), "^nothing$", "50ms")); !errors.As(err, &exit) {
		t.Errorf("a run of no axis ends with %v", err)
	}
	check()
}

// openTemp is a directory that the user of the peers reaches.
func openTemp(t *testing.T) string {
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
