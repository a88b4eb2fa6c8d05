package forwarder

import (
	"net/netip"
	"syscall"
	"testing"
)

func testPolicy(hostLoopback bool) Policy {
	return Policy{
		Subnet4: netip.MustParsePrefix("10.0.2.0/24"), Subnet6: netip.MustParsePrefix("fd00::/64"),
		Gateway4: netip.MustParseAddr("10.0.2.2"), Gateway6: netip.MustParseAddr("fd00::2"),
		DNS4: netip.MustParseAddr("10.0.2.3"), DNS6: netip.MustParseAddr("fd00::3"),
		HostAlias4: netip.MustParseAddr("169.254.1.2"), HostAlias6: netip.MustParseAddr("fd00::4"),
		HostLoopback: hostLoopback,
	}
}

func TestResolve(t *testing.T) {
	const (
		me4, me6 = "10.0.2.100:4000", "[fd00::100]:4000"
		drop     = "drop"
		refused  = "refuse (connection refused)"
		noHost   = "refuse (no route to host)"
		noNet    = "refuse (network is unreachable)"
	)
	host := HostAddrs{V4: netip.MustParseAddr("192.0.2.7"), V6: netip.MustParseAddr("2001:db8::7")}
	open, shut := testPolicy(true), testPolicy(false)
	for _, c := range []struct {
		what     string
		proto    uint8
		src, dst string
		shut     string // without HostLoopback
		open     string // with it, if that differs
	}{
		{"the world", protoTCP, me4, "198.51.100.1:80", "198.51.100.1:80", ""},
		{"the world by IPv6", protoUDP, me6, "[2001:db8::1]:80", "[2001:db8::1]:80", ""},
		{"an echo to the world", protoICMP, "10.0.2.100:0", "198.51.100.1:0", "198.51.100.1:0", ""},
		{"another private network", protoUDP, me4, "192.168.1.1:80", "192.168.1.1:80", ""},
		{"the cloud's metadata service, as on the host", protoTCP, me4, "169.254.169.254:80", "169.254.169.254:80", ""},
		{"a nested network as the source", protoUDP, "172.17.0.2:1", "198.51.100.1:80", "198.51.100.1:80", ""},

		{"the gateway", protoTCP, me4, "10.0.2.2:80", refused, "127.0.0.1:80"},
		{"the gateway", protoUDP, me6, "[fd00::2]:80", refused, "[::1]:80"},
		{"an echo to the gateway", protoICMP, me4, "10.0.2.2:0", drop, ""},
		{"DNS without the stack's server", protoUDP, me4, "10.0.2.3:53", refused, ""},
		{"the DNS address's other ports", protoTCP, me4, "10.0.2.3:80", refused, ""},
		{"the DNS address's other ports", protoUDP, me6, "[fd00::3]:5353", refused, ""},
		{"an echo to the DNS address", protoICMPv6, me6, "[fd00::3]:0", drop, ""},
		{"the host's alias", protoTCP, me4, "169.254.1.2:8080", "192.0.2.7:8080", ""},
		{"the host's alias", protoUDP, me6, "[fd00::4]:8080", "[2001:db8::7]:8080", ""},
		{"an echo to the host", protoICMP, me4, "169.254.1.2:0", "192.0.2.7:0", ""},

		{"loopback", protoTCP, me4, "127.0.0.1:80", noNet, ""},
		{"loopback", protoTCP, me4, "127.255.1.2:80", noNet, ""},
		{"loopback", protoUDP, me6, "[::1]:80", noNet, ""},
		{"loopback, echo", protoICMPv6, me6, "[::1]:0", noNet, ""},
		{"loopback, mapped", protoTCP, me6, "[::ffff:127.0.0.1]:80", noNet, ""},
		{"the gateway, mapped", protoTCP, me6, "[::ffff:10.0.2.2]:80", noNet, ""},
		{"loopback, IPv4-compatible", protoTCP, me6, "[::127.0.0.1]:80", noNet, ""},

		{"nobody on the link", protoTCP, me4, "10.0.2.50:80", noHost, ""},
		{"nobody on the link", protoTCP, me6, "[fd00::50]:80", noHost, ""},
		{"the router's anycast address", protoTCP, me6, "[fd00::]:80", noHost, ""},
		{"link-local", protoUDP, me6, "[fe80::1]:80", noHost, ""},
		{"the link's broadcast", protoUDP, me4, "10.0.2.255:80", drop, ""},
		{"the link's old broadcast", protoUDP, me4, "10.0.2.0:80", drop, ""},
		{"broadcast", protoUDP, me4, "255.255.255.255:67", drop, ""},
		{"unspecified", protoTCP, me4, "0.0.0.0:80", drop, ""},
		{"this network", protoTCP, me4, "0.1.2.3:80", drop, ""},
		{"unspecified", protoTCP, me6, "[::]:80", drop, ""},
		{"multicast", protoUDP, me4, "224.0.0.251:5353", drop, ""},
		{"multicast", protoUDP, me6, "[ff02::fb]:5353", drop, ""},
		{"class E", protoUDP, me4, "240.0.0.1:80", drop, ""},

		{"from loopback", protoUDP, "127.0.0.1:1", "198.51.100.1:80", drop, ""},
		{"from loopback", protoUDP, "[::1]:1", "[2001:db8::1]:80", drop, ""},
		{"from nobody", protoUDP, "0.0.0.0:1", "198.51.100.1:80", drop, ""},
		{"from multicast", protoUDP, "224.0.0.1:1", "198.51.100.1:80", drop, ""},
		{"from the link's broadcast", protoUDP, "10.0.2.255:1", "198.51.100.1:80", drop, ""},
		{"from the gateway", protoUDP, "10.0.2.2:1", "198.51.100.1:80", drop, ""},
		{"from the gateway", protoTCP, "[fd00::2]:1", "[2001:db8::1]:80", drop, ""},
		{"from the DNS address", protoTCP, "[fd00::3]:1", "[2001:db8::1]:80", drop, ""},
		{"from the host's alias", protoUDP, "169.254.1.2:1", "198.51.100.1:80", drop, ""},
		{"from a mapped address", protoUDP, "[::ffff:10.0.2.100]:1", "[2001:db8::1]:80", drop, ""},
		{"from the other family", protoUDP, me6, "198.51.100.1:80", drop, ""},
		{"with a zone", protoUDP, me6, "[2001:db8::1%eth0]:80", drop, ""},
		{"from port 0", protoUDP, "10.0.2.100:0", "198.51.100.1:80", drop, ""},
		{"to port 0", protoTCP, me4, "198.51.100.1:0", refused, ""},
		{"to nothing", protoTCP, me4, "", drop, ""},
	} {
		var f Flow
		f.Proto, f.Src = c.proto, netip.MustParseAddrPort(c.src)
		if c.dst != "" {
			f.Dst = netip.MustParseAddrPort(c.dst)
		}
		if c.open == "" {
			c.open = c.shut
		}
		for _, v := range []struct {
			p    *Policy
			want string
		}{{&shut, c.shut}, {&open, c.open}} {
			dst, verdict := v.p.Resolve(f, host)
			got := verdict.String()
			if verdict.Action == Forward {
				got = dst.String()
			} else if dst.IsValid() {
				t.Errorf("%s: %v with destination %v", c.what, verdict, dst)
			}
			if got != v.want {
				t.Errorf("%s: %v with HostLoopback %v: got %s, want %s", c.what, f, v.p.HostLoopback, got, v.want)
			}
		}
	}
}

// The alias is never more than the host's own address, whatever that is taken for.
func TestResolveAliasOfHostWithout(t *testing.T) {
	p := testPolicy(true)
	for _, host := range []HostAddrs{
		{},
		{V4: netip.MustParseAddr("127.0.0.1"), V6: netip.IPv6Loopback()},
		{V4: netip.IPv4Unspecified(), V6: netip.IPv6Unspecified()},
		{V4: netip.MustParseAddr("2001:db8::7"), V6: netip.MustParseAddr("192.0.2.7")},
		{V6: netip.MustParseAddr("::ffff:127.0.0.1")},
		{V4: netip.MustParseAddr("169.254.3.4"), V6: netip.MustParseAddr("fe80::1")},
	} {
		for _, alias := range []string{"169.254.1.2:80", "[fd00::4]:80"} {
			f := Flow{protoTCP, netip.MustParseAddrPort("10.0.2.100:4000"), netip.MustParseAddrPort(alias)}
			if f.Dst.Addr().Is6() {
				f.Src = netip.MustParseAddrPort("[fd00::100]:4000")
			}
			if _, v := p.Resolve(f, host); v != (Verdict{Refuse, syscall.EHOSTUNREACH}) {
				t.Errorf("%s with %v: %v", alias, host, v)
			}
		}
	}
}

// A policy without a plan at all keeps the host's loopback shut.
// An internal network reaches what the stack itself listens at, and nothing else.
func TestResolveInternal(t *testing.T) {
	p := testPolicy(false)
	p.Internal = true
	host := HostAddrs{V4: netip.MustParseAddr("192.0.2.7"), V6: netip.MustParseAddr("2001:db8::7")}
	for to, want := range map[string]string{
		"198.51.100.1:80": "refuse (network is unreachable)", "[2001:db8::1]:80": "refuse (network is unreachable)",
		"169.254.1.2:80": "refuse (network is unreachable)", "[fd00::4]:80": "refuse (network is unreachable)",
		"10.0.2.9:80": "refuse (network is unreachable)", "10.0.2.2:80": "refuse (connection refused)", "224.0.0.1:80": "drop",
	} {
		dst := netip.MustParseAddrPort(to)
		src := netip.MustParseAddrPort("10.0.2.100:4000")
		if dst.Addr().Is6() {
			src = netip.MustParseAddrPort("[fd00::100]:4000")
		}
		if _, v := p.Resolve(Flow{protoTCP, src, dst}, host); v.String() != want {
			t.Errorf("%s: %v, want %s", to, v, want)
		}
	}
}

func TestResolveZeroPolicy(t *testing.T) {
	var p Policy
	f := Flow{protoTCP, netip.MustParseAddrPort("10.0.2.100:1"), netip.MustParseAddrPort("127.0.0.1:80")}
	if _, v := p.Resolve(f, HostAddrs{}); v != (Verdict{Refuse, syscall.ENETUNREACH}) {
		t.Errorf("loopback: %v", v)
	}
	f.Dst = netip.MustParseAddrPort("198.51.100.1:80")
	if dst, v := p.Resolve(f, HostAddrs{}); v.Action != Forward || dst != f.Dst {
		t.Errorf("the world: %v, %v", dst, v)
	}
}

func TestResolveSmallSubnets(t *testing.T) {
	for _, c := range []struct {
		subnet, dst string
		want        Action
	}{
		{"10.0.2.0/30", "10.0.2.3:1", Drop},
		{"10.0.2.0/31", "10.0.2.1:1", Refuse}, // RFC 3021: two hosts, no broadcast
		{"10.0.2.7/32", "10.0.2.7:1", Refuse},
		{"10.0.0.0/13", "10.7.255.255:1", Drop},
		{"10.0.0.0/13", "10.7.255.254:1", Refuse},
		{"10.0.0.0/13", "10.8.0.0:1", Forward},
	} {
		p := Policy{Subnet4: netip.MustParsePrefix(c.subnet)}
		f := Flow{protoUDP, netip.MustParseAddrPort("172.16.0.1:1"), netip.MustParseAddrPort(c.dst)}
		if _, v := p.Resolve(f, HostAddrs{}); v.Action != c.want {
			t.Errorf("%s in %s: %v", c.dst, c.subnet, v)
		}
	}
}

// FuzzResolve holds the promise that matters most: nothing reaches the host's loopback, or the
// unspecified address (which Linux takes for the loopback), but by the gateway with HostLoopback.
func FuzzResolve(f *testing.F) {
	for _, a := range []string{"127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::127.0.0.1", "10.0.2.2", "fd00::2", "169.254.1.2", "fd00::4", "198.51.100.1"} {
		b := netip.MustParseAddr(a).AsSlice()
		f.Add(uint8(protoTCP), []byte{10, 0, 2, 100}, b, uint16(1), uint16(80), []byte{192, 0, 2, 7}, b, false)
		f.Add(uint8(protoUDP), netip.MustParseAddr("fd00::100").AsSlice(), b, uint16(1), uint16(80), b, b, true)
	}
	f.Fuzz(func(t *testing.T, proto uint8, src, dst []byte, sport, dport uint16, host4, host6 []byte, hostLoopback bool) {
		s, _ := netip.AddrFromSlice(src)
		d, _ := netip.AddrFromSlice(dst)
		var h HostAddrs
		h.V4, _ = netip.AddrFromSlice(host4)
		h.V6, _ = netip.AddrFromSlice(host6)
		p := testPolicy(hostLoopback)
		to, v := p.Resolve(Flow{proto, netip.AddrPortFrom(s, sport), netip.AddrPortFrom(d, dport)}, h)
		if v.Action != Forward {
			if to.IsValid() {
				t.Fatalf("%v, but to %v", v, to)
			}
			if (v.Action == Refuse) != (v.Reason != 0) {
				t.Fatalf("%v with reason %d", v, v.Reason)
			}
			return
		}
		a := to.Addr().Unmap()
		loopback := a.IsLoopback() || a.IsUnspecified() || a.Is4() && (a.As4()[0] == 127 || a.As4()[0] == 0)
		if loopback && !(hostLoopback && (d == p.Gateway4 || d == p.Gateway6)) {
			t.Fatalf("%v reaches %v", d, to)
		}
		if !to.IsValid() || to.Addr().IsMulticast() || to.Port() != dport || to.Addr().Is4() != d.Is4() {
			t.Fatalf("%v goes to %v", d, to)
		}
	})
}
