package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"usernet/api"
	"usernet/network"
	"usernet/tap/bridge"
	"usernet/tap/netns"
)

// The daemon of the shared mode is the engines of all networks in one process, which stays in the host's namespaces:
//
//	daemon.sock ── api ── daemon ─┬─ network.Set ── state.json
//	                              ├─ openNet: a bridge, and an engine on its uplink     for each network that has members
//	                              └─ openMember: a cable, ports, a control socket       for each member
//
// It has no memory of its own: what state.json says and what lives in the shared namespace make a new one what the old one was.
// So that is how it deals with all that should not be, too: a network whose uplink somebody has deleted is an error that
// ends it, and the keeper starts another.
//
// Locks: mu is held during a change, from the first look until it is saved. A member's driver may save without it.

// daemonName is argv[0] of the daemon; argv[1] is the directory of the shared mode.
const daemonName = "usernet-daemon"

const (
	logName = "daemon.log"
	logSize = 1 << 20 // octets, after which it is moved to daemon.log.old: of some ten thousand lines

	// idleAfter is how long the daemon waits for a member to come. An entry speaks to it before it asks for anything, and
	// has as long for that.
	idleAfter = 5 * time.Second

	// endAtOnce is how many members that ended together are taken apart at a time.
	endAtOnce = 16

	// changePatience is what one change may take; the kernel needs some milliseconds for each of its parts.
	changePatience = 20 * time.Second
)

func isDaemon(args []string) bool { return len(args) == 2 && args[0] == daemonName }

// daemonMain returns the exit status.
func daemonMain(args []string) int {
	for _, fd := range []int{fdUserNS, fdNetNS, fdReady} {
		unix.CloseOnExec(fd)
	}
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT)
	ready := os.NewFile(fdReady, "ready")
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	o := &options{logLevel: slog.LevelInfo}
	// The other parts of the sandbox would keep it from the namespaces of members that come later.
	if !cgoEnabled {
		if err := noNewPrivs(confinement{}); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", daemonName, err)
		}
	}
	d, err := openDaemon(ctx, args[1], newLogTo(&logFile{path: filepath.Join(args[1], logName)}, o))
	if err != nil {
		fmt.Fprintf(ready, "%v\n", err)
		fmt.Fprintf(os.Stderr, "%s: %v\n", daemonName, err)
		return daemonCannot
	}
	fmt.Fprintln(ready, "ok")
	ready.Close()
	err = d.run(ctx)
	if err = errors.Join(err, d.close()); err != nil {
		d.log.Error("the daemon ends", "error", err)
		return statusFailure
	}
	return daemonDone
}

// A daemon serves all networks of one user.
type daemon struct {
	dir     *network.Dir
	set     *network.Set
	boot    string
	log     *slog.Logger
	ns      *netns.NS // the shared one
	taps    *tapSet
	files   int
	started time.Time
	control *api.Server

	saving sync.Mutex // inside of mu

	mu      sync.Mutex
	nets    map[string]*sharedNet // that are open
	members map[memberKey]*member
	lock    *network.Lock // held once it is to end for want of members

	touched chan struct{} // to idle: somebody is there
	ended   chan *member  // that is not one any more
	suspect chan struct{} // something has happened to interfaces
	failed  chan error
}

type memberKey struct{ network, name string }

// openDaemon finds all that there is, and serves it. The control socket takes clients, who are answered by run.
func openDaemon(ctx context.Context, path string, log *slog.Logger) (_ *daemon, err error) {
	d := &daemon{
		log: log, started: time.Now(),
		nets: map[string]*sharedNet{}, members: map[memberKey]*member{},
		touched: make(chan struct{}, 1), ended: make(chan *member), suspect: make(chan struct{}, 1), failed: make(chan error, 1),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	if err := errors.Join(checkFiles(), checkProc()); err != nil {
		return nil, err
	}
	if d.files, err = raiseFiles(); err != nil {
		return nil, err
	}
	if d.dir, err = network.OpenDir(path); err != nil {
		return nil, err
	}
	if d.boot, err = network.BootID(); err != nil {
		return nil, err
	}
	if d.set, err = loadSet(d.dir, d.boot, log); err != nil {
		return nil, err
	}
	if d.ns, err = openShared(); err != nil {
		return nil, err
	}
	if d.taps, err = newTAPSet(); err != nil {
		return nil, err
	}
	d.control, err = api.Listen(api.Config{
		Path: filepath.Join(path, network.DaemonSocket), Networks: d, Info: d.info, Log: log,
	})
	if err != nil {
		return nil, err
	}
	return d, d.restore(ctx)
}

// loadSet reads what was recorded; what is of another boot is of no use.
func loadSet(dir *network.Dir, boot string, log *slog.Logger) (*network.Set, error) {
	set, err := dir.Load(boot, hostNames...)
	if errors.Is(err, network.ErrOtherBoot) {
		log.Warn("what was recorded is of another boot, and put aside", "file", network.StateFile, "reason", err)
		if err := dir.Discard(network.StateFile); err != nil {
			return nil, err
		}
		return network.New(hostNames...), nil
	}
	return set, err
}

// save writes what is so now.
func (d *daemon) save() error {
	d.saving.Lock()
	defer d.saving.Unlock()
	return d.dir.Save(d.set.State(d.boot))
}

// run serves until ctx ends, nothing is left to do, or something has failed.
func (d *daemon) run(ctx context.Context) error {
	err := goEach(ctx, d.control.Serve, d.watch, d.reap, d.idle, func(ctx context.Context) error {
		select {
		case err := <-d.failed:
			return err
		case <-ctx.Done():
			return nil
		}
	})
	if errors.As(err, new(ending)) {
		d.log.Info("ending", "reason", err)
		err = nil
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}

// fail ends the daemon.
func (d *daemon) fail(err error) {
	select {
	case d.failed <- err:
	default: // it ends already
	}
}

// idle ends the daemon when nobody has been a member for a while. The lock, which is held until the process has ended,
// keeps an entry from speaking to one that ends.
func (d *daemon) idle(ctx context.Context) error {
	t := time.NewTimer(idleAfter)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.touched:
		case <-t.C:
			if d.leave(ctx) {
				return ending{"no network has a member"}
			}
		}
		t.Reset(idleAfter)
	}
}

func (d *daemon) leave(ctx context.Context) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.members) > 0 {
		return false
	}
	for _, n := range d.set.List() {
		if n.Persist {
			return false
		}
	}
	try, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	lock, err := d.dir.Lock(try, "end of the daemon")
	if errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
		return false // an entry has it, and will ask for something
	}
	if err != nil {
		d.log.Warn("the directory is gone, and nobody finds us any more", "error", err)
		return true
	}
	select {
	case <-d.touched:
		_ = lock.Unlock() // a client was faster; of its file only the lock matters
		return false
	default:
	}
	d.lock = lock
	return true
}

// touch tells that somebody is there.
func (d *daemon) touch() {
	select {
	case d.touched <- struct{}{}:
	default:
	}
}

// watch hears of interfaces of the shared namespace.
func (d *daemon) watch(ctx context.Context) error {
	err := bridge.Watch(ctx, d.ns, func() {}, func(e bridge.Event) {
		if e.Gone || e.Missed {
			select {
			case d.suspect <- struct{}{}:
			default:
			}
		}
	})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// reap lets members go that have left by themselves: their process has ended, their path leads elsewhere, or
// their interface is gone.
func (d *daemon) reap(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-d.ended:
			d.mu.Lock()
			var gone []*member
			for more := true; more; {
				if d.members[m.key] == m {
					d.log.Info("a member is gone", "network", m.key.network, "name", m.key.name)
					gone = append(gone, m)
					delete(d.members, m.key) // it may say so twice: its process has ended, and its cable
				}
				select {
				case m = <-d.ended: // many end together
				default:
					more = false
				}
			}
			d.drop(gone...)
			d.mu.Unlock()
		case <-d.suspect:
			if err := d.lookForPorts(ctx); err != nil && ctx.Err() == nil {
				return err
			}
		}
	}
}

// lookForPorts drops the members whose port is not there any more. As numbers are given again, the event itself says too
// little. A network's own interfaces, and ports that have lost their bridge, a new daemon puts in order.
func (d *daemon) lookForPorts(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	links, err := bridge.List(ctx, d.ns)
	if err != nil {
		return err
	}
	of := map[string]string{} // of which bridge each is a port
	for _, l := range links {
		of[l.Name] = l.Bridge
	}
	for name, sn := range d.nets {
		_, there := of[sn.is.Bridge()]
		if uplink, plugged := of[sn.is.Uplink()]; !there || !plugged || uplink != sn.is.Bridge() {
			return fmt.Errorf("network %q: somebody has removed its bridge %s or its uplink %s", name, sn.is.Bridge(), sn.is.Uplink())
		}
	}
	var gone []*member
	for _, m := range d.members {
		if _, there := of[m.port]; !there {
			d.log.Info("a member's interface is gone, and so is the member", "network", m.key.network, "name", m.key.name)
			gone = append(gone, m)
		}
	}
	d.drop(gone...)
	return nil
}

// drop ends memberships, whatever of them is left. The kernel takes tens of milliseconds to remove a TAP, and removes some at a time.
// mu is held.
func (d *daemon) drop(gone ...*member) {
	g := errgroup.Group{}
	g.SetLimit(endAtOnce)
	for _, m := range gone {
		delete(d.members, m.key)
		g.Go(func() error {
			if err := m.close(true); err != nil {
				d.log.Warn("a member's end", "network", m.key.network, "name", m.key.name, "error", err)
			}
			if _, err := d.set.Leave(m.key.network, m.key.name); err != nil {
				d.log.Warn("a member's end", "network", m.key.network, "name", m.key.name, "error", err)
			}
			return nil
		})
	}
	_ = g.Wait()
	if len(gone) == 0 {
		return
	}
	if err := d.save(); err != nil {
		d.log.Error("the end of memberships is not recorded", "members", len(gone), "error", err)
	}
	for _, m := range gone {
		d.shutUnused(m.key.network)
	}
	d.touch()
}

// shutUnused closes a network that nobody is a member of.
func (d *daemon) shutUnused(name string) {
	sn := d.nets[name]
	if n, err := d.set.Get(name); sn == nil || err == nil && (len(n.Members) > 0 || n.Persist) {
		return
	}
	delete(d.nets, name)
	if err := sn.close(d.ns, true); err != nil {
		d.log.Warn("a network's end", "network", name, "error", err)
	}
}

// close leaves interfaces to who comes after.
func (d *daemon) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, m := range d.members {
		errs = append(errs, m.close(false))
	}
	for _, sn := range d.nets {
		errs = append(errs, sn.close(d.ns, false))
	}
	if d.control != nil {
		errs = append(errs, d.control.Close())
	}
	if d.taps != nil {
		errs = append(errs, d.taps.close())
	}
	if d.ns != nil {
		errs = append(errs, d.ns.Close())
	}
	if d.dir != nil {
		errs = append(errs, d.dir.Close())
	}
	return errors.Join(errs...)
}

// info is what the daemon says of itself. Who asks for it is going to ask for more.
func (d *daemon) info() api.Info {
	d.touch()
	return api.Info{
		Version: ourVersion(), Started: d.started, Namespace: sharedPath(os.Getpid(), fdNetNS),
		Interface: api.Interface{Name: "-"},
	}
}

// hostNetworks are the host's own addresses and networks, which no network of ours may take.
func hostNetworks() ([]netip.Prefix, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("the host's addresses: %w", err)
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("the host's routes: %w", err)
	}
	var list []netip.Prefix
	add := func(n *net.IPNet) {
		if n == nil {
			return // a default route
		}
		a, ok := netip.AddrFromSlice(n.IP)
		length, _ := n.Mask.Size()
		if a = a.Unmap(); ok && !a.IsLoopback() && !a.IsLinkLocalUnicast() && !a.IsMulticast() {
			list = append(list, netip.PrefixFrom(a, length).Masked())
		}
	}
	for _, a := range addrs {
		add(a.IPNet)
	}
	for _, r := range routes {
		add(r.Dst)
	}
	return list, nil
}

// A logFile is a log that does not grow for ever.
type logFile struct {
	path string
	mu   sync.Mutex
	f    *os.File
	size int64
}

func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f != nil && l.size > logSize {
		_ = os.Rename(l.path, l.path+".old") // else it grows on
		l.f.Close()
		l.f = nil
	}
	if l.f == nil {
		f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return 0, err
		}
		info, err := f.Stat()
		if err != nil {
			f.Close()
			return 0, err
		}
		l.f, l.size = f, info.Size()
	}
	n, err := l.f.Write(p)
	l.size += int64(n)
	return n, err
}
