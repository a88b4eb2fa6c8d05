// Package api is the control socket: one Unix socket through which a running usernet is asked and told.
//
// Three dialects share it, so that clients written for others work unchanged:
//
//	first octet A–Z   HTTP   /v1/info, /v1/ports      rootlesskit's REST API 1.1.3, by its own router
//	                         /v1/usernet/...          ours: docs/api.md and api/openapi.yaml
//	anything else     JSON   {"execute":...}          slirp4netns's, one request to a connection
//
//	accept ─▶ who is it (SO_PEERCRED) ─▶ first octet ─┬─▶ net/http ─▶ rootlesskit's router │ ours ─▶ Ports
//	                                                  └─▶ slirp ─────────────────────────────────▶ Ports
//
// Whoever may speak may publish ports of the host, so only our own user and root may, whatever the mode of the file.
// Nothing here touches a packet: a request costs the container no more than the lock of the table of forwards.
package api
