package ra

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if os.Getenv("TEST_IN_NAMESPACE") == "" {
		os.Exit(m.Run())
	}
	if err := inNamespace(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// The kernel takes an advertisement of ours: address, default route and MTU, and the end of the route with
// the final one.
func TestKernelTakesIt(t *testing.T) {
	if f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
		t.Skipf("no TAP on this machine: %v", err)
	} else {
		f.Close()
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "TEST_IN_NAMESPACE=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out := new(strings.Builder)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Skipf("this machine gives no user and network namespace: %v", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func inNamespace() error {
	tap, err := unix.Open("/dev/net/tun", unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer unix.Close(tap)
	ifr, err := unix.NewIfreq("tap0")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(tap, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("TUNSETIFF: %w", err)
	}
	sock, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(sock)
	ifr.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(sock, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("link up: %w", err)
	}

	cfg := config()
	cfg.MTU = 1400 // of the link's 1500
	const route = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000002"
	for _, step := range []struct {
		what, file, want string
	}{
		{what: "address", file: "/proc/net/if_inet6", want: "fd000000000000"},
		{what: "route", file: "/proc/net/ipv6_route", want: route},
		{what: "mtu", file: "/proc/sys/net/ipv6/conf/tap0/mtu", want: "1400"},
	} {
		deadline := time.Now().Add(10 * time.Second)
		for {
			// Again each time: the interface drops frames until it is wholly up.
			if _, err := unix.Write(tap, ethernet(Advertisement(cfg))); err != nil {
				return fmt.Errorf("write: %w", err)
			}
			text, err := os.ReadFile(step.file)
			if err != nil {
				return err
			}
			if strings.Contains(string(text), step.want) {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s: %s is\n%s", step.what, step.file, text)
			}
		}
	}
	return nil
}

// ethernet wraps an advertisement from the router to all nodes.
func ethernet(advertisement []byte) []byte {
	src, dst := netip.MustParseAddr("fe80::2"), netip.MustParseAddr("ff02::1")
	m, err := (&icmp.Message{Type: ipv6.ICMPTypeRouterAdvertisement, Body: &icmp.RawBody{Data: advertisement[4:]}}).
		Marshal(icmp.IPv6PseudoHeader(src.AsSlice(), dst.AsSlice()))
	if err != nil {
		panic(err) // it is of our own making
	}
	f := []byte{0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xdd, 0x60, 0, 0, 0}
	f = binary.BigEndian.AppendUint16(f, uint16(len(m)))
	f = append(f, 58, 255)
	f = append(f, src.AsSlice()...)
	f = append(f, dst.AsSlice()...)
	return append(f, m...)
}
