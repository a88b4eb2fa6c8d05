package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"usernet/stack"
	"usernet/tap"
)

// A link is where frames come from and go to:
//
//	a namespace    tap.Open          a TAP that is ours to make, configure and remove
//	options.tapFD  tap.FromFD        a TAP that somebody has made and passed on
//	options.bess   tap.ListenSocket  a program's Ethernet card, one frame to a message
//	options.uplink bridge.Uplink     a port of a bridge with several containers
//
// Only with the first is there a namespace to look into: without one published ports go through the stack alone, and the
// network ends when the device does.
type link struct {
	name    string
	mtu     int
	mac     net.HardwareAddr // of the container's side; nil: it has not told us
	devices []stack.Device
	fds     []int           // of devices on which one may linger
	there   <-chan struct{} // closed when there is another end; nil: from the beginning
	dir     *os.File        // in which something is removed at the end; nil: none
	gone    string          // why the network ends when a device vanishes; "": that is an error
	close   func() error
}

// inNamespace tells whether the network is one of a namespace that we open.
func (o *options) inNamespace() bool { return o.tapFD < 0 && o.bess == "" && o.uplink == nil }

// openLink opens what the options name.
func (e *engine) openLink(ctx context.Context) (*link, error) {
	o, p := e.o, e.o.plan
	switch {
	case o.uplink != nil:
		return o.uplink(ctx)
	case o.bess != "":
		s, err := tap.ListenSocket(o.bess, o.mtu)
		if err != nil {
			return nil, err
		}
		return &link{
			name: o.tapName, mtu: o.mtu, devices: []stack.Device{s}, there: s.Connected(), dir: s.Dir(),
			gone: "the client of " + o.bess + " has hung up", close: s.Close,
		}, nil
	case o.tapFD >= 0:
		d, err := tap.FromFD(ctx, o.tapFD, tap.FDConfig{MTU: o.mtu, NoOffload: o.noOffload, NoUSO: o.noUSO, Log: e.log})
		if err != nil {
			return nil, err
		}
		l := tapLink(d)
		l.gone = "the TAP was deleted"
		return l, nil
	}
	d, err := tap.Open(ctx, e.ns, tap.Config{
		Name: o.tapName, MTU: o.mtu, MAC: o.mac, Queues: o.queues, Configure: o.configure,
		NoOffload: o.noOffload, NoUSO: o.noUSO, KeepIPv6Off: o.keepIPv6Off,
		IPv4: withLen(p.container4, p.net4), Gateway4: p.gateway4,
		IPv6: withLen(p.container6, p.net6), Gateway6: p.gateway6,
		Log: e.log,
	})
	if err != nil {
		return nil, err
	}
	return tapLink(d), nil
}

func tapLink(d *tap.Device) *link {
	l := &link{name: d.Name(), mtu: d.MTU(), mac: d.MAC(), close: d.Close}
	for _, q := range d.Queues() {
		l.devices = append(l.devices, q)
		l.fds = append(l.fds, q.FD())
	}
	return l
}

// wait blocks until there is another end, and returns false if ctx ends before.
func (l *link) wait(ctx context.Context) bool {
	if l.there == nil {
		return true
	}
	select {
	case <-l.there:
		return true
	case <-ctx.Done():
		return false
	}
}

// ended makes an ending of an error that says that the device has vanished, where nothing else can tell us that
// the container has.
func (l *link) ended(err error) error {
	if l.gone != "" && errors.Is(err, unix.ENODEV) {
		return ending{l.gone}
	}
	return err
}

// takeTAP takes a TAP's descriptor over, as inherited does with those of flags. What it is the tap package asks.
func takeTAP(o *options) error {
	if o.tapFD == o.readyFD || o.tapFD == o.exitFD {
		return fmt.Errorf("descriptor %d is given twice: for the TAP, and for the ready or the exit descriptor", o.tapFD)
	}
	var st unix.Stat_t
	if err := unix.Fstat(o.tapFD, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return fmt.Errorf("descriptor %d is no TAP: open /dev/net/tun, attach it by TUNSETIFF, and pass it on", o.tapFD)
	}
	unix.CloseOnExec(o.tapFD)
	return nil
}
