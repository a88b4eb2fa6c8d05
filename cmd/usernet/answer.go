package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"usernet/api"
	"usernet/api/client"
	"usernet/portdriver"
)

// askPatience is what an answer may take: ten thousand ports are published in a second or two.
const askPatience = 30 * time.Second

// ask asks a running usernet, and prints what it answers.
func ask(q *question, out io.Writer) error {
	ctx, cancel := context.WithTimeout(context.Background(), askPatience)
	defer cancel()
	path := q.socket
	if q.network != "" {
		var err error
		if path, err = memberSocket(ctx, q.network, q.name); err != nil {
			return err
		}
	}
	if path == "" {
		dir, err := api.DefaultDir()
		if err != nil {
			return err
		}
		if path, err = onlySocket(dir); err != nil {
			return err
		}
	}
	c := client.New(path)
	defer c.Close()
	switch q.verb {
	case "add":
		specs, err := whereTyped(q.specs)
		if err != nil {
			return err
		}
		added, err := c.Add(ctx, api.AddRequest{Publish: specs})
		if err != nil {
			return err
		}
		return q.printForwards(out, added)
	case "list":
		all, err := c.List(ctx)
		if err != nil {
			return err
		}
		return q.printForwards(out, all)
	case "remove":
		// Each for itself: what cannot be removed keeps no other from it.
		var errs []error
		for _, id := range q.ids {
			errs = append(errs, c.Remove(ctx, id, q.drain))
		}
		return errors.Join(errs...)
	}
	info, err := c.Info(ctx)
	if err != nil {
		return err
	}
	if q.json {
		return printJSON(out, info)
	}
	return printInfo(out, info)
}

// whereTyped makes paths of unix sockets absolute: they are meant where they are typed, and usernet may run elsewhere.
func whereTyped(specs []string) ([]string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	specs = slices.Clone(specs)
	for i, s := range specs {
		if strings.HasPrefix(s, "./") {
			specs[i] = dir + s[1:]
		}
	}
	return specs, nil
}

// onlySocket is the control socket that answers in dir, where there is just one.
func onlySocket(dir string) (string, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.sock"))
	if err != nil {
		return "", err
	}
	var live []string
	for _, p := range paths {
		if c, err := net.Dial("unix", p); err == nil { // else it was left behind by one that was killed
			c.Close()
			live = append(live, p)
		}
	}
	switch len(live) {
	case 0:
		return "", fmt.Errorf("no usernet of this user has its control socket in %s: name it with --socket", dir)
	case 1:
		return live[0], nil
	}
	return "", fmt.Errorf("which one? name it with --socket, or by $USERNET_SOCKET:\n  %s", strings.Join(live, "\n  "))
}

func printJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printForwards prints a table, whose last column holds as many words as it likes.
func (q *question) printForwards(out io.Writer, all []api.Forward) error {
	if q.json {
		return printJSON(out, api.Forwards{Forwards: all})
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tPROTO\tHOST\tCONTAINER\tPATH\tACTIVE\tTOTAL\tIN\tOUT\tNOTE")
	for _, f := range all {
		path, note := f.Path, f.Note
		if path == "" {
			path = "-"
		}
		if f.Auto {
			path += " (auto)"
		}
		if f.Draining {
			note = strings.TrimPrefix(note+"; draining", "; ")
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n",
			f.ID, f.Proto, hostOf(f.Spec), containerOf(f.Spec), path, f.Active, f.Total, octets(f.OctetsIn), octets(f.OctetsOut), note)
	}
	return w.Flush()
}

func hostOf(s api.Spec) string {
	if s.HostPath != "" {
		return s.HostPath
	}
	host := "*"
	if s.Host.IsValid() {
		host = s.Host.String()
	}
	return net.JoinHostPort(host, fmt.Sprint(s.HostPort))
}

func containerOf(s api.Spec) string {
	host := "" // its own
	if s.Container.IsValid() {
		host = s.Container.String()
	}
	return net.JoinHostPort(host, fmt.Sprint(s.ContainerPort))
}

// octets is n with a binary suffix, in four digits at most.
func octets(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprint(n)
	}
	v, unit := float64(n)/1024, 0
	for v >= 1000 {
		v, unit = v/1024, unit+1
	}
	if v < 10 {
		return fmt.Sprintf("%.1f%c", v, units[unit])
	}
	return fmt.Sprintf("%.0f%c", v, units[unit])
}

func printInfo(out io.Writer, i api.Info) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	line := func(name string, format string, args ...any) {
		fmt.Fprintf(w, "%s:\t%s\n", name, fmt.Sprintf(format, args...))
	}
	line("usernet", "%s, API %s, process %d, since %s", i.Version, i.APIVersion, i.PID, i.Started.Local().Format(time.DateTime))
	line("namespace", "%s", i.Namespace)
	line("interface", "%s, MTU %d octets, MAC %s, queues %d", i.Interface.Name, i.Interface.MTU, i.Interface.MAC, i.Interface.Queues)
	offloads := "none"
	if len(i.Interface.Offloads) > 0 {
		offloads = strings.Join(i.Interface.Offloads, " ")
	}
	line("offloads", "%s", offloads)
	for _, f := range []struct {
		name string
		a    *api.Addresses
	}{{"IPv4", i.IPv4}, {"IPv6", i.IPv6}} {
		if f.a == nil {
			line(f.name, "none")
			continue
		}
		dns := "no resolver"
		if f.a.DNS.IsValid() {
			dns = "resolver " + f.a.DNS.String()
		}
		line(f.name, "container %s, gateway %s, %s", f.a.Container, f.a.Gateway, dns)
	}
	line("sandbox", "%s", map[bool]string{true: "on", false: "off (--no-sandbox)"}[i.Sandbox])
	if p := i.Ports; p == nil {
		line("ports", "none can be published")
	} else {
		printPorts(line, p)
	}
	return w.Flush()
}

func printPorts(line func(name, format string, args ...any), p *portdriver.Info) {
	for _, f := range []struct {
		name string
		path *portdriver.PathInfo
	}{{"TCP over IPv4", p.IPv4}, {"TCP over IPv6", p.IPv6}} {
		if f.path == nil {
			line(f.name, "not published")
			continue
		}
		text := "refused"
		if f.path.Path != "" {
			text = "by the " + f.path.Path + " path"
		}
		if f.path.WhyNotKernel != "" {
			text += ", since " + f.path.WhyNotKernel
		}
		if f.path.Detours > 0 {
			text += fmt.Sprintf("; %d by the stack path for now (see port list)", f.path.Detours)
		}
		if !f.path.Loopback {
			text += "; servers on the container's loopback alone are not reached"
		}
		line(f.name, "%s", text)
	}
	line("ports", "%d of at most %d published, %d of %d connections", p.Forwards, p.MaxForwards, p.Connections, p.MaxConnections)
}
