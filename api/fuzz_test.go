package api_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"usernet/api"
)

// Whatever a client sends, it gets an answer in the shape of the dialect that its first octet chose, or a closed connection;
// and what was not answered with success has published nothing.
func FuzzConversation(f *testing.F) {
	for _, s := range []string{
		"", "{", "}", add, add + "\n" + add, add[:30], `{"execute":"list_hostfwd"}`, `{"execute":"remove_hostfwd","arguments":{"id":1}}`,
		`[]`, `"x"`, `nul`, "\x00", " " + add, strings.Repeat("[", 3000), `{"execute":"add_hostfwd","arguments":null}`,
		"GET /v1/usernet/info HTTP/1.1\r\nHost: x\r\n\r\n", "GET /v1/ports HTTP/1.0\r\n\r\n", "GET /", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"POST /v1/usernet/forwards HTTP/1.1\r\nHost: x\r\nContent-Length: 23\r\n\r\n{\"publish\":[\"8080:80\"]}",
		"POST /v1/usernet/forwards HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{\"publish\":[\"8080:80\"]}",
		"POST /v1/ports HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n33\r\n{\"proto\":\"tcp\",\"parentPort\":8080,\"childPort\":80}    \r\n0\r\n\r\n",
		"POST /v1/ports HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
		"DELETE /v1/usernet/forwards/1 HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/usernet/metrics HTTP/1.1\r\nHost: x\r\n\r\n",
		"DELETE /v1/ports/%31 HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", "GET //v1/../v1/ports HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	ports := newFake()
	ports.quick = true
	path, _ := serve(f, ports)
	f.Fuzz(func(t *testing.T, sent []byte) {
		ports.reset()
		c := dial(t, path)
		defer c.Close()
		_, _ = c.Write(sent) // the server may close before all of it is sent
		_ = c.CloseWrite()
		got, _ := io.ReadAll(c)
		success := false
		switch {
		case len(got) == 0:
		case len(sent) > 0 && sent[0] >= 'A' && sent[0] <= 'Z':
			if !bytes.HasPrefix(got, []byte("HTTP/1.")) {
				t.Errorf("%q: no HTTP: %q", sent, got)
			}
			success = bytes.Contains(got, []byte(" 201 Created\r\n"))
		default:
			success = checkSlirp(t, sent, got)
		}
		if left := ports.List(); len(left) > 0 && !success {
			t.Errorf("%q: answered %q, but %d ports are published", sent, got, len(left))
		}
	})
}

// FuzzSlirp is about what comes after the outer form: any arguments.
func FuzzSlirp(f *testing.F) {
	f.Add("add_hostfwd", `{"proto":"tcp","host_addr":"0.0.0.0","host_port":8080,"guest_addr":"","guest_port":80}`)
	f.Add("add_hostfwd", `{"proto":"udp","host_addr":"127.0.0.1","host_port":1e3,"guest_addr":"10.0.2.100","guest_port":80.0}`)
	f.Add("remove_hostfwd", `{"id":1}`)
	f.Add("remove_hostfwd", `{"id":-1e300}`)
	f.Add("list_hostfwd", `null`)
	ports := newFake()
	path, _ := serve(f, ports)
	f.Fuzz(func(t *testing.T, execute, arguments string) {
		ports.reset()
		name, err := json.Marshal(execute)
		if err != nil {
			return // nothing that the invariant speaks of
		}
		sent := fmt.Appendf(nil, `{"execute":%s,"arguments":%s}`, name, arguments)
		if len(sent) >= 4096 {
			return // nothing that the invariant speaks of
		}
		c := dial(t, path)
		defer c.Close()
		if _, err := c.Write(sent); err != nil {
			t.Fatal(err)
		}
		_ = c.CloseWrite()
		got, err := io.ReadAll(c)
		if err != nil {
			t.Fatal(err)
		}
		if success := checkSlirp(t, sent, got); len(ports.List()) > 0 != success {
			t.Errorf("%s: answered %s, and %d ports are published", sent, got, len(ports.List()))
		}
		for _, p := range ports.List() { // what is published is what was said
			host := p.Spec.Host.String()
			if p.Spec.HostPort == 0 || p.Spec.ContainerPort == 0 || !strings.Contains(arguments, p.Spec.Proto) ||
				host != "0.0.0.0" && !strings.Contains(string(sent), host) && !strings.Contains(arguments, `\u`) {
				t.Errorf("%s has published %+v", sent, p.Spec)
			}
		}
	})
}

// checkSlirp sees whether got is an answer of slirp4netns's, and whether it says that a port was published.
func checkSlirp(t *testing.T, sent, got []byte) (added bool) {
	t.Helper()
	var m map[string]json.RawMessage
	if err := json.Unmarshal(got, &m); err != nil || got[0] != '{' || got[len(got)-1] != '}' {
		t.Errorf("%q: no object: %q", sent, got)
		return false
	}
	var failure struct{ Desc string }
	switch {
	case m["error"] != nil:
		if err := json.Unmarshal(m["error"], &failure); err != nil || len(m) != 1 || !strings.HasPrefix(failure.Desc, "bad request: ") {
			t.Errorf("%q: %q", sent, got)
		}
		return false
	case m["return"] == nil, len(m) != 1 && m["entries"] == nil:
		t.Errorf("%q: %q", sent, got)
	}
	return bytes.HasPrefix(got, []byte(`{"return":{"id":`))
}

// FuzzBodies is any JSON, or none, where ports are added.
func FuzzBodies(f *testing.F) {
	for _, s := range []string{
		``, `null`, `{}`, `{"publish":["8080:80"]}`, `{"publish":["[::1]:9000-9010:1-11/udp","/x:80"],"forwards":[]}`,
		`{"forwards":[{"proto":"tcp","host":"127.0.0.1","hostPort":8080,"containerPort":80}]}`,
		`{"forwards":[{"proto":"tcp4","hostPath":"/x","container":"10.0.2.3","containerPort":80},{"proto":"x","containerPort":1}]}`,
		`{"proto":"tcp","parentIP":"127.0.0.1","parentPort":18080,"childPort":80}`, `{"proto":"udp","childPort":1e9}`,
		`{"publish":["1-65535:1-65535"]}`,
	} {
		f.Add(s)
	}
	ports := newFake()
	ports.quick = true
	path, _ := serve(f, ports)
	f.Fuzz(func(t *testing.T, body string) {
		if len(body) > 1<<16 {
			return // nothing that the invariant speaks of
		}
		for url, statuses := range map[string][]int{
			"/v1/usernet/forwards": {http.StatusCreated, 400, 403, 409, 413, 503}, "/v1/ports": {http.StatusCreated, 400},
		} {
			ports.reset()
			status, _, answer := request(t, path, "POST", url, body)
			if !slices.Contains(statuses, status) {
				t.Errorf("%s %q: %d %.200s", url, body, status, answer)
			}
			n := len(ports.List())
			if status != http.StatusCreated {
				var e api.Error
				if err := json.Unmarshal([]byte(answer), &e); err != nil || e.Message == "" || n != 0 {
					t.Errorf("%s %q: %d %.200s; %d ports are published", url, body, status, answer, n)
				}
				continue
			}
			var list api.Forwards
			if err := json.Unmarshal([]byte(answer), &list); err != nil || n == 0 || url != "/v1/ports" && len(list.Forwards) != n {
				t.Errorf("%s %q: %.200s: %d ports are published", url, body, answer, n)
			}
		}
	})
}
