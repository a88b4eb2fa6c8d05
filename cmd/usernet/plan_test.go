package main

import (
	"fmt"
	"testing"
)

func TestPlan(t *testing.T) {
	for _, tt := range []struct {
		cidr, cidr6 string
		want        string
	}{
		{"10.0.2.0/24", "fd00::/64", "10.0.2.2 10.0.2.3 10.0.2.100 169.254.1.2 fd00::2 fd00::3 fd00::100 fd00::4 fe80::2 52:55:0a:00:02:02"},
		{"192.168.7.128/25", "2001:db8:1:2::/112", "192.168.7.130 192.168.7.131 192.168.7.228 169.254.1.2 2001:db8:1:2::2 2001:db8:1:2::3 2001:db8:1:2::100 2001:db8:1:2::4 fe80::2 52:55:c0:a8:07:82"},
		{"10.0.0.0/8", "fd00::/16", "10.0.0.2 10.0.0.3 10.0.0.100 169.254.1.2 fd00::2 fd00::3 fd00::100 fd00::4 fe80::2 52:55:0a:00:00:02"},
		{"172.16.0.0/12", "", "172.16.0.2 172.16.0.3 172.16.0.100 169.254.1.2 invalid IP invalid IP invalid IP invalid IP invalid IP 52:55:ac:10:00:02"},
	} {
		p, err := newPlan(tt.cidr, tt.cidr6, tt.cidr6 != "")
		if err != nil {
			t.Errorf("%s %s: %v", tt.cidr, tt.cidr6, err)
			continue
		}
		got := fmt.Sprint(p.gateway4, " ", p.dns4, " ", p.container4, " ", p.host4, " ",
			p.gateway6, " ", p.dns6, " ", p.container6, " ", p.host6, " ", p.linkLocal, " ", p.gatewayMAC())
		if got != tt.want {
			t.Errorf("%s %s:\n got %s\nwant %s", tt.cidr, tt.cidr6, got, tt.want)
		}
		if n := len(p.dns()); n != map[bool]int{true: 2, false: 1}[tt.cidr6 != ""] {
			t.Errorf("%s: %d resolvers", tt.cidr, n)
		}
		if withLen(p.dns6, p.net6).IsValid() != (tt.cidr6 != "") {
			t.Errorf("%s: %v", tt.cidr, withLen(p.dns6, p.net6))
		}
	}
}
