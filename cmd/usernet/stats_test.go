package main

import (
	"bytes"
	"log/slog"
	"testing"
)

func TestCounts(t *testing.T) {
	type inner struct {
		A, B  uint64
		Drops map[string]uint64
	}
	stats := struct {
		In, Out uint64
		Now     int
		UDP     inner
		Echo    inner
	}{In: 3, Now: 1, UDP: inner{B: 2, Drops: map[string]uint64{"z": 1, "busy": 4, "none": 0}}, Echo: inner{Drops: map[string]uint64{"none": 0}}}
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	log.Info("counted", counts(stats)...)
	if want := "level=INFO msg=counted In=3 Now=1 UDP.B=2 UDP.Drops.busy=4 UDP.Drops.z=1\n"; b.String() != want {
		t.Errorf("%s", &b)
	}
}
