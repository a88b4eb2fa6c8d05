// Package bridge is the plumbing of a network that containers share: a Linux bridge in a network namespace that is
// nobody's in particular, usernet's own TAP as one of its ports, and a cable to each member.
//
//	shared namespace                             member's namespace
//	  bridge b1 ─┬─ TAP u1 ═ Uplink ═ a stack
//	             ├─ m1 ───────── veth ────────────── eth0
//	             └─ m2 ═ TAP ═ Cable.Run ═ TAP ═════ eth0
//
// The kernel makes a veth only for who has CAP_NET_ADMIN over both ends: where the member's namespace is owned by the
// user namespace of the shared one, or by one below. Siblings (two containers, each with a user namespace of its own)
// get two TAPs, and their frames are read here and written there as they are, with the virtio-net header, so that a
// super-segment of 64 KiB is one frame all the way.
//
// Everything outlives us: the kernel goes on switching between veths, TAPs are persistent, and whoever comes after
// takes up what is there (Open, Uplink, and Attach with Adopt). The bridge has no address, nor has any port, so that the
// shared namespace's kernel speaks with nobody and forwards nothing between bridges.
//
// Who may adopt what is not settled here: one program at a time works on a shared namespace, by a lock of its own.
package bridge
