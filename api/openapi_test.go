package api_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"

	"usernet/api"
	"usernet/network"
)

// openapi.yaml tells the truth: each answer of the server fits it, with no field too many or too few, and each answer
// that it tells of is one that the server gives.
func TestOpenAPI(t *testing.T) {
	doc, err := openapi3.NewLoader().LoadFromFile("openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if doc.Info.Version != api.Version {
		t.Errorf("it is of version %s, and the API is %s", doc.Info.Version, api.Version)
	}
	router, err := legacy.NewRouter(doc)
	if err != nil {
		t.Fatal(err)
	}
	full, _ := serve(t, newFake(), func(c *api.Config) { c.Pprof, c.Networks = true, fakeNetworks{network.New()} })
	bare, _ := serve(t, nil, func(c *api.Config) {
		c.Info = func() api.Info {
			return api.Info{Version: "x", Namespace: "y", Interface: api.Interface{Name: "tap0", MTU: 1500, Queues: 1}}
		}
	})

	given := map[string]bool{} // "GET /v1/usernet/info 200"
	for _, c := range []struct {
		method, url, body string
		status            int
		strange           bool // the request itself is none that the document allows
	}{
		{"GET", "/v1/usernet/info", "", 200, false},
		{"PUT", "/v1/usernet/info", "", 405, true},
		{"GET", "/v1/usernet/forwards", "", 200, false},
		{"POST", "/v1/usernet/forwards", `{"publish":["127.0.0.1:8080:80"],"forwards":[{"proto":"tcp","hostPath":"/x","containerPort":1},{"proto":"udp6","host":"::","hostPort":5,"container":"fd00::1","containerPort":5}]}`, 201, false},
		{"POST", "/v1/usernet/forwards", `{"publish":["x"]}`, 400, false},
		{"POST", "/v1/usernet/forwards", `{"x":1}`, 400, true},
		{"POST", "/v1/usernet/forwards", `{"publish":["1:1"]}`, 403, false},
		{"POST", "/v1/usernet/forwards", `{"publish":["127.0.0.1:8080:80"]}`, 409, false},
		{"POST", "/v1/usernet/forwards", `{"publish":["1-65535:1-65535","1-65535:1-65535/udp","9:9/tcp4"]}`, 413, false},
		{"POST", "/v1/usernet/forwards", `{"publish":["4:4"]}`, 503, false},
		{"GET", "/v1/usernet/forwards", "", 200, false},
		{"GET", "/v1/usernet/forwards/1", "", 200, false},
		{"GET", "/v1/usernet/forwards/99", "", 404, false},
		{"DELETE", "/v1/usernet/forwards/1?drain=true", "", 204, false},
		{"DELETE", "/v1/usernet/forwards/1", "", 404, false},
		{"DELETE", "/v1/usernet/forwards/2?drain=perhaps", "", 400, true},
		{"POST", "/v1/usernet/networks", `{"name":"web","subnet":"10.1.0.0/30"}`, 201, false},
		{"POST", "/v1/usernet/networks", `{"name":"web"}`, 409, false},
		{"POST", "/v1/usernet/networks", `{"name":"Web","mtu":1500}`, 400, false},
		{"GET", "/v1/usernet/networks/web", "", 200, false},
		{"GET", "/v1/usernet/networks/nope", "", 404, false},
		{"POST", "/v1/usernet/networks/web/members", `{"path":"/a","name":"a","aliases":["b"]}`, 201, false},
		{"POST", "/v1/usernet/networks/web/members", `{"path":"/bb","name":"bb"}`, 409, false},
		{"POST", "/v1/usernet/networks/web/members", `{"path":"/bb","name":"bb","mac":"1"}`, 400, false},
		{"POST", "/v1/usernet/networks/nope/members", `{"path":"/bb","name":"bb"}`, 404, false},
		{"GET", "/v1/usernet/networks", "", 200, false},
		{"DELETE", "/v1/usernet/networks/web", "", 409, false},
		{"DELETE", "/v1/usernet/networks/web/members/a", "", 204, false},
		{"DELETE", "/v1/usernet/networks/web/members/a", "", 404, false},
		{"GET", "/v1/usernet/networks/web", "", 200, false},
		{"DELETE", "/v1/usernet/networks/web", "", 204, false},
		{"DELETE", "/v1/usernet/networks/web", "", 404, false},
		{"GET", "/v1/usernet/metrics", "", 200, false},
		{"GET", "/v1/usernet/debug/pprof/heap?debug=1", "", 200, false},
		{"GET", "/v1/usernet/debug/pprof/heap", "", 200, false},
		{"GET", "/v1/usernet/debug/pprof/none", "", 404, false},
		{"GET", "/v1/usernet/debug/pprof/profile?seconds=99", "", 400, true},
		{"GET", "/v1/info", "", 200, false},
		{"GET", "/v1/ports", "", 200, false},
		{"POST", "/v1/ports", `{"proto":"tcp","parentPort":8081,"childPort":80}`, 201, false},
		{"POST", "/v1/ports", `{"proto":"tcp","parentPort":8081,"childPort":80}`, 400, false},
		{"DELETE", "/v1/ports/4", "", 200, false},
		{"DELETE", "/v1/ports/4", "", 400, false},
		{"GET", "/v1/usernet/info", "", 200, false},
	} {
		given[check(t, router, full, c.method, c.url, c.body, c.status, c.strange)] = true
	}
	for _, c := range []struct {
		url    string
		status int
	}{{"/v1/usernet/info", 200}, {"/v1/usernet/forwards", 200}, {"/v1/usernet/metrics", 200}, {"/v1/info", 200}, {"/v1/ports", 400}} {
		given[check(t, router, bare, "GET", c.url, "", c.status, false)] = true
	}

	given["GET /v1/usernet/debug/pprof/{name} 503"] = true // two profiles of the CPU at a time
	for path, item := range doc.Paths.Map() {
		for method, op := range item.Operations() {
			for status := range op.Responses.Map() {
				if line := fmt.Sprintf("%s %s %s", method, path, status); !given[line] {
					t.Errorf("no request was answered by what the document tells of: %s", line)
				}
			}
		}
	}
	codes := doc.Components.Schemas["Error"].Value.Properties["code"].Value.Enum
	for _, code := range []string{api.CodeBadRequest, api.CodeUnknownID, api.CodeNotFound, api.CodeMethod, api.CodeConflict, api.CodeInUse,
		api.CodeNotAvailable, api.CodeNotPermitted, api.CodeTooLarge, api.CodeBusy, api.CodeInternal, api.CodeExhausted} {
		if !slices.Contains(codes, any(code)) {
			t.Errorf("the document has no code %s", code)
		}
	}
}

// check makes a request, holds it and its answer against the document, and returns what it was in the document's words.
func check(t *testing.T, router routers.Router, path, method, url, body string, status int, strange bool) string {
	t.Helper()
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	r, err := http.NewRequestWithContext(t.Context(), method, "http://usernet"+url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	answer, err := hc.Do(r)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	defer answer.Body.Close()
	content, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	if answer.StatusCode != status {
		t.Errorf("%s %s: %s: %.300s, want %d", method, url, answer.Status, content, status)
	}
	look := r.Clone(t.Context())
	if method == "PUT" { // which the document has nowhere: the answer is that of the path
		look.Method = "GET"
	}
	look.Body = io.NopCloser(strings.NewReader(body))
	route, params, err := router.FindRoute(look)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	in := &openapi3filter.RequestValidationInput{Request: look, Route: route, PathParams: params}
	if err := openapi3filter.ValidateRequest(t.Context(), in); (err != nil) != strange && method != "PUT" {
		t.Errorf("%s %s %s: as a request: %v", method, url, body, err)
	}
	out := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: answer.StatusCode, Header: answer.Header,
		Body: io.NopCloser(bytes.NewReader(content)), Options: &openapi3filter.Options{IncludeResponseStatus: true},
	}
	if err := openapi3filter.ValidateResponse(t.Context(), out); err != nil {
		t.Errorf("%s %s: %d %.500s\nas an answer: %v", method, url, answer.StatusCode, content, err)
	}
	return fmt.Sprintf("%s %s %d", look.Method, route.Path, answer.StatusCode)
}
