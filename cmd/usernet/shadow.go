package main

import (
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// warnShadowed says once which of the host's own networks the container cannot reach, because it takes
// their addresses for its neighbours'. 10.0.2.0/24 is what virtual machines have as well.
func warnShadowed(p plan, log *slog.Logger) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return // a warning that nobody can count on
	}
	networks := map[string][]netip.Prefix{}
	for _, i := range interfaces {
		if i.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, _ := i.Addrs()
		for _, a := range addrs {
			if network, err := netip.ParsePrefix(a.String()); err == nil {
				networks[i.Name] = append(networks[i.Name], network)
			}
		}
	}
	for _, family := range []struct {
		remedy string
		ours   netip.Prefix
	}{{"choose others with --cidr", p.net4}, {"choose others with usernet's own --cidr6, or do without IPv6", p.net6}} {
		if hidden := shadowed(family.ours, networks); len(hidden) > 0 {
			log.Warn("networks of the host are shadowed: the container's own addresses overlap them, so that it does not reach them; "+family.remedy,
				"own", family.ours, "shadowed", strings.Join(hidden, ", "))
		}
	}
}

// shadowed lists those networks, by interface, that overlap ours, which may be the zero Prefix.
func shadowed(ours netip.Prefix, networks map[string][]netip.Prefix) []string {
	var hidden []string
	for _, name := range slices.Sorted(maps.Keys(networks)) {
		for _, n := range networks[name] {
			if ours.IsValid() && n.Overlaps(ours) {
				hidden = append(hidden, n.Masked().String()+" of "+name)
			}
		}
	}
	return hidden
}
