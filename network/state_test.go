package network

import (
	"bytes"
	"flag"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files")

// example is a Set with one of everything.
func example(t testing.TB) *Set {
	t.Helper()
	s := New("host.containers.internal")
	create(t, s, Config{Name: "web"})
	create(t, s, Config{Name: "lab", Subnet: prefix("192.168.50.0/28"), NoIPv6: true, Internal: true, MTU: 1500, Domain: "lab.example.org"})
	create(t, s, Config{Name: "empty", Subnet6: prefix("fd00:5::/112")})
	r := request("db")
	r.Aliases, r.Ports = []string{"data", "sql"}, []string{"5432:5432", "[::1]:53:53/udp"}
	join(t, s, "web", r)
	r = request("app")
	r.Process, r.Path, r.IPv4, r.MAC, r.Ifname = Process{}, "/run/user/1000/netns/app", addr("10.89.0.77"), mac("02:00:00:00:00:01"), "net0"
	join(t, s, "web", r)
	join(t, s, "lab", request("db"))
	join(t, s, "web", request("gone"))
	leave(t, s, "web", "gone")
	want(t, s.SetCable("web", "db", CableVeth), nil)
	want(t, s.SetCable("web", "app", CableTAP), nil)
	return s
}

func TestStateGolden(t *testing.T) {
	got := append(text(t, example(t).State(boot)), '\n')
	const file = "testdata/state.golden"
	if *update {
		want(t, os.WriteFile(file, got, 0o644), nil)
	}
	golden, err := os.ReadFile(file)
	want(t, err, nil)
	if !bytes.Equal(got, golden) {
		t.Errorf("state.json is now\n%s\nA usernet that has been updated reads what the last one wrote: is the version another?", got)
	}
	st, err := ParseState(golden, boot)
	want(t, err, nil)
	s, err := Restore(st, "host.containers.internal")
	want(t, err, nil)
	holds(t, s)
	if back := append(text(t, s.State(boot)), '\n'); !bytes.Equal(back, golden) {
		t.Errorf("restored as %s", back)
	}
	// What the name had is still its own.
	if m := join(t, s, "web", request("gone")); m.IPv4 != addr("10.89.0.3") {
		t.Errorf("%+v", m)
	}
}

// However short a file was cut, it says so and gives nothing.
func TestStateTruncated(t *testing.T) {
	data := text(t, example(t).State(boot))
	for n := range data {
		_, err := ParseState(data[:n], boot)
		want(t, err, ErrInvalid, "it ends after", "in the middle")
	}
}

func TestParseState(t *testing.T) {
	for data, words := range map[string][]string{
		"null":                       {"version 0"},
		"[]":                         {"damaged"},
		"\x00\x00":                   {"damaged"},
		`{"version":"1"}`:            {"damaged"},
		`{"version":2,"boot":"x"}`:   {"version 2", "newer usernet"},
		`{"version":-1}`:             {"version -1"},
		`{"version":1,"boot":"b"} x`: {"damaged"},
		`{"version":1,"boot":"` + boot + `","networks":[],"color":"red"}`:                 {"damaged", "color"},
		`{"version":1,"boot":"` + boot + `","networks":[{"subnet":"10.0.0.0/33"}]}`:       {"damaged", "10.0.0.0/33"},
		`{"version":1,"boot":"` + boot + `","networks":[{"members":[{"mac":"1:2:3"}]}]}`:  {"damaged", "1:2:3"},
		`{"version":1,"boot":"` + boot + `","networks":[{"members":[{"number":1e400}]}]}`: {"damaged"},
	} {
		_, err := ParseState([]byte(data), boot)
		want(t, err, ErrInvalid, words...)
	}
	_, err := ParseState([]byte(`{"version":1,"boot":"another","networks":[{"number":"?"}]}`), boot)
	want(t, err, ErrOtherBoot, "another", boot)
}

// Nonsense that is JSON of the right form.
func TestRestoreRefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*State)
		words  []string
	}{
		{"name", func(st *State) { st.Networks[2].Name = "../x" }, []string{"../x"}},
		{"name twice", func(st *State) { st.Networks[0].Name, st.Networks[0].Domain = "web", "web.usernet.internal" }, []string{`"web"`, "already"}},
		{"number twice", func(st *State) { st.Networks[2].Number = 2 }, []string{`"web"`, "number 2"}},
		{"number", func(st *State) { st.Networks[2].Number = 0 }, []string{"number 0"}},
		{"large number", func(st *State) { st.Networks[2].Number = 1 << 40 }, []string{"number 1099511627776"}},
		{"overlap", func(st *State) {
			st.Networks[0].Subnet, st.Networks[0].Gateway = prefix("10.89.0.0/16"), addr("10.89.0.1")
		}, []string{"overlaps"}},
		{"no subnet", func(st *State) { st.Networks[1] = Network{Name: "lab", Number: 2, MTU: 1500} }, []string{`"lab"`, "follow"}},
		{"gateway", func(st *State) { st.Networks[2].Gateway = addr("10.89.0.9") }, []string{`"web"`, "follow", "10.89.0.1"}},
		{"domain", func(st *State) { st.Networks[2].Domain = "lab.usernet.internal" }, []string{"other networks"}},
		{"MTU", func(st *State) { st.Networks[2].MTU = 0 }, []string{"follow"}},
		{"member", func(st *State) { st.Networks[2].Members[0].Name = "" }, []string{"1 to 63"}},
		{"member twice", func(st *State) { st.Networks[2].Members[1].Name = "db" }, []string{`member "db"`, "a member has it"}},
		{"address twice", func(st *State) { st.Networks[2].Members[1].IPv4 = addr("10.89.0.2") }, []string{`"app"`, "10.89.0.2"}},
		{"no address", func(st *State) { st.Networks[2].Members[1].Addresses = Addresses{} }, []string{"no IPv4"}},
		{"no IPv6", func(st *State) { st.Networks[2].Members[1].IPv6 = addr("::") }, []string{"is not in"}},
		{"IPv6 missing", func(st *State) { st.Networks[2].Members[1].IPv6 = Addresses{}.IPv6 }, []string{"follow"}},
		{"MAC twice", func(st *State) { st.Networks[2].Members[0].MAC = mac("02:00:00:00:00:01") }, []string{"has it"}},
		{"no MAC", func(st *State) { st.Networks[2].Members[0].MAC = MAC{} }, []string{"no MAC"}},
		{"no interface", func(st *State) { st.Networks[2].Members[0].Ifname = "" }, []string{"no interface"}},
		{"interface", func(st *State) { st.Networks[2].Members[0].Ifname = "../x" }, []string{"../x"}},
		{"interface twice", func(st *State) { st.Networks[2].Members[0].Ifname = "eth1" }, []string{"eth1"}},
		{"member's number", func(st *State) { st.Networks[2].Members[0].Number = -4 }, []string{"number -4"}},
		{"member's number twice", func(st *State) { st.Networks[1].Members[0].Number = 1 }, []string{"number 1"}},
		{"cable", func(st *State) { st.Networks[2].Members[0].Cable = "rope" }, []string{"rope"}},
		{"alias", func(st *State) { st.Networks[2].Members[0].Aliases[0] = "app" }, []string{`"app"`}},
		{"alias twice", func(st *State) { st.Networks[2].Members[0].Aliases[0] = "sql" }, []string{"follow"}},
		{"namespace", func(st *State) { st.Networks[2].Members[0].NetNS = NetNS{} }, []string{"namespace"}},
		{"place", func(st *State) { st.Networks[2].Members[0].Path = "/x" }, []string{"either"}},
		{"former's name", func(st *State) { st.Networks[2].Former[0].Name = "db" }, []string{`"db"`, "twice"}},
		{"former's address", func(st *State) { st.Networks[2].Former[0].IPv4 = addr("10.89.0.2") }, []string{`former member "gone"`, "10.89.0.2"}},
		{"former twice", func(st *State) { st.Networks[2].Former = append(st.Networks[2].Former, st.Networks[2].Former[0]) }, []string{"twice"}},
		{"former without", func(st *State) { st.Networks[2].Former[0].Addresses = Addresses{IPv6: st.Networks[2].Former[0].IPv6} }, []string{"is not in"}},
		{"former's family", func(st *State) { st.Networks[2].Former[0].IPv6 = Addresses{}.IPv6 }, []string{"IPv6"}},
		{"many former", func(st *State) { st.Networks[2].Former = make([]Lease, maxFormer+1) }, []string{"257 former"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st := example(t).State(boot)
			tt.change(&st)
			s, err := Restore(st)
			if err == nil || s != nil {
				t.Fatal("it was restored")
			}
			for _, w := range tt.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%v: does not say %q", err, w)
				}
			}
		})
	}
}

// Whatever a file has in it: no crash, and a Set that comes of it keeps its promises and is written as it was read.
func FuzzState(f *testing.F) {
	st := example(f).State(boot)
	f.Add(text(f, st))
	st.Networks = st.Networks[1:2]
	f.Add(text(f, st))
	f.Add([]byte(`{"version":1,"boot":"` + boot + `"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		st, err := ParseState(data, boot)
		if err != nil {
			return
		}
		s, err := Restore(st, "host.containers.internal")
		if err != nil {
			return
		}
		holds(t, s)
		once := text(t, s.State(boot))
		st, err = ParseState(once, boot)
		want(t, err, nil)
		s, err = Restore(st, "host.containers.internal")
		want(t, err, nil)
		if again := text(t, s.State(boot)); !bytes.Equal(once, again) {
			t.Fatalf("%s\nwas %s", again, once)
		}
	})
}
