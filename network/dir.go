package network

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// The files of a Dir. No network's name has a dot in it, so that its folder is none of them.
const (
	StateFile    = "state.json"
	KeeperFile   = "keeper.json"
	DaemonSocket = "daemon.sock"
	lockFile     = "state.lock"
)

const (
	// maxFile, in octets, is well above what the largest Set takes; only thousands of members with many ports each make it more.
	maxFile = 32 << 20

	// maxSocket is what sockaddr_un holds without its final zero.
	maxSocket = 107
)

// A Dir is the directory of the shared mode: $XDG_RUNTIME_DIR/usernet/shared. It is ours, and nobody else gets in, so
// that what is in it is what a usernet of the same user has put there.
type Dir struct {
	path string
	root *os.Root
	most int        // octets of a file: maxFile
	mu   sync.Mutex // one writer at a time of the files beside, *.tmp
}

// DefaultDir is where the Dir of this user belongs.
func DefaultDir() (string, error) {
	run := os.Getenv("XDG_RUNTIME_DIR")
	if !filepath.IsAbs(run) {
		return "", fmt.Errorf("XDG_RUNTIME_DIR is %q: set it to a directory that is yours alone and does not outlive a reboot, as a login session does (/run/user/%d)", run, os.Geteuid())
	}
	return filepath.Join(run, "usernet", "shared"), nil
}

// OpenDir opens the directory, and makes it and the one above where they are missing. Both have to be the user's own. Close closes it.
func OpenDir(path string) (*Dir, error) {
	for _, p := range []string{filepath.Dir(path), path} {
		if err := os.Mkdir(p, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, err
		}
		info, err := os.Lstat(p)
		if err != nil {
			return nil, err
		}
		if err := checkDir(p, info); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	// Once more what is open now: somebody may have moved something in the meantime.
	info, err := root.Stat(".")
	if err == nil {
		err = checkDir(path, info)
	}
	if err == nil && info.Mode().Perm() != 0o700 {
		err = root.Chmod(".", 0o700)
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return &Dir{path: path, root: root, most: maxFile}, nil
}

// checkDir refuses a directory in which somebody else could put files in the place of ours.
func checkDir(path string, info os.FileInfo) error {
	if !info.IsDir() {
		return fmt.Errorf("%s is no directory: remove it, or set XDG_RUNTIME_DIR to another place", path)
	}
	if uid := owner(info); uid != os.Geteuid() {
		return fmt.Errorf("%s belongs to uid %d, and this is uid %d: set XDG_RUNTIME_DIR to a directory of your own", path, uid, os.Geteuid())
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s has mode %04o, and others may write to it: chmod go-w %s", path, info.Mode().Perm(), path)
	}
	return nil
}

func owner(info os.FileInfo) int {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}

// Close closes the directory. Locks remain held.
func (d *Dir) Close() error { return d.root.Close() }

// Path is the directory's.
func (d *Dir) Path() string { return d.path }

// Socket is where a member's control socket belongs: NETWORK/MEMBER.sock, or a part of the member's name and a hash where that
// would be longer than a socket's path may be. It makes the network's folder.
func (d *Dir) Socket(network, member string) (string, error) {
	if err := checkName("network", network); err != nil {
		return "", err
	}
	if err := checkName("name", member); err != nil {
		return "", err
	}
	if err := d.root.Mkdir(network, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return socketIn(filepath.Join(d.path, network), member), nil
}

// RemoveSocket removes the control socket of a member that is gone, which a daemon that was killed has left. That there is none is no error.
func (d *Dir) RemoveSocket(network, member string) error {
	if err := errors.Join(checkName("network", network), checkName("name", member)); err != nil {
		return err
	}
	name := filepath.Base(socketIn(filepath.Join(d.path, network), member))
	if err := d.root.Remove(filepath.Join(network, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// RemoveNetwork removes the folder of a network that is removed, with all that is left in it. That there is none is no error.
func (d *Dir) RemoveNetwork(network string) error {
	if err := checkName("network", network); err != nil {
		return err
	}
	return d.root.RemoveAll(network)
}

func socketIn(dir, member string) string {
	path := filepath.Join(dir, member+".sock")
	if len(path) <= maxSocket {
		return path
	}
	sum := sha256.Sum256([]byte(member))
	short := "~" + hex.EncodeToString(sum[:5]) + ".sock" // no name has a ~
	room := min(len(member), max(0, maxSocket-len(filepath.Join(dir, short))))
	return filepath.Join(dir, member[:room]+short)
}

// WriteFile puts v, as JSON, in the place of a file at once: a reader sees the old one or the new one, whatever ends this process
// or the machine. Each file has one process that writes it.
func (d *Dir) WriteFile(name string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	data = append(data, '\n')
	if len(data) > d.most {
		return exhaustedf("write %s: it would have %d octets, and %d are read back: detach members with many ports", filepath.Join(d.path, name), len(data), d.most)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.replace(name, data); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Join(d.path, name), err)
	}
	return nil
}

func (d *Dir) replace(name string, data []byte) (err error) {
	temp := name + ".tmp"
	f, err := d.root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync() // before the name: else a crash leaves an empty file under it
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, d.root.Remove(temp))
	}
	if err := d.root.Rename(temp, name); err != nil {
		return errors.Join(err, d.root.Remove(temp))
	}
	dir, err := d.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// ReadFile reads what WriteFile wrote, strictly. os.ErrNotExist: there is none.
func (d *Dir) ReadFile(name string, v any) error {
	data, err := d.read(name)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return explain(ErrInvalid, "%s: it is damaged: %v", filepath.Join(d.path, name), jsonError(err, len(data)))
	}
	return nil
}

// Load reads state.json and restores the Set of it; where there is none, the Set has no networks. An error says which file it is and what can
// be done; for an ErrOtherBoot that is to Discard the file and to begin anew.
func (d *Dir) Load(boot string, hosts ...string) (*Set, error) {
	data, err := d.read(StateFile)
	if errors.Is(err, os.ErrNotExist) {
		return New(hosts...), nil
	}
	if err != nil {
		return nil, err
	}
	var s *Set
	st, err := ParseState(data, boot)
	if err == nil {
		s, err = Restore(st, hosts...)
	}
	path := filepath.Join(d.path, StateFile)
	switch {
	case errors.Is(err, ErrOtherBoot):
		return nil, fmt.Errorf("%s: %w", path, err)
	case err != nil:
		return nil, fmt.Errorf("%s: %w. Containers go on as they are; to begin without networks, move it away: mv %s %s.old", path, err, path, path)
	}
	return s, nil
}

// Save writes state.json.
func (d *Dir) Save(st State) error { return d.WriteFile(StateFile, st) }

// Discard moves a file aside, to NAME.old, in the place of one that was moved before.
func (d *Dir) Discard(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.root.Rename(name, name+".old")
}

func (d *Dir) read(name string) ([]byte, error) {
	// Non-blocking, as a FIFO in its place would have us wait for a writer.
	f, err := d.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(d.path, name)
	switch {
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no regular file: remove it", path)
	case owner(info) != os.Geteuid() || info.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("%s belongs to uid %d and has mode %04o: others could have written it: remove it, or make it yours", path, owner(info), info.Mode().Perm())
	case info.Size() > maxFile:
		return nil, fmt.Errorf("%s has %d octets, and usernet has written at most %d: remove it", path, info.Size(), maxFile)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return data, nil
}
