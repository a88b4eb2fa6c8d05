package main

import (
	"flag"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"usernet/forwarder"
	"usernet/portdriver"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; if that is meant, run go test -update and look at the diff. Now:\n%s", path, got)
	}
}

func TestHelp(t *testing.T) { golden(t, "help.golden", helpText()) }

// Every flag of run is in help, which shows those of the attach form and one group of run's.
func TestHelpHasTheFlagsOfRun(t *testing.T) {
	for _, g := range newFlags(true).groups {
		g.set.VisitAll(func(fl *pflag.Flag) {
			if !strings.Contains(helpText(), "--"+fl.Name) {
				t.Errorf("--%s of run is not in help", fl.Name)
			}
		})
	}
}

func environment(kv map[string]string) func(string) string {
	return func(k string) string { return kv[k] }
}

// line splits a command line at spaces.
func line(s string) []string { return strings.Fields(s) }

func TestParse(t *testing.T) {
	defaults := func(change func(*options)) *options {
		p, err := newPlan(defaultCIDR, defaultCIDR6, true)
		if err != nil {
			t.Fatal(err)
		}
		o := &options{
			tapFD:   -1,
			tapName: "tap0", mtu: 65520, configure: true, queues: 1, plan: p, dns: true,
			readyFD: -1, exitFD: -1, logLevel: slog.LevelInfo, logFormat: "text", pcapSize: 100 << 20, sandbox: true,
			portPath: portdriver.PathAuto,
		}
		change(o)
		return o
	}
	for _, tt := range []struct {
		args string
		want *options
	}{
		{"1234", defaults(func(o *options) { o.pid = 1234 })},
		{"1234 eth7", defaults(func(o *options) { o.pid, o.tapName = 1234, "eth7" })},
		{"./1234", defaults(func(o *options) { o.path = "./1234" })},
		{"/run/netns/blue", defaults(func(o *options) { o.path = "/run/netns/blue" })},
		{"--netns-path 77", defaults(func(o *options) { o.path = "77" })},
		{"--netns-path=/x --userns-path /u eth7", defaults(func(o *options) { o.path, o.usernsPath, o.tapName = "/x", "/u", "eth7" })},
		{"1 eth7 --tap-name eth7", defaults(func(o *options) { o.pid, o.tapName = 1, "eth7" })},
		{"--mtu 1500 1", defaults(func(o *options) { o.pid, o.mtu = 1, 1500 })},
		{"1 --mtu=1500", defaults(func(o *options) { o.pid, o.mtu = 1, 1500 })},
		{"1 --no-offload --no-uso", defaults(func(o *options) { o.pid, o.noOffload, o.noUSO = 1, true, true })},
		{"1 --mtu 1500 eth7 --queues=2", defaults(func(o *options) { o.pid, o.mtu, o.tapName, o.queues = 1, 1500, "eth7", 2 })},
		{"-- 1 eth7", defaults(func(o *options) { o.pid, o.tapName = 1, "eth7" })},
		{"1 --no-configure", defaults(func(o *options) { o.pid, o.configure = 1, false })},
		{"1 --no-configure --configure", defaults(func(o *options) { o.pid = 1 })},
		{"1 --configure=false", defaults(func(o *options) { o.pid, o.configure = 1, false })},
		{"1 --no-ipv6 --mtu 576", defaults(func(o *options) { o.pid, o.mtu = 1, 576; o.plan, _ = newPlan(defaultCIDR, "", false) })},
		{"1 --mac 02:00:5e:10:00:01", defaults(func(o *options) { o.pid, o.mac = 1, []byte{2, 0, 0x5e, 0x10, 0, 1} })},
		{"1 --dns 192.0.2.53 --dns=[2001:db8::53]:5353 --dns 2001:db8::1", defaults(func(o *options) {
			o.pid = 1
			o.upstreams = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.53:53"), netip.MustParseAddrPort("[2001:db8::53]:5353"), netip.MustParseAddrPort("[2001:db8::1]:53")}
		})},
		{"1 --no-dns --host-loopback --outbound-addr eth0 --outbound-addr6 2001:db8::9", defaults(func(o *options) {
			o.pid, o.dns, o.hostLoopback = 1, false, true
			o.outbound = forwarder.Outbound{Interface4: "eth0", Addr6: netip.MustParseAddr("2001:db8::9")}
		})},
		{"1 --ready-fd=3 --exit-fd 4 --pid-file /p", defaults(func(o *options) { o.pid, o.readyFD, o.exitFD, o.pidFile = 1, 3, 4, "/p" })},
		{"1 --log-level debug --log-format json --pcap f --pcap-size 2G --no-sandbox", defaults(func(o *options) {
			o.pid, o.logLevel, o.logFormat, o.pcap, o.pcapSize, o.sandbox = 1, slog.LevelDebug, "json", "f", 2<<30, false
		})},
		{"run", defaults(func(o *options) { o.command, o.logLevel, o.argv = cmdRun, slog.LevelWarn, []string{"/bin/zsh"} })},
		{"run --", defaults(func(o *options) { o.command, o.logLevel, o.argv = cmdRun, slog.LevelWarn, []string{"/bin/zsh"} })},
		{"run curl --mtu 9", defaults(func(o *options) { o.command, o.logLevel, o.argv = cmdRun, slog.LevelWarn, line("curl --mtu 9") })},
		{"run --log-level info --mtu 1500 -- --odd -x", defaults(func(o *options) { o.command, o.mtu, o.argv = cmdRun, 1500, line("--odd -x") })},
		{"run --log-level=info --tap-name eth7 sh -- -c", defaults(func(o *options) { o.command, o.tapName, o.argv = cmdRun, "eth7", line("sh -- -c") })},
		{"1 -p 8080:80 -p 127.0.0.1:5353:53/udp --port-path stack", defaults(func(o *options) {
			o.pid, o.portPath = 1, portdriver.PathStack
			o.publish = []portdriver.Spec{
				{Proto: "tcp", HostPort: 8080, ContainerPort: 80},
				{Proto: "udp", Host: netip.MustParseAddr("127.0.0.1"), HostPort: 5353, ContainerPort: 53},
			}
		})},
		{"run -p auto:80 --api-socket none ls", defaults(func(o *options) {
			o.command, o.logLevel, o.argv, o.apiSocket = cmdRun, slog.LevelWarn, line("ls"), apiNone
			o.auto = []portdriver.AutoConfig{{TCP: true, UDP: true, Include: []portdriver.PortRange{{First: 80, Last: 80}}}}
		})},
		{"1 --api-socket /s --pprof", defaults(func(o *options) { o.pid, o.apiSocket, o.pprof = 1, "/s", true })},
		{"port add --socket /s 8080:80 9000", &options{command: cmdAsk, question: &question{verb: "add", socket: "/s", specs: line("8080:80 9000")}}},
		{"port list --json", &options{command: cmdAsk, question: &question{verb: "list", json: true}}},
		{"port remove 3 --drain 4", &options{command: cmdAsk, question: &question{verb: "remove", drain: true, ids: []int{3, 4}}}},
		{"info", &options{command: cmdAsk, question: &question{verb: "info"}}},
		{"port --help", &options{command: cmdHelp}},
		{"port add -h", &options{command: cmdHelp}},
		{"help", &options{command: cmdHelp}},
		{"help run", &options{command: cmdHelp}},
		{"--help", &options{command: cmdHelp}},
		{"1 -h", &options{command: cmdHelp}},
		{"run --help", &options{command: cmdHelp}},
		{"run ls --help", defaults(func(o *options) { o.command, o.logLevel, o.argv = cmdRun, slog.LevelWarn, line("ls --help") })},
		{"version", &options{command: cmdVersion}},
		{"--version", &options{command: cmdVersion}},
	} {
		got, err := parse(line(tt.args), environment(map[string]string{"SHELL": "/bin/zsh"}))
		if err != nil {
			t.Errorf("%s: %v", tt.args, err)
		} else if !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s:\n got %+v\nwant %+v", tt.args, got, tt.want)
		}
	}
}

func TestParseRunWithoutSHELL(t *testing.T) {
	o, err := parse(line("run"), environment(nil))
	if err != nil || !reflect.DeepEqual(o.argv, []string{"/bin/sh"}) {
		t.Errorf("argv %q, %v", o.argv, err)
	}
}

// What is refused, and the words that tell the user why.
func TestParseRefuses(t *testing.T) {
	var b strings.Builder
	for _, args := range []string{
		"", "--mtu 1500", "1 a b", "0", "99999999999", "--netns-path= x", "--nonsense 1", "1 --mtu", "1 --mtu x",
		"1 --mtu 1000", "1 --mtu 65521", "1 --mtu 500 --no-ipv6", "1 --queues 0", "1 --queues 17",
		"1 aninterfacename16", "1 a/b", "1 lo", "1 tap0 --tap-name tap1", "run --tap-name aninterfacename16",
		"1 --mac 1:2", "1 --mac 01:00:5e:00:00:01", "1 --mac 00:00:00:00:00:00", "1 --mac 52:55:0a:00:02:02",
		"1 --cidr 10.0.2.0/26", "1 --cidr 10.0.2.0/7", "1 --cidr 10.0.2.5/24", "1 --cidr fd00::/64", "1 --cidr x",
		"1 --cidr 127.0.0.0/24", "1 --cidr 169.254.0.0/16", "1 --cidr 240.0.0.0/8",
		"1 --cidr6 fd00::/113", "1 --cidr6 fd00::1/64", "1 --cidr6 fe80::/64", "1 --cidr6 ::/64", "1 --cidr6 10.0.2.0/24", "1 --cidr6 fd01::/64 --no-ipv6",
		"1 --dns localhost", "1 --dns 0.0.0.0", "1 --dns 1.2.3.4:0", "1 --dns 1.2.3.4 --no-dns",
		"1 --ready-fd 1", "1 --ready-fd=-1", "1 --exit-fd 2", "1 --ready-fd 3 --exit-fd 3", "1 --ready-fd x",
		"1 --outbound-addr ::1", "1 --outbound-addr6 10.0.0.1", "1 --outbound-addr a/b", "1 --outbound-addr 127.0.0.1", "1 --outbound-addr lo", "1 --outbound-addr6 ::1", "1 --pid-file=", "1 --pcap=", "1 --pcap-size 1G", "1 --pcap f --pcap-size 1", "1 --pcap f --pcap-size 1T",
		"1 --log-level loud", "1 --log-format xml", "version now", "--mtu 1500 run ls",
		"run --netns-path /x", "run --exit-fd 0", "1 --ipv6=maybe", "1 --no-ipv6=maybe",
		"1 -p x", "1 -p 1:2:3:4:5", "1 -p 80-70:80-70", "1 -p 8080:80/sctp", "1 -p 70000:80", "1 -p auto:", "1 -p ", "1 --port-path fast", "1 --api-socket=",
		"1 --pprof --api-socket none", "port", "port frob", "port add", "port remove", "port remove x", "port remove 0", "port remove 1 --json", "port add auto:80", "port list 1",
		"port list --drain", "port list --socket=", "info now", "--mtu 1500 port list",
	} {
		o, err := parse(line(args), environment(nil))
		if err == nil {
			t.Errorf("%q: accepted: %+v", args, o)
			continue
		}
		if _, ok := err.(usageError); !ok {
			t.Errorf("%q: %T is no usageError", args, err)
		}
		b.WriteString("usernet " + args + "\n    " + err.Error() + "\n")
	}
	golden(t, "refused.golden", b.String())
}

// Whatever argv is, parse answers with options that hold what the rest relies on, or a usageError.
func FuzzArgv(f *testing.F) {
	for _, s := range []string{"1", "run\x00ls", "--mtu=9\x001", "1\x00--cidr\x0010.0.0.0/8", "--dns\x00[::1%lo]:1\x001", "run\x00--\x00-x", "1\x00--pcap=a\x00--pcap-size=9999999G"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		o, err := parse(strings.Split(s, "\x00"), environment(nil))
		if err != nil {
			if _, ok := err.(usageError); !ok || err.Error() == "" {
				t.Fatalf("%q: %T %v", s, err, err)
			}
			return
		}
		switch o.command {
		case cmdRun:
			if len(o.argv) == 0 || o.argv[0] == "" {
				t.Fatalf("%q: no command", s)
			}
		case cmdAttach:
			if (o.pid > 0) == (o.path != "") {
				t.Fatalf("%q: pid %d, path %q", s, o.pid, o.path)
			}
		default:
			return
		}
		if len(o.tapName) < 1 || len(o.tapName) > 15 || o.mtu < minMTU4 || o.mtu > maxMTU || o.pcapSize <= 0 {
			t.Fatalf("%q: %+v", s, o)
		}
		for _, a := range append(o.plan.dns(), o.plan.gateway4, o.plan.container4) {
			if a.Is4() && !o.plan.net4.Contains(a) || a.Is6() && !o.plan.net6.Contains(a) {
				t.Fatalf("%q: %s is outside of the plan", s, a)
			}
		}
	})
}
