package taptest_test

import (
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap/taptest"
)

func TestMain(m *testing.M) { taptest.Main(m, nil) }

// Main's namespaces: root, lo up and nothing else, mounts that nobody else sees.
func TestMainIsInside(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Errorf("uid %d", os.Geteuid())
	}
	links, err := net.Interfaces()
	if err != nil || len(links) != 1 || links[0].Name != "lo" || links[0].Flags&net.FlagUp == 0 {
		t.Errorf("interfaces %v, %v", links, err)
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	if !taptest.Inside(t) {
		t.Error("Inside does not know")
	}
}

func TestNewNS(t *testing.T) {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{own: true}
	var all []*taptest.Namespace // each lives until all are there, for the number of one that has ended is free again
	for _, owner := range taptest.Owners {
		ns := taptest.NewNS(t, owner)
		name, err := os.Readlink(ns.Path())
		if err != nil || seen[name] {
			t.Errorf("%s: %s, %v; want a namespace of its own", owner, name, err)
		}
		seen[name] = true
		ids, err := os.ReadFile(strings.Replace(ns.Path(), "ns/net", "uid_map", 1))
		if err != nil || (len(ids) == 0) != (owner == taptest.OwnerUnmapped) {
			t.Errorf("%s: uid map %q, %v", owner, ids, err)
		}
		all = append(all, ns)
	}
	for i, ns := range all {
		ns.End()
		if _, err := os.Stat(ns.Path()); err == nil {
			t.Errorf("%s: its process outlived End", taptest.Owners[i])
		}
		ns.End()
	}
}

func TestCommand(t *testing.T) {
	if _, err := exec.LookPath("nsenter"); err != nil {
		t.Skip("no nsenter (util-linux) here")
	}
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	out, err := ns.Command("readlink", "/proc/self/ns/net").CombinedOutput()
	want, _ := os.Readlink(ns.Path())
	if err != nil || strings.TrimSpace(string(out)) != want {
		t.Errorf("%s, %v; want %s", out, err, want)
	}
}

// owner is the inode of the user namespace that owns a network namespace, by the user namespaces above it.
func owner(t *testing.T, path string, above int) uint64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
	for range above {
		if err != nil {
			break
		}
		parent, e := unix.IoctlRetInt(fd, unix.NS_GET_PARENT)
		unix.Close(fd)
		fd, err = parent, e
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestNewNSIn(t *testing.T) {
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	beside, below := taptest.NewNSIn(t, ns, false), taptest.NewNSIn(t, ns, true)
	want := owner(t, ns.Path(), 0)
	if owner(t, beside.Path(), 0) != want || owner(t, below.Path(), 0) == want || owner(t, below.Path(), 1) != want {
		t.Errorf("owners are %d, %d and %d below %d; want the first two and the last alike",
			want, owner(t, beside.Path(), 0), owner(t, below.Path(), 0), owner(t, below.Path(), 1))
	}
	for _, n := range []*taptest.Namespace{beside, below} {
		n.End()
		if _, err := os.Stat(n.Path()); err == nil {
			t.Error("its process outlived End")
		}
	}
}
