package main

import (
	"math"
	"slices"
)

// A figure is the samples of one thing.
type figure struct {
	Values []float64 `json:"values"`
	Median float64   `json:"median"`
	Min    float64   `json:"min"`
	Max    float64   `json:"max"`
	// Of usernet's figures the medians' ratios to the best peer's and to the limit's, where there is one.
	ToPeer  *float64 `json:"to_best_peer,omitempty"`
	ToLimit *float64 `json:"to_limit,omitempty"`
}

// add takes a sample.
func (f *figure) add(v float64) {
	f.Values = append(f.Values, v)
	sorted := slices.Sorted(slices.Values(f.Values))
	f.Min, f.Max = sorted[0], sorted[len(sorted)-1]
	f.Median = (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

// ratio is a/b, or NaN where it says nothing.
func ratio(a, b float64) float64 {
	if b == 0 || math.IsNaN(a) || math.IsNaN(b) {
		return math.NaN()
	}
	return a / b
}
