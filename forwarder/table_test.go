package forwarder

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

// testFlow is a flow without a socket.
func testFlow(host, port int, now int64) *flow {
	addr := netip.AddrFrom4([4]byte{10, 0, byte(host >> 8), byte(host)})
	fl := &flow{key: flowKey{proto: protoUDP, src: netip.AddrPortFrom(addr, uint16(port))}}
	fl.refs.Store(1)
	fl.last.Store(now)
	return fl
}

func insert(t *testing.T, tb *table, fl *flow, now int64) (evicted *flow) {
	t.Helper()
	existing, evicted, ok := tb.insert(fl, now)
	if existing != nil || !ok {
		t.Fatalf("insert %v: existing %v, %v", fl.key, existing, ok)
	}
	return evicted
}

// A source that opens flow after flow evicts its own; what the others have stays.
func TestTableFairness(t *testing.T) {
	const limit = 30
	tb := newTable(limit, 1)
	var quiet []*flow
	for i := range 5 {
		fl := testFlow(1+i%2, i, int64(i))
		quiet = append(quiet, fl)
		insert(t, tb, fl, int64(i))
	}
	for i := range 10 * limit {
		evicted := insert(t, tb, testFlow(9, i, int64(100+i)), int64(100+i))
		if evicted != nil && evicted.key.src.Addr() != testFlow(9, 0, 0).key.src.Addr() {
			t.Fatalf("flow %d of the greedy one evicted %v", i, evicted.key)
		}
		if i >= limit-5 && evicted == nil || tb.len() > limit {
			t.Fatalf("%d flows", tb.len())
		}
	}
	// A newcomer gets its share from whoever has most.
	for i := range 10 {
		if evicted := insert(t, tb, testFlow(10, i, 1000), 1000); evicted.key.src.Addr() != testFlow(9, 0, 0).key.src.Addr() {
			t.Fatalf("newcomer evicted %v", evicted.key)
		}
	}
	for _, fl := range quiet {
		if tb.get(fl.key) != fl {
			t.Errorf("%v is gone", fl.key)
		}
	}
}

// Between equals nobody gains by asking for more.
func TestTableFairnessOfEquals(t *testing.T) {
	tb := newTable(10, 0)
	for i := range 10 {
		insert(t, tb, testFlow(1+i%2, i, int64(i)), int64(i))
	}
	for i := 10; i < 50; i++ {
		host := 1 + (i/7)%2
		if evicted := insert(t, tb, testFlow(host, i, int64(i)), int64(i)); evicted.key.src.Addr() != testFlow(host, 0, 0).key.src.Addr() {
			t.Fatalf("host %d took a flow of %v", host, evicted.key)
		}
	}
	// A third one takes from either, until all have the same.
	counts := func() (n [4]int) {
		for key := range tb.flows {
			n[key.src.Addr().As4()[3]]++
		}
		return n
	}
	for i := range 20 {
		insert(t, tb, testFlow(3, i, int64(100+i)), int64(100+i))
	}
	if n := counts(); n[1] < 3 || n[2] < 3 || n[3] < 3 {
		t.Errorf("shares %v", n)
	}
}

// Within a source: first who was never answered and is idle longest, then who was.
func TestTableEvictionOrder(t *testing.T) {
	tb := newTable(6, 0)
	var flows []*flow
	for i := range 6 {
		fl := testFlow(1, i, int64(i))
		flows = append(flows, fl)
		insert(t, tb, fl, int64(i))
	}
	flows[0].answered.Store(true)
	flows[2].answered.Store(true)
	flows[1].last.Store(50) // in use, though never answered
	var order []int
	for i := range 6 {
		evicted := insert(t, tb, testFlow(1, 100+i, int64(100+i)), int64(100+i))
		order = append(order, int(evicted.key.src.Port()))
	}
	if got, want := fmt.Sprint(order), "[3 4 5 1 100 101]"; got != want {
		t.Errorf("evicted in order %s, want %s", got, want)
	}
	for i := 100; i < 106; i++ {
		if fl := tb.get(testFlow(1, i, 0).key); fl != nil {
			fl.answered.Store(true)
		}
	}
	if evicted := insert(t, tb, testFlow(1, 200, 200), 200); evicted != flows[0] {
		t.Errorf("with none unanswered %v is evicted, want %v", evicted.key, flows[0].key)
	}
}

func TestTableEvictKeeps(t *testing.T) {
	tb := newTable(10, 0)
	a := testFlow(1, 1, 1)
	insert(t, tb, a, 1)
	if fl := tb.evict(a); fl != nil {
		t.Errorf("evicted the one to keep")
	}
	b := testFlow(2, 1, 2)
	insert(t, tb, b, 2)
	if fl := tb.evict(b); fl != a {
		t.Errorf("evicted %v, want %v", fl, a)
	}
	if tb.len() != 1 || tb.remove(a) || !tb.remove(b) || tb.len() != 0 || len(tb.owners) != 0 || len(tb.busy) != 0 {
		t.Errorf("left: %d flows, %d owners", tb.len(), len(tb.owners))
	}
}

// A source whose flows are all in use but the new one gives up one of those, not the new one.
func TestTableEvictBusy(t *testing.T) {
	tb := newTable(10, 0)
	var old []*flow
	for i := range 3 {
		fl := testFlow(1, i, 1)
		old = append(old, fl)
		insert(t, tb, fl, 1)
	}
	old[1].answered.Store(true)
	for round := range int64(3) {
		keep := testFlow(1, 10+int(round), 10*round+10)
		for _, fl := range old {
			fl.last.Store(10*round + 9)
		}
		insert(t, tb, keep, 10*round+10)
		if fl := tb.evict(keep); fl == nil || fl == keep {
			t.Fatalf("round %d: evicted %v", round, fl)
		}
		if tb.get(keep.key) != keep || tb.len() != 3 {
			t.Fatalf("round %d: %d flows", round, tb.len())
		}
	}
	if tb.get(old[1].key) != old[1] {
		t.Error("the answered one did not stay longest")
	}
}

// The flows of one owner are bounded, and its own make room; forget takes all of them.
func TestTableShare(t *testing.T) {
	tb := newTable(10, 0)
	tb.share = 4
	for host := 1; host <= 2; host++ {
		for i := range 6 {
			evicted := insert(t, tb, testFlow(host, i, int64(i)), int64(i))
			if (evicted != nil) != (i >= 4) || evicted != nil && evicted.key != testFlow(host, i-4, 0).key {
				t.Fatalf("host %d, flow %d: evicted %v", host, i, evicted)
			}
		}
	}
	one := testFlow(1, 0, 0).ownerKey()
	all := tb.forget(one)
	if len(all) != 4 || tb.len() != 4 || len(tb.owners) != 1 || len(tb.busy) != 1 || tb.owners[one] != nil {
		t.Errorf("forgot %d; left: %d flows of %d owners", len(all), tb.len(), len(tb.owners))
	}
	if all := tb.forget(one); len(all) != 0 {
		t.Errorf("forgot %v", all)
	}
}

// The same key twice is one flow; one whose last reference is gone is none.
func TestTableInsertExisting(t *testing.T) {
	tb := newTable(10, 0)
	a, b := testFlow(1, 1, 1), testFlow(1, 1, 1)
	insert(t, tb, a, 1)
	if existing, _, _ := tb.insert(b, 2); existing != a {
		t.Fatalf("got %v", existing)
	}
	if n := a.refs.Load(); n != 2 {
		t.Errorf("%d references", n)
	}
	if all := tb.close(); len(all) != 1 || all[0] != a {
		t.Errorf("close returned %v", all)
	}
	if _, _, ok := tb.insert(b, 3); ok || tb.get(a.key) != nil {
		t.Error("a closed table takes flows")
	}
}

// Each flow is looked at within two steps of its time, never before, however the clock jumps.
func TestTableWheel(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	now := int64(time.Hour)
	tb := newTable(1000, now)
	due, scheduled := map[*flow]int64{}, map[*flow]int64{}
	for i := range 300 {
		fl := testFlow(1, i, now)
		insert(t, tb, fl, now)
		due[fl] = now + rng.Int64N(int64(300*time.Second))
		tb.schedule(fl, due[fl])
		scheduled[fl] = now
	}
	var list []*flow
	for len(due) > 0 {
		now += rng.Int64N(int64(5 * time.Second))
		if rng.IntN(50) == 0 {
			now += int64(200 * time.Second)
		}
		list = tb.expired(now, list[:0])
		for _, fl := range list {
			fl.release()
			switch at := due[fl]; {
			case at > now: // it was further away than the wheel is long
				if at-scheduled[fl] < (wheelSize-2)*wheelStep {
					t.Fatalf("looked at %v early", time.Duration(at-now))
				}
				tb.schedule(fl, at)
				scheduled[fl] = now
			default:
				delete(due, fl)
				tb.remove(fl)
			}
		}
		for fl, at := range due {
			if now-at > 2*wheelStep {
				t.Fatalf("%v is %v late", fl.key, time.Duration(now-at))
			}
		}
	}
	if tb.len() != 0 {
		t.Errorf("%d flows left", tb.len())
	}
}

func TestPeers(t *testing.T) {
	at := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), 7)
	}
	var p peers
	const limit = 100
	for i := range limit {
		if p.find(at(i)) != nil {
			t.Fatalf("%d is there", i)
		}
		p.add(at(i), limit).last = int64(i)
		if (p.index != nil) != (len(p.list) > indexFrom) {
			t.Fatalf("index with %d peers: %v", len(p.list), p.index != nil)
		}
	}
	for i := range limit {
		if q := p.find(at(i)); q == nil || q.last != int64(i) {
			t.Fatalf("%d: %v", i, q)
		}
	}
	// Whoever is in use stays when others come and go.
	for i := limit; i < 10*limit; i++ {
		p.find(at(5)).last = int64(i)
		p.add(at(i), limit).last = int64(i)
		if p.find(at(5)) == nil || p.find(at(i)) == nil {
			t.Fatalf("peer %d took the place of one in use", i)
		}
		if len(p.list) != limit || len(p.index) != limit {
			t.Fatalf("%d peers, %d in the index", len(p.list), len(p.index))
		}
	}
	idle := func(*peer) time.Duration { return 10 }
	if next := p.expire(10*limit, idle); next <= 10*limit {
		t.Errorf("next at %d", next)
	}
	for _, q := range p.list {
		if q.last+10 <= 10*limit {
			t.Errorf("peer of %d stayed", q.last)
		}
		if p.find(q.real) == nil {
			t.Errorf("%v is not found", q.real)
		}
	}
	if next := p.expire(1<<40, idle); next != 0 || len(p.list) != 0 || p.index != nil {
		t.Errorf("left: %d peers", len(p.list))
	}
}

func TestTrain(t *testing.T) {
	type piece struct{ octets, segment int }
	for _, c := range []struct {
		what  string
		first piece
		then  piece
		joins bool
		want  train
	}{
		{"equal", piece{100, 0}, piece{100, 0}, true, train{100, 200, 2, false}},
		{"shorter", piece{100, 0}, piece{7, 0}, true, train{100, 107, 2, true}},
		{"longer", piece{100, 0}, piece{101, 0}, false, train{100, 100, 1, false}},
		{"after a shorter one", piece{107, 100}, piece{100, 0}, false, train{100, 107, 2, true}},
		{"empty", piece{100, 0}, piece{0, 0}, false, train{100, 100, 1, false}},
		{"after an empty one", piece{0, 0}, piece{100, 0}, false, train{0, 0, 1, true}},
		{"two empty ones", piece{0, 0}, piece{0, 0}, false, train{0, 0, 1, true}},
		{"trains", piece{200, 100}, piece{250, 100}, true, train{100, 450, 5, true}},
		{"trains of different segments", piece{200, 100}, piece{180, 90}, false, train{100, 200, 2, false}},
		{"a segment longer than the datagram", piece{100, 500}, piece{100, 0}, true, train{100, 200, 2, false}},
		{"too many", piece{6400, 100}, piece{100, 0}, false, train{100, 6400, 64, false}},
		{"one more", piece{6300, 100}, piece{100, 0}, true, train{100, 6400, 64, false}},
		{"too long", piece{64000, 2000}, piece{2000, 0}, false, train{2000, 64000, 32, false}},
	} {
		var tr train
		if !tr.add(c.first.octets, c.first.segment) {
			t.Errorf("%s: an empty train takes anything", c.what)
		}
		if got := tr.add(c.then.octets, c.then.segment); got != c.joins || tr != c.want {
			t.Errorf("%s: joins %v, %+v; want %v, %+v", c.what, got, tr, c.joins, c.want)
		}
	}
}

func TestLimitsFor(t *testing.T) {
	for _, c := range []struct {
		files int
		want  Limits
	}{
		{10, Limits{minFlows, minFlows, minFlows, minFlows}},
		{1024, Limits{TCP: 448, UDP: 336, Echo: 56, Inside: 56}},
		{1 << 20, Limits{TCP: 1<<20 - filesKept - maxUDPFlows - maxEchoFlows - maxInside, UDP: maxUDPFlows, Echo: maxEchoFlows, Inside: maxInside}},
	} {
		if got := LimitsFor(c.files); got != c.want {
			t.Errorf("LimitsFor(%d) = %+v, want %+v", c.files, got, c.want)
		}
	}
	if got := LimitsFor(0); got.UDP < minFlows {
		t.Errorf("of the process: %+v", got)
	}
}
