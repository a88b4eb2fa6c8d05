package runtimes

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A podman is one release of podman in a lab of its own, with usernet as its network_cmd_path.
type podman struct {
	*labType
	flags []string // before the command
}

// podmans are the releases that are there: the one of the lab that all tests share, and those that TestMain adds.
var podmans = map[string]*labType{}

// eachPodman runs a test under every release. What the test leaves behind is removed, and none of usernet's processes may stay.
func eachPodman(t *testing.T, test func(t *testing.T, p *podman)) {
	t.Helper()
	needLab(t)
	for version, lab := range podmans {
		t.Run(version, func(t *testing.T) {
			p := &podman{labType: lab}
			t.Cleanup(func() { p.clean(t) })
			test(t, p)
		})
	}
}

// each runs a part of a test that begins and ends without containers.
func (p *podman) each(t *testing.T, name string, part func(t *testing.T)) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		t.Cleanup(func() { p.clean(t) })
		part(t)
	})
}

// clean removes pods, containers and networks, and checks that usernet is gone with them.
func (p *podman) clean(t *testing.T) {
	for _, args := range []string{"pod rm --all --force --time 0", "rm --all --force --time 0", "network prune --force"} {
		p.do(t, strings.Fields(args)...)
	}
	eventually(t, func() error {
		if left := p.processes(); len(left) > 0 {
			return fmt.Errorf("left behind when no container is: %q", left)
		}
		return nil
	})
	// podman names the API's socket, and never removes it.
	if sockets, _ := filepath.Glob(p.path(fmt.Sprintf("/run/user/%d/libpod/tmp/*.net", uid))); len(sockets) > 0 {
		t.Errorf("left behind: %q", sockets)
	}
}

// serving are those of the processes that serve a namespace, without the helpers which they have for a moment.
func (p *podman) serving() []string {
	return slices.DeleteFunc(p.processes(), func(cmdline string) bool { return !strings.HasPrefix(cmdline, bin) })
}

// processes are the command lines of all that runs the program under test.
func (p *podman) processes() []string {
	var found []string
	links, _ := filepath.Glob(p.path("/proc/[0-9]*/exe"))
	for _, link := range links {
		exe, err := os.Readlink(link)
		if err != nil || filepath.Dir(strings.TrimSuffix(exe, " (deleted)")) != bin {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(link), "cmdline"))
		found = append(found, strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " ")))
	}
	return found
}

func (p *podman) try(args ...string) (string, error) {
	return p.labType.try("user", append(append([]string{"podman"}, p.flags...), args...)...)
}

// do runs podman, which must succeed, and gives what it printed.
func (p *podman) do(t *testing.T, args ...string) string {
	t.Helper()
	out, err := p.try(args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// shell runs a script in a new container that is removed afterwards. Words before "--" are options of podman run.
func (p *podman) shell(t *testing.T, options, script string) string {
	t.Helper()
	return p.do(t, runArgs("run --rm "+options, "sh", "-c", script)...)
}

// web starts a container with a web server at port 80.
func (p *podman) web(t *testing.T, options string) string {
	t.Helper()
	return p.do(t, runArgs("run --detach "+options, webServer...)...)
}

const image = "localhost/lab"

// The shell ends on SIGTERM, which a first process without a handler does not see: podman would wait for ten seconds.
var webServer = []string{"sh", "-c", "trap exit TERM; httpd -f -p 80 -h /www & wait"}

func runArgs(options string, command ...string) []string {
	return append(append(strings.Fields(options), image), command...)
}

// wantWeb waits for the containers' page at every address, from there. The server may take a moment to listen.
func wantWeb(t *testing.T, from *place, addresses ...string) {
	t.Helper()
	for _, address := range addresses {
		eventually(t, func() error {
			got, err := from.get("http://" + address + "/")
			if err == nil && got != "hello\n" {
				err = fmt.Errorf("%s has %q", address, got)
			}
			return err
		})
	}
}

// refused checks that nobody listens at the addresses.
func refused(t *testing.T, from *place, addresses ...string) {
	t.Helper()
	for _, address := range addresses {
		c, err := from.dial("tcp", address)
		if err == nil {
			c.Close()
			t.Errorf("%s can be connected to from %s", address, from.name)
		}
	}
}
