package main

import (
	"fmt"
	"strings"

	"github.com/spf13/pflag"
)

const helpHead = `usernet gives a network namespace a working network, without root.

Usage:
  usernet run [flags] [-- COMMAND ARG...]   run COMMAND (default $SHELL) in new namespaces with a network
  usernet [flags] PID|PATH [TAPNAME]        give the network namespace of a process, or at a path, a network
  usernet network create NAME [flags]       make a shared network, whose members reach each other by name
  usernet network ls | inspect NAME | rm NAME...
  usernet attach NETWORK PID|--netns-path PATH --name NAME [flags]
                                            make the network namespace of a process, or at a path, a member
  usernet detach NETWORK NAME               end a membership
  usernet netns exec NETWORK -- COMMAND...  run COMMAND in the namespace of the bridges, to look at them
  usernet port add [--socket FILE] SPEC...  publish ports of a container that runs; SPEC as after --publish
  usernet port list [--socket FILE]         what is published, by which path, and how much passed
  usernet port remove [--socket FILE] ID... take them away; connections are reset, or left to end with --drain
  usernet info [--socket FILE]              a running usernet: addresses, offloads, data paths
  usernet version                           print version, compiler and platform
  usernet help                              print this text

The second form stays in the foreground and ends, with status 0, on SIGTERM, SIGINT or SIGHUP (unless
nohup has that ignored), when the process ends, or when the path no longer names the namespace. Flags may
stand before and after PID|PATH; those of run end at COMMAND. --flag=value and --flag value mean the same.

port and info ask over the control socket: that of --socket, else of $USERNET_SOCKET, else the only one in
$XDG_RUNTIME_DIR/usernet; that of a member of a shared network with --network NETWORK --name NAME. With --json
they print the answer as it came.

Shared networks are served by a daemon, which each command that needs it starts, and which ends when no network has a member any more;
its log is $XDG_RUNTIME_DIR/usernet/shared/daemon.log.
`

const helpTail = `
Inside, by default:
  10.0.2.100  fd00::100   the container
  10.0.2.2    fd00::2     the gateway; the host's loopback with --host-loopback
  10.0.2.3    fd00::3     the resolver
  169.254.1.2 fd00::4     the host at its own addresses: host.containers.internal, host.docker.internal

Namespaces that run makes: user, network and mount. Your user is root inside; started with root's
capabilities, every user is itself. COMMAND has its own /etc/resolv.conf and /etc/hosts.

In the place of slirp4netns, with its options (usernet slirp4netns --help), when it is called by that name or
with one that is not above: -c -e -r -m -6 -a -v --disable-dns --disable-host-loopback --enable-ipv6
--enable-sandbox --enable-seccomp --macaddress --netns-type --target-type. podman and rootlesskit do that.

Exit status: 0; 1 on failure; 2 on a mistake in the command line. Of run: COMMAND's own, 128+N when
signal N ended it, 127 when it is not found, 126 when it cannot be executed, 125 on any failure of ours.
`

// helpText is the whole of "usernet help".
func helpText() string {
	var b strings.Builder
	b.WriteString(helpHead)
	// The attach form has every flag but those of one group of run's; what run lacks is the first group.
	print := func(title string, set *pflag.FlagSet) {
		fmt.Fprintf(&b, "\n%s:\n%s", title, set.FlagUsagesWrapped(120))
	}
	for i, g := range newFlags(false).groups {
		if i > 0 {
			print(g.title, g.set)
			continue
		}
		print(g.title+" (not for run)", g.set)
		print("Shared network (run only)", newFlags(true).groups[0].set)
	}
	for _, verb := range []string{"network create", "attach"} {
		where := ""
		print("usernet "+verb, newOrderFlags(verb, new(order), new(membership), &where))
	}
	b.WriteString(helpTail)
	return b.String()
}
