package main

import (
	"log/slog"
	"maps"
	"reflect"
	"slices"
)

// logStats writes a line per package of what it has counted.
func logStats(log *slog.Logger, e *engine) {
	log.Info("counted", append([]any{"package", "stack"}, counts(e.stack.Stats())...)...)
	log.Info("counted", append([]any{"package", "forwarder"}, counts(e.forward.Stats())...)...)
	if e.server != nil {
		log.Info("counted", append([]any{"package", "dns"}, counts(e.server.Stats())...)...)
	}
}

// counts are the fields of a struct of numbers that are not zero, as attributes; structs and maps in
// it are groups.
func counts(stats any) []any {
	var attrs []any
	add := func(name string, v reflect.Value) {
		switch {
		case v.IsZero():
		case v.Kind() == reflect.Struct || v.Kind() == reflect.Map:
			if inner := counts(v.Interface()); len(inner) > 0 {
				attrs = append(attrs, slog.Group(name, inner...))
			}
		default:
			attrs = append(attrs, slog.Any(name, v.Interface()))
		}
	}
	switch v := reflect.ValueOf(stats); v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			add(v.Type().Field(i).Name, v.Field(i))
		}
	case reflect.Map:
		values := map[string]reflect.Value{}
		for k, m := range v.Seq2() {
			values[k.String()] = m
		}
		for _, k := range slices.Sorted(maps.Keys(values)) {
			add(k, values[k])
		}
	}
	return attrs
}
