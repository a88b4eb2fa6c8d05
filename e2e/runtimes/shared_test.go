package runtimes

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// Containers of runc and of crun, each in a user namespace of its own that podman knows nothing of, find each other on a shared network.
func TestSharedNetwork(t *testing.T) {
	lab := needLab(t)
	lab.outside.serve(t, "tcp", outsideAddr4+":8000")
	dir := lab.user(t, "mktemp", "--directory")
	t.Cleanup(func() { lab.try("root", "rm", "-rf", dir) })
	lab.user(t, "mkdir", dir+"/rootfs")
	lab.user(t, "tar", "-C", dir+"/rootfs", "-xf", "/opt/lab/image.tar")

	lab.user(t, "usernet", "network", "create", "web")
	t.Cleanup(func() { lab.try("user", "usernet", "network", "rm", "web") })
	runtimes := []string{"runc", "crun"}
	for _, runtime := range runtimes {
		configureBundle(t, lab, runtime, dir)
		run := func(args ...string) []string {
			return append([]string{runtime, "--root", dir + "/" + runtime}, args...)
		}
		startDaemon(t, lab, run("run", "--bundle", dir, runtime)...)
		t.Cleanup(func() { lab.try("user", run("kill", runtime, "KILL")...) })
		var state struct {
			PID    int
			Status string
		}
		eventually(t, func() error {
			out, err := lab.try("user", run("state", runtime)...)
			if err == nil {
				err = json.Unmarshal([]byte(out), &state)
			}
			if err == nil && state.Status != "running" {
				err = fmt.Errorf("%s", state.Status)
			}
			return err
		})
		out := lab.user(t, "usernet", "attach", "web", fmt.Sprint(state.PID), "--name", runtime)
		if !strings.Contains(out, "(tap)") {
			t.Errorf("a namespace of a stranger to the bridge has another cable: %s", out)
		}
		// What runs in it asks the network's resolver, as its resolv.conf would say.
		for _, other := range runtimes {
			answer := func(args ...string) (string, error) {
				return lab.try("user", run(append([]string{"exec", runtime}, args...)...)...)
			}
			if other == "crun" && runtime == "runc" {
				continue // has yet to come
			}
			address, err := answer("dig", "+short", "@"+gatewayOf(t, lab, "web"), other+".web.usernet.internal", "A")
			if err != nil || address == "" {
				t.Errorf("%s does not find %s: %q, %v", runtime, other, address, err)
				continue
			}
			if out, err := answer("ping", "-c", "1", "-W", "5", address); err != nil {
				t.Errorf("%s does not reach %s: %v\n%s", runtime, other, err, out)
			}
		}
		if out, err := lab.try("user", run("exec", runtime, "curl", "-sS", "--max-time", "10", "http://"+outsideAddr4+":8000/")...); err != nil || out != hostAddr4 {
			t.Errorf("outside sees %s at %q: %v", runtime, out, err)
		}
	}
}

// configureBundle writes the configuration of a rootless container that does nothing, in a network namespace of its own.
func configureBundle(t *testing.T, lab *labType, runtime, dir string) {
	t.Helper()
	lab.try("user", "rm", dir+"/config.json")
	lab.user(t, "env", "-C", dir, runtime, "spec", "--rootless")
	var config map[string]any
	if err := json.Unmarshal([]byte(lab.user(t, "cat", dir+"/config.json")), &config); err != nil {
		t.Fatal(err)
	}
	process, linux := config["process"].(map[string]any), config["linux"].(map[string]any)
	process["terminal"] = false
	process["args"] = []string{"sleep", "1000"}
	caps := process["capabilities"].(map[string]any)
	for set := range caps {
		caps[set] = []string{"CAP_NET_RAW", "CAP_KILL"}
	}
	spaces := linux["namespaces"].([]any)
	linux["namespaces"] = append(spaces, map[string]any{"type": "network"})
	for _, s := range spaces {
		if s.(map[string]any)["type"] == "network" {
			linux["namespaces"] = spaces
		}
	}
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lab.feed("user", string(text), "tee", dir+"/config.json"); err != nil {
		t.Fatal(err)
	}
}

// gatewayOf is the address of a network's resolver.
func gatewayOf(t *testing.T, lab *labType, network string) string {
	t.Helper()
	var n struct{ Gateway string }
	if err := json.Unmarshal([]byte(lab.user(t, "usernet", "network", "inspect", network)), &n); err != nil {
		t.Fatal(err)
	}
	return n.Gateway
}
