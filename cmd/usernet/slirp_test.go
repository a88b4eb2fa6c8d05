package main

import (
	"io"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/cmd/usernet/slirp4netns"
)

func TestSlirpArgv(t *testing.T) {
	for line, want := range map[string]string{
		"slirp4netns -c 1":               "slirp4netns -c 1",
		"/opt/bin/slirp4netns":           "/opt/bin/slirp4netns",
		"usernet slirp4netns --help":     "slirp4netns --help",
		"/bin/slirp4netns slirp4netns":   "/bin/slirp4netns slirp4netns",
		"usernet -r 3 1 tap0":            "usernet -r 3 1 tap0",
		"usernet 1 tap0":                 "",
		"usernet run slirp4netns -c 1":   "",
		"usernet":                        "",
		"slirp4netns-old 1":              "",
		"/opt/slirp4netns/usernet 1 tap": "",
	} {
		argv, is := slirpArgv(strings.Fields(line))
		if got := strings.Join(argv, " "); got != want || is != (want != "") {
			t.Errorf("%s: %q, %v", line, got, is)
		}
	}
}

// The dialect's own defaults, in usernet's terms; and what its flags change.
func TestSlirpOptions(t *testing.T) {
	defaults := func(change func(*options)) *options {
		o := &options{
			pid: 1, tapFD: -1, tapName: "tap0", mtu: 1500, mtuAgreed: true, keepIPv6Off: true, queues: 1, hostLoopback: true, portPath: "stack", apiSocket: "none",
			dns: true, readyFD: -1, exitFD: -1, looseFDs: true, logLevel: 4, logFormat: "text", sandbox: true,
			plan: planOf(netip.MustParsePrefix("10.0.2.0/24"), netip.Prefix{}),
		}
		o.outbound.ToLoopback = true
		change(o)
		return o
	}
	plan6 := planOf(netip.MustParsePrefix("10.0.2.0/24"), netip.MustParsePrefix("fd00::/64"))
	for _, tt := range []struct {
		args     string
		want     func(*options)
		warnings int
	}{
		{"1", func(*options) {}, 0},
		{"--enable-sandbox --enable-seccomp 1", func(*options) {}, 0},
		{"-c -r 3 -e 4 -m 65521 -6 1 eth0", func(o *options) {
			o.configure, o.portPath, o.readyFD, o.exitFD, o.mtu, o.plan, o.tapName = true, "auto", 3, 4, 65521, plan6, "eth0"
		}, 0},
		{"-6 -m 1280 1", func(o *options) { o.mtu, o.plan = 1280, plan6 }, 0},
		{"-6 -m 1279 1", func(o *options) { o.mtu = 1279 }, 1},
		{"--disable-host-loopback --disable-dns -a /s 1", func(o *options) { o.hostLoopback, o.dns, o.apiSocket = false, false, "/s" }, 0},
		{"--cidr=16.0.0.0/4 1", func(o *options) { o.plan = planOf(netip.MustParsePrefix("16.0.0.0/4"), netip.Prefix{}) }, 0},
		{"--outbound-addr=192.0.2.1 --outbound-addr6 eth0 1", func(o *options) {
			o.outbound.Addr4, o.outbound.Interface6 = netip.MustParseAddr("192.0.2.1"), "eth0"
		}, 0},
		{"--outbound-addr=lo --outbound-addr6=lo 1", func(o *options) {
			o.outbound.Addr4, o.outbound.Addr6 = netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()
		}, 0},
		{"--netns-type=tapfd 5", func(o *options) { o.pid, o.tapFD = 0, 5 }, 0},
		{"--target-type=bess /s", func(o *options) { o.pid, o.bess = 0, "/s" }, 0},
	} {
		s, err := slirp4netns.Parse(append([]string{"slirp4netns"}, strings.Fields(tt.args)...), exists)
		if err != nil {
			t.Fatalf("%s: %v", tt.args, err)
		}
		o, err := slirpOptions(s)
		if err != nil {
			t.Errorf("%s: %v", tt.args, err)
			continue
		}
		o.banner = ""
		if want := defaults(tt.want); !reflect.DeepEqual(o, want) || len(s.Warnings) != tt.warnings {
			t.Errorf("%s:\n got %+v\nwant %+v\nwarnings %q", tt.args, o, want, s.Warnings)
		}
	}
}

// What slirp4netns would let happen, and find out later or not at all.
func TestSlirpOptionsRefuse(t *testing.T) {
	for args, why := range map[string]string{
		"--cidr=127.0.0.0/8 1":                 "loopback",
		"--cidr=128.0.0.0/1 1":                 "link-local",
		"--cidr=240.0.0.0/8 1":                 "multicast or reserved",
		"1 lo":                                 "loopback interface",
		"1 a/b":                                "no slash",
		"-c --macaddress=52:55:0a:00:02:02 1":  "the gateway's",
		"--outbound-addr=::1 1":                "outbound-addr has to be valid ipv4 address",
		"--outbound-addr6=127.0.0.1 1":         "outbound-addr6 has to be valid ipv6 address",
		"--outbound-addr6=::ffff:127.0.0.1 1":  "outbound-addr6 has to be valid ipv6 address",
		"--outbound-addr=averylonginterface 1": "outbound-addr has to be valid",
	} {
		s, err := slirp4netns.Parse(append([]string{"slirp4netns"}, strings.Fields(args)...), exists)
		if err != nil {
			t.Fatalf("%s: %v", args, err)
		}
		if o, err := slirpOptions(s); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %+v, %v; want %q", args, o, err, why)
		}
	}
}

// A ready descriptor that is none is nobody's mistake; an exit descriptor that is none is.
func TestTakeLoose(t *testing.T) {
	r, w := pipe(t)
	closed, _ := pipe(t)
	bad := int(closed.Fd())
	closed.Close()
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC) // as the runtime has one
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(epoll)
	for _, fd := range []int{bad, epoll, -1} {
		given, err := takeInherited(&options{readyFD: fd, exitFD: -1, looseFDs: true})
		if err != nil || given.ready != nil || given.exit != nil {
			t.Errorf("ready-fd %d: %+v, %v", fd, given, err)
		}
	}
	for _, fd := range []int{bad, epoll} {
		if given, err := takeInherited(&options{readyFD: -1, exitFD: fd, looseFDs: true}); err == nil || !strings.Contains(err.Error(), strconv.Itoa(fd)+" is not open") {
			t.Errorf("exit-fd %d: %+v, %v", fd, given, err)
		}
	}
	if given, err := takeInherited(&options{readyFD: bad, exitFD: bad, looseFDs: true}); err == nil || !strings.Contains(err.Error(), "both") {
		t.Errorf("one descriptor for both: %+v, %v", given, err)
	}
	// Copies, which takeInherited's files own.
	ready, err1 := unix.Dup(int(w.Fd()))
	exit, err2 := unix.Dup(int(r.Fd()))
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	given, err := takeInherited(&options{readyFD: ready, exitFD: exit, looseFDs: true})
	if err != nil || int(given.exit.Fd()) != exit {
		t.Fatalf("%+v, %v", given, err)
	}
	defer given.exit.Close()
	w.Close()
	if err := sayReady(given.ready); err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "1" {
		t.Errorf("%q, %v", b, err)
	}
}
