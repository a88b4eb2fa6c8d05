// Package portdriver publishes ports of the container on the host.
//
//	                             ┌─ kernel: socket of the container's namespace ─ lo ─ server
//	client ─ listener ─ conn ────┤                                             (relay)
//	                             └─ stack: netstack ─ TAP ─ server
//	client ─ UDP socket ─ forwarder ┬ TAP ─ server
//	                                └ a socket of the namespace ─ server          where that is on its loopback alone
//
// A connection is accepted by the host's kernel before we know of it. It is then dialled in the container, from the client's
// own address where an answer finds its way back to us (see source), and joined; or it is reset, with
// not one octet delivered, if nobody listens there. The kernel path is tried where the namespace has the
// address that is dialled; there it takes no goroutine, because the outcome of a connect over
// lo is known at once. Everything else is dialled by the stack, whose outcome a goroutine waits for.
//
// The addresses that are dialled, one after the other until one does not refuse, are those of targets.
//
// Nobody's container or client can hold up another forward: what is accepted is served by the relay's
// workers, dials that hang have a deadline and are bounded, and a forward that has most of them gives way. Of the places for
// connections the last are kept for forwards that have few.
package portdriver
