package main

import (
	"maps"
	"reflect"
	"slices"
	"strings"

	"usernet/api"
)

// metrics writes what the packages have counted, for the control socket. Their Stats say by the type what a
// field is: an int is how many there are now, a uint64 has been counted since the start, and a
// map has counts by reason.
func (e *engine) metrics(m *api.Metrics) {
	writeMetrics(m, "usernet_stack", "stack", e.stack.Stats())
	writeMetrics(m, "usernet_forwarder", "forwarder", e.forward.Stats())
	if e.server != nil {
		writeMetrics(m, "usernet_dns", "dns", e.server.Stats())
	}
}

func writeMetrics(m *api.Metrics, prefix, where string, stats any) {
	v := reflect.ValueOf(stats)
	for i := range v.NumField() {
		name, field := v.Type().Field(i).Name, v.Field(i)
		metric, help := prefix+"_"+snake(name), name+" of "+where+"'s Stats"
		switch field.Kind() {
		case reflect.Struct:
			writeMetrics(m, metric, where+"'s "+name, field.Interface())
		case reflect.Int:
			m.Gauge(metric, help+", now", float64(field.Int()))
		case reflect.Uint64:
			m.Counter(metric+"_total", help, float64(field.Uint()))
		case reflect.Map:
			byReason := field.Interface().(map[string]uint64)
			for _, reason := range slices.Sorted(maps.Keys(byReason)) {
				m.Counter(metric+"_total", help, float64(byReason[reason]), "reason", reason)
			}
		default:
			panic("no metric is made of a " + field.Type().String())
		}
	}
}

// snake is name as Prometheus writes names: OctetsIn is octets_in, ICMPErrorsOut is icmp_errors_out.
func snake(name string) string {
	name = strings.ReplaceAll(name, "SYNs", "Syns")
	upper := func(i int) bool { return i < len(name) && name[i] >= 'A' && name[i] <= 'Z' }
	var b strings.Builder
	for i := range len(name) {
		// A word begins at a capital behind a small letter, and at the last capital of several.
		if upper(i) && i > 0 && (!upper(i-1) || i+1 < len(name) && !upper(i+1)) {
			b.WriteByte('_')
		}
		b.WriteByte(name[i])
	}
	return strings.ToLower(b.String())
}
