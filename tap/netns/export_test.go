package netns

import "errors"

// UseHelper makes calls go through the helper even where a thread of ours might enter.
func (n *NS) UseHelper() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.direct = placeHelper
}

// HelperPID is the helper's PID, or 0.
func (n *NS) HelperPID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.helper == nil {
		return 0
	}
	return n.helper.proc.Pid
}

// Direct tells whether calls run on a thread of ours.
func (n *NS) Direct() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.direct == placeThread
}

// Trim does what a helper at rest does, and says how many mappings there were.
func Trim() int {
	s := OpenSpare()
	defer s.Close()
	s.Trim()
	return len(s.find())
}

// OpenWithoutPidfd is OpenPID on a host that has no pidfd for us.
func OpenWithoutPidfd(pid int) (*NS, error) {
	n := &NS{name: "by its process", fd: -1, userFd: -1, life: noLife()}
	if err := n.openProc(pid); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, n.openOwner("")
}

// ForgetInotify makes n's path one that nothing is told of but mounts.
func (n *NS) ForgetInotify() {
	closeFd(&n.life.events)
	closeFd(&n.life.mounts)
	n.life.looks = true
}
