package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	iperfPort = 5201
	floodPort = 7100
	whoPort   = 7200 // tells a client its address
	// readyLimit bounds a peer's start.
	readyLimit = 10 * time.Second
)

var echoPorts = []uint16{7001, 7002, 7003, 7004, 7005, 7006, 7007, 7008}

// A peer gives a container a network.
type peer struct {
	name    string
	present func(l *lab) error // why it cannot be measured, or nil
	version func(l *lab) string
	// publishes tells whether it brings connections into the container, and plain whether it is measured otherwise.
	publishes func(l *lab) bool
	plain     bool
	// streams: only its way of TCP is its own; the rest is measured under another name.
	streams bool
	// among: it is two members of a network, and outward, that the one is measured on its way out too.
	among, outward bool
	// thorough: it is not in the quick run, whose time is short, unless it is asked for.
	thorough bool
	// shift is what is added to the ports of a container to have those of the host that lead there: another for each,
	// so that they can be published side by side.
	shift uint16
	// start gives a new container a network, with the ports published that publish has. Where publish is not nil, ports
	// can be published later too, by what manage makes of the instance; a nil manage says that they cannot.
	start  func(ctx context.Context, l *lab, mtu int, publish []forward) (*instance, error)
	manage func(socket string) portAPI
}

// An instance is a peer that serves a container.
type instance struct {
	container *agent
	server    *agent     // another member of its network
	addr      netip.Addr // and at which the container reaches that
	account   account
	ready     time.Duration // from its start until it said so
	socket    string        // for publishing, or empty
	stop      func()
}

func always(*lab) bool { return true }

var peers = []*peer{
	{
		name: "usernet",
		present: func(l *lab) error {
			if l.usernet == "" {
				return errors.New("no binary (make build)")
			}
			return nil
		},
		version:   usernetVersion,
		publishes: usernetPublishes,
		plain:     true,
		shift:     1000,
		start:     startUsernet("usernet", "kernel"),
		manage:    restAPI,
	},
	{
		name: "usernet-stack",
		present: func(l *lab) error {
			if l.usernet == "" || !usernetPublishes(l) {
				return errors.New("no binary that publishes ports (make build)")
			}
			return nil
		},
		version:   func(l *lab) string { return usernetVersion(l) + ", published ports by way of the stack" },
		publishes: usernetPublishes,
		streams:   true,
		shift:     5000,
		start:     startUsernet("usernet-stack", "stack"),
		manage:    restAPI,
	},
	{
		name:      "slirp4netns",
		present:   installed("slirp4netns", "slirp4netns"),
		version:   func(*lab) string { return firstLine("slirp4netns", "--version") },
		publishes: always,
		plain:     true,
		shift:     2000,
		start:     startSlirp,
		manage:    slirpAPI,
	},
	{
		name:      "pasta",
		present:   installed("pasta", "passt"),
		version:   pastaVersion,
		publishes: always,
		plain:     true,
		shift:     3000,
		start:     startPasta,
	},
	{
		name:      debianKit.name,
		present:   debianKit.present,
		version:   debianKit.version,
		publishes: always,
		shift:     4000,
		start:     debianKit.start,
		manage:    restAPI,
	},
	{
		name:      builtKit.name,
		present:   builtKit.present,
		version:   builtKit.version,
		publishes: always,
		shift:     6000,
		start:     builtKit.start,
		manage:    restAPI,
		thorough:  true,
	},
	{
		name:      vsockKit.name,
		present:   vsockKit.present,
		version:   vsockKit.version,
		publishes: func(*lab) bool { return false },
		plain:     true,
		start:     vsockKit.start,
		thorough:  true,
	},
	{
		name:    sharedVeth,
		present: usernetShares,
		version: func(l *lab) string { return usernetVersion(l) + ", members of a shared network, on veths" },
		among:   true,
		outward: true,
		start:   startShared(onVeth, onVeth),
	},
	{
		name:    sharedTAP,
		present: usernetShares,
		version: func(l *lab) string { return usernetVersion(l) + ", members of a shared network, on TAP cables" },
		among:   true,
		outward: true,
		start:   startShared(onTAP, onTAP),
	},
	{
		name:     sharedMixed,
		present:  usernetShares,
		version:  func(l *lab) string { return usernetVersion(l) + ", the client on a veth and the server on a TAP cable" },
		among:    true,
		thorough: true,
		start:    startShared(onVeth, onTAP),
	},
	{
		name:    limitBridge,
		present: func(*lab) error { return nil },
		version: func(*lab) string { return "" },
		among:   true,
		start:   startBridge,
	},
}

// The shared mode, by the cables of its members.
const (
	sharedVeth  = "usernet-shared"
	sharedTAP   = "usernet-tap"
	sharedMixed = "usernet-mixed"
)

// ours tells whether a contender is usernet, by whichever way.
func ours(name string) bool { return name == "usernet" || strings.HasPrefix(name, "usernet-") }

func usernetShares(l *lab) error {
	if l.usernet == "" || !strings.Contains(output(l.usernet, "--help"), "network create") {
		return errors.New("no binary that has shared networks (make build)")
	}
	return nil
}

func usernetVersion(l *lab) string { return firstLine(l.usernet, "version") }

func usernetPublishes(l *lab) bool {
	return strings.Contains(output(l.usernet, "--help"), "--port-path")
}

func installed(program, debian string) func(*lab) error {
	return func(*lab) error {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("not installed (Debian's %s)", debian)
		}
		return nil
	}
}

// output is what a program prints, or nothing.
func output(args ...string) string {
	ctx, cancel := context.WithTimeout(context.Background(), readyLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.WaitDelay = time.Second
	out, _ := cmd.Output()
	return string(out)
}

func firstLine(args ...string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(output(args...)), "\n")
	return line
}

// pastaVersion asks the package manager, because Debian's pasta calls its own version unknown.
func pastaVersion(*lab) string {
	v := firstLine("pasta", "--version")
	if strings.Contains(v, "unknown") {
		if p := firstLine("dpkg-query", "--show", "--showformat=${Version}", "passt"); p != "" {
			return "pasta " + p
		}
	}
	return v
}

// startUsernet has published ports take the named path and no other, so that it is known what was measured.
func startUsernet(name, path string) func(context.Context, *lab, int, []forward) (*instance, error) {
	return func(ctx context.Context, l *lab, mtu int, publish []forward) (*instance, error) {
		args := []string{l.usernet, "--mtu", strconv.Itoa(mtu), "--log-level", "warn", "--ready-fd", "3"}
		socket := ""
		if publish != nil {
			socket = filepath.Join(l.scratch, "home", name+".sock")
			args = append(args, "--api-socket", socket, "--port-path", path)
		}
		for _, f := range publish {
			args = append(args, "--publish", fmt.Sprintf("%d:%d/%s", f.host, f.container, f.proto))
		}
		in, err := startDaemon(ctx, l, args, fdReady)
		if err == nil {
			in.socket = socket
		}
		return in, err
	}
}

func startSlirp(ctx context.Context, l *lab, mtu int, publish []forward) (*instance, error) {
	args := []string{"slirp4netns", "--configure", "--mtu=" + strconv.Itoa(mtu), "--enable-ipv6", "--ready-fd=3"}
	if publish == nil {
		return startDaemon(ctx, l, args, fdReady, "tap0")
	}
	socket := filepath.Join(l.scratch, "home", "slirp.sock")
	in, err := startDaemon(ctx, l, append(args, "--api-socket="+socket), fdReady, "tap0")
	if err != nil {
		return nil, err
	}
	in.socket = socket
	api := slirpAPI(socket)
	defer api.close()
	for _, f := range publish {
		if err := api.add(ctx, f); err != nil {
			in.stop()
			return nil, err
		}
	}
	return in, nil
}

func startPasta(ctx context.Context, l *lab, mtu int, publish []forward) (*instance, error) {
	pidFile := filepath.Join(l.scratch, "home", "pasta.pid")
	if err := os.Remove(pidFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// The gateway is outside itself, and not a way to the host's loopback.
	args := []string{"pasta", "--foreground", "--quiet", "--config-net", "--no-map-gw", "--mtu", strconv.Itoa(mtu),
		"-t", pastaPorts(publish, "tcp"), "-u", pastaPorts(publish, "udp"), "-T", "none", "-U", "none", "--pid", pidFile}
	// It writes the file when it is set up.
	return startDaemon(ctx, l, args, func(_ *os.File, ended <-chan struct{}) error {
		for end := time.Now().Add(readyLimit); time.Now().Before(end); {
			if text, err := os.ReadFile(pidFile); err == nil && len(text) > 0 {
				return nil
			}
			select {
			case <-ended:
				return errors.New("it ended")
			case <-time.After(200 * time.Microsecond):
			}
		}
		return errors.New("its PID file did not appear")
	})
}

// pastaPorts is the value of -t or -u. Of 10 000 ports in a row a list would be too long for a command line: a range
// is one word.
func pastaPorts(publish []forward, proto string) string {
	var list []string
	for i := 0; i < len(publish); {
		f, n := publish[i], 1
		for i+n < len(publish) && publish[i+n] == (forward{f.proto, f.host + uint16(n), f.container + uint16(n)}) {
			n++
		}
		i += n
		if f.proto == proto {
			list = append(list, fmt.Sprintf("%d-%d:%d-%d", f.host, int(f.host)+n-1, f.container, int(f.container)+n-1))
		}
	}
	if list == nil {
		return "none"
	}
	return strings.Join(list, ",")
}

// fdReady waits for an octet.
func fdReady(r *os.File, _ <-chan struct{}) error {
	if err := r.SetReadDeadline(time.Now().Add(readyLimit)); err != nil {
		return err
	}
	if n, err := r.Read(make([]byte, 1)); n != 1 {
		return fmt.Errorf("it did not get ready: %w", err)
	}
	return nil
}

// startDaemon starts a container, and args PID more... to serve it, whose descriptor 3 is the other end of what ready gets.
func startDaemon(ctx context.Context, l *lab, args []string, ready func(*os.File, <-chan struct{}) error, more ...string) (_ *instance, err error) {
	container, err := l.newContainer(ctx, filepath.Base(args[0])+"'s container")
	if err != nil {
		return nil, err
	}
	in := &instance{container: container}
	r, w, err := os.Pipe()
	if err != nil {
		container.close()
		return nil, err
	}
	defer r.Close()
	cmd := l.homeCommand(slices.Concat(args, []string{strconv.Itoa(container.pid)}, more)...)
	cmd.ExtraFiles = []*os.File{w}
	var said tail
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.WaitDelay = time.Second
	begin := time.Now()
	err = cmd.Start()
	w.Close()
	if err != nil {
		container.close()
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		cmd.Wait() // its status says nothing: we end it by a signal
	}()
	in.account = account{roots: []int{cmd.Process.Pid}}
	in.stop = func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(giveUp):
			cmd.Process.Kill()
			<-ended
		}
		container.close()
	}
	if err := ready(r, ended); err != nil {
		in.stop()
		return nil, fmt.Errorf("%w: %s", err, said.String())
	}
	in.ready = time.Since(begin)
	if err := prepareContainer(ctx, l, container); err != nil {
		in.stop()
		return nil, fmt.Errorf("%w: %s", err, said.String())
	}
	return in, nil
}

// prepareContainer equips it, and waits until it reaches outside.
func prepareContainer(ctx context.Context, l *lab, container *agent) error {
	if err := equip(ctx, l, container); err != nil {
		return err
	}
	return reach(ctx, container, outsideIP)
}

// equip sets what all contenders have alike.
func equip(ctx context.Context, l *lab, container *agent) error {
	set := map[string]string{"ipv4/ip_local_port_range": portRange, "ipv4/tcp_congestion_control": l.cc}
	return container.do(ctx, "sysctl", sysctlParams{Set: set}, nil)
}

// reach waits until a container reaches the echo service at an address.
func reach(ctx context.Context, container *agent, to netip.Addr) (err error) {
	for end := time.Now().Add(readyLimit); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
		if err = container.do(ctx, "tcp-rr", rrParams{Addr: to, Ports: echoPorts, Duration: time.Millisecond}, nil); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%v is not reached: %w", to, errors.Join(err, ctx.Err()))
}

// startEcho begins the echo service of an agent, which lasts as long as the agent.
func startEcho(ctx context.Context, a *agent) error {
	return a.start("echo", echoParams{TCP: echoPorts, UDP: echoPorts[:1], Who: whoPort}).waitReady(ctx)
}
