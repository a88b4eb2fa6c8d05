// Package inside does in a container's network namespace what published ports need besides the TAP: sockets made
// there ahead, the routing that lets them speak with a foreign client's address, and the list of who listens.
//
//	usernet (sandboxed)                      helper, in the namespace
//	Open ───────────── set up ─────────────▶ rule, routes, sysctl; undone at its end, whatever ends it
//	       ◀────────── a netlink socket
//	Socket ◀─ ready ◀─ 48 sockets at a go ── IP_TRANSPARENT, SO_MARK, ...
//	Listening ─ sock_diag, on that netlink socket, without the helper
//	Close ──────────── undo ───────────────▶
//
// How a server in the container sees the client's own address: a socket of the namespace that is IP_TRANSPARENT binds to
// the client's address and connects to the container's, over lo. The server's answer would be routed to the
// TAP; but the segments carry Mark, and with net.ipv4.tcp_fwmark_accept the server's end of the connection
// inherits it, so that a rule sends its answers to Table, where every address is local, by lo. What the kernel answers for a port where
// nobody listens belongs to no connection: net.{ipv4,ipv6}.fwmark_reflect gives it the mark.
//
// All of it belongs to the container as well, which may change it: then its own forwards suffer, and nothing else.
package inside
