package main

import (
	"slices"
	"strings"
)

// slirpShorts and slirpLongs are options of slirp4netns's that usernet's own command line does not have. Every program that starts
// slirp4netns gives it at least one of them, -r above all. Its other short options do not count: by hand they are a slip, and the
// dialect opens the host's loopback.
const slirpShorts = "er"

var slirpLongs = []string{
	"disable-dns", "disable-host-loopback", "enable-ipv6", "enable-sandbox", "enable-seccomp", "macaddress", "netns-type", "target-type",
}

// meansSlirp tells whether the arguments are those of a slirp4netns although the program is called usernet, as in podman's
// network_cmd_path = "/usr/local/bin/usernet".
func meansSlirp(args []string) bool {
	if len(args) == 0 || slices.Contains(ownCommands, args[0]) {
		return false // what follows run is a command with options of its own
	}
	for _, arg := range args {
		long, isLong := strings.CutPrefix(arg, "--")
		switch {
		case arg == "--":
			return false
		case isLong:
			name, _, _ := strings.Cut(long, "=")
			if slices.Contains(slirpLongs, name) {
				return true
			}
		case len(arg) > 1 && arg[0] == '-' && strings.IndexByte(slirpShorts, arg[1]) >= 0:
			return true
		}
	}
	return false
}
