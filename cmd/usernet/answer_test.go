package main

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"usernet/api"
	"usernet/portdriver"
)

func TestPrintForwards(t *testing.T) {
	all := []api.Forward{
		{ID: 1, Spec: api.Spec{Proto: "tcp", HostPort: 8080, ContainerPort: 80}, Path: portdriver.PathKernel, Active: 1, Total: 20, OctetsIn: 1023, OctetsOut: 5 << 30},
		{ID: 2, Spec: api.Spec{Proto: "udp6", Host: netip.MustParseAddr("::1"), HostPort: 53, Container: netip.MustParseAddr("fd00::7"), ContainerPort: 5353}, Path: portdriver.PathTAP, Auto: true},
		{ID: 10, Spec: api.Spec{Proto: "tcp", HostPath: "/run/x.sock", ContainerPort: 80}, Draining: true, Note: "nobody listens"},
	}
	var b strings.Builder
	if err := (&question{}).printForwards(&b, all); err != nil {
		t.Fatal(err)
	}
	golden(t, "list.golden", b.String())
}

func TestPrintInfo(t *testing.T) {
	info := api.Info{
		APIVersion: "1.0", Version: "v1", PID: 7, Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local), Namespace: "/proc/8/ns/net",
		Interface: api.Interface{Name: "tap0", MTU: 1500, MAC: "02:00:5e:10:00:01", Queues: 1},
		IPv4:      &api.Addresses{Container: netip.MustParsePrefix("10.0.2.100/24"), Gateway: netip.MustParseAddr("10.0.2.2"), DNS: netip.MustParseAddr("10.0.2.3")},
		Ports: &portdriver.Info{
			IPv4:     &portdriver.PathInfo{Path: portdriver.PathStack, WhyNotKernel: "the kernel is too old"},
			Forwards: 1, MaxForwards: 5000, MaxConnections: 2500,
		},
	}
	var b strings.Builder
	if err := printInfo(&b, info); err != nil {
		t.Fatal(err)
	}
	info.Interface.Offloads, info.Sandbox, info.Ports = []string{"csum", "tso4"}, true, nil
	if err := printInfo(&b, info); err != nil {
		t.Fatal(err)
	}
	info.Ports = &portdriver.Info{IPv6: &portdriver.PathInfo{Path: portdriver.PathKernel, Loopback: true, Detours: 2}, Forwards: 3, MaxForwards: 5000}
	if err := printInfo(&b, info); err != nil {
		t.Fatal(err)
	}
	golden(t, "info.golden", b.String())
}

func TestOctets(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 1023: "1023", 1024: "1.0K", 10 << 10: "10K", 1000 << 10: "1.0M", 5 << 30: "5.0G", 1<<64 - 1: "16E"} {
		if got := octets(n); got != want {
			t.Errorf("octets(%d) = %s, want %s", n, got, want)
		}
	}
}

// The server may run elsewhere.
func TestWhereTyped(t *testing.T) {
	t.Chdir(t.TempDir())
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	typed := []string{"./a.sock:80", "8080:80", "/b.sock:80"}
	got, err := whereTyped(typed)
	if want := []string{dir + "/a.sock:80", "8080:80", "/b.sock:80"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

// The only socket that answers is meant; of several the user has to name one.
func TestOnlySocket(t *testing.T) {
	dir := t.TempDir()
	if _, err := onlySocket(dir); err == nil || !strings.Contains(err.Error(), "--socket") {
		t.Errorf("an empty directory: %v", err)
	}
	listen := func(name string) *net.UnixListener {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	dead := listen("1.sock")
	dead.SetUnlinkOnClose(false)
	dead.Close()
	live := listen("2.sock")
	if got, err := onlySocket(dir); err != nil || got != live.Addr().String() {
		t.Errorf("one of two lives: %q, %v", got, err)
	}
	listen("3.sock")
	if _, err := onlySocket(dir); err == nil || !strings.Contains(err.Error(), "2.sock") || !strings.Contains(err.Error(), "3.sock") {
		t.Errorf("two live ones: %v", err)
	}
}
