package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Two members of one network, and what is between them:
//
//	client ── eth0 ── veth or TAPs ── bridge ── veth or TAPs ── eth0 ── server
//
// Each contender has a keeper and a daemon of its own, in a directory of its own: what one of them uses is not another's. The client
// is also what goes out, in the axes in which members are beside a container with a network of its own.

// Cables, in the words of usernet network inspect.
const (
	onVeth = "veth"
	onTAP  = "tap"
)

// The network, and its members: client and server. Names are short, for they are in paths of sockets, which have 107 octets at most.
const (
	sharedName = "n"
	clientName = "c"
	serverName = "s"
)

// startShared starts a shared network whose client and server have those cables.
func startShared(client, server string) func(context.Context, *lab, int, []forward) (*instance, error) {
	return func(ctx context.Context, l *lab, mtu int, _ []forward) (_ *instance, err error) {
		s := &shared{lab: l, runtime: filepath.Join(l.scratch, "home", client[:1]+server[:1])}
		in := &instance{stop: s.stop}
		defer func() {
			if err != nil {
				in.stop()
			}
		}()
		if err := l.homeDir(s.runtime); err != nil {
			return nil, err
		}
		begin := time.Now()
		if _, err := s.usernet(ctx, "network", "create", sharedName, "--mtu", strconv.Itoa(mtu)); err != nil {
			return nil, err
		}
		if s.keeper, err = s.keeperPID(); err != nil {
			return nil, err
		}
		in.account = account{roots: []int{s.keeper}}
		for _, m := range []struct{ name, cable string }{{clientName, client}, {serverName, server}} {
			a, err := s.join(ctx, m.name, m.cable)
			if err != nil {
				return nil, fmt.Errorf("member %s: %w", m.name, err)
			}
			s.members = append(s.members, a)
			addr, err := s.joined(ctx, m.name, m.cable)
			if err != nil {
				return nil, err
			}
			in.addr = addr // the last one's is the server's
		}
		in.ready = time.Since(begin)
		in.container, in.server = s.members[0], s.members[1]
		return in, errors.Join(prepareMembers(ctx, l, in), reach(ctx, in.container, outsideIP))
	}
}

// prepareMembers sets what all contenders have alike, starts the server's services and waits until the client reaches them.
func prepareMembers(ctx context.Context, l *lab, in *instance) error {
	return errors.Join(equip(ctx, l, in.container), equip(ctx, l, in.server), startEcho(ctx, in.server), reach(ctx, in.container, in.addr))
}

// A shared is the shared mode of one contender.
type shared struct {
	lab     *lab
	runtime string // XDG_RUNTIME_DIR
	keeper  int    // 0: there is none yet
	members []*agent
}

// command is usernet with the contender's directory.
func (s *shared) command(args ...string) *exec.Cmd {
	cmd := s.lab.homeCommand(append([]string{s.lab.usernet}, args...)...)
	cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+s.runtime) // of two the last one counts
	return cmd
}

// usernet is what a command says that ends by itself.
func (s *shared) usernet(ctx context.Context, args ...string) (string, error) {
	var out strings.Builder
	var errs tail
	cmd := s.command(args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return "", err
	}
	late := time.AfterFunc(readyLimit, func() { cmd.Process.Kill() })
	defer late.Stop()
	defer context.AfterFunc(ctx, func() { cmd.Process.Kill() })()
	if err := cmd.Wait(); err != nil {
		return "", fmt.Errorf("usernet %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return out.String(), nil
}

// join starts an agent as a member. A command of usernet's own is below the shared user namespace, and gets a veth; a container
// that somebody else has made gets TAPs, because bench's user has no right to more.
func (s *shared) join(ctx context.Context, name, cable string) (*agent, error) {
	if cable == onVeth {
		cmd := s.command("run", "--network", sharedName, "--name", name, "--", s.lab.self(), agentArg)
		return startAgent(ctx, name, cmd, cmd.Start)
	}
	a, err := s.lab.newContainer(ctx, name)
	if err != nil {
		return nil, err
	}
	if _, err := s.usernet(ctx, "attach", sharedName, strconv.Itoa(a.pid), "--name", name); err != nil {
		a.close()
		return nil, err
	}
	return a, nil
}

// joined is a member's address. A cable of another kind than what is to be measured is an error.
func (s *shared) joined(ctx context.Context, name, cable string) (netip.Addr, error) {
	text, err := s.usernet(ctx, "network", "inspect", sharedName)
	if err != nil {
		return netip.Addr{}, err
	}
	return parseMember([]byte(text), name, cable)
}

// parseMember reads a member's address in the output of usernet network inspect.
func parseMember(text []byte, name, cable string) (netip.Addr, error) {
	var is struct {
		Members []struct {
			Name, Cable string
			IPv4        netip.Addr
		}
	}
	if err := json.Unmarshal(text, &is); err != nil {
		return netip.Addr{}, fmt.Errorf("usernet network inspect: %w", err)
	}
	for _, m := range is.Members {
		switch {
		case m.Name != name:
		case m.Cable != cable:
			return netip.Addr{}, fmt.Errorf("member %s has a cable of kind %q and not %q", name, m.Cable, cable)
		default:
			return m.IPv4, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("network %s has no member %s", sharedName, name)
}

// keeperPID is the process below which the daemon is.
func (s *shared) keeperPID() (int, error) {
	text, err := os.ReadFile(filepath.Join(s.runtime, "usernet", "shared", "keeper.json"))
	if err != nil {
		return 0, err
	}
	var is struct{ Process struct{ PID int } }
	if err := json.Unmarshal(text, &is); err != nil {
		return 0, fmt.Errorf("keeper.json: %w", err)
	}
	if is.Process.PID <= 0 {
		return 0, errors.New("keeper.json names no process")
	}
	return is.Process.PID, nil
}

// stop ends members, keeper and daemon, and forgets the network. The keeper is our child: who started it has ended, and
// we are the next that takes such in.
func (s *shared) stop() {
	for _, a := range s.members {
		a.close()
	}
	if s.keeper != 0 {
		unix.Kill(s.keeper, unix.SIGTERM) // which it hands on to the daemon, and waits for that
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			waitFor(s.keeper)
		}()
		select {
		case <-ended:
		case <-time.After(giveUp):
			unix.Kill(s.keeper, unix.SIGKILL) // and the daemon is left to endOrphans
			<-ended
		}
	}
	os.RemoveAll(s.runtime) // the scratch directory's end takes what is left
}

// waitFor reaps a child, whatever its status.
func waitFor(pid int) {
	for {
		var status unix.WaitStatus
		if _, err := unix.Wait4(pid, &status, 0, nil); err != unix.EINTR {
			return
		}
	}
}

// homeDir makes a directory of the ordinary user's.
func (l *lab) homeDir(path string) error {
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	if l.root {
		return os.Chown(path, homeUID, homeUID)
	}
	return nil
}

// The plain bridge's members have these addresses.
const (
	plainClient = "198.51.100.1"
	plainServer = "198.51.100.2"
)

// startBridge makes what usernet's veths are measured by: two namespaces on a bridge in a third, all of it by ip(8).
func startBridge(ctx context.Context, l *lab, mtu int, _ []forward) (_ *instance, err error) {
	var all []*agent
	in := &instance{addr: netip.MustParseAddr(plainServer), stop: func() {
		for _, a := range all {
			a.close()
		}
	}}
	defer func() {
		if err != nil {
			in.stop()
		}
	}()
	begin := time.Now()
	for _, name := range []string{"client", "server", "bridge"} {
		cmd := exec.Command("/proc/self/exe", agentArg)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		a, err := startAgent(ctx, "the plain bridge's "+name, cmd, cmd.Start)
		if err != nil {
			return nil, err
		}
		all = append(all, a)
	}
	bridge := all[2]
	if err := ip(ctx, bridge, "link add plain type bridge", "link set plain up"); err != nil {
		return nil, err
	}
	for i, addr := range []string{plainClient, plainServer} {
		port := fmt.Sprintf("port%d", i)
		err := ip(ctx, bridge,
			fmt.Sprintf("link add %s mtu %d type veth peer name eth0 mtu %d netns %d", port, mtu, mtu, all[i].pid),
			fmt.Sprintf("link set %s master plain up", port))
		if err == nil {
			err = ip(ctx, all[i], "link set lo up", "addr add "+addr+"/24 dev eth0", "link set eth0 up")
		}
		if err != nil {
			return nil, err
		}
	}
	in.container, in.server = all[0], all[1]
	in.ready = time.Since(begin)
	return in, prepareMembers(ctx, l, in)
}

// ip runs ip(8) where an agent is.
func ip(ctx context.Context, a *agent, lines ...string) error {
	for _, line := range lines {
		var said runResult
		err := a.do(ctx, "run", runParams{Args: append([]string{"ip"}, strings.Fields(line)...), Timeout: readyLimit}, &said)
		if err == nil && said.Status != 0 {
			err = errors.New(said.Stderr)
		}
		if err != nil {
			return fmt.Errorf("ip %s: %w", line, err)
		}
	}
	return nil
}
