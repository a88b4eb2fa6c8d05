package main

import (
	"net/netip"
	"strings"
	"testing"
)

func TestShadowed(t *testing.T) {
	networks := map[string][]netip.Prefix{
		"eth0": {netip.MustParsePrefix("10.0.2.15/24"), netip.MustParsePrefix("fe80::1/64")},
		"vpn":  {netip.MustParsePrefix("10.9.8.7/8"), netip.MustParsePrefix("fd00::9/48")},
	}
	for ours, want := range map[string]string{
		"10.0.2.0/24":    "10.0.2.0/24 of eth0, 10.0.0.0/8 of vpn",
		"10.0.3.0/24":    "10.0.0.0/8 of vpn",
		"192.168.0.0/16": "",
		"fd00::/64":      "fd00::/48 of vpn",
		"fd01::/64":      "",
	} {
		if got := strings.Join(shadowed(netip.MustParsePrefix(ours), networks), ", "); got != want {
			t.Errorf("%s shadows %q, want %q", ours, got, want)
		}
	}
	if got := shadowed(netip.Prefix{}, networks); got != nil {
		t.Errorf("no network shadows %q", got)
	}
}
