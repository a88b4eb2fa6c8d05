package portdriver

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

var (
	ip  = netip.MustParseAddr
	any = netip.Addr{}
)

func TestParseSpec(t *testing.T) {
	for in, want := range map[string][]Spec{
		"8080:80":                  {{"tcp", any, 8080, "", any, 80}},
		"80":                       {{"tcp", any, 80, "", any, 80}},
		"53/udp":                   {{"udp", any, 53, "", any, 53}},
		"0:80/tcp4":                {{"tcp4", any, 0, "", any, 80}},
		"127.0.0.1:5353:53/udp":    {{"udp", ip("127.0.0.1"), 5353, "", any, 53}},
		"127.0.0.1::53":            {{"tcp", ip("127.0.0.1"), 0, "", any, 53}},
		"2222:10.0.2.7:22":         {{"tcp", any, 2222, "", ip("10.0.2.7"), 22}},
		"[::1]:80:[fd00::7]:8080":  {{"tcp", ip("::1"), 80, "", ip("fd00::7"), 8080}},
		"[fe80::1%eth0]:80:80":     {{"tcp", ip("fe80::1%eth0"), 80, "", any, 80}},
		"80:[fd00::7]:8080/tcp6":   {{"tcp6", any, 80, "", ip("fd00::7"), 8080}},
		"[::ffff:127.0.0.1]:80:80": {{"tcp", ip("127.0.0.1"), 80, "", any, 80}},
		"[::1]:9000-9002:9010-9012": {
			{"tcp", ip("::1"), 9000, "", any, 9010}, {"tcp", ip("::1"), 9001, "", any, 9011}, {"tcp", ip("::1"), 9002, "", any, 9012},
		},
		"7000-7001/udp6":               {{"udp6", any, 7000, "", any, 7000}, {"udp6", any, 7001, "", any, 7001}},
		"/run/a.sock:80":               {{"tcp", any, 0, "/run/a.sock", any, 80}},
		"./a:b.sock:80/tcp":            {{"tcp", any, 0, "./a:b.sock", any, 80}},
		"/run/a.sock:10.0.2.7:80":      {{"tcp", any, 0, "/run/a.sock", ip("10.0.2.7"), 80}},
		"/run/a.sock:[fd00::7]:80/tcp": {{"tcp", any, 0, "/run/a.sock", ip("fd00::7"), 80}},
	} {
		got, err := ParseSpec(in)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v; want %v", in, got, err, want)
		}
	}
	all, err := ParseSpec("1-65535:1-65535")
	if err != nil || len(all) != 65535 || all[65534].HostPort != 65535 {
		t.Errorf("all ports: %d, %v", len(all), err)
	}
}

func TestParseSpecRefuses(t *testing.T) {
	for in, want := range map[string]string{
		"":                                     "a port is missing",
		":":                                    "a port is missing",
		":80":                                  "a port is missing",
		"80:":                                  "a port is missing",
		"x":                                    `"x" is no port`,
		"-1":                                   "a port is missing",
		"+80:80":                               "is no port",
		"65536:80":                             "beyond 65535",
		"80:0":                                 "the container's port is 1 to 65535",
		"80/sctp":                              "it is tcp, tcp4",
		"80/TCP":                               "it is tcp, tcp4",
		"80/":                                  "it is tcp, tcp4",
		"1.2.3.4:80":                           "1.2.3.4:80:80",
		"localhost:80:80":                      `"localhost" is no address`,
		"::1:80:80":                            "[HOST:]HOSTPORT",
		"[::1:80:80":                           "not closed",
		"[::1]x:80:80":                         "[HOST:]HOSTPORT",
		"1.2.3.4:80:1.2.3.4:80:80":             "[HOST:]HOSTPORT",
		"80-90:80":                             "11 ports of the host for 1",
		"0-5:0-5":                              "no range",
		"90-80:90-80":                          "no range",
		"1.2.3.4:80:80/tcp6":                   "it is an IPv4 address",
		"[::1]:80:80/udp4":                     "it is an IPv6 address",
		"224.0.0.1:80:80":                      "multicast",
		"80:0.0.0.0:80":                        "no address of a container",
		"/run/a.sock":                          "followed by :PORT",
		"/run/a.sock:80/udp":                   "not to udp",
		"/run/a.sock:80-81":                    "not to a range",
		"/" + strings.Repeat("x", 107) + ":80": "at most 107",
		"/a\x00b:80":                           "octet 0",
	} {
		got, err := ParseSpec(in)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v; want %q", in, got, err, want)
		}
	}
}

func TestParseAuto(t *testing.T) {
	for in, want := range map[string]AutoConfig{
		"auto":                      {TCP: true, UDP: true},
		"auto/udp":                  {UDP: true},
		"auto:80,8000-8100":         {TCP: true, UDP: true, Include: []PortRange{{80, 80}, {8000, 8100}}},
		"auto:^22,^5000-5100/tcp":   {TCP: true, Exclude: []PortRange{{22, 22}, {5000, 5100}}},
		"127.0.0.1:auto:1-1023,^22": {Host: ip("127.0.0.1"), TCP: true, UDP: true, Include: []PortRange{{1, 1023}}, Exclude: []PortRange{{22, 22}}},
		"[::1]:auto":                {Host: ip("::1"), TCP: true, UDP: true},
	} {
		got, ok, err := ParseAuto(in)
		if !ok || err != nil || got.Host != want.Host || got.TCP != want.TCP || got.UDP != want.UDP ||
			!slices.Equal(got.Include, want.Include) || !slices.Equal(got.Exclude, want.Exclude) {
			t.Errorf("%s: %+v, %v, %v; want %+v", in, got, ok, err, want)
		}
	}
	for _, in := range []string{"80:80", "/run/auto:80", "./x:auto:80", "/auto:80", "automatic", "1.2.3.4:automatic"} {
		if a, ok, err := ParseAuto(in); ok || err != nil {
			t.Errorf("%s: %+v, %v, %v", in, a, ok, err)
		}
	}
	for _, in := range []string{"auto:", "auto:x", "auto:0", "auto:^", "auto:80,", "auto/sctp", "auto:9-8", "localhost:auto", "1.2.3.4:auto:"} {
		if a, ok, err := ParseAuto(in); !ok || err == nil {
			t.Errorf("%s: %+v, %v, %v", in, a, ok, err)
		}
	}
}

// A path of a Spec that was not parsed is one as well, and no abstract name.
func TestPathsOfSpecs(t *testing.T) {
	for _, path := range []string{"@a", "a", "../a", "\x00a"} {
		s := Spec{Proto: "tcp", HostPath: path, ContainerPort: 80}
		if err := s.check(); err == nil || !strings.Contains(err.Error(), "begins with / or ./") {
			t.Errorf("%q: %v", path, err)
		}
	}
}

// What ParseSpec accepts is what a Spec's text says, and can be published or not, but never more than a range of ports.
func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{"8080:80", "127.0.0.1:5353:53/udp", "[::1]:9000-9010:9000-9010", "2222:10.0.2.100:22",
		"/run/a.sock:[fd00::7]:80", "./a:b:80", "[fe80::1%eth0]::80", "auto:80,^22/tcp", "[::1]:auto", "1-65535", "0:1/tcp6"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, ok, err := ParseAuto(s)
		if ok && err == nil {
			for _, r := range append(a.Include, a.Exclude...) {
				if r.First == 0 || r.Last < r.First {
					t.Fatalf("%q: range %v", s, r)
				}
			}
		}
		specs, err := ParseSpec(s)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "port ") {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		if len(specs) == 0 || len(specs) > 65535 {
			t.Fatalf("%q: %d forwards", s, len(specs))
		}
		for i, spec := range specs {
			if err := spec.check(); err != nil {
				t.Fatalf("%q: %+v: %v", s, spec, err)
			}
			if spec.Host.Is4In6() || int(spec.ContainerPort) != int(specs[0].ContainerPort)+i {
				t.Fatalf("%q: %+v", s, spec)
			}
			if i > 0 {
				continue
			}
			again, err := ParseSpec(spec.String())
			if err != nil || len(again) != 1 || again[0] != spec {
				t.Fatalf("%q: %+v is written %q, which is read as %+v, %v", s, spec, spec, again, err)
			}
		}
	})
}

func TestOverlap(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"80", "80/tcp4", true}, {"80", "80/udp", false}, {"80/tcp4", "80/tcp6", false}, {"80", "81", false},
		{"80", "127.0.0.1:80:80", true}, {"0.0.0.0:80:80", "[::]:80:80", false}, {"127.0.0.1:80:80", "127.0.0.2:80:80", false},
		{"[::]:80:80", "[::1]:80:81", true}, {"80/udp", "127.0.0.1:80:80/udp4", true}, {"/a:80", "/a:80", false},
	} {
		a, err := ParseSpec(c.a)
		b, err2 := ParseSpec(c.b)
		if err != nil || err2 != nil {
			t.Fatal(err, err2)
		}
		if overlap(a[0], b[0]) != c.want || overlap(b[0], a[0]) != c.want {
			t.Errorf("%s and %s: want %v", c.a, c.b, c.want)
		}
	}
}

func TestSource(t *testing.T) {
	a := addresses{container4: container4, container6: container6, gateway4: gateway4, gateway6: gateway6, subnets: []netip.Prefix{net4, net6}}
	to4, to6 := netip.AddrPortFrom(gateway4, 0), netip.AddrPortFrom(gateway6, 0)
	for _, c := range []struct {
		client string // "" is a unix socket
		dst    netip.Addr
		want   netip.AddrPort
	}{
		{"203.0.113.2:7000", container4, netip.MustParseAddrPort("203.0.113.2:7000")},
		{"203.0.113.2:7000", container6, to6},
		{"[2001:db8::2]:7000", container6, netip.MustParseAddrPort("[2001:db8::2]:7000")},
		{"[2001:db8::2]:7000", container4, to4},
		{"127.0.0.1:7000", container4, to4}, {"127.9.9.9:7000", loopback4, to4}, {"[::1]:7000", loopback6, to6},
		{"169.254.7.7:7000", container4, to4}, {"[fe80::1%2]:7000", container6, to6},
		{"10.0.2.100:7000", container4, to4}, {"10.0.2.2:7000", container4, to4}, {"10.0.2.77:7000", container4, to4}, {"[fd00::1]:7000", container6, to6},
		{"", container4, to4}, {"", container6, to6},
	} {
		client := netip.AddrPort{}
		if c.client != "" {
			client = netip.MustParseAddrPort(c.client)
		}
		if got := a.source(client, c.dst); got != c.want {
			t.Errorf("%v to %v: %v, want %v", client, c.dst, got, c.want)
		}
	}
	if got := (&addresses{}).source(netip.MustParseAddrPort("127.0.0.1:1"), loopback4); got.IsValid() {
		t.Errorf("without a gateway: %v", got)
	}
}

func TestTargets(t *testing.T) {
	a := addresses{container4: container4, container6: container6}
	for _, c := range []struct {
		to   netip.Addr
		v4   bool
		want []netip.Addr
	}{
		{any, true, []netip.Addr{container4, loopback4, container6, loopback6}},
		{any, false, []netip.Addr{container6, loopback6, container4, loopback4}},
		{container4, false, []netip.Addr{container4, loopback4}},
		{container6, true, []netip.Addr{container6, loopback6}},
		{ip("10.0.2.7"), true, []netip.Addr{ip("10.0.2.7")}},
		{loopback4, true, []netip.Addr{loopback4}},
	} {
		if got := a.targets(Spec{Container: c.to}, c.v4); !slices.Equal(got, c.want) {
			t.Errorf("to %v, IPv4 %v: %v, want %v", c.to, c.v4, got, c.want)
		}
	}
}

func TestLimitsFor(t *testing.T) {
	for files, want := range map[int]Limits{
		30000: {30000, 15000, 7500, 1024},
		1000:  {1000, 500, 250, 125},
		1:     {1, 16, 16, 8},
	} {
		if got := LimitsFor(files); got != want {
			t.Errorf("%d files: %+v, want %+v", files, got, want)
		}
	}
	if l := LimitsFor(0); l.Files <= 0 {
		t.Errorf("of this process: %+v", l)
	}
}

// Where no server of the container's can be, nothing is published: clients would meet us or nobody.
func TestTargetsThatCannotBe(t *testing.T) {
	d := bare(t, func(c *Config) {
		c.Gateway4, c.Gateway6 = netip.MustParseAddr("10.0.2.2"), netip.MustParseAddr("fd00::2")
		c.Subnets = []netip.Prefix{netip.MustParsePrefix("10.0.2.0/25"), netip.MustParsePrefix("fd00::/64"), netip.MustParsePrefix("10.9.9.9/31")}
	})
	for target, want := range map[string]string{
		"10.0.2.2":        "is the gateway",
		"fd00::2":         "is the gateway",
		"10.0.2.0":        "is the network 10.0.2.0/25",
		"10.0.2.127":      "is the broadcast address of 10.0.2.0/25",
		"255.255.255.255": "is the broadcast address",
		"10.0.2.128":      "", // of another network
		"10.0.2.126":      "",
		"10.9.9.8":        "", // RFC 3021: two hosts and no more
		"fd00::":          "",
		"127.0.0.1":       "",
	} {
		fs, err := d.Add(t.Context(), Spec{Proto: "tcp", Host: netip.MustParseAddr("127.0.0.1"), Container: netip.MustParseAddr(target), ContainerPort: 80})
		switch {
		case want == "" && err != nil:
			t.Errorf("%s: %v", target, err)
		case want != "" && err == nil:
			t.Errorf("%s is published: %+v", target, fs)
		case want != "" && !strings.Contains(err.Error(), want):
			t.Errorf("%s: %q, want %q in it", target, err, want)
		}
	}
}
