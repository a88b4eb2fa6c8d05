package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// connected is a container with usernet attached.
func connected(t testing.TB, flags ...string) *container {
	t.Helper()
	c := newContainer(t)
	attach(t, c, flags...)
	return c
}

// families are the two ways to reach the outside.
var families = []struct {
	name, flag, outside, gateway string
}{
	{"IPv4", "-4", outsideAddr4, gateway4},
	{"IPv6", "-6", outsideAddr6, gateway6},
}

func TestCurl(t *testing.T) {
	needs(t, "curl")
	serveDNS(t, outsideAddr4)
	c := connected(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			url := lab.outside.serveHTTP(t, net.JoinHostPort(f.outside, "0"), files())
			if got := c.must(t, "curl", "-sS", "--http1.1", url+"/peer"); !strings.Contains(got, hostAddr4) && !strings.Contains(got, hostAddr6) {
				t.Errorf("the server saw %q, want an address of the host", got)
			}
		})
		t.Run(f.name+" by name", func(t *testing.T) {
			lab.outside.serveHTTP(t, map[string]string{"-4": "198.51.100.9:80", "-6": "[2001:db8:1::9]:80"}[f.flag], files())
			if got := c.must(t, "curl", "-sS", f.flag, "http://web.test/5"); got != string(pattern[:5]) {
				t.Errorf("got %q, want the first 5 octets of the pattern", got)
			}
		})
	}
}

// A GiB each way arrives as it was sent.
func TestGiB(t *testing.T) {
	needs(t, "curl", "sha256sum")
	const size = 1 << 30
	want := patternHash(size)
	c := connected(t)
	url := lab.outside.serveHTTP(t, outsideAddr4+":0", files())
	t.Run("download", func(t *testing.T) {
		got := c.sh(t, fmt.Sprintf("curl -sS %s/%d | sha256sum", url, size))
		if !strings.HasPrefix(got, want+" ") {
			t.Errorf("hash %s, want %s", got, want)
		}
	})
	t.Run("upload", func(t *testing.T) {
		got := c.sh(t, fmt.Sprintf("%s | curl -sS -T - %s/", strings.Join(helper("pattern", strconv.Itoa(size)), " "), url))
		if got != fmt.Sprintf("%d %s\n", size, want) {
			t.Errorf("the server got %s, want %d %s", got, size, want)
		}
	})
	t.Run("at mtu 1500", func(t *testing.T) {
		const size = 256 << 20
		c := connected(t, "--mtu", "1500")
		if got := c.sh(t, fmt.Sprintf("curl -sS %s/%d | sha256sum", url, size)); !strings.HasPrefix(got, patternHash(size)+" ") {
			t.Errorf("download: hash %s, want %s", got, patternHash(size))
		}
		got := c.sh(t, fmt.Sprintf("%s | curl -sS -T - %s/", strings.Join(helper("pattern", strconv.Itoa(size)), " "), url))
		if got != fmt.Sprintf("%d %s\n", size, patternHash(size)) {
			t.Errorf("upload: the server got %s, want %d %s", got, size, patternHash(size))
		}
	})
}

func TestIperf3(t *testing.T) {
	needs(t, "iperf3")
	c := connected(t)
	for _, test := range []struct {
		name string
		args []string
	}{
		{"8 streams up", []string{"-P", "8"}},
		{"8 streams down", []string{"-P", "8", "-R"}},
		{"datagrams up", []string{"-u", "-b", "50M"}},
		{"datagrams down", []string{"-u", "-b", "50M", "-R"}},
		{"8 streams up IPv6", []string{"-P", "8", "-6"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			target := outsideAddr4
			if test.args[len(test.args)-1] == "-6" {
				target = outsideAddr6
			}
			server := where{place: lab.outside}.start(t, nil, "iperf3", "-s", "-1", "--forceflush")
			server.has(t, "Server listening")
			out := c.must(t, append([]string{"iperf3", "-c", target, "-t", "2", "--json"}, test.args...)...)
			var result struct {
				End struct {
					SumReceived struct {
						BitsPerSecond float64 `json:"bits_per_second"`
					} `json:"sum_received"`
					Sum struct {
						Packets, LostPackets int
						LostPercent          float64 `json:"lost_percent"`
					}
				}
			}
			unmarshal(t, out, &result)
			if test.args[0] == "-u" {
				t.Logf("%.2f %% lost of %d", result.End.Sum.LostPercent, result.End.Sum.Packets)
				if result.End.Sum.Packets == 0 || result.End.Sum.LostPercent > 50 {
					t.Errorf("%d datagrams, %.1f %% lost", result.End.Sum.Packets, result.End.Sum.LostPercent)
				}
				return
			}
			t.Logf("%.2f Gbit/s", result.End.SumReceived.BitsPerSecond/1e9)
			if result.End.SumReceived.BitsPerSecond == 0 {
				t.Error("nothing was received")
			}
		})
	}
}

// nc -N ends its sending side when its input ends; what the other side says afterwards must still arrive.
func TestHalfCloseNetcat(t *testing.T) {
	needs(t, "nc", "socat")
	c := connected(t)
	server := func(t *testing.T, script string) {
		p := where{place: lab.outside}.start(t, nil, "socat", "-d", "-d", "TCP4-LISTEN:7000,bind="+outsideAddr4+",reuseaddr", "SYSTEM:"+script)
		p.has(t, "listening on")
	}
	t.Run("container first", func(t *testing.T) {
		// The server answers only once it has seen the end.
		server(t, "wc -c")
		if got := c.sh(t, "head -c 300000 /dev/zero | nc -N "+outsideAddr4+" 7000"); strings.TrimSpace(got) != "300000" {
			t.Errorf("the server counted %q, want 300000", got)
		}
	})
	t.Run("server first", func(t *testing.T) {
		l := lab.outside.listen(t, outsideAddr4+":0")
		got := make(chan string, 1)
		go func() {
			conn, err := l.Accept()
			if err != nil {
				got <- err.Error()
				return
			}
			defer conn.Close()
			fmt.Fprint(conn, "over to you")
			conn.(*net.TCPConn).CloseWrite()
			b := make([]byte, 64)
			n := 0
			for err == nil && n < len(b) {
				var m int
				m, err = conn.Read(b[n:])
				n += m
			}
			got <- string(b[:n])
		}()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		// cat ends at the server's FIN, and only then the client speaks.
		c.sh(t, "socat -t 30 TCP4:"+outsideAddr4+":"+port+" SYSTEM:'cat >/dev/null; printf answer'")
		if s := <-got; s != "answer" {
			t.Errorf("the server got %q after its FIN, want %q", s, "answer")
		}
	})
}

func TestOpenSSL(t *testing.T) {
	needs(t, "openssl")
	c := connected(t)
	dir := t.TempDir()
	key, cert := filepath.Join(dir, "key.pem"), filepath.Join(dir, "cert.pem")
	lab.root.must(t, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
		"-keyout", key, "-out", cert, "-days", "1", "-subj", "/CN=server.test", "-addext", "subjectAltName=DNS:server.test")
	server := where{place: lab.outside}.start(t, nil, "openssl", "s_server", "-accept", outsideAddr4+":4433", "-key", key, "-cert", cert, "-rev")
	server.has(t, "ACCEPT")
	out := c.sh(t, "printf 'tamatoa\\nCLOSE\\n' | openssl s_client -connect "+outsideAddr4+":4433 -CAfile "+cert+" -verify_hostname server.test -verify_return_error -quiet 2>&1")
	if !strings.Contains(out, "aotamat") {
		t.Errorf("openssl s_client got %q, want the line reversed", out)
	}
}

func TestGitClone(t *testing.T) {
	needs(t, "git")
	c := connected(t)
	dir := t.TempDir()
	lab.root.sh(t, "cd "+dir+` && git init -q origin && cd origin &&
		for i in 1 2 3 4 5; do head -c 300000 /dev/urandom >file$i; git add file$i
		git -c user.name=n -c user.email=e@test commit -q -m "commit $i"; done`)
	libexec := strings.TrimSpace(lab.root.must(t, "git", "--exec-path"))
	daemon := where{place: lab.outside}.start(t, nil, filepath.Join(libexec, "git-daemon"), "--verbose", "--log-destination=stderr", "--export-all", "--reuseaddr",
		"--listen="+outsideAddr4, "--base-path="+dir)
	daemon.has(t, "Ready to rumble")
	c.must(t, "git", "clone", "-q", "git://"+outsideAddr4+"/origin", filepath.Join(dir, "clone"))
	if out, err := exec.Command("diff", "-r", "-x", ".git", filepath.Join(dir, "origin"), filepath.Join(dir, "clone")).CombinedOutput(); err != nil {
		t.Errorf("the clone differs: %v: %s", err, out)
	}
}

// A connection that is silent for a while stays; the packages test minutes in virtual time.
func TestLongPoll(t *testing.T) {
	needs(t, "curl")
	c := connected(t)
	url := lab.outside.serveHTTP(t, outsideAddr4+":0", files())
	if got := c.must(t, "curl", "-sSN", url+"/slow?for=4s"); got != "first\nlast\n" {
		t.Errorf("got %q", got)
	}
}

// The capture of a ping is what tcpdump reads.
func TestPcap(t *testing.T) {
	needs(t, "tcpdump", "ping")
	file := filepath.Join(t.TempDir(), "tap.pcapng")
	c := newContainer(t)
	u := attach(t, c, "--pcap", file)
	c.must(t, "ping", "-c", "1", "-W", "10", gateway4)
	u.end(t)
	if info, err := os.Stat(file); err != nil || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("the capture is %v, %v; it shows what the container says, so others must not read it", info, err)
	}
	// By standard input: tcpdump may become a user who cannot open the file.
	out := lab.home.sh(t, "tcpdump -n -r - icmp <"+file)
	for _, want := range []string{container4 + " > " + gateway4 + ": ICMP echo request", gateway4 + " > " + container4 + ": ICMP echo reply"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in what tcpdump reads:\n%s", want, out)
		}
	}
}
