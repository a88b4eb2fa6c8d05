package api

import (
	"errors"
	"net"
	"os"
	"path/filepath"

	"usernet/portdriver/sockfile"
)

// listenAt makes the socket and its file.
func listenAt(path string) (net.Listener, *sockfile.File, error) {
	if path == "" {
		return nil, nil, errors.New("it has no name")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, nil, err
	}
	file, fd, err := sockfile.Listen(path)
	if err != nil {
		return nil, nil, err
	}
	s := os.NewFile(uintptr(fd), path)
	defer s.Close() // FileListener has a duplicate
	ln, err := net.FileListener(s)
	if err != nil {
		return nil, nil, errors.Join(err, file.Remove())
	}
	return ln, file, nil
}
