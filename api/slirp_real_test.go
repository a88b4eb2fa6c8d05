package api_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"usernet/tap/taptest"
)

// realSlirp runs slirp4netns itself, and returns where it listens.
func realSlirp(t *testing.T) string {
	t.Helper()
	bin, err := exec.LookPath("slirp4netns")
	if err != nil {
		t.Skip("there is no slirp4netns on this machine")
	}
	taptest.NeedTUN(t)
	ns := taptest.NewNS(t, taptest.OwnerRoot)
	path := socketPath(t)
	ready, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	cmd := exec.Command(bin, "--configure", "--ready-fd=3", "--api-socket="+path, strconv.Itoa(ns.PID), "tap0")
	cmd.ExtraFiles = []*os.File{w}
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	ready.SetReadDeadline(time.Now().Add(deadline))
	if _, err := io.ReadFull(ready, make([]byte, 1)); err != nil {
		t.Skipf("slirp4netns does not start here: %v", err)
	}
	return path
}

// Each request gets from us what it gets from slirp4netns, to the octet: those for which we have an answer of our own are in TestSlirp.
func TestSlirpAnswersAsTheRealOne(t *testing.T) {
	real := realSlirp(t)
	ours, _ := serve(t, newFake())
	port := freePort(t)
	add := func(changes ...any) string {
		arguments := map[string]any{"proto": "tcp", "host_addr": "127.0.0.1", "host_port": port, "guest_addr": "10.0.2.100", "guest_port": 80}
		for i := 0; i < len(changes); i += 2 {
			if key := changes[i].(string); changes[i+1] != "none" {
				arguments[key] = changes[i+1]
			} else {
				delete(arguments, key)
			}
		}
		b, _ := json.Marshal(map[string]any{"execute": "add_hostfwd", "arguments": arguments})
		return string(b)
	}
	remove := func(id any) string {
		b, _ := json.Marshal(map[string]any{"execute": "remove_hostfwd", "arguments": map[string]any{"id": id}})
		return string(b)
	}
	for i, request := range []string{
		add(), remove(1), remove(1), add("proto", "udp"), remove(2), add("guest_addr", ""), remove(3), add("guest_addr", "none") + "\n", remove(4),
		remove("5"), remove(99), remove(nil), `{"execute":"remove_hostfwd"}`,
		add("proto", "sctp"), add("proto", "tcp6"), add("proto", ""), add("host_addr", "x"), add("host_addr", "0127.0.0.1"),
		add("host_addr", "127.1"), add("host_port", 0), add("host_port", "none"), add("host_port", "80"), add("guest_addr", "x"), add("guest_addr", "::ffff:1.2.3.4"),
		add("guest_port", 0), add("guest_port", "none"), add("guest_port", "80"),
		``, `hello`, `"x"`, `17`, `null`, `true`, `[]`, `[1]`, `{}`, `{"execute":1}`, `{"execute":null}`, `{"EXECUTE":"x"}`, `{"execute":"dance"}`,
		`{"execute":"dance"} trailing`, "\n\t {\"execute\":\"dance\"}", `{"execute":"dance",}`, `{'execute':1}`, `{"execute":"dance","execute":"dance"}`,
		`{"execute":"` + strings.Repeat("x", 4000) + `"}`, `{"execute":"` + strings.Repeat("x", 4095-14) + `"}`, `{"execute":"` + strings.Repeat("x", 4096-14) + `"}`,
	} {
		answers := make([]string, 2)
		for i, path := range []string{real, ours} {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(deadline))
			_, _ = io.WriteString(c, request)
			c.(*net.UnixConn).CloseWrite()
			b, err := io.ReadAll(c)
			if err != nil && !errors.Is(err, syscall.ECONNRESET) { // the real one's, for what is too large
				t.Errorf("%.200s: %v", request, err)
			}
			answers[i] = string(b)
			c.Close()
		}
		if answers[0] != answers[1] || answers[0] == "" {
			t.Errorf("request %d %s\nslirp4netns %s\nwe          %s", i, fmt.Sprintf("%.200s", request), answers[0], answers[1])
		}
	}
}
