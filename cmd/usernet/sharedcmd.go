package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"usernet/api"
	"usernet/network"
	"usernet/tap/netns"
)

// obey carries out an order, and returns the exit status.
func obey(o *order, out io.Writer) (status int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), askPatience)
	defer cancel()
	s, err := openSharedClient(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	switch o.verb {
	case "network create":
		var n network.Network
		if n, err = s.client.CreateNetwork(ctx, o.config); err == nil {
			err = printNetworks(out, o.json, n)
		}
	case "network ls":
		var all []network.Network
		err = s.do(ctx, func(ctx context.Context) (err error) { all, err = s.client.Networks(ctx); return err })
		if err == nil && o.json {
			err = printJSON(out, api.NetworkList{Networks: all})
		} else if err == nil {
			err = printNetworks(out, false, all...)
		}
	case "network inspect":
		var n network.Network
		err = s.do(ctx, func(ctx context.Context) (err error) { n, err = s.client.Network(ctx, o.network()); return err })
		if err == nil {
			err = printJSON(out, n)
		}
	case "network rm":
		for _, name := range o.names {
			err = errors.Join(err, s.do(ctx, func(ctx context.Context) error { return s.client.RemoveNetwork(ctx, name) }))
		}
	case "attach":
		var a api.Attached
		if a, err = s.client.Attach(ctx, o.network(), o.request); err == nil {
			err = printAttached(out, o, a)
		}
	case "detach":
		err = s.do(ctx, func(ctx context.Context) error { return s.client.Detach(ctx, o.network(), o.names[1]) })
	case "netns exec":
		if _, err = s.client.Network(ctx, o.network()); err == nil {
			return execShared(s.daemon, o.argv)
		}
	}
	return 0, err
}

func printNetworks(out io.Writer, asJSON bool, all ...network.Network) error {
	if asJSON {
		return printJSON(out, all[0])
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tIPV4\tIPV6\tMTU\tDOMAIN\tMEMBERS\tNOTE")
	for _, n := range all {
		ipv6, note := "-", ""
		if n.Subnet6.IsValid() {
			ipv6 = n.Subnet6.String()
		}
		if n.Internal {
			note = "internal"
		}
		if n.Persist {
			note = strings.TrimPrefix(note+", persistent", ", ")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%d\t%s\n", n.Name, n.Subnet, ipv6, n.MTU, n.Domain, len(n.Members), note)
	}
	return w.Flush()
}

func printAttached(out io.Writer, o *order, a api.Attached) error {
	if o.json {
		return printJSON(out, a)
	}
	m := a.Member
	var addrs []string
	for _, addr := range []netip.Addr{m.IPv4, m.IPv6} {
		if addr.IsValid() {
			addrs = append(addrs, addr.String())
		}
	}
	_, err := fmt.Fprintf(out, "%s: %s at %s (%s)\n", m.Name, strings.Join(addrs, " "), m.Ifname, m.Cable)
	return err
}

// execName is argv[0] of our own binary in the shared namespaces; the rest is the command.
const execName = "usernet-exec"

func isExec(args []string) bool { return len(args) > 1 && args[0] == execName }

// execMain becomes the command.
func execMain(args []string) int {
	path, err := exec.LookPath(args[1])
	if err != nil && !errors.Is(err, exec.ErrDot) {
		fmt.Fprintf(os.Stderr, "usernet: %s: %v\n", args[1], reason(err))
		return execStatus(args[1], err)
	}
	err = syscall.Exec(path, args[1:], os.Environ())
	fmt.Fprintf(os.Stderr, "usernet: %v\n", explainExec(path, err))
	return execStatus(path, err)
}

// execShared runs a command in the shared namespaces, of which the daemon has descriptors, and returns its status.
func execShared(daemon int, argv []string) (int, error) {
	ns, closeNS, err := sharedNamespaces(daemon)
	if err != nil {
		return 0, err
	}
	defer closeNS()
	signal.Notify(make(chan os.Signal, 1), unix.SIGINT, unix.SIGQUIT) // caught, and not ignored: the command would inherit that
	pid, err := netns.Start(ns.user, ns.net, append([]string{execName}, argv...), os.Environ())
	if err != nil {
		return 0, err
	}
	return (&child{pid: pid}).status()
}

// A namespacePair is the shared mode's, by descriptors.
type namespacePair struct{ user, net int }

func sharedNamespaces(daemon int) (p namespacePair, done func(), err error) {
	var fds []int
	done = func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
	for _, n := range []int{fdUserNS, fdNetNS} {
		path := sharedPath(daemon, n)
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done()
			return p, nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		fds = append(fds, fd)
	}
	return namespacePair{fds[0], fds[1]}, done, nil
}
