package slirp4netns

import (
	"errors"
	"flag"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares text with a file of testdata.
func golden(t *testing.T, name, text string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if text != string(want) {
		t.Errorf("%s differs; if that is meant, run go test -update and look at the diff. Now:\n%s", path, text)
	}
}

// there is a file system in which only some paths lead somewhere.
func there(path string) error {
	switch path {
	case "/run/netns/blue", "/proc/7/ns/user", "5":
		return nil
	}
	return &os.PathError{Op: "stat", Path: path, Err: syscall.ENOENT}
}

func parse(args string) (*Options, error) {
	return Parse(append([]string{"slirp4netns"}, strings.Fields(args)...), there)
}

func defaults(change func(*Options)) *Options {
	o := &Options{
		Program: "slirp4netns", TapFD: -1, ExitFD: -1, ReadyFD: -1, MTU: 1500, TapName: "tap0",
		CIDR: netip.MustParsePrefix("10.0.2.0/24"),
	}
	change(o)
	return o
}

// Each caller's own command line, and the forms that getopt_long has.
func TestParse(t *testing.T) {
	for _, tt := range []struct {
		args string
		want func(*Options)
	}{
		{"1 tap0", func(o *Options) { o.PID = 1 }},
		{"1", func(o *Options) { o.PID = 1 }},
		// podman
		{"--disable-host-loopback --mtu=65520 --enable-sandbox --enable-seccomp --enable-ipv6 -c -e 3 -r 4 --api-socket /tmp/1.net --netns-type=path /run/netns/blue tap0", func(o *Options) {
			o.DisableLoopback, o.MTU, o.Sandbox, o.Seccomp, o.IPv6, o.Configure = true, 65520, true, true, true, true
			o.ExitFD, o.ReadyFD, o.APISocket, o.Path = 3, 4, "/tmp/1.net", "/run/netns/blue"
		}},
		{"--mtu=1400 --enable-sandbox --enable-seccomp --cidr=10.9.8.0/24 --outbound-addr=203.0.113.1 -c -e 3 -r 4 27576 tap0", func(o *Options) {
			o.MTU, o.Sandbox, o.Seccomp, o.Configure, o.ExitFD, o.ReadyFD, o.PID = 1400, true, true, true, 3, 4, 27576
			o.CIDR, o.Outbound4 = netip.MustParsePrefix("10.9.8.0/24"), "203.0.113.1"
		}},
		// buildah
		{"--mtu 65520 -r 3 -c 77 tap0", func(o *Options) { o.MTU, o.ReadyFD, o.Configure, o.PID = 65520, 3, true, 77 }},
		// rootlesskit
		{"--mtu 65520 -r 3 --disable-host-loopback --cidr 10.1.0.0/16 --api-socket /x/.s4nn.sock --enable-sandbox --enable-seccomp --enable-ipv6 7 tap0", func(o *Options) {
			o.MTU, o.ReadyFD, o.DisableLoopback, o.CIDR, o.PID = 65520, 3, true, netip.MustParsePrefix("10.1.0.0/16"), 7
			o.APISocket, o.Sandbox, o.Seccomp, o.IPv6 = "/x/.s4nn.sock", true, true, true
		}},
		{"--mtu 1500 -r 3 --userns-path=/proc/7/ns/user --netns-type=path /run/netns/blue tap0", func(o *Options) {
			o.ReadyFD, o.UsernsPath, o.Path = 3, "/proc/7/ns/user", "/run/netns/blue"
		}},
		// getopt_long
		{"-ce3 -r4 1", func(o *Options) { o.Configure, o.ExitFD, o.ReadyFD, o.PID = true, 3, 4, 1 }},
		{"-c6r3 1", func(o *Options) { o.Configure, o.IPv6, o.ReadyFD, o.PID = true, true, 3, 1 }},
		{"1 tap7 -c --mt 9000", func(o *Options) { o.PID, o.TapName, o.Configure, o.MTU = 1, "tap7", true, 9000 }},
		{"1 -c -- -tap", func(o *Options) { o.PID, o.Configure, o.TapName = 1, true, "-tap" }},
		{"--conf --disable-h --disable-d --enable-sa --enable-se --enable-i --u /proc/7/ns/user 1", func(o *Options) {
			o.PID, o.Configure, o.DisableLoopback, o.DisableDNS, o.Sandbox, o.Seccomp, o.IPv6 = 1, true, true, true, true, true, true
			o.UsernsPath = "/proc/7/ns/user"
		}},
		{"--no-host-loopback --create-sandbox 1", func(o *Options) { o.PID, o.DisableLoopback, o.Sandbox = 1, true, true }},
		{"--outbound-addr eth0 --outbound-addr6=2001:db8::1 1", func(o *Options) { o.PID, o.Outbound4, o.Outbound6 = 1, "eth0", "2001:db8::1" }},
		{"-m 1400 --mtu=1 -m65521 1", func(o *Options) { o.PID, o.MTU = 1, 65521 }},
		{"-e 3 --exit-fd 0 +5", func(o *Options) { o.PID, o.ExitFD = 5, 0 }},
		{"-c --macaddress=2:0:0:0:0:aB 1", func(o *Options) {
			o.PID, o.Configure, o.MAC = 1, true, net.HardwareAddr{2, 0, 0, 0, 0, 0xab}
		}},
		{"--cidr=16.0.0.0/4 1", func(o *Options) { o.PID, o.CIDR = 1, netip.MustParsePrefix("16.0.0.0/4") }},
		{"--netns-type=tapfd 5 tap0", func(o *Options) { o.TapFD = 5 }},
		{"--netns-type tapfd 0", func(o *Options) { o.TapFD = 0 }},
		{"--netns-type= /run/netns/blue", func(o *Options) { o.Path = "/run/netns/blue" }},
		{"--netns-type=anything 5", func(o *Options) { o.Path = "5" }},
		{"--target-type=netns 1", func(o *Options) { o.PID = 1 }},
		{"--target-type=bess --mtu 9000 /tmp/bess.sock", func(o *Options) { o.Bess, o.MTU = "/tmp/bess.sock", 9000 }},
		{"1 abcdefghijklmnop x", func(o *Options) {
			o.PID, o.TapName = 1, "abcdefghijklmno"
			o.Warnings = []string{"too many arguments", "the name of an interface has at most 15 octets: it is abcdefghijklmno"}
		}},
		{"--mtu 9 -h --nonsense", func(o *Options) { o.Command, o.MTU, o.CIDR = Help, 9, netip.Prefix{} }},
		{"-vh", func(o *Options) { o.Command, o.CIDR = Version, netip.Prefix{} }},
		{"--vers 1 2 3", func(o *Options) { o.Command, o.CIDR = Version, netip.Prefix{} }},
	} {
		o, err := parse(tt.args)
		if want := defaults(tt.want); err != nil || !reflect.DeepEqual(o, want) {
			t.Errorf("%s\n got %+v, %v\nwant %+v", tt.args, o, err, want)
		}
	}
}

// What is refused, in which words, and whether the help follows. Most lines are compared with slirp4netns's own by
// the tests of the built binary.
func TestGoldenRefused(t *testing.T) {
	var b strings.Builder
	for _, args := range []string{
		"", "-c", "abc tap0", "0 tap0", "-1 tap0", "-- -5 tap0", "99999999999 tap0", "5x tap0",
		"--bogus 1", "-z 1", "-", "--=1 1", "-e", "1 tap0 --exit-fd", "-e x 1", "-e -1 1", "-r-1 1", "--exit-fd= 1", "-r 2147483648 1", "-ce3r4 1",
		"-m 0 1", "-m 65522 1", "--mtu=1x 1", "--e 1", "--enable-s 1", "--c 1", "--d 1", "--n x 1", "--o x 1", "--m x 1", "--conf=3 1", "--no-host-loopback=1 1",
		"--cidr=24 1", "--cidr= 1", "--cidr=10.0.2.0/0 1", "--cidr=10.0.2.0/26 1", "--cidr=10.0.2.0/33 1", "--cidr=10.0.2.0/024 1", "--cidr=10.0.2.100/24 1",
		"--cidr=300.0.0.0/8 1", "--cidr=fd00::/64 1", "--cidr=10.0.2/24 1", "--cidr=10.0.2.0/+8 1", "--cidr=10.0.2.1000/24 1",
		"--macaddress=zz 1", "-c --macaddress=zz 1", "-c --macaddress=1:2:3:4:5 1", "-c --macaddress=2:0:0:0:0:0:1 1", "-c --macaddress=01:0:0:0:0:1 1", "-c --macaddress=0:0:0:0:0:0 1",
		"-c --macaddress= 1", "-c --macaddress=002:0:0:0:0:0 1",
		"--userns-path=/nowhere 1", "--netns-type=path /nowhere tap0", "--netns-type=tapfd x", "--netns-type=tapfd -c 5",
		"--outbound-addr= 1", "--outbound-addr6= 1",
		"--target-type=foo 1", "--target-type=bess /s tap0", "--target-type=bess -c /s", "--target-type=bess --netns-type=pid /s", "--target-type=bess --userns-path=/proc/7/ns/user /s",
	} {
		o, err := parse(args)
		var e *Error
		if !errors.As(err, &e) {
			t.Errorf("%q: %+v, %v", args, o, err)
			continue
		}
		b.WriteString("slirp4netns " + args + "\n")
		if e.Text != "" {
			b.WriteString("    " + strings.ReplaceAll(e.Text, "\n", "\n    ") + "\n")
		}
		if e.Usage {
			b.WriteString("    and the help\n")
		}
	}
	golden(t, "refused.golden", b.String())
}

// An empty word is no option and no number.
func TestEmptyWords(t *testing.T) {
	for _, args := range [][]string{{""}, {"", "tap0"}, {"--mtu", "", "1"}, {"--target-type=bess", ""}, {"--netns-type=path", ""}} {
		if o, err := Parse(append([]string{"slirp4netns"}, args...), there); err == nil {
			t.Errorf("%q: %+v", args, o)
		}
	}
}

func TestGoldenHelp(t *testing.T) { golden(t, "help.golden", HelpText("/usr/bin/slirp4netns")) }

// These are looked for by podman, rootlesskit and dockerd-rootless.sh; without one of them its option is not used, or they refuse to start.
func TestHelpSays(t *testing.T) {
	help := HelpText("slirp4netns")
	for _, o := range options {
		if o.name == "no-host-loopback" || o.name == "create-sandbox" {
			continue
		}
		if !strings.Contains(help, "--"+o.name) {
			t.Errorf("--%s is not in the help", o.name)
		}
		if o.short != 0 && !strings.Contains(help, "\n-"+string(o.short)+", --"+o.name) {
			t.Errorf("-%c is not in the help", o.short)
		}
	}
}

func TestGoldenVersion(t *testing.T) { golden(t, "version.golden", VersionText("v1.2.3-4-gabcdef0")) }

func TestGoldenBanner(t *testing.T) {
	p := Plan{
		Network: netip.MustParsePrefix("10.9.0.0/16"), Gateway: netip.MustParseAddr("10.9.0.2"), DNS: netip.MustParseAddr("10.9.0.3"),
		LeaseBegin: netip.MustParseAddr("10.9.0.15"), LeaseEnd: netip.MustParseAddr("10.9.0.30"), Container: netip.MustParseAddr("10.9.0.100"),
	}
	o := Options{MTU: 65520, APISocket: "/run/x.sock"}
	text := o.Banner(p)
	o.DisableLoopback, o.APISocket = true, ""
	golden(t, "banner.golden", text+"\n"+o.Banner(p))
}

func TestNetmask(t *testing.T) {
	for bits, want := range map[int]string{1: "128.0.0.0", 8: "255.0.0.0", 25: "255.255.255.128"} {
		if got := netmask(bits).String(); got != want {
			t.Errorf("/%d: %s", bits, got)
		}
	}
}

func TestFailure(t *testing.T) {
	pid, path := &Options{PID: 99}, &Options{Path: "/x"}
	why := func(errno syscall.Errno) error { return &os.PathError{Op: "open", Path: "/x", Err: errno} }
	for _, tt := range []struct {
		o    *Options
		err  error
		at   Stage
		want string
	}{
		{pid, syscall.ESRCH, Attaching, "/proc/99/ns/net: No such file or directory\nslirp4netns: no such process\nchild failed(1)\n"},
		{pid, why(syscall.ENOENT), Attaching, "slirp4netns: open /x: no such file or directory\n"}, // /dev/net/tun, say
		{path, syscall.ESRCH, Attaching, "slirp4netns: no such process\n"},
		{pid, why(syscall.ENOENT), Listening, "api_bindlisten: bind: No such file or directory\nslirp4netns: open /x: no such file or directory\nparent failed\n"},
		{pid, why(syscall.ENAMETOOLONG), Listening, "the specified API socket path is too long (>= 108)\nslirp4netns: open /x: file name too long\nparent failed\n"},
		{pid, errors.New("it is no socket"), Listening, "api_bindlisten: bind: it is no socket\nslirp4netns: it is no socket\nparent failed\n"},
	} {
		if got := tt.o.Failure(tt.err, tt.at); got != tt.want {
			t.Errorf("%v at %d: %q, want %q", tt.err, tt.at, got, tt.want)
		}
	}
}

// Whatever argv is, Parse answers with options that hold what the rest relies on, or with an *Error.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"1", "-ce3\x00-r4\x001\x00tap0", "--mtu\x001400\x001", "--mt=9\x001", "1\x00--\x00-x", "-c\x00--macaddress=2:0:0:0:0:1\x001", "--cidr=10.0.0.0/8\x001",
		"--target-type=bess\x00/s", "--netns-type=tapfd\x003", "--netns-type=path\x00/run/netns/blue", "-h", "--e\x001", "-\x00",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		o, err := Parse(append([]string{"slirp4netns"}, strings.Split(s, "\x00")...), there)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || !e.Usage && e.Text == "" {
				t.Fatalf("%q: %T %v", s, err, err)
			}
			return
		}
		if o.Command != Serve {
			return
		}
		targets := 0
		for _, is := range []bool{o.PID > 0, o.Path != "", o.TapFD >= 0, o.Bess != ""} {
			if is {
				targets++
			}
		}
		if targets != 1 || o.MTU < 1 || o.MTU > maxMTU || o.ExitFD < -1 || o.ReadyFD < -1 || len(o.TapName) > maxName ||
			o.MAC != nil && (len(o.MAC) != 6 || !o.Configure) || o.CIDR.Bits() < 1 || o.CIDR.Bits() > 25 || o.CIDR.Masked() != o.CIDR || !o.CIDR.Addr().Is4() {
			t.Fatalf("%q: %+v", s, o)
		}
	})
}
