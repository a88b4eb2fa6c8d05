package tap_test

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap"
	"usernet/tap/taptest"
)

// Several TAPs in one namespace, by handles of their own.
func TestUnlocked(t *testing.T) {
	taptest.NeedTUN(t)
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	cfg := config()
	cfg.Unlocked = true
	a := open(t, ns.Open(t), cfg)
	cfg.Name, cfg.Configure = "tap1", false
	second := ns.Open(t)
	b := open(t, second, cfg)
	if _, err := tap.Open(t.Context(), second, cfg); !errors.Is(err, unix.EBUSY) {
		t.Errorf("the same TAP twice: %v, want EBUSY", err)
	}
	// Their ends leave a lock alone that was taken since.
	last := ns.Open(t)
	if err := last.Lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, d := range []*tap.Device{a, b} {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := second.Lock(t.Context()); !errors.Is(err, unix.EBUSY) {
		t.Errorf("the lock was lost: %v", err)
	}
}

func TestFresh(t *testing.T) {
	n := newNS(t)
	cfg := config()
	cfg.Fresh = true
	d := open(t, n, cfg)
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	if _, err := tap.Open(t.Context(), n, cfg); !errors.Is(err, unix.EEXIST) {
		t.Errorf("%v, want EEXIST", err)
	}
	if s := see(t, n); !s.Found {
		t.Error("it is gone")
	}
}

// An interface that is no TAP gets what a TAP would get, once.
func TestDress(t *testing.T) {
	n := newNS(t)
	call(t, n, "foreign", foreigner{Name: "tap0"}, nil)
	cfg := config()
	cfg.MAC = net.HardwareAddr{2, 0, 0, 0, 0, 9}
	if err := tap.Dress(t.Context(), n, cfg); err != nil {
		t.Fatal(err)
	}
	s := see(t, n)
	if !s.Up || !s.LoUp || s.MTU != 1500 || s.MAC != "02:00:00:00:00:09" || s.Alias != tap.AliasOurs {
		t.Errorf("%+v", s)
	}
	for _, want := range configured {
		if !slices.Contains(s.Addrs, want) {
			t.Errorf("addresses %q lack %s", s.Addrs, want)
		}
	}
	cfg.MTU, cfg.IPv4, cfg.Gateway4 = 1400, netip.MustParsePrefix("10.9.9.9/24"), netip.MustParseAddr("10.9.9.1")
	if err := tap.Dress(t.Context(), n, cfg); err != nil {
		t.Fatal(err)
	}
	if after := see(t, n); after.MTU != s.MTU || !slices.Equal(after.Addrs, s.Addrs) || !slices.Equal(after.Routes, s.Routes) {
		t.Errorf("it was\n%+v and is\n%+v", s, after)
	}
	cfg.Name = "none"
	if err := tap.Dress(t.Context(), n, cfg); err == nil {
		t.Error("an interface that is not there was dressed")
	}
}
