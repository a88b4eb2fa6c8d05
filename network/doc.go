// Package network keeps the books of the shared mode: which networks there are, who is a member, and under which address and
// names. What it decides, others carry out in the kernel.
//
//	Config ─ Create ─┐         ┌─ List, Get, Member ── inspect
//	Request ─ Join ──┤── Set ──┼─ Names ────────────── the resolver of each network
//	name ─── Leave ──┘    ▲    └─ State ─┐
//	                      └─ Restore ────┴─ Dir: state.json, and the lock that keeps two starters apart
//
// A Set never has two networks that overlap, nor two members with one address, name or MAC, however it was filled: what comes
// from a file goes through the checks that a user's words go through. It touches neither a file nor an interface. Dir, Process, NetNS
// and BootID do, and tell whether what is written down is still so: a number of a process or of an inode
// says nothing after a reboot, and a PID by itself not even until then.
package network
