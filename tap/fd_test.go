package tap_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap"
	"usernet/tap/netns"
	"usernet/tap/taptest"
)

// inheritedTAP makes a TAP in n that is up and has the container's address, and returns its descriptor twice: what
// FromFD takes, and the maker's own.
func inheritedTAP(t testing.TB, n *netns.NS, flags uint16) (fd, makers int) {
	t.Helper()
	files := call(t, n, "foreign", foreigner{Name: "tap0", Flags: flags, Hold: true}, nil)
	call(t, n, "change", wish{Name: "tap0", Addr: "10.0.2.100/24", MTU: 1400, Up: true}, nil)
	makers = int(files[0].Fd())
	fd, err := unix.Dup(makers)
	if err := errors.Join(err, unix.SetNonblock(makers, false)); err != nil {
		t.Fatal(err)
	}
	return fd, makers
}

func fromFD(t testing.TB, fd int, cfg tap.FDConfig) *tap.Device {
	t.Helper()
	d, err := tap.FromFD(t.Context(), fd, cfg)
	if err != nil {
		unix.Close(fd)
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return d
}

const plainTAP = unix.IFF_TAP | unix.IFF_NO_PI

func TestFromFD(t *testing.T) {
	for _, c := range []struct {
		name     string
		flags    uint16
		config   tap.FDConfig
		offloads uint32
	}{
		{"plain", plainTAP, tap.FDConfig{}, 0},
		{"with a header", plainTAP | unix.IFF_VNET_HDR, tap.FDConfig{}, 0x67},
		{"with several queues", plainTAP | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE, tap.FDConfig{}, 0x67},
		{"no USO", plainTAP | unix.IFF_VNET_HDR, tap.FDConfig{NoUSO: true}, 0x07},
		{"no offload", plainTAP | unix.IFF_VNET_HDR, tap.FDConfig{NoOffload: true}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNS(t)
			fd, makers := inheritedTAP(t, n, c.flags)
			header := c.flags&unix.IFF_VNET_HDR != 0
			if header { // a size that QEMU uses
				if err := unix.IoctlSetPointerInt(makers, unix.TUNSETVNETHDRSZ, 12); err != nil {
					t.Fatal(err)
				}
			} else if err := unix.IoctlSetInt(makers, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4); err != nil { // somebody forgot it
				t.Fatal(err)
			}
			d := fromFD(t, fd, c.config)
			if s := see(t, n); d.Name() != "tap0" || d.MTU() != 1400 || d.MAC().String() != s.MAC || !d.Adopted() || fmt.Sprint(d.Addrs()) != "[10.0.2.100/24]" {
				t.Errorf("name %s, MTU %d, MAC %s of %s, adopted %v, addresses %v", d.Name(), d.MTU(), d.MAC(), s.MAC, d.Adopted(), d.Addrs())
			}
			q := d.Queues()[0]
			if q.Offloads() != c.offloads {
				t.Errorf("offloads %#x, want %#x", q.Offloads(), c.offloads)
			}
			s := socket(t, n, "10.0.2.100:1000")
			payload := bytes.Repeat([]byte("0123456789"), 25)
			if _, err := s.WriteToUDPAddrPort(payload, netip.AddrPortFrom(everybody, 9)); err != nil {
				t.Fatal(err)
			}
			if _, f := next(t, q); !bytes.Equal(f[udpLen:], payload) {
				t.Errorf("up came %q", f[udpLen:])
			}
			if err := q.Write([][]byte{frameTo(d, payload, 0)}); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 1000)
			if size, err := s.Read(buf); err != nil || !bytes.Equal(buf[:size], payload) {
				t.Errorf("down came %q, %v", buf[:size], err)
			}
			for range 2 {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
			if s := see(t, n); !s.Found || !s.Up || len(s.Addrs) == 0 {
				t.Errorf("after Close: %+v", s)
			}
			if mode, err := unix.FcntlInt(uintptr(makers), unix.F_GETFL, 0); err != nil || mode&unix.O_NONBLOCK != 0 {
				t.Errorf("mode of the maker's descriptor: %#x, %v", mode, err)
			}
			req, err := unix.NewIfreq("")
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.IoctlIfreq(makers, unix.TUNGETIFF, req); err != nil || req.Uint16()&unix.IFF_NOFILTER == 0 {
				t.Errorf("flags %#x, %v: a filter is left", req.Uint16(), err)
			}
			if header {
				if size, err := unix.IoctlGetInt(makers, unix.TUNGETVNETHDRSZ); err != nil || size != 12 {
					t.Errorf("its header has %d octets, %v", size, err)
				}
				if le, err := unix.IoctlGetInt(makers, unix.TUNGETVNETLE); err != nil || le != 0 {
					t.Errorf("its header's order is %d, %v", le, err)
				}
			}
		})
	}
}

// The MTU of an interface that is down is what it was born with, and not what it will have.
func TestFromFDBeforeItIsUp(t *testing.T) {
	n := newNS(t)
	files := call(t, n, "foreign", foreigner{Name: "tap0", Flags: plainTAP, Hold: true}, nil)
	fd, err := unix.Dup(int(files[0].Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if d := fromFD(t, fd, tap.FDConfig{MTU: 9000}); d.MTU() != 9000 {
		t.Errorf("MTU %d, want 9000", d.MTU())
	}
	if fd, err = unix.Dup(int(files[0].Fd())); err != nil {
		t.Fatal(err)
	}
	if d := fromFD(t, fd, tap.FDConfig{}); d.MTU() != tap.DefaultMTU {
		t.Errorf("MTU %d, want %d", d.MTU(), tap.DefaultMTU)
	}
}

// Whoever may not enter the namespace goes by what he was told.
func TestFromFDWithoutRights(t *testing.T) {
	taptest.NeedTUN(t)
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	n, err := netns.Open(netns.Config{PID: ns.PID, Helper: true}) // of ours, a thread has the rights of the namespace's owner
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	var got linkState
	call(t, n, "adopt", 1280, &got)
	if got.MTU != 1280 || got.MAC == "" {
		t.Errorf("%+v", got)
	}
}

// adopt is FromFD of a new TAP on a thread that has given up its rights.
func adopt(ctx context.Context, mtu int) (s linkState, _ []*os.File, err error) {
	fd, err := attach("tap0", plainTAP)
	if err != nil {
		return s, nil, err
	}
	runtime.LockOSThread() // until the process ends: nobody else shall get this thread
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capset(&hdr, &make([]unix.CapUserData, 2)[0]); err != nil {
		return s, nil, err
	}
	d, err := tap.FromFD(ctx, fd, tap.FDConfig{MTU: mtu, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return s, nil, err
	}
	s.MTU, s.MAC = d.MTU(), d.MAC().String()
	return s, nil, d.Close()
}

func TestFromFDRefuses(t *testing.T) {
	taptest.NeedTUN(t)
	for _, c := range []struct {
		name, want string
		open       func(t *testing.T) (int, error)
	}{
		{"nothing", "is not open", func(*testing.T) (int, error) { return 1 << 20, nil }},
		{"a file", "is no TAP", func(*testing.T) (int, error) { return unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0) }},
		{"no interface", "attached to no interface", func(*testing.T) (int, error) {
			return unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		}},
		{"a TUN", "is a TUN and no TAP", func(t *testing.T) (int, error) {
			fd, _ := inheritedTAP(t, newNS(t), unix.IFF_TUN|unix.IFF_NO_PI)
			return fd, nil
		}},
		{"packet information", "IFF_NO_PI", func(t *testing.T) (int, error) {
			fd, _ := inheritedTAP(t, newNS(t), unix.IFF_TAP)
			return fd, nil
		}},
		{"a detached queue", "IFF_ATTACH_QUEUE", func(t *testing.T) (int, error) {
			fd, _ := inheritedTAP(t, newNS(t), plainTAP|unix.IFF_MULTI_QUEUE)
			req, err := unix.NewIfreq("tap0")
			if err != nil {
				return fd, err
			}
			req.SetUint16(unix.IFF_DETACH_QUEUE)
			return fd, unix.IoctlIfreq(fd, unix.TUNSETQUEUE, req)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			fd, err := c.open(t)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			d, err := tap.FromFD(t.Context(), fd, tap.FDConfig{})
			if err == nil {
				t.Fatal("accepted", d.Close())
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%q, want %q in it", err, c.want)
			}
		})
	}
	if _, err := tap.FromFD(t.Context(), 0, tap.FDConfig{MTU: 67}); err == nil || !strings.Contains(err.Error(), "MTU 67") {
		t.Error(err)
	}
}

// The interface's end is all that a descriptor tells of the container's, whether one waits or reads.
func TestFromFDSeesTheEnd(t *testing.T) {
	n := newNS(t)
	fd, _ := inheritedTAP(t, n, plainTAP|unix.IFF_VNET_HDR)
	d := fromFD(t, fd, tap.FDConfig{})
	q := d.Queues()[0]
	ended := make(chan error)
	go func() {
		var err error
		for err == nil {
			for err == nil {
				_, err = q.Read([][]byte{make([]byte, 65536)})
			}
			if errors.Is(err, unix.EAGAIN) {
				err = q.Wait()
			}
		}
		ended <- err
	}()
	call(t, n, "change", wish{Name: "tap0", Delete: true}, nil)
	if err := <-ended; !errors.Is(err, unix.ENODEV) {
		t.Errorf("%v, want ENODEV", err)
	}
	if _, err := q.Read([][]byte{make([]byte, 100)}); !errors.Is(err, unix.ENODEV) {
		t.Errorf("Read after it: %v, want ENODEV", err)
	}
}
