// Package netns is a handle on somebody else's network namespace: it opens one, tells
// when it is gone, and runs named operations inside it.
//
//	Open ─ checks that it is one, asks who owns it, keeps all that Watch will need
//	Call ─ may this thread setns? ── yes ─ a locked thread enters, works, goes home
//	                              └─ no ── the helper: our own binary, once cloned,
//	                                       inside owner user namespace and netns,
//	                                       answers on a socketpair, and when that is closed
//	                                       does what AtEnd was given, and ends
//	Watch ─ pidfd, or the path, until the namespace is gone
//	Close ─ ends the helper and waits for it
//
// The owner is what the kernel says (NS_GET_USERNS), never /proc/PID/ns/user: under nested
// user namespaces a process may live in another one than the owner of its network.
//
// A threaded process may not enter a user namespace, so that a helper is needed where we
// hold no CAP_SYS_ADMIN over the owner: see spawn.go for how it is made. Config.Helper asks for one everywhere, for
// calls from a process that has given up its rights meanwhile.
package netns
