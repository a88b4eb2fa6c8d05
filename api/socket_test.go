package api_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"usernet/api"
)

func listen(path string) (*api.Server, error) {
	return api.Listen(api.Config{Path: path, Info: testInfo})
}

func TestListenErrors(t *testing.T) {
	path := socketPath(t)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for at, want := range map[string]string{
		"":   "control socket: it has no name",
		"/":  "control socket: / is a directory",
		path: "control socket: " + path + " is there already and is no socket: remove it, or choose another name",
		"/" + strings.Repeat("x", 107): "control socket: /" + strings.Repeat("x", 107) +
			" has 108 octets, and the name of a socket at most 107: choose a shorter one",
	} {
		s, err := listen(at)
		if err == nil {
			s.Close()
		}
		if err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// A relative name is one from here. Close may be called again, and leaves what somebody else has put there.
func TestListenHere(t *testing.T) {
	path := socketPath(t)
	t.Chdir(filepath.Dir(path))
	first, err := listen("s")
	if err != nil {
		t.Fatal(err)
	}
	if first.Path() != path {
		t.Error(first.Path())
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := errors.Join(first.Close(), first.Close()); err != nil {
		t.Error(err)
	}
	dial(t, path).Close()
}

// Another user may not speak, even where the file would let him; and nobody is not who we are.
func TestOtherUsersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		return // to be somebody else takes root, who runs the tests as well
	}
	path, _ := serve(t, newFake())
	if err := errors.Join(os.Chmod(filepath.Dir(path), 0o755), os.Chmod(path, 0o666)); err != nil {
		t.Fatal(err)
	}
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("there is no curl on this machine")
	}
	for uid, ok := range map[uint32]bool{0: true, 54321: false, 65534: false} {
		cmd := exec.CommandContext(t.Context(), curl, "-sS", "--unix-socket", path, "http://x/v1/usernet/info")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if (err == nil) != ok || ok != strings.Contains(string(out), "apiVersion") {
			t.Errorf("uid %d: %v: %s", uid, err, out)
		}
	}
	if got := ask(t, path, add); got != `{"return":{"id":1}}` { // a refusal keeps no place
		t.Error(got)
	}
}

// A plain user and root may speak; root has every way in anyhow.
func TestRootMaySpeakToUser(t *testing.T) {
	if os.Geteuid() != 0 {
		return // to be root takes root, who runs the tests as well
	}
	dir := filepath.Dir(socketPath(t))
	if err := os.Chown(dir, 54321, 54321); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The test binary of another run serves until its standard input ends.
	bin := filepath.Join(dir, "bin")
	data, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bin, data, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), bin, "-test.run", "^TestServeForAnother$")
	cmd.Dir, cmd.Env = "/", []string{"USERNET_TEST_SOCKET=" + filepath.Join(dir, "s")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 54321, Gid: 54321}}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("ready"))); err != nil {
		t.Errorf("no server: %v", err)
	} else if got := ask(t, filepath.Join(dir, "s"), `{"execute":"list_hostfwd"}`); !strings.Contains(got, "entries") {
		t.Errorf("%q", got)
	}
	in.Close()
	rest, _ := io.ReadAll(out)
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, rest)
	}
}

// TestServeForAnother is the server of TestRootMaySpeakToUser.
func TestServeForAnother(t *testing.T) {
	path := os.Getenv("USERNET_TEST_SOCKET")
	if path == "" {
		return
	}
	serve(t, newFake(), func(c *api.Config) { c.Path = path })
	fmt.Print("ready")
	io.Copy(io.Discard, os.Stdin)
}
