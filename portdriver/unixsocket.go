package portdriver

import (
	"errors"
	"net"
	"os"

	"usernet/portdriver/sockfile"
)

// listenPath makes the forward's unix socket, which listens at once: who else wants the path must see that it is taken.
func (f *forward) listenPath() error {
	file, fd, err := sockfile.Listen(f.spec.HostPath)
	if err != nil {
		return f.d.pathError(f.spec, err)
	}
	f.file, f.fds = file, append(f.fds, fd)
	return nil
}

// pathError tells what sockfile said about spec, in the words for ports where a call has failed.
func (d *Driver) pathError(spec Spec, err error) error {
	if e, ok := errors.AsType[*sockfile.Error](err); ok && e.Call != "" {
		return d.listenError(spec, e.Call, e.Errno)
	}
	return &ErrListen{Spec: spec, Err: &net.OpError{Op: "listen", Net: "unix", Addr: hostAddr{spec}, Err: err}}
}

// Dirs are the directories of the unix sockets that are published now. A sandbox must allow removing files in them, or else
// these are left behind. They belong to the Driver.
func (d *Driver) Dirs() []*os.File {
	var dirs []*os.File
	for _, f := range d.all() {
		if f.file != nil {
			dirs = append(dirs, f.file.Dir())
		}
	}
	return dirs
}
