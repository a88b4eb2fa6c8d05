package layers

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A rule says what the packages under a folder may import. The longest matching folder counts.
// "x/..." means x and all below it. The standard library is open to all.
type rule struct {
	ours    []string // packages of this module, without the module's name
	outside []string // modules or packages
	tests   []string // both kinds, in addition, for _test.go files
}

const (
	xsys    = "golang.org/x/sys/unix"
	xnet    = "golang.org/x/net/..."
	xsync   = "golang.org/x/sync/..."
	netlink = "github.com/vishvananda/netlink/..."
	water   = "github.com/songgao/water"
	gvisor  = "gvisor.dev/gvisor/..."
	dns     = "github.com/miekg/dns"
	pcap    = "github.com/gopacket/gopacket/..."
	dhcp    = "github.com/insomniacslk/dhcp/..."
)

// layers is the architecture: arrows point down, and what a package hides nobody else sees.
// The table of docs/architecture.md says the same in words.
var layers = map[string]rule{
	"tap/netns":   {outside: []string{xsys}, tests: []string{"tap/taptest", netlink}},
	"tap":         {ours: []string{"tap/netns", "portdriver/sockfile"}, outside: []string{xsys, water, netlink}, tests: []string{"tap/taptest"}},
	"tap/inside":  {ours: []string{"tap/netns"}, outside: []string{xsys, netlink, "github.com/google/nftables/..."}, tests: []string{"tap/taptest"}},
	"tap/bridge":  {ours: []string{"tap", "tap/netns"}, outside: []string{xsys, netlink, "github.com/google/nftables/..."}, tests: []string{"tap/taptest"}},
	"tap/capture": {ours: []string{"tap/netns"}, outside: []string{xsys, pcap}, tests: []string{"tap/taptest"}},
	"tap/taptest": {ours: []string{"tap/netns"}, outside: []string{xsys}, tests: []string{netlink}},

	"stack":      {ours: []string{"stack/spin"}, outside: []string{gvisor, xsys}, tests: []string{"tap/taptest", dns, xnet}},
	"stack/dns":  {outside: []string{dns, xnet, xsys}},
	"stack/dhcp": {outside: []string{dhcp, pcap}, tests: []string{xsys}},
	"stack/spin": {outside: []string{xsys}},
	"stack/ra":   {outside: []string{pcap, xnet}, tests: []string{xsys, "tap/taptest"}},

	"forwarder":           {ours: []string{"stack", "forwarder/relay"}, outside: []string{xsys, xnet, xsync}, tests: []string{"tap/taptest"}},
	"forwarder/relay":     {ours: []string{"stack/spin"}, outside: []string{xsys}, tests: []string{"tap/taptest"}},
	"portdriver/sockfile": {outside: []string{xsys}, tests: []string{"tap/taptest"}},
	"portdriver": {
		ours: []string{"portdriver/sockfile", "forwarder/relay", "tap/inside"}, outside: []string{xsys, "github.com/rootless-containers/rootlesskit/v3/pkg/port/..."},
		// The tests run the whole way, from a client to a server in a container.
		tests: []string{"tap", "tap/netns", "tap/taptest", "stack", "forwarder", xnet, "github.com/rootless-containers/rootlesskit/v3/pkg/api"},
	},
	"api":        {ours: []string{"portdriver", "portdriver/sockfile", "network"}, outside: []string{xsys, "github.com/rootless-containers/rootlesskit/v3/pkg/..."}, tests: []string{"api/client", "tap/taptest", "forwarder/relay", "github.com/getkin/kin-openapi/...", "github.com/prometheus/..."}},
	"api/client": {ours: []string{"api", "network"}},
	"network":    {outside: []string{xsys}},

	// It is the wiring, so it sees everything of ours, but not what the others hide.
	"cmd/usernet/slirp4netns": {},
	"cmd/usernet": {
		ours:    []string{"cmd/usernet/slirp4netns", "tap/...", "stack/...", "forwarder/...", "portdriver", "api/...", "network"},
		outside: []string{"github.com/spf13/pflag", xsync, xsys, netlink, "github.com/rootless-containers/rootlesskit/v3/pkg/port", "github.com/elastic/go-seccomp-bpf/...", "github.com/prometheus/client_golang/..."},
	},
	"bench": {ours: []string{"tap/...", "stack", "forwarder/..."}, outside: []string{xsys, "gonum.org/v1/plot/..."}},

	// The built binary is tested from outside; servers in the lab speak DNS with a library.
	"e2e":          {outside: []string{xsys, dns}},
	"e2e/runtimes": {outside: []string{xsys}},
	"e2e/layers":   {},
	"e2e/tally":    {},
	"e2e/demo":     {},
}

// folders are the permitted top-level entries that are directories.
var folders = []string{"cmd", "stack", "tap", "forwarder", "portdriver", "api", "bench", "network", "e2e", "docs", ".ci", ".git", "bin"}

func TestLayers(t *testing.T) {
	root := moduleRoot(t)
	checked := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if filepath.Ext(path) != ".go" {
			return nil
		}
		pkg, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		r, ok := layers[pkg]
		if !ok {
			t.Errorf("%s: package %s is not in the table of layers", path, pkg)
			return nil
		}
		checked[pkg] = true
		for _, imported := range imports(t, path) {
			if why := r.forbids(pkg, imported, strings.HasSuffix(path, "_test.go")); why != "" {
				t.Errorf("%s imports %s: %s", filepath.Join(pkg, d.Name()), imported, why)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, pkg := range []string{"stack", "tap", "forwarder", "cmd/usernet"} {
		if !checked[pkg] {
			t.Errorf("no file of %s was seen: the test looks in the wrong place", pkg)
		}
	}
}

// forbids tells why the package may not import what it imports, or "".
func (r rule) forbids(pkg, imported string, test bool) string {
	kind := r.outside
	name, ours := strings.CutPrefix(imported, "usernet/")
	switch {
	case ours && test && name == pkg: // an external test package
		return ""
	case ours:
		kind = r.ours
	case !strings.Contains(strings.Split(imported, "/")[0], "."):
		if imported == "C" {
			return "CGO is off"
		}
		return "" // the standard library
	}
	if test {
		kind = slices.Concat(kind, r.tests)
	}
	for _, allowed := range kind {
		if below, all := strings.CutSuffix(allowed, "/..."); name == allowed && !all ||
			all && (name == below || strings.HasPrefix(name, below+"/")) {
			return ""
		}
	}
	return "the table of layers does not allow it"
}

func TestForbids(t *testing.T) {
	r := rule{ours: []string{"tap/netns", "stack/..."}, outside: []string{xsys}, tests: []string{"tap/taptest", dns}}
	for _, c := range []struct {
		imported  string
		test, bad bool
	}{
		{"net/netip", false, false},
		{"C", false, true},
		{"usernet/tap/netns", false, false},
		{"usernet/tap", false, true},
		{"usernet/stack", false, false},
		{"usernet/stack/dns", false, false},
		{"usernet/stackx", false, true},
		{"golang.org/x/sys/unix", false, false},
		{"golang.org/x/sys/cpu", false, true},
		{"usernet/tap/taptest", false, true},
		{"usernet/tap/taptest", true, false},
		{"github.com/miekg/dns", false, true},
		{"github.com/miekg/dns", true, false},
		{"gvisor.dev/gvisor/pkg/tcpip", true, true},
		{"usernet/forwarder", true, false},
	} {
		if got := r.forbids("forwarder", c.imported, c.test); (got != "") != c.bad {
			t.Errorf("import of %s, in a test %v: %q", c.imported, c.test, got)
		}
	}
}

// The top level tells a reader what there is; a new folder there is a decision, taken here.
func TestFolders(t *testing.T) {
	entries, err := os.ReadDir(moduleRoot(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() && !slices.Contains(folders, e.Name()) {
			t.Errorf("folder %s/ at the top level is not one of %v", e.Name(), folders)
		}
	}
}

func imports(t *testing.T, path string) []string {
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
	if err != nil {
		t.Error(err)
		return nil
	}
	var paths []string
	for _, spec := range file.Imports {
		p, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Error(err)
		}
		paths = append(paths, p)
	}
	return paths
}

// moduleRoot is relative, because an ordinary user may not be able to name where the source is.
func moduleRoot(t *testing.T) string {
	root := filepath.Join("..", "..")
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatal(err)
	}
	return root
}
