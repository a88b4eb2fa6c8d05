// Package layers holds the test of who may import whom, and nothing else.
package layers
