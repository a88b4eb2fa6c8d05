package slirp4netns

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
)

// A Stage is how far a start came.
type Stage int

const (
	Attaching Stage = iota // to the namespace or device
	Listening              // at the API socket
)

// Failure is what is printed when a start fails: what happened, with its remedy, between the lines that slirp4netns has for
// it, where callers may know those.
func (o *Options) Failure(err error, at Stage) string {
	ours := "slirp4netns: " + err.Error()
	switch {
	case at == Listening && errors.Is(err, syscall.ENAMETOOLONG):
		return lines("the specified API socket path is too long (>= 108)", ours, "parent failed")
	case at == Listening:
		return lines("api_bindlisten: bind: "+Reason(err), ours, "parent failed")
	case o.PID != 0 && errors.Is(err, syscall.ESRCH):
		return lines(fmt.Sprintf("/proc/%d/ns/net: %s", o.PID, syscallText(syscall.ENOENT)), ours, "child failed(1)")
	}
	return lines(ours)
}

func lines(ss ...string) string { return strings.Join(ss, "\n") + "\n" }

// Reason is a system call's error in the words of strerror(3); another error's own.
func Reason(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err.Error()
	}
	return syscallText(errno)
}

// syscallText has the capital that C's text has and Go's has not.
func syscallText(errno syscall.Errno) string {
	text := errno.Error()
	return strings.ToUpper(text[:1]) + text[1:]
}
