package api_test

import (
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"usernet/api"
)

// add is what podman writes.
const add = `{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"0.0.0.0","host_port":8080,"guest_addr":"","guest_port":80}}`

// The requests and answers of slirp4netns, in the order of its life; what we answer better is marked.
func TestSlirp(t *testing.T) {
	path, _ := serve(t, newFake())
	bad := func(desc string) string { return `{"error":{"desc":"bad request: ` + desc + `"}}` }
	entry := `{"id":1,"proto":"tcp","host_addr":"0.0.0.0","host_port":8080,"guest_addr":"10.0.2.100","guest_port":80}`
	addWith := func(changes string) string {
		var m map[string]any
		arguments := map[string]any{"proto": "tcp", "host_addr": "127.0.0.1", "host_port": 9000, "guest_addr": "10.0.2.100", "guest_port": 80}
		if err := json.Unmarshal([]byte(changes), &m); err != nil {
			t.Fatal(err)
		}
		for k, v := range m {
			if arguments[k] = v; v == "none" {
				delete(arguments, k)
			}
		}
		b, _ := json.Marshal(map[string]any{"execute": "add_hostfwd", "arguments": arguments})
		return string(b)
	}
	for _, c := range []struct{ what, request, answer string }{
		{"empty list", `{"execute": "list_hostfwd"}`, `{"return":{"entries":[]},"entries":[]}`},
		{"add", add, `{"return":{"id":1}}`},
		{"list", `{"execute":"list_hostfwd"}`, `{"return":{"entries":[` + entry + `]},"entries":[` + entry + `]}`},                    // better: as the manual says, too
		{"taken", add, bad("add_hostfwd: slirp_add_hostfwd failed: conflict with ID 1: remove that forward, or choose another port")}, // better: says why
		{"defaults", addWith(`{"host_addr":"none","guest_addr":"none","host_port":8081}`), `{"return":{"id":2}}`},
		{"null", addWith(`{"host_addr":null,"guest_addr":null,"host_port":8082}`), `{"return":{"id":3}}`},
		{"udp", addWith(`{"proto":"udp"}`), `{"return":{"id":4}}`},
		{"remove", `{"execute":"remove_hostfwd","arguments":{"id":1}}`, `{"return":{}}`},
		{"remove again", `{"execute":"remove_hostfwd","arguments":{"id":1}}`, bad("remove_hostfwd: bad arguments.id")},
		{"remove text", `{"execute":"remove_hostfwd","arguments":{"id":"2"}}`, bad("remove_hostfwd: bad arguments.id")},
		{"remove nothing", `{"execute":"remove_hostfwd"}`, bad("remove_hostfwd: bad arguments.id")},
		{"no half ID", `{"execute":"remove_hostfwd","arguments":{"id":2.5}}`, bad("remove_hostfwd: bad arguments.id")},
		{"after a removal", addWith(`{"host_port":8080}`), `{"return":{"id":5}}`},
		{"sctp", addWith(`{"proto":"sctp"}`), bad("add_hostfwd: bad arguments.proto")},
		{"tcp6", addWith(`{"proto":"tcp6"}`), bad("add_hostfwd: bad arguments.proto")},
		{"no proto", addWith(`{"proto":"none"}`), bad("add_hostfwd: bad arguments.proto")}, // better: crashes there
		{"no arguments", `{"execute":"add_hostfwd"}`, bad("add_hostfwd: bad arguments.proto")},
		{"arguments are a list", `{"execute":"add_hostfwd","arguments":[1]}`, bad("add_hostfwd: bad arguments.proto")},
		{"host name", addWith(`{"host_addr":"localhost"}`), bad("add_hostfwd: bad arguments.host_addr")},
		{"IPv6 host", addWith(`{"host_addr":"::1","guest_addr":""}`), `{"return":{"id":6}}`},                          // better: refused there
		{"IPv6 guest", addWith(`{"host_addr":"::1","host_port":9001,"guest_addr":"fd00::1"}`), `{"return":{"id":7}}`}, // better: refused there
		{"IPv4 in IPv6", addWith(`{"host_addr":"::ffff:127.0.0.1"}`), bad("add_hostfwd: bad arguments.host_addr")},
		{"host number", addWith(`{"host_addr":7}`), bad("add_hostfwd: bad arguments.host_addr")}, // better: is 0.0.0.0 there
		{"no port", addWith(`{"host_port":"none"}`), bad("add_hostfwd: bad arguments.host_port")},
		{"port 0", addWith(`{"host_port":0}`), bad("add_hostfwd: bad arguments.host_port")},
		{"port text", addWith(`{"host_port":"80"}`), bad("add_hostfwd: bad arguments.host_port")},
		{"port 70000", addWith(`{"host_port":70000}`), bad("add_hostfwd: bad arguments.host_port")}, // better: taken there
		{"port -1", addWith(`{"host_port":-1}`), bad("add_hostfwd: bad arguments.host_port")},       // better: taken there
		{"port 1e99", addWith(`{"host_port":1e99}`), bad("add_hostfwd: bad arguments.host_port")},
		{"guest name", addWith(`{"guest_addr":"x"}`), bad("add_hostfwd: bad arguments.guest_addr")},
		{"guest IPv4 in IPv6", addWith(`{"guest_addr":"::ffff:10.0.2.100"}`), bad("add_hostfwd: bad arguments.guest_addr")},
		{"guest port", addWith(`{"guest_port":65536}`), bad("add_hostfwd: bad arguments.guest_port")},
		{"privileged", addWith(`{"host_port":1}`), bad("add_hostfwd: slirp_add_hostfwd failed: listen tcp :1: bind: permission denied: ports below 1024 are privileged here")},
		{"order of checks", addWith(`{"proto":"x","host_addr":"x","guest_port":0}`), bad("add_hostfwd: bad arguments.proto")},
		{"no JSON", `hello`, bad("cannot parse JSON")},
		{"broken JSON", `{"execute":}`, bad("cannot parse JSON")},
		{"no number", `{"execute":"x","arguments":{"id":1e700}}`, bad("cannot parse JSON")},
		{"list", `[1]`, bad("json_object() failed")},
		{"number", `17 `, bad("json_object() failed")},
		{"a key twice", `{"execute":"dance","execute":"list_hostfwd"}`, bad("cannot parse JSON")},
		{"a key twice, inside", `{"execute":"x","arguments":{"id":1,"id":2}}`, bad("cannot parse JSON")},
		{"commas", `{"execute":"dance",}`, bad("cannot parse JSON")},
		{"commas in a list", `{"execute":"dance","arguments":[1,]}`, bad("cannot parse JSON")},
		{"no comma", `{"execute":"dance" "arguments":[]}`, bad("cannot parse JSON")},
		{"no key", `{1:2}`, bad("cannot parse JSON")},
		{"no colon", `{"execute"}`, bad("cannot parse JSON")},
		{"brackets", `{"execute":"dance","arguments":[}`, bad("cannot parse JSON")},
		{"no execute", `{}`, bad("no execute found")},
		{"execute is a number", `{"execute":1}`, bad("no execute found")},
		{"capitals", `{"EXECUTE":"list_hostfwd"}`, bad("no execute found")},
		{"unknown", `{"execute":"dance"}`, bad("unknown execute")},
		{"too large", `{"execute":"` + strings.Repeat("x", 4084), bad("too large message")},
		{"much too large", `{"execute":"` + strings.Repeat("x", 50000) + `"}`, bad("too large message")},
		{"just not too large", `{"execute":"` + strings.Repeat("x", 4094-14) + `"}`, bad("unknown execute")},
	} {
		// As podman does: a newline, and the end. As slirp4netns's own client may: neither.
		if !strings.HasPrefix(c.what, "add") && !strings.HasPrefix(c.what, "remove") && !strings.HasPrefix(c.answer, `{"return":{"id"`) && len(c.request) < 4095 {
			if got := ask(t, path, c.request); json.Valid([]byte(c.request)) && got != c.answer {
				t.Errorf("%s: without the end of the stream: %s, want %s", c.what, got, c.answer)
			}
		}
		conn := dial(t, path)
		if _, err := io.WriteString(conn, c.request+"\n"); err != nil && len(c.request) < 4096 {
			t.Fatalf("%s: %v", c.what, err)
		}
		conn.CloseWrite()
		if got := readAll(t, conn); got != c.answer {
			t.Errorf("%s: %.200s\nanswer %s\nwant   %s", c.what, c.request, got, c.answer)
		}
	}
}

// slirp4netns takes the first piece of a request for all of it, and nobody at all for somebody who is about to speak.
func TestSlirpInPieces(t *testing.T) {
	path, _ := serve(t, newFake())
	silent := dial(t, path) // blocks nobody
	c := dial(t, path)
	c.SetWriteBuffer(1)
	for i := range len(add) {
		if _, err := io.WriteString(c, add[i:i+1]); err != nil {
			t.Fatal(err)
		}
	}
	if got := readAll(t, c); got != `{"return":{"id":1}}` {
		t.Error(got)
	}
	silent.CloseWrite()
	if got := readAll(t, silent); got != `{"error":{"desc":"bad request: cannot parse JSON"}}` {
		t.Errorf("to nothing at all: %s", got)
	}
	half := dial(t, path)
	io.WriteString(half, add[:20])
	half.CloseWrite()
	if got := readAll(t, half); got != `{"error":{"desc":"bad request: cannot parse JSON"}}` {
		t.Errorf("to half a request: %s", got)
	}
}

// What slirp4netns cannot say, its list does not say wrongly.
func TestSlirpListsWhatItCan(t *testing.T) {
	path, _ := serve(t, newFake())
	clientAdd(t, path, api.AddRequest{Forwards: []api.Spec{
		{Proto: "tcp", HostPort: 10, ContainerPort: 1},
		{Proto: "tcp6", HostPort: 11, ContainerPort: 1},
		{Proto: "udp4", Host: addr("127.0.0.1"), HostPort: 12, ContainerPort: 1, Container: addr("10.0.2.7")},
		{Proto: "tcp", Host: addr("::1"), HostPort: 13, ContainerPort: 1},
		{Proto: "tcp", HostPath: "/run/x", ContainerPort: 1},
		{Proto: "tcp", HostPort: 14, ContainerPort: 1, Container: addr("fd00::7")},
	}})
	var got struct {
		Return struct {
			Entries []map[string]any `json:"entries"`
		} `json:"return"`
	}
	if err := json.Unmarshal([]byte(ask(t, path, `{"execute":"list_hostfwd"}`)), &got); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, e := range got.Return.Entries {
		lines = append(lines, fmt.Sprintf("%v %v %v:%v %v:%v", e["id"], e["proto"], e["host_addr"], e["host_port"], e["guest_addr"], e["guest_port"]))
	}
	want := []string{
		"1 tcp 0.0.0.0:10 10.0.2.100:1", "2 tcp :::11 fd00::100:1", "3 udp 127.0.0.1:12 10.0.2.7:1", "4 tcp ::1:13 fd00::100:1", "6 tcp 0.0.0.0:14 fd00::7:1",
	}
	if !slices.Equal(lines, want) {
		t.Errorf("%q, want %q", lines, want)
	}
}

func TestSlirpInParallel(t *testing.T) {
	path, _ := serve(t, newFake())
	ids := make([]int, 100)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			var got struct{ Return struct{ ID int } }
			answer := ask(t, path, fmt.Sprintf(`{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":%d,"guest_port":80}}`, 1000+i))
			if err := json.Unmarshal([]byte(answer), &got); err != nil {
				t.Errorf("%s: %v", answer, err)
			}
			ids[i] = got.Return.ID
		})
	}
	wg.Wait()
	slices.Sort(ids)
	for i, id := range ids {
		if id != i+1 {
			t.Fatalf("IDs %v", ids)
		}
	}
}

// Without ports, and with a server that ends, the dialect stays what it is.
func TestSlirpWithoutPorts(t *testing.T) {
	path, _ := serve(t, nil)
	for request, answer := range map[string]string{
		add:                          `{"error":{"desc":"bad request: add_hostfwd: slirp_add_hostfwd failed: usernet publishes no ports here"}}`,
		`{"execute":"list_hostfwd"}`: `{"return":{"entries":[]},"entries":[]}`,
		`{"execute":"remove_hostfwd","arguments":{"id":1}}`: `{"error":{"desc":"bad request: remove_hostfwd: bad arguments.id"}}`,
	} {
		if got := ask(t, path, request); got != answer {
			t.Errorf("%s: %s, want %s", request, got, answer)
		}
	}
}

// The programs that people use from a shell, each with its own idea of the end of a stream.
func TestSlirpFromShell(t *testing.T) {
	path, _ := serve(t, newFake())
	for i, c := range [][]string{
		{"socat", "-t", "10", "-", "UNIX-CONNECT:" + path},
		{"ncat", "-U", path},
		{"ncat", "--no-shutdown", "-U", path},
	} {
		if _, err := exec.LookPath(c[0]); err != nil {
			t.Skipf("there is no %s on this machine", c[0])
		}
		cmd := exec.CommandContext(t.Context(), c[0], c[1:]...)
		cmd.Stdin = strings.NewReader(fmt.Sprintf(`{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":%d,"guest_port":80}}`, 1000+i) + "\n")
		out, err := cmd.CombinedOutput()
		if err != nil || string(out) != fmt.Sprintf(`{"return":{"id":%d}}`, i+1) {
			t.Errorf("%v: %v: %s", c, err, out)
		}
	}
}
