// Package tap is the TAP device in the container's network namespace: it makes one or takes up
// the one that is there, attaches its queues, and gives the interface its address.
//
//	Open ─ lock the namespace ─▶ inside (netns.Call):
//	                               is there one? ── no ── water makes it, persistent
//	                                             ── yes ─ TAP, nobody attached: adopt
//	                               attach queues, header, offloads
//	                               configure, or leave as found
//	     ◀─ queues as descriptors ─┘
//	Queue.Read, Wait, Write ─ frames, each behind a virtio-net header
//	Close ─ remove it · Detach ─ leave it for who comes after
//
// FromFD takes a TAP that somebody has opened already, and gives it back as it was. ListenSocket is for machines that have
// no TAP: frames come and go as messages of a unix socket.
package tap
