package api

import "time"

// SetPatience changes how long clients may take for their requests; before Serve.
func SetPatience(s *Server, d time.Duration) { s.patience = d }

// What tests need to know of the limits.
const (
	MaxConns  = maxConns
	MaxHeader = maxHeader
	MaxBody   = maxBody
)
