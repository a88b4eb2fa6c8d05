package inside

// ParseDiag reads one part of an answer of sock_diag's, as to request number seq.
func ParseDiag(b []byte, seq uint32) ([]Listening, bool, error) {
	d := diag{seq: seq}
	return d.parse(nil, b, "tcp")
}
