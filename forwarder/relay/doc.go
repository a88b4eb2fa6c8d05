// Package relay joins two ends of a TCP connection: the container's, which is a stack.Conn
// or whatever behaves like one, and a socket of the host's.
//
//	container ── Drain ─▶ writev(fd) ──▶ host        FIN: shutdown(SHUT_WR)   RST: close with linger 0
//	container ◀── Fill ── recv(fd)  ◀── host        FIN: CloseWrite          RST: Abort
//
// A Loop serves all connections with a few workers, each an edge-triggered epoll and a list of
// connections that may have something to do; a connection at rest costs neither a goroutine
// nor a buffer. A worker copies nothing: octets go from netstack's buffers to the socket and
// from the socket into netstack's buffers.
package relay
