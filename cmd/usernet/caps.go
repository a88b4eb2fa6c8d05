package main

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Capabilities that may stay, where we have them:
//
//	CAP_NET_BIND_SERVICE  a container's source port below 1024 is kept on the host (NTP, old NFS)
//	CAP_NET_RAW           SO_BINDTODEVICE for --outbound-addr=INTERFACE, on kernels before 5.7
//	CAP_NET_ADMIN         of the helper, in the container's namespace: transparent sockets and their routing
const (
	capsForwarding = 1 << unix.CAP_NET_BIND_SERVICE
	capsBindDevice = 1 << unix.CAP_NET_RAW
	capsInside     = 1 << unix.CAP_NET_ADMIN
)

// effectiveCaps is the set of capabilities in force for this thread, bit n for capability n.
func effectiveCaps() (uint64, error) {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return 0, fmt.Errorf("capget: %w", err)
	}
	return uint64(data[0].Effective) | uint64(data[1].Effective)<<32, nil
}

func hasCaps(wanted ...int) bool {
	have, err := effectiveCaps()
	for _, c := range wanted {
		if have&(1<<c) == 0 {
			return false
		}
	}
	return err == nil
}

// confineCaps leaves c.caps permitted and effective; inheritable and ambient sets end up empty. Who may narrow the bounding
// set keeps CAP_SETPCAP until confineBounds.
func confineCaps(c confinement) error {
	have, err := effectiveCaps()
	if err != nil {
		return err
	}
	if err := allThreads(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil {
		return fmt.Errorf("prctl(PR_CAP_AMBIENT_CLEAR_ALL): %w", err)
	}
	return setCaps(have & (c.caps | 1<<unix.CAP_SETPCAP))
}

// confineBounds empties the bounding set, too, where we may. It matters to an execve only, and no_new_privs, seccomp and Landlock
// stand before that anyway: so that nobody need wait for it. It takes some forty calls, each of which stops every
// thread, and would be the longest part of the sandbox.
func confineBounds(c confinement) error {
	have, err := effectiveCaps()
	if err != nil || have&(1<<unix.CAP_SETPCAP) == 0 {
		return err
	}
	for n := uintptr(0); ; n++ {
		err := allThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, n, 0)
		if err == unix.EINVAL && n > 0 {
			break // behind the kernel's last capability
		}
		if err != nil {
			return fmt.Errorf("prctl(PR_CAPBSET_DROP, %d): %w", n, err)
		}
	}
	return setCaps(have & c.caps)
}

// setCaps makes a set the permitted and effective one of all threads.
func setCaps(keep uint64) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i := range data {
		word := uint32(keep >> (32 * i))
		data[i] = unix.CapUserData{Effective: word, Permitted: word}
	}
	err := allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&data[0])), 0)
	runtime.KeepAlive(&hdr)
	runtime.KeepAlive(&data)
	if err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}
