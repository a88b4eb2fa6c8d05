package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestResolvConfText(t *testing.T) {
	got := resolvConfText(netip.MustParseAddr("10.0.2.3"), []string{"a.example", "b.example"}, []string{"ndots:2", "edns0"})
	want := "# usernet's resolver, which asks the host's.\nnameserver 10.0.2.3\nsearch a.example b.example\noptions ndots:2 edns0\n"
	if got != want {
		t.Errorf("%q", got)
	}
	if got := resolvConfText(netip.MustParseAddr("10.0.2.3"), nil, nil); strings.Contains(got, "search") || strings.Contains(got, "options") {
		t.Errorf("%q", got)
	}
}

func TestHostsText(t *testing.T) {
	const ours = "169.254.1.2 host.containers.internal host.docker.internal\nfd00::4 host.containers.internal host.docker.internal\n"
	const own = "10.0.2.100 box\nfd00::100 box\n"
	p, err := newPlan(defaultCIDR, defaultCIDR6, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, hosts, want string }{
		{"empty", "", ours + own},
		{"kept as it is", "# hi\n127.0.0.1\tlocalhost # lo\n\n::1 localhost", "# hi\n127.0.0.1\tlocalhost # lo\n\n::1 localhost\n" + ours + own},
		{"own name known", "127.0.1.1 box.example box\n", "127.0.1.1 box.example box\n" + ours},
		{"only as an address", "127.0.1.1 boxes\n", "127.0.1.1 boxes\n" + ours + own},
		{"the host's names replaced", "192.168.65.2 host.docker.internal\n10.9.9.9 gw Host.Containers.Internal x # c\n", "10.9.9.9 gw x # c\n" + ours + own},
		{"in a comment", "#1.2.3.4 host.docker.internal\n", "#1.2.3.4 host.docker.internal\n" + ours + own},
	} {
		if got := hostsText(tt.hosts, p, "box"); got != tt.want {
			t.Errorf("%s:\n%s\nwant\n%s", tt.name, got, tt.want)
		}
	}
	if got := hostsText("", p, "two words"); got != ours {
		t.Errorf("a hostname that is none: %q", got)
	}
	p, _ = newPlan(defaultCIDR, "", false)
	if got := hostsText("", p, ""); strings.Contains(got, "::") {
		t.Errorf("without IPv6: %q", got)
	}
}

func TestIdentity(t *testing.T) {
	got, err := identity([]byte("         0     100000      65536\n     70000          0          1\n"))
	want := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}, {ContainerID: 70000, HostID: 70000, Size: 1}}
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "1 2\n", "a b c\n"} {
		if m, err := identity([]byte(bad)); err == nil {
			t.Errorf("%q: %v", bad, m)
		}
	}
}

func TestNamespaceAdvice(t *testing.T) {
	for _, tt := range []struct {
		err     error
		sysctls map[string]string
		want    string
	}{
		{&os.PathError{Op: "fork/exec", Path: "/proc/self/exe", Err: unix.EPERM}, map[string]string{"kernel/unprivileged_userns_clone": "0"}, "kernel.unprivileged_userns_clone=1"},
		{unix.EACCES, map[string]string{"kernel/apparmor_restrict_unprivileged_userns": "1", "kernel/unprivileged_userns_clone": "1"}, "kernel.apparmor_restrict_unprivileged_userns=0"},
		{unix.EPERM, nil, "something forbids user namespaces"},
		{unix.ENOSPC, map[string]string{"user/max_user_namespaces": "0"}, "user.max_user_namespaces=10000"},
		{unix.ENOSPC, map[string]string{"user/max_user_namespaces": "100", "user/max_net_namespaces": "0"}, "user.max_net_namespaces=10000"},
		{unix.EUSERS, map[string]string{"user/max_user_namespaces": "100"}, "a limit on namespaces is reached"},
		{unix.EINVAL, nil, "CONFIG_USER_NS"},
		{unix.ENOMEM, nil, "cannot allocate memory"},
		{errors.New("else"), nil, "else"},
	} {
		got := namespaceAdvice(tt.err, func(path string) string { return tt.sysctls[path] })
		if e := (*os.PathError)(nil); errors.As(tt.err, &e) {
			tt.err = e.Err
		}
		if !errors.Is(got, tt.err) || !strings.Contains(got.Error(), tt.want) {
			t.Errorf("%v with %v: %v", tt.err, tt.sysctls, got)
		}
	}
}

func TestMapAdvice(t *testing.T) {
	refused := &os.PathError{Op: "fork/exec", Path: "/proc/self/exe", Err: unix.EPERM}
	none := func(string) string { return "" }
	if err := mapAdvice(refused, none, true); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_SETFCAP") {
		t.Errorf("root without CAP_SETFCAP: %v", err)
	}
	if err := mapAdvice(refused, none, false); !strings.Contains(err.Error(), "something forbids user namespaces") {
		t.Errorf("another: %v", err)
	}
	if err := mapAdvice(unix.EUSERS, none, true); !strings.Contains(err.Error(), "a limit on namespaces") {
		t.Errorf("another error: %v", err)
	}
}

func TestExplainExec(t *testing.T) {
	dir := t.TempDir()
	script := func(name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		return name
	}
	for path, want := range map[string]string{
		script("missing", "#! \t/no/such/perl -w\n"): ": bad interpreter /no/such/perl: no such file",
		script("no newline", "#!/no/such/perl"):      ": bad interpreter /no/such/perl: no such file",
		script("there", "#!/bin/sh\n"):               ": no such file",
		script("none", "#!\n"):                       ": no such file",
		script("empty", ""):                          ": no such file",
		filepath.Join(dir, "no"):                     ": no such file",
	} {
		if err := explainExec(path, unix.ENOENT); !errors.Is(err, unix.ENOENT) || !strings.HasPrefix(err.Error(), path+want) {
			t.Errorf("%v, want %s%s", err, path, want)
		}
	}
}

func TestExecStatus(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "plain"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	for _, tt := range []struct {
		name string
		err  error
		want int
	}{
		{"nosuch", unix.ENOENT, 127}, {"plain", unix.ENOENT, 126}, {"/x/nosuch", unix.ENOENT, 127},
		{"/x/f/y", unix.ENOTDIR, 127}, {"/x", unix.EACCES, 126}, {"/x", unix.EISDIR, 126}, {"/x", unix.ENOEXEC, 126}, {"/x", unix.E2BIG, 126},
	} {
		if got := execStatus(tt.name, &os.PathError{Err: tt.err}); got != tt.want {
			t.Errorf("%s, %v: %d, want %d", tt.name, tt.err, got, tt.want)
		}
	}
}
