// Package stack is TCP/IP at the container's end: Ethernet frames below, connections,
// datagrams and echoes above. It is the only package that knows gVisor.
package stack
