package e2e

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// asSlirp is the binary under the name of slirp4netns, as make install links it.
func asSlirp(t testing.TB) string {
	t.Helper()
	link := filepath.Join(scratch, "slirp4netns")
	if err := os.Symlink(binary, link); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	return link
}

// realSlirp is slirp4netns itself, with which the dialect is compared.
func realSlirp(t testing.TB) string {
	t.Helper()
	needs(t, "slirp4netns")
	path, err := exec.LookPath("slirp4netns")
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// slirps are both, for what must be the same.
func slirps(t testing.TB) map[string]string {
	t.Helper()
	return map[string]string{"slirp4netns": realSlirp(t), "usernet": asSlirp(t)}
}

// A slirp is a process of either program that is ready.
type slirp struct {
	*usernet
	stdout *output
	exit   *os.File // the test's end of the exit descriptor
}

// startSlirp starts a program with a ready descriptor, 3, and an exit descriptor, 4, and waits until it is ready. Standard
// output is apart from the rest. The exit descriptor ends it with the test.
func (w where) startSlirp(t testing.TB, program string, args ...string) *slirp {
	t.Helper()
	ready, readyW := pipe(t)
	exitR, exit := pipe(t)
	s := &slirp{stdout: &output{}, exit: exit}
	s.usernet = &usernet{w.start(t, func(cmd *exec.Cmd) {
		cmd.Stdout = s.stdout
		cmd.ExtraFiles = []*os.File{readyW, exitR}
	}, append(append([]string{program}, args...), "-r", "3", "-e", "4")...)}
	readyW.Close()
	exitR.Close()
	t.Cleanup(func() {
		exit.Close()
		s.wait(t)
	})
	if text := readAll(t, ready); text != "1" {
		t.Fatalf("%s %s: the ready descriptor got %q, want \"1\" and its end:\n%s", program, strings.Join(args, " "), text, s.out)
	}
	return s
}

func pipe(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// readAll reads to the end.
func readAll(t testing.TB, r interface {
	io.Reader
	SetReadDeadline(time.Time) error
}) string {
	t.Helper()
	r.SetReadDeadline(time.Now().Add(patience))
	b, err := io.ReadAll(r)
	if err != nil {
		t.Errorf("after %q: %v", b, err)
	}
	return string(b)
}

// hangUp closes the exit descriptor, and expects a good end.
func (s *slirp) hangUp(t testing.TB) {
	t.Helper()
	s.exit.Close()
	endsWell(t, s.usernet)
}

// tell sends one request to an API socket as podman does, and returns the answer.
func tell(t testing.TB, socket, request string) string {
	t.Helper()
	var c net.Conn
	var err error
	lab.host.do(func() { c, err = net.Dial("unix", socket) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, request+"\n"); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	return readAll(t, c)
}

// addHostfwd is what podman asks for, to the octet.
func addHostfwd(proto, host string, hostPort uint16, guest string, guestPort uint16) string {
	return fmt.Sprintf(`{"execute":"add_hostfwd","arguments":{"proto":%q,"host_addr":%q,"host_port":%d,"guest_addr":%q,"guest_port":%d}}`,
		proto, host, hostPort, guest, guestPort)
}

// refusal is how a program that does not start ends.
type refusal struct {
	status         int
	stdout, stderr string
}

// refuse runs a program that ends by itself. Its own name in its messages is slirp4netns, whatever it was called by.
func refuse(t testing.TB, program string, args ...string) refusal {
	t.Helper()
	stdout := &output{}
	p := lab.home.start(t, func(cmd *exec.Cmd) { cmd.Stdout = stdout }, append([]string{program}, args...)...)
	status := p.wait(t)
	plain := strings.NewReplacer(program, "slirp4netns").Replace
	return refusal{status, plain(stdout.String()), plain(p.out.String())}
}
