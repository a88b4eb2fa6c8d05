package slirp4netns

import (
	"errors"
	"syscall"
)

// Reason is a system call's error in the words of strerror(3), which begin with a capital; another error's own.
func Reason(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err.Error()
	}
	text := errno.Error()
	return string(text[0]&^0x20) + text[1:]
}

// Failure is what is printed when the start fails: slirp4netns's line where callers may know it, then what happened.
func (o *Options) Failure(err error) string {
	return "slirp4netns: " + err.Error() + "\n"
}
