// Package e2e tests the built binary in a lab of network namespaces, with real clients and servers.
//
//	container ── tap0 ══ usernet ══ host ── veth ── outside ── veth ── far
//	10.0.2.100                 203.0.113.1     203.0.113.2      198.18.5.2
//	                         2001:db8::1     2001:db8::2
//
// The tests make the lab without root: they run once more inside new user, network and mount
// namespaces, where they are root, and that network namespace is the host. usernet and the containers
// run as "home", an ordinary user of the host, in a user namespace of its own where that user is 1000 and has no
// capability. When the tests are run by the machine's root there is no user namespace, and home is root.
//
// outside routes 198.51.100.0/24 and 2001:db8:1::/64 to itself, so that servers can have many addresses;
// drops what goes to 192.0.2.0/25 and 2001:db8:dead::/64; and refuses 192.0.2.128/25 and 2001:db8:bad::/64 with ICMP.
// Nothing leaves the lab: it has no other link.
package e2e
