package api_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"usernet/api"
	"usernet/api/client"
)

// Prometheus's own parser reads what we write, and its linter finds nothing to say.
func TestMetrics(t *testing.T) {
	path, _ := serve(t, newFake(), func(c *api.Config) {
		c.Metrics = func(m *api.Metrics) {
			m.Counter("usernet_drops_total", "What \\ was\ndropped.", 17, "why", "a \"quoted\\\nreason\xff")
			m.Counter("usernet_drops_total", "", 1e15, "why", "other")
			m.Gauge("usernet_ratio", "Of something.", 0.25)
		}
	})
	clientAdd(t, path, api.AddRequest{
		Publish:  []string{"8080:80", "[::1]:9000:9000/udp"},
		Forwards: []api.Spec{{Proto: "tcp", HostPath: `/run/"x"`, ContainerPort: 1}},
	})
	c := client.New(path)
	var b bytes.Buffer
	if err := c.Metrics(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.New(bytes.NewReader(b.Bytes())).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v %v", err, problems)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(b.Bytes()))
	if err != nil {
		t.Fatalf("%v\n%s", err, b.String())
	}
	// A map, so that the same name twice in different places would be lost; the parser says so above.
	got := map[string]float64{}
	for name, f := range families {
		for _, m := range f.Metric {
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			value := m.GetGauge().GetValue()
			if m.Counter != nil {
				value = m.GetCounter().GetValue()
			}
			got[name+"{"+strings.Join(labels, ",")+"}"] = value
		}
	}
	for name, want := range map[string]float64{
		`usernet_start_time_seconds{}`:                                       1700000000.5,
		"usernet_drops_total{why=a \"quoted\\\nreason\uFFFD}":                17,
		`usernet_drops_total{why=other}`:                                     1e15,
		`usernet_ratio{}`:                                                    0.25,
		`usernet_forwards{}`:                                                 3,
		`usernet_forward_connections{id=1,proto=tcp,host=8080}`:              1,
		`usernet_forward_connections_total{id=2,proto=udp,host=[::1]:9000}`:  3,
		`usernet_forward_refused_total{id=1,proto=tcp,host=8080}`:            1,
		`usernet_forward_received_bytes_total{id=3,proto=tcp,host=/run/"x"}`: 1 << 40,
		`usernet_forward_sent_bytes_total{id=1,proto=tcp,host=8080}`:         7,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v (%v), want %v", name, v, ok, want)
		}
	}
	for _, name := range []string{"usernet_goroutines{}", "usernet_memory_bytes{}", "usernet_heap_bytes{}"} {
		if got[name] < 1 {
			t.Errorf("%s is %v", name, got[name])
		}
	}
}
