package netns

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
	s := FindSpare()
	s.Trim()
	return len(s)
}
