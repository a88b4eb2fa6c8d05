package e2e

import (
	"debug/buildinfo"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Each form in which the namespace is named, up to the end by the exit descriptor: data on it means nothing, its
// hanging up is a good end, and then nothing is left.
func TestSlirpLife(t *testing.T) {
	servers := echoServers(t)
	for _, form := range []string{"%d tap0", "%d", "--netns-type=path /proc/%d/ns/net tap7", "--netns-type path /proc/%[1]d/ns/net --userns-path /proc/%[1]d/ns/user --enable-sandbox tap0"} {
		for name, program := range map[string][]string{"link": {asSlirp(t)}, "first argument": {binary, "slirp4netns"}} {
			t.Run(form+" by "+name, func(t *testing.T) {
				c := newContainer(t)
				socket := socketPath(t)
				args := append(program[1:], strings.Fields("-c -6 --mtu=65520 --enable-sandbox --enable-seccomp --api-socket "+socket+" "+fmt.Sprintf(form, c.pid))...)
				s := lab.home.startSlirp(t, program[0], args...)
				works(t, c.net, servers)
				if _, err := s.exit.WriteString("data is no end"); err != nil {
					t.Fatal(err)
				}
				works(t, c.net, servers)
				if !isThere(socket) {
					t.Error("no API socket")
				}
				if entries, _ := filepath.Glob(filepath.Join(runtimeDir, "usernet", "*")); len(entries) > 0 {
					t.Errorf("nobody asked for %v", entries)
				}
				s.hangUp(t)
				if isThere(socket) {
					t.Error("the API socket is still there")
				}
				if hasInterface(t, c, "tap0") || hasInterface(t, c, "tap7") {
					t.Error("the TAP is still there")
				}
				if left := processesOf(binary); len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
				if text := s.out.String(); text != "" && !raceDetector {
					t.Errorf("a life without trouble says %q", text)
				}
			})
		}
	}
}

// Where slirp4netns goes on for ever, we end: with the container. Signals end us as well, and the socket goes.
func TestSlirpEnds(t *testing.T) {
	for what, end := range map[string]func(c *container, s *slirp){
		"container": func(c *container, s *slirp) { syscall.Kill(c.pid, syscall.SIGKILL) },
		"SIGTERM":   func(c *container, s *slirp) { s.signal(t, syscall.SIGTERM) },
		"SIGINT":    func(c *container, s *slirp) { s.signal(t, syscall.SIGINT) },
	} {
		t.Run(what, func(t *testing.T) {
			c := newContainer(t)
			socket := socketPath(t)
			s := lab.home.startSlirp(t, asSlirp(t), "-c", "-a", socket, strconv.Itoa(c.pid), "tap0")
			end(c, s)
			endsWell(t, s.usernet)
			if isThere(socket) {
				t.Error("the API socket is still there")
			}
		})
	}
}

// A signal while the helper was giving up its rights cut that short and ended the helper, which nothing inside the sandbox could
// replace: status 1, and routing rules stayed in the namespace.
func TestSlirpSignalWhileItStarts(t *testing.T) {
	for round := range 40 {
		c := newContainer(t)
		socket := socketPath(t)
		p := lab.home.start(t, nil, asSlirp(t), "-c", "-6", "-a", socket, strconv.Itoa(c.pid), "tap0")
		eventually(t, "the helper or the API socket is there", func() bool {
			if round%2 == 0 {
				return isThere(socket)
			}
			return len(processesOf(binary)) > 1
		})
		p.signal(t, syscall.SIGTERM)
		if status := p.wait(t); status != 0 || strings.Contains(p.out.String(), "slirp4netns: ") || strings.Contains(p.out.String(), "slower path") {
			t.Errorf("round %d: status %d: %s", round, status, p.out)
		}
		if left := processesOf(binary); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

// buildah and rootlesskit end it with SIGKILL. What is left in the namespace is taken over by the next one, and so is
// a dead socket.
func TestSlirpAfterSIGKILL(t *testing.T) {
	c := newContainer(t)
	socket := socketPath(t)
	args := []string{"-c", "-6", "-a", socket, strconv.Itoa(c.pid), "tap0"}
	s := lab.home.startSlirp(t, asSlirp(t), args...)
	s.signal(t, syscall.SIGKILL)
	s.wait(t)
	eventually(t, "no process is left", func() bool { return len(processesOf(binary)) == 0 })
	if !isThere(socket) {
		t.Fatal("the socket is gone: what removed it?")
	}
	lab.home.startSlirp(t, asSlirp(t), args...)
	works(t, c.net, echoServers(t))
	if got := tell(t, socket, `{"execute":"list_hostfwd"}`); got != `{"return":{"entries":[]},"entries":[]}` {
		t.Error(got)
	}
}

// buildah and rootlesskit set a death signal, so that it ends with them; and with it ends the helper that makes sockets inside.
func TestSlirpDiesWithItsCaller(t *testing.T) {
	needs(t, "setpriv")
	c := newContainer(t)
	ready, readyW := pipe(t)
	caller := lab.home.start(t, func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{readyW} }, "sh", "-c", `setpriv --pdeathsig KILL "$@" & wait`, "sh",
		asSlirp(t), "-c", "-a", socketPath(t), "-r", "3", strconv.Itoa(c.pid), "tap0")
	readyW.Close()
	// The shell has the descriptor, too, so that it does not end.
	ready.SetReadDeadline(time.Now().Add(patience))
	if n, err := ready.Read(make([]byte, 1)); n != 1 {
		t.Fatalf("not ready: %v", err)
	}
	if len(processesOf(binary)) == 0 {
		t.Fatal("there is no process to end")
	}
	caller.signal(t, syscall.SIGKILL)
	eventually(t, "nothing of it is left", func() bool { return len(processesOf(binary)) == 0 })
}

// In a control group with a limit on CPU time, "-e 3" without a descriptor 3 was taken: Go's runtime had that limit's file open
// there, which never hangs up, and the process never ended.
func TestSlirpDescriptorIsNotTheRuntimes(t *testing.T) {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	setting := ""
	for _, s := range info.Settings {
		if s.Key == "DefaultGODEBUG" {
			setting = s.Value
		}
	}
	if !slices.Contains(strings.Split(setting, ","), "containermaxprocs=0") {
		t.Errorf("DefaultGODEBUG is %q: the runtime keeps files of the control group open", setting)
	}
	c := newContainer(t)
	got := refuse(t, asSlirp(t), "-c", "-e", "3", strconv.Itoa(c.pid), "tap0")
	if got.status != 1 || !strings.Contains(got.stderr, "exit-fd 3 is not open") {
		t.Errorf("%+v", got)
	}
}

// Only a dead socket is replaced: slirp4netns removes whatever is there.
func TestSlirpSocketInTheWay(t *testing.T) {
	c := newContainer(t)
	dir := t.TempDir()
	file, live := filepath.Join(dir, "file"), filepath.Join(dir, "live")
	writeFile(t, file, "precious")
	ln, err := net.Listen("unix", live)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for path, want := range map[string]string{file: "is no socket", live: "in use by a running process"} {
		got := refuse(t, asSlirp(t), "-c", "-a", path, strconv.Itoa(c.pid), "tap0")
		if got.status != 1 {
			t.Errorf("%s: status %d", path, got.status)
		}
		saysAll(t, got.stderr, "api_bindlisten: bind: ", want, path)
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "precious" {
		t.Errorf("the file is %q, %v", text, err)
	}
	if hasInterface(t, c, "tap0") {
		t.Error("a start that failed has left its TAP")
	}
}

// A ready descriptor that cannot be used is nobody's mistake, as there; an exit descriptor that is not open would end
// slirp4netns at once, with status 0.
func TestSlirpDescriptors(t *testing.T) {
	c := newContainer(t)
	s := lab.home.startSlirp(t, asSlirp(t), "-c", "--ready-fd=99", "--ready-fd", "3", strconv.Itoa(c.pid), "tap0") // the last counts
	s.hangUp(t)

	exitR, exit := pipe(t)
	u := &usernet{lab.home.start(t, func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{exitR} }, asSlirp(t), "-c", "-r", "99", "-e3", strconv.Itoa(c.pid), "tap0")}
	exitR.Close()
	u.has(t, "Starting slirp\n")
	works(t, c.net, echoServers(t)[:1])
	exit.Close()
	endsWell(t, u)

	got := refuse(t, asSlirp(t), "-c", "-e", "99", strconv.Itoa(c.pid), "tap0")
	if got.status != 1 {
		t.Errorf("a closed exit descriptor: status %d", got.status)
	}
	saysAll(t, got.stderr, "exit-fd 99 is not open")
}

// Standard output and error may be the ready descriptor. What is closed then must not become a file of ours.
func TestSlirpReadyOnStandardFiles(t *testing.T) {
	for fd := 1; fd <= 2; fd++ {
		c := newContainer(t)
		r, w := pipe(t)
		exitR, exit := pipe(t)
		u := &usernet{lab.home.start(t, func(cmd *exec.Cmd) {
			cmd.ExtraFiles = []*os.File{exitR}
			if fd == 1 {
				cmd.Stdout = w
			} else {
				cmd.Stderr = w
			}
		}, asSlirp(t), "-c", "-e", "3", "-r", strconv.Itoa(fd), strconv.Itoa(c.pid), "tap0")}
		w.Close()
		exitR.Close()
		if text := readAll(t, r); text != "1" {
			t.Errorf("-r %d: %q", fd, text)
		}
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", u.cmd.Process.Pid, fd)); realRoot && (err != nil || to != os.DevNull) {
			t.Errorf("descriptor %d is now %s, %v", fd, to, err)
		}
		works(t, c.net, echoServers(t)[:1])
		exit.Close()
		endsWell(t, u)
	}
}

// rootlesskit makes the TAP, has it adopted with one queue and without an address, and then configures it, with the MTU that it
// has told us.
func TestSlirpAdoptsTheCallersTAP(t *testing.T) {
	needs(t, "ip")
	c := newContainer(t)
	c.sh(t, "ip tuntap add name tap0 mode tap; ip link set tap0 up")
	s := lab.home.startSlirp(t, asSlirp(t), "--mtu", "65520", "--enable-ipv6", "--disable-host-loopback", strconv.Itoa(c.pid), "tap0")
	before := c.must(t, "ip", "addr", "show", "tap0")
	if strings.Contains(before, "inet 10.") || !strings.Contains(before, "mtu 1500") {
		t.Errorf("the caller's interface was configured:\n%s", before)
	}
	c.sh(t, "ip link set lo up; ip link set tap0 mtu 65520; ip addr add 10.0.2.100/24 dev tap0; ip route add default via 10.0.2.2")
	c.sh(t, "ip addr add fd00::100/64 dev tap0 nodad; ip route replace default via fd00::2 dev tap0")
	servers := echoServers(t)
	works(t, c.net, servers)
	// Datagrams of the MTU that was agreed upon come in whole, and not in pieces of 1500.
	server := lab.outside.serveUDP(t, outsideAddr4+":0", same)
	big := strings.Repeat("x", 60000)
	if got := ask(t, c.net, server, big); got != big {
		t.Errorf("of %d octets %d came back", len(big), len(got))
	}
	s.hangUp(t)
	if !hasInterface(t, c, "tap0") {
		t.Error("the caller's TAP is gone")
	}
}

// What -c does is what slirp4netns's does, and IPv6 works at once.
func TestSlirpConfigures(t *testing.T) {
	needs(t, "ip")
	for _, flags := range []string{"", "--mtu=1400 --cidr=10.9.8.0/24 --macaddress=02:00:00:00:00:07", "--cidr=172.16.0.0/12 -m 65521"} {
		text := map[string]string{}
		for name, program := range slirps(t) {
			c := newContainer(t)
			lab.home.startSlirp(t, program, append(append([]string{"--configure"}, strings.Fields(flags)...), strconv.Itoa(c.pid), "tap0")...)
			mac := ""
			if strings.Contains(flags, "macaddress") {
				mac = c.sh(t, "ip -o link show tap0 | grep -o 'ether [0-9a-f:]*'")
			}
			text[name] = c.sh(t, "ip -4 -o addr show | sed 's/.*: //'; ip route show; ip -o link show lo up; ip -o link show tap0 up | grep -o 'mtu [0-9]*'") + mac
		}
		if text["slirp4netns"] != text["usernet"] {
			t.Errorf("%s:\nslirp4netns\n%s\nusernet\n%s", flags, text["slirp4netns"], text["usernet"])
		}
	}
}

// IPv6 needs 1280 octets; slirp4netns takes both flags together, and so we give what can be given.
func TestSlirpSmallMTU(t *testing.T) {
	c := newContainer(t)
	s := lab.home.startSlirp(t, asSlirp(t), "-c", "-6", "-m", "1000", strconv.Itoa(c.pid), "tap0")
	works(t, c.net, echoServers(t)[:1])
	s.has(t, "1280")
}

// A name that the kernel would cut off is cut off; slirp4netns then looks for the whole of it.
func TestSlirpLongName(t *testing.T) {
	c := newContainer(t)
	s := lab.home.startSlirp(t, asSlirp(t), "-c", strconv.Itoa(c.pid), "abcdefghijklmnopqrstuv")
	if !hasInterface(t, c, "abcdefghijklmno") {
		t.Error("no interface abcdefghijklmno")
	}
	s.has(t, "at most 15 octets")
}
