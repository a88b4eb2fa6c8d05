package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// What is wrong on the command line, or with what it names, is told as slirp4netns tells it: the same words, the same status,
// the help where it has it.
func TestSlirpRefusesAsTheRealOne(t *testing.T) {
	programs := slirps(t)
	c := newContainer(t)
	pid := strconv.Itoa(c.pid)
	for _, args := range []string{
		"", "-c", "abc tap0", "0 tap0", "-1 tap0", "-c -- -5 tap0", "99999999999999999999 tap0",
		"--bogus 1 tap0", "-z 1 tap0", "-e", "--exit-fd", "-e x 1 tap0", "-e -1 1 tap0", "-r x 1 tap0", "-r-1 1 tap0", "-ce3r4 1 tap0",
		"--mtu=0 1 tap0", "-m 65522 1 tap0", "--mtu=1x 1 tap0", "--e 1", "--en 1", "--enable-s 1", "--c 1", "--d 1", "--n x 1", "--o x 1", "--m x 1",
		"--conf=3 1 tap0", "--enable-ipv6=1 1 tap0", "--no-host-loopback=3 1 tap0",
		"--cidr=24 1 tap0", "--cidr= 1 tap0", "--cidr=10.0.2.0/0 1 tap0", "--cidr=10.0.2.0/26 1 tap0", "--cidr=10.0.2.0/33 1 tap0", "--cidr=10.0.2.0/024 1 tap0",
		"--cidr=10.0.2.100/24 1 tap0", "--cidr=300.0.0.0/8 1 tap0",
		"--macaddress=zz 1 tap0", "-c --macaddress=zz 1 tap0",
		"--userns-path=/nonexistent 1 tap0", "--netns-type=path /nonexistent tap0", "--netns-type=any /nonexistent tap0", "--netns-type= /nonexistent tap0",
		"--target-type=foo 1 tap0", "--target-type=bess /tmp/x tap0", "--target-type=bess -c /tmp/x", "--target-type=bess --netns-type=pid /tmp/x", "--target-type=bess --userns-path=/ /tmp/x",
	} {
		real, ours := refuse(t, programs["slirp4netns"], strings.Fields(args)...), refuse(t, programs["usernet"], strings.Fields(args)...)
		if real.status != ours.status || strings.TrimSpace(real.stderr) != strings.TrimSpace(ours.stderr) || isHelp(real.stdout) != isHelp(ours.stdout) {
			t.Errorf("%s\nslirp4netns: status %d, help %v, %q\nusernet:     status %d, help %v, %q", args,
				real.status, isHelp(real.stdout), real.stderr, ours.status, isHelp(ours.stdout), ours.stderr)
		}
	}
	// Here there is more to say than slirp4netns does: its lines are there, and ours between them.
	for _, args := range []string{
		"99999999 tap0",
		"-c -a /nonexistent/x " + pid + " tap0",
		"-c -a /" + strings.Repeat("x", 120) + " " + pid + " tap0",
		"-c --outbound-addr=no/such " + pid + " tap0",
		"-c --macaddress=01:02:03:04:05:06 " + pid + " tap0",
	} {
		real, ours := refuse(t, programs["slirp4netns"], strings.Fields(args)...), refuse(t, programs["usernet"], strings.Fields(args)...)
		if real.status != 1 || ours.status != 1 {
			t.Errorf("%s: status %d, slirp4netns's %d", args, ours.status, real.status)
		}
		for line := range strings.Lines(real.stderr) {
			line = strings.TrimRight(strings.TrimSpace(line), ".")
			if noise.MatchString(line) {
				continue
			}
			what, _, _ := strings.Cut(line, ": Cannot assign")
			if !strings.Contains(ours.stderr, what) {
				t.Errorf("%s: %q does not say %q", args, ours.stderr, what)
			}
		}
	}
}

// noise are lines of slirp4netns's that tell how it works, or the end of an end.
var noise = regexp.MustCompile(`^(sent|received) tapfd|^do_slirp|^child failed`)

func isHelp(text string) bool {
	return strings.Contains(text, "Usage: slirp4netns [OPTION]... PID|PATH") && strings.Contains(text, "\n--netns-type=TYPE")
}

// Help and version come by both names, on standard output, with status 0, and help has every option that slirp4netns's has.
func TestSlirpHelpAndVersion(t *testing.T) {
	programs := slirps(t)
	real := refuse(t, programs["slirp4netns"], "--help")
	version := regexp.MustCompile(`^slirp4netns version \S+\ncommit: \S+\nlibslirp: \S+\nSLIRP_CONFIG_VERSION_MAX: (\d+)\nlibseccomp: \S+\n$`)
	for _, call := range [][]string{{programs["usernet"]}, {binary, "slirp4netns"}} {
		help := refuse(t, call[0], append(call[1:], "1", "--help", "--nonsense")...)
		if help.status != 0 || help.stderr != "" || !isHelp(help.stdout) {
			t.Errorf("%v --help: %+v", call, help)
		}
		for _, option := range regexp.MustCompile(`(?m)^(-., )?--[a-z0-9-]+`).FindAllString(real.stdout, -1) {
			if !strings.Contains(help.stdout, "\n"+option) {
				t.Errorf("%v --help lacks %q", call, option)
			}
		}
		is := refuse(t, call[0], append(call[1:], "-v")...)
		if m := version.FindStringSubmatch(is.stdout); is.status != 0 || is.stderr != "" || m == nil || m[1] < "3" {
			t.Errorf("%v -v: %+v", call, is)
		}
	}
	if !version.MatchString(refuse(t, programs["slirp4netns"], "-v").stdout) {
		t.Error("slirp4netns's own version has another form: this test looks for the wrong one")
	}
}

// The lines at the start are slirp4netns's.
func TestSlirpBanner(t *testing.T) {
	programs := slirps(t)
	for _, flags := range []string{
		"-c", "-c --mtu=65520 --disable-host-loopback --cidr=10.9.0.0/17", "--mtu 1400 -a " + socketPath(t), "-c --cidr=172.16.0.0/12 --disable-dns",
	} {
		text := map[string]string{}
		for name, program := range programs {
			c := newContainer(t)
			s := lab.home.startSlirp(t, program, append(strings.Fields(flags), strconv.Itoa(c.pid), "tap0")...)
			s.hangUp(t)
			text[name] = s.stdout.String()
		}
		if text["slirp4netns"] != text["usernet"] || !strings.HasPrefix(text["usernet"], "Starting slirp\n") {
			t.Errorf("%s:\nslirp4netns says\n%s\nusernet says\n%s", flags, text["slirp4netns"], text["usernet"])
		}
	}
}

// make install puts the link beside the binary, make uninstall removes both, and neither touches a slirp4netns of somebody else's.
func TestMakeInstall(t *testing.T) {
	if !realRoot {
		return // the source may be where only root gets to
	}
	needs(t, "make", "install")
	dir := t.TempDir()
	bin := filepath.Join(dir, "usr/bin")
	line := func(target string) []string {
		return []string{"make", "--no-print-directory", "-C", "..", "-o", "build", target, "BIN=" + binary, "DESTDIR=" + dir, "PREFIX=/usr"}
	}
	for range 2 { // over itself, too
		lab.root.must(t, line("install")...)
		if to, err := os.Readlink(filepath.Join(bin, "slirp4netns")); err != nil || to != "usernet" {
			t.Errorf("the link leads to %q, %v", to, err)
		}
		if got := refuse(t, filepath.Join(bin, "slirp4netns"), "--help"); got.status != 0 || !isHelp(got.stdout) {
			t.Errorf("what is installed: %+v", got)
		}
	}
	lab.root.must(t, line("uninstall")...)
	if left, err := os.ReadDir(bin); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	theirs := filepath.Join(bin, "slirp4netns")
	writeFile(t, theirs, "theirs")
	if out, status := lab.root.run(t, line("install")...); status == 0 || !strings.Contains(out, "is no link to usernet") || isThere(filepath.Join(bin, "usernet")) {
		t.Errorf("beside another slirp4netns: status %d, %s", status, out)
	}
	lab.root.must(t, line("uninstall")...)
	if text, err := os.ReadFile(theirs); err != nil || string(text) != "theirs" {
		t.Errorf("somebody else's is %q, %v", text, err)
	}
}
