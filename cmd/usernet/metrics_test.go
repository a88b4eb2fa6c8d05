package main

import "testing"

func TestSnake(t *testing.T) {
	for name, want := range map[string]string{
		"OctetsIn": "octets_in", "ICMPErrorsOut": "icmp_errors_out", "SYNs": "syns", "SYNsOverLimit": "syns_over_limit",
		"TCPRetransmits": "tcp_retransmits", "UDP": "udp", "Echo": "echo", "FramesOutDropped": "frames_out_dropped",
	} {
		if got := snake(name); got != want {
			t.Errorf("snake(%s) = %s, want %s", name, got, want)
		}
	}
}
