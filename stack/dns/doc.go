// Package dns is the name server on the gateway's address: it passes the container's
// questions on to the host's resolvers and their answers back, octet for octet but for
// the ID, and answers a few names itself.
//
// The way of a question:
//
//	PacketConn ─ udp.go ─┐                                   ┌ names.go: a name of ours
//	                     ├ message.go: is it one? ─ server.go ┤
//	Listener ─── tcp.go ─┘                                   └ ask.go: one upstream after the
//	                                                            other (health.go), exchange.go
//
// What comes by UDP leaves by UDP, and so for TCP: a truncated answer goes to the client as
// it is, and it is the client that asks again by TCP. Nothing is cached: the host's resolver
// does that, and only it knows when the host's network changed.
//
// The package talks to the addresses that Upstreams names and to no other, so that it opens
// no way to other ports of the host's loopback.
package dns
