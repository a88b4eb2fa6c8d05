package bridge

import (
	"context"
	"fmt"
	"net"
	"strings"

	"github.com/vishvananda/netlink"

	"usernet/tap/netns"
)

// A Link is an interface as it is found.
type Link struct {
	Name  string
	Index int    // in its namespace
	Type  string // "bridge", "veth", "tuntap" for a TAP, or another of the kernel's
	MAC   net.HardwareAddr
	MTU   int // IP octets
	Up    bool

	Bridge string // of which it is a port; "" means none

	// Peer is the index of a veth's other end, in that one's namespace; 0 for others.
	Peer int

	// Ours tells that usernet has made it: so says its alias, which a port of the shared namespace need not have.
	Ours bool
}

// List tells which interfaces ns has, lo left out: what is there without a record is to be removed.
func List(ctx context.Context, ns *netns.NS) ([]Link, error) {
	var all []Link
	if _, err := ns.Call(ctx, Ops(), opList, struct{}{}, &all); err != nil {
		return nil, err
	}
	return all, nil
}

// Remove takes an interface of ns away, and with a veth's end the other one. One that is not there is no error.
func Remove(ctx context.Context, ns *netns.NS, name string) error {
	if _, err := ns.Call(ctx, Ops(), opRemove, name, nil); err != nil {
		return fmt.Errorf("remove interface %s: %w", name, err)
	}
	return nil
}

func describe(link netlink.Link, bridge string) Link {
	a := link.Attrs()
	l := Link{
		Name: a.Name, Index: a.Index, Type: link.Type(), MAC: a.HardwareAddr, MTU: a.MTU, Up: a.Flags&net.FlagUp != 0,
		Bridge: bridge, Ours: strings.HasPrefix(a.Alias, "usernet"),
	}
	if _, is := link.(*netlink.Veth); is {
		l.Peer = a.ParentIndex
	}
	return l
}

const (
	typeVeth = "veth"
	typeTAP  = "tuntap"
)
