package main

import (
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"usernet/api"
	"usernet/network"
	"usernet/portdriver"
)

func TestParseOrder(t *testing.T) {
	for _, tt := range []struct {
		args string
		want order
	}{
		{"network create web", order{verb: "network create", names: []string{"web"}, config: network.Config{Name: "web", MTU: network.DefaultMTU}}},
		{"network create web --subnet 10.89.1.0/24 --ipv6=fd12::/64 --internal --mtu 1500 --dns-domain corp --persist --json", order{
			verb: "network create", names: []string{"web"}, json: true,
			config: network.Config{
				Name: "web", MTU: 1500, Subnet: netip.MustParsePrefix("10.89.1.0/24"), Subnet6: netip.MustParsePrefix("fd12::/64"),
				Internal: true, Domain: "corp", Persist: true,
			},
		}},
		{"network ls --json", order{verb: "network ls", names: []string{}, json: true}},
		{"network list", order{verb: "network ls", names: []string{}}},
		{"network inspect web", order{verb: "network inspect", names: []string{"web"}}},
		{"network rm a b", order{verb: "network rm", names: []string{"a", "b"}}},
		{"attach web 12 --name db --alias x --alias y --ip 10.89.1.7 --ip fd12::7 --mac 02:00:00:00:00:01 -p 5432:5432 -p auto --ifname net0", order{
			verb: "attach", names: []string{"web", "12"},
			request: api.AttachRequest{
				PID: 12, Name: "db", Aliases: []string{"x", "y"}, IPv4: netip.MustParseAddr("10.89.1.7"), IPv6: netip.MustParseAddr("fd12::7"),
				MAC: network.MAC{2, 0, 0, 0, 0, 1}, Ifname: "net0", Publish: []string{"5432:5432", "auto"},
			},
		}},
		{"attach --name db web --netns-path /run/netns/blue", order{verb: "attach", names: []string{"web"}, request: api.AttachRequest{Path: "/run/netns/blue", Name: "db"}}},
		{"detach web db", order{verb: "detach", names: []string{"web", "db"}}},
		{"netns exec web -- ip -d addr", order{verb: "netns exec", names: []string{"web"}, argv: []string{"ip", "-d", "addr"}}},
		{"netns exec web ip", order{verb: "netns exec", names: []string{"web"}, argv: []string{"ip"}}},
	} {
		o, err := parse(line(tt.args), environment(nil))
		switch {
		case err != nil:
			t.Errorf("%s: %v", tt.args, err)
		case o.command != cmdOrder || !reflect.DeepEqual(*o.order, tt.want):
			t.Errorf("%s:\n got %+v\nwant %+v", tt.args, *o.order, tt.want)
		}
	}
}

// Paths are meant where they are typed; the daemon is elsewhere, and takes none that depends on it.
func TestPublishPaths(t *testing.T) {
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	o, err := parse(line("attach web 12 --name x -p ./a.sock:80 -p /b.sock:80"), environment(nil))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(o.order.request.Publish, " "), dir+"/a.sock:80 /b.sock:80"; got != want {
		t.Errorf("published %s, want %s", got, want)
	}
	if _, err := parsePorts(network.Network{Name: "web"}, []string{"./a.sock:80"}); err == nil || !strings.Contains(err.Error(), "not an absolute path") {
		t.Errorf("a relative path: %v", err)
	}
	if _, err := parsePorts(network.Network{Name: "web", Internal: true}, []string{"80:80"}); err == nil || !strings.Contains(err.Error(), "internal") {
		t.Errorf("a port of an internal network: %v", err)
	}
}

func TestParseOrderRefuses(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"network", "what? create, ls, inspect, rm"},
		{"network make x", "must be create"},
		{"network create", "NAME"},
		{"network create a b", `unexpected argument "b"`},
		{"network create a --subnet x", "must be a network such as 10.89"},
		{"network create a --ipv6 x", "must be a network such as fd12"},
		{"network ls x", "unexpected"},
		{"network rm", "NAME"},
		{"attach web 12", "--name"},
		{"attach web --name x", "PID"},
		{"attach web abc --name x", "not a PID"},
		{"attach web 0 --name x", "not a PID"},
		{"attach web --netns-path= --name x", "empty"},
		{"attach web 12 --name x --ip 1.2.3", "no IPv4 or IPv6 address"},
		{"attach web 12 --name x --ip 10.0.0.2 --ip 10.0.0.3", "one address of each family"},
		{"attach web 12 --name x --mac 1:2", "six octets"},
		{"attach web 12 --name x -p 70000", "--publish"},
		{"detach web", "NETWORK NAME"},
		{"netns exec web", "COMMAND"},
		{"netns exec web --", "which command"},
		{"netns look web", "must be exec"},
		{"run --name x true", "--network"},
		{"run --network= true", "empty"},
		{"run --network web true", "--name"},
		{"run --network web --name x --mtu 1500 true", "contradict"},
		{"port list --network web", "belong together"},
		{"port list --network web --name db --socket x", "contradict"},
	} {
		if _, err := parse(line(tt.args), environment(nil)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.args, err, tt.want)
		}
	}
}

// What is published is recorded in words that mean the same, and neighbours in one range.
func TestPortTexts(t *testing.T) {
	for _, tt := range []struct{ words, want string }{
		{"8080:80", "8080:80/tcp"},
		{"127.0.0.1:5353:53/udp", "127.0.0.1:5353:53/udp"},
		{"[::1]:9000:10.89.0.2:90/tcp6", "[::1]:9000:10.89.0.2:90/tcp6"},
		{"9000-9010:19000-19010 9011:19011 9012:80", "9000-9011:19000-19011/tcp 9012:80/tcp"},
		{"65534-65535:65534-65535", "65534-65535:65534-65535/tcp"},
		{"/run/x.sock:80", "/run/x.sock:80"},
		{"1:1/udp 2:2/tcp", "2:2/tcp 1:1/udp"},
	} {
		read := func(words []string) (all []portdriver.Spec) {
			for _, w := range words {
				specs, err := portdriver.ParseSpec(w)
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, specs...)
			}
			return all
		}
		specs := read(line(tt.words))
		texts := portTexts(specs)
		if got := strings.Join(texts, " "); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.words, got, tt.want)
		}
		if again := read(texts); len(again) != len(specs) {
			t.Errorf("%s: %d forwards became %d", tt.words, len(specs), len(again))
		}
	}
}
