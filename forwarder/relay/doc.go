// Package relay joins two ends of a connection: a socket of the host's with the container's end, which is a
// stack.Conn or whatever behaves like one (Loop.Join), or a socket as well (Loop.JoinSockets). It accepts connections,
// too (Loop.Listen).
//
//	container ── Drain ─▶ writev(fd) ──▶ host        FIN: shutdown(SHUT_WR)   RST: close with linger 0
//	container ◀── Fill ── recv(fd)  ◀── host        FIN: CloseWrite          RST: Abort
//
//	container ── recv ─▶ buffer ── send ─▶ host      FIN: shutdown(SHUT_WR), the second: close   RST: close with linger 0
//	container ◀─ send ── buffer ◀─ recv ── host
//
// A Loop serves all connections with a few workers, each an edge-triggered epoll and a list of
// connections that may have something to do; a connection at rest costs neither a goroutine
// nor a buffer. Of what netstack has a worker copies nothing: octets go from its buffers to the socket and
// from the socket into its buffers. Between sockets they are copied through one buffer of the worker's, or spliced where many come.
package relay
