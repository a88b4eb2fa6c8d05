package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// hostNames are what the container calls the host: podman's name and docker's.
var hostNames = []string{"host.containers.internal", "host.docker.internal"}

// resolvConfText is a resolv.conf that names our resolver and is otherwise the host's. One address is
// enough, and some C libraries ask all that they find.
func resolvConfText(server netip.Addr, search, options []string) string {
	text := fmt.Sprintf("# usernet's resolver, which asks the host's.\nnameserver %s\n", server)
	if len(search) > 0 {
		text += "search " + strings.Join(search, " ") + "\n"
	}
	if len(options) > 0 {
		text += "options " + strings.Join(options, " ") + "\n"
	}
	return text
}

// hostsText is the host's hosts file with the host's names in it, which replace such lines as it may have
// for them itself, and with the container's own name, unless the file knows that already (as
// 127.0.1.1 on many hosts, which is as good inside).
func hostsText(hosts string, p plan, hostname string) string {
	var b strings.Builder
	known := hostname == "" || strings.ContainsAny(hostname, " \t\n#")
	for line := range strings.Lines(hosts) {
		entry, comment, _ := strings.Cut(strings.TrimRight(line, "\n"), "#")
		words := strings.Fields(entry)
		keep := words
		if len(words) > 0 {
			keep = slices.DeleteFunc(slices.Clone(words), func(w string) bool { return slices.Contains(hostNames, strings.ToLower(w)) })
			known = known || slices.Contains(words[1:], hostname)
		}
		switch {
		case len(keep) == len(words):
			b.WriteString(strings.TrimRight(line, "\n") + "\n")
		case len(keep) > 1:
			line := strings.Join(keep, " ")
			if comment != "" {
				line += " #" + comment
			}
			b.WriteString(line + "\n")
		}
	}
	for _, a := range p.host() {
		fmt.Fprintf(&b, "%s %s\n", a, strings.Join(hostNames, " "))
	}
	if !known {
		for _, a := range valid(p.container4, p.container6) {
			fmt.Fprintf(&b, "%s %s\n", a, hostname)
		}
	}
	return b.String()
}
