package api

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"net/http"
	"runtime"
	"strconv"
	"strings"

	"usernet/portdriver"
)

// Metrics writes Prometheus's text format 0.0.4, which is a few lines; the client library would keep 3 MiB of this process
// in memory for it all day. A test has its parser and its linter read what we write.
//
// All samples of one name must follow each other. Names and label names are constants of the program: a bad one panics.
type Metrics struct {
	w    *bufio.Writer
	name string // of the last sample
}

// Counter writes a sample of what only grows. The name ends in _total. Labels are names and values in turn.
func (m *Metrics) Counter(name, help string, value float64, labels ...string) {
	m.sample("counter", name, help, value, labels)
}

// Gauge writes a sample of what goes up and down.
func (m *Metrics) Gauge(name, help string, value float64, labels ...string) {
	m.sample("gauge", name, help, value, labels)
}

func (m *Metrics) sample(kind, name, help string, value float64, labels []string) {
	if len(labels)%2 != 0 {
		panic("api: label without a value in metric " + name)
	}
	if name != m.name {
		m.name = name
		fmt.Fprintf(m.w, "# HELP %s %s\n# TYPE %s %s\n", name, escapeHelp.Replace(help), name, kind)
	}
	m.w.WriteString(name)
	for i := 0; i < len(labels); i += 2 {
		m.w.WriteByte("{,"[min(i, 1)])
		m.w.WriteString(labels[i])
		m.w.WriteString(`="`)
		_, _ = escapeLabel.WriteString(m.w, strings.ToValidUTF8(labels[i+1], "\uFFFD"))
		m.w.WriteByte('"')
	}
	if len(labels) > 0 {
		m.w.WriteByte('}')
	}
	m.w.WriteByte(' ')
	m.w.WriteString(number(value))
	m.w.WriteByte('\n')
}

func number(v float64) string {
	switch {
	case math.IsInf(v, 1):
		return "+Inf"
	case v == math.Trunc(v) && math.Abs(v) < 1<<53: // not 1e+06
		return strconv.FormatFloat(v, 'f', -1, 64)
	}
	return strconv.FormatFloat(v, 'g', -1, 64)
}

var (
	escapeHelp  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
	escapeLabel = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
)

// getMetrics answers GET /v1/usernet/metrics.
func (s *Server) getMetrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	s.writeMetrics(w)
}

func (s *Server) writeMetrics(w io.Writer) {
	m := &Metrics{w: bufio.NewWriterSize(w, 16<<10)}
	info := s.info()
	m.Gauge("usernet_info", "Always 1; the labels say what runs.", 1,
		"version", info.Version, "go", runtime.Version(), "namespace", info.Namespace)
	if !info.Started.IsZero() {
		m.Gauge("usernet_start_time_seconds", "When the process began to serve, since the epoch.", float64(info.Started.UnixMilli())/1000)
	}
	if s.cfg.Metrics != nil {
		s.cfg.Metrics(m)
	}
	if s.cfg.Ports != nil {
		m.forwards(s.cfg.Ports.List())
	}
	m.runtime()
	_ = m.w.Flush() // a client that has gone needs no answer
}

// forwards writes what each forward has done.
func (m *Metrics) forwards(list []portdriver.Forward) {
	m.Gauge("usernet_forwards", "Published ports.", float64(len(list)))
	for _, c := range []struct {
		write      func(name, help string, v float64, labels ...string)
		name, help string
		value      func(*portdriver.Forward) uint64
	}{
		{m.Gauge, "usernet_forward_connections", "Connections, or clients of UDP, now.",
			func(f *portdriver.Forward) uint64 { return f.Active }},
		{m.Counter, "usernet_forward_connections_total", "Connections, or clients of UDP, since the forward was made.",
			func(f *portdriver.Forward) uint64 { return f.Total }},
		{m.Counter, "usernet_forward_refused_total", "Connections that the container did not take.",
			func(f *portdriver.Forward) uint64 { return f.Refused }},
		{m.Counter, "usernet_forward_received_bytes_total", "Payload from the host to the container.",
			func(f *portdriver.Forward) uint64 { return f.OctetsIn }},
		{m.Counter, "usernet_forward_sent_bytes_total", "Payload from the container to the host.",
			func(f *portdriver.Forward) uint64 { return f.OctetsOut }},
	} {
		for i := range list {
			f := &list[i]
			host := f.Spec.HostPath
			if host == "" {
				host = strconv.Itoa(int(f.Spec.HostPort))
				if f.Spec.Host.IsValid() {
					host = f.Spec.Host.String() + ":" + host
					if f.Spec.Host.Is6() {
						host = "[" + f.Spec.Host.String() + "]:" + strconv.Itoa(int(f.Spec.HostPort))
					}
				}
			}
			c.write(c.name, c.help, float64(c.value(f)), "id", strconv.Itoa(f.ID), "proto", f.Spec.Proto, "host", host)
		}
	}
}

// runtime writes what Go's runtime knows of the process; /proc is out of a sandbox's reach.
func (m *Metrics) runtime() {
	var mem runtime.MemStats // runtime/metrics makes 300 descriptions at each start of the program, whether it is asked or not
	runtime.ReadMemStats(&mem)
	m.Gauge("usernet_goroutines", "Goroutines.", float64(runtime.NumGoroutine()))
	m.Gauge("usernet_memory_bytes", "Memory that Go's runtime holds.", float64(mem.Sys-mem.HeapReleased))
	m.Gauge("usernet_heap_bytes", "Objects on the heap.", float64(mem.HeapAlloc))
}
