package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestMain holds that no test leaves a goroutine or a descriptor behind. With TEST_LOCK it is a process that takes
// the lock of that directory, says so, and keeps it until it is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("TEST_LOCK"); dir != "" {
		fmt.Println(holdLock(dir))
		select {}
	}
	before := descriptors()
	code := m.Run()
	deadline := time.Now().Add(5 * time.Second)
	for leaked() != "" || descriptors() > before {
		if time.Now().After(deadline) {
			fmt.Fprintf(os.Stderr, "left behind: %d descriptors and\n%s\n", descriptors()-before, leaked())
			code = 1
			break
		}
		runtime.Gosched()
	}
	os.Exit(code)
}

func holdLock(path string) string {
	d, err := OpenDir(path)
	if err == nil {
		_, err = d.Lock(context.Background(), "usernet test")
	}
	if err != nil {
		return err.Error()
	}
	return "locked"
}

func leaked() string {
	buf := make([]byte, 1<<20)
	var out []string
	for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "usernet/network.") && !strings.Contains(g, "TestMain") {
			out = append(out, g)
		}
	}
	return strings.Join(out, "\n\n")
}

// descriptors counts those that are not the runtime's own.
func descriptors() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	n := 0
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.Contains(to, "anon_inode:[event") && !strings.Contains(to, "/proc/") {
			n++
		}
	}
	return n
}

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func prefixes(list ...string) []netip.Prefix {
	var p []netip.Prefix
	for _, s := range list {
		p = append(p, prefix(s))
	}
	return p
}

func mac(s string) MAC {
	m, err := ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

// want fails unless err is of that kind (nil: there is none) and has all the words in it.
func want(t testing.TB, err, kind error, words ...string) {
	t.Helper()
	if kind == nil {
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	if !errors.Is(err, kind) {
		t.Fatalf("%v, want one that is %v", err, kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v: does not say %q", err, w)
		}
	}
}

func create(t testing.TB, s *Set, cfg Config) Network {
	t.Helper()
	n, err := s.Create(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// request is one of a container that is nobody else's.
func request(name string) Request {
	var inode uint64
	for _, c := range name {
		inode = inode<<8 | uint64(c)
	}
	return Request{Name: name, NetNS: NetNS{4, inode + 1}, Process: Process{100, 7}}
}

func join(t testing.TB, s *Set, network string, r Request) Member {
	t.Helper()
	m, err := s.Join(network, r)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func leave(t testing.TB, s *Set, network, name string) {
	t.Helper()
	if _, err := s.Leave(network, name); err != nil {
		t.Fatal(err)
	}
}

const boot = "0a6e4a52-5d0b-4f0c-9c1f-0d5f2b0e7a11"

func text(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// holds checks what a Set promises, from what it shows.
func holds(t testing.TB, s *Set) {
	t.Helper()
	ports, numbers := map[int]bool{}, map[int]bool{}
	var subnets []netip.Prefix
	seats := map[string]bool{}
	for _, n := range s.List() {
		if numbers[n.Number] || n.Number < 1 {
			t.Fatalf("network %s: number %d", n.Name, n.Number)
		}
		numbers[n.Number] = true
		for _, p := range []netip.Prefix{n.Subnet, n.Subnet6} {
			if p.IsValid() && slices.ContainsFunc(subnets, p.Overlaps) {
				t.Fatalf("network %s: %s overlaps another", n.Name, p)
			}
			subnets = append(subnets, p)
		}
		if len(n.Members) > maxMembers || len(n.Former) > maxFormer {
			t.Fatalf("network %s: %d members, %d former", n.Name, len(n.Members), len(n.Former))
		}
		used := map[string]bool{n.Gateway.String(): true, n.Gateway6.String(): true, n.Host6.String(): true, n.GatewayMAC().String(): true, n.BridgeMAC().String(): true}
		once := func(what string) {
			if used[what] {
				t.Fatalf("network %s: %s is there twice", n.Name, what)
			}
			used[what] = true
		}
		used[n.Subnet.Addr().String()], used[last(n.Subnet).String()], used[n.Subnet6.Addr().String()] = true, true, true
		leases := map[string]Addresses{}
		for _, m := range n.Members {
			once(m.MAC.String())
			once("name " + m.Name)
			leases[m.Name] = m.Addresses
			if ports[m.Number] || m.Number < 1 {
				t.Fatalf("member %s: number %d", m.Name, m.Number)
			}
			ports[m.Number] = true
			seat := fmt.Sprint(m.NetNS, m.Ifname)
			if seats[seat] {
				t.Fatalf("member %s: interface %s of %v is there twice", m.Name, m.Ifname, m.NetNS)
			}
			seats[seat] = true
			v := s.Names(n.Name).For(m.IPv4)
			if got, ok := v.Addrs(m.Name); !ok || !slices.Contains(got, m.IPv4) {
				t.Fatalf("member %s: its name is answered %v", m.Name, got)
			}
			if got, ok := v.Name(m.IPv4); !ok || got != m.Name+"."+n.Domain {
				t.Fatalf("member %s: its address is answered %q", m.Name, got)
			}
		}
		for _, l := range n.Former {
			once("name " + l.Name)
			leases[l.Name] = l.Addresses
		}
		for name, a := range leases {
			once(a.IPv4.String())
			if !n.Subnet.Contains(a.IPv4) {
				t.Fatalf("%s: %s is not in %s", name, a.IPv4, n.Subnet)
			}
			if n.Subnet6.IsValid() {
				once(a.IPv6.String())
				if !n.Subnet6.Contains(a.IPv6) {
					t.Fatalf("%s: %s is not in %s", name, a.IPv6, n.Subnet6)
				}
			} else if a.IPv6.IsValid() {
				t.Fatalf("%s: %s without IPv6", name, a.IPv6)
			}
		}
	}
}
