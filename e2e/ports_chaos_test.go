package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// visible is a publisher whose files can be counted by whoever runs the tests, with at least files of them
// where root may grant so many.
func visible(t testing.TB, files int, flags ...string) *publisher {
	t.Helper()
	p := &publisher{c: newContainer(t), socket: socketPath(t)}
	from := lab.root
	if files > fileLimit(t) && mayRaise() {
		from = withFiles(from, files)
	}
	p.usernet = from.begin(t, append(append([]string{"--log-level", "info", "--pprof", "--api-socket", p.socket}, flags...), strconv.Itoa(p.c.pid))...)
	t.Cleanup(func() {
		if !t.Failed() {
			p.end(t)
		}
	})
	return p
}

// withFiles is where a process has so many files at most.
func withFiles(w where, files int) where {
	w.prefix = append(append([]string{}, w.prefix...), "prlimit", fmt.Sprintf("--nofile=%d:%[1]d", files))
	return w
}

// mayRaise tells whether we may have more files than the limit (CAP_SYS_RESOURCE of the machine itself).
func mayRaise() bool {
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) != nil || r.Max == unix.RLIM_INFINITY {
		return false
	}
	more := unix.Rlimit{Cur: r.Cur, Max: r.Max + 1}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &more) != nil {
		return false
	}
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &r) == nil
}

// echoIn starts a server of its own process in the container.
func echoIn(t testing.TB, c *container, addr string) *process {
	t.Helper()
	server := c.start(t, nil, helper("echo", addr)...)
	server.has(t, "listening")
	return server
}

// crowd has n clients connect at once from outside. done releases them and returns how many still carried.
func crowd(t testing.TB, to string, n int) (served, reset, failed int, done func() int) {
	t.Helper()
	var in io.WriteCloser
	p := where{place: lab.outside}.start(t, func(cmd *exec.Cmd) {
		var err error
		if in, err = cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
	}, helper("crowd", to, strconv.Itoa(n))...)
	p.has(t, "served")
	if _, err := fmt.Sscanf(p.out.String(), "served %d reset %d failed %d", &served, &reset, &failed); err != nil {
		t.Fatalf("%v: %s", err, p.out)
	}
	t.Log(strings.TrimSpace(p.out.String()))
	return served, reset, failed, func() int {
		t.Helper()
		in.Close()
		p.has(t, "alive")
		_, text, _ := strings.Cut(p.out.String(), "alive ")
		alive, _ := strconv.Atoi(strings.TrimSpace(text))
		p.wait(t)
		return alive
	}
}

// goroutines counts those of usernet.
func (p *publisher) goroutines(t testing.TB) (n int) {
	t.Helper()
	text := p.get(t, "/v1/usernet/debug/pprof/goroutine?debug=1")
	if _, err := fmt.Sscanf(text, "goroutine profile: total %d", &n); err != nil {
		t.Fatalf("%v: %s", err, tail(text))
	}
	return n
}

func (p *publisher) rss(t testing.TB) int {
	t.Helper()
	n, err := strconv.Atoi(strings.Fields(p.status(t, "VmRSS"))[0])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A server that dies and returns takes its own connections with it and nothing else.
func TestPortsServerDies(t *testing.T) {
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "8080:8080", "-p", "8081:8081")
			echoIn(t, p.c, ":8081")
			other := lab.outside.connect(t, "tcp", hostAddr4+":8081")
			for range 3 {
				server := echoIn(t, p.c, ":8080")
				conn := lab.outside.connect(t, "tcp", hostAddr4+":8080")
				if err := ping(conn); err != nil {
					t.Fatal(err)
				}
				server.kill(t)
				if n, err := conn.Read(make([]byte, 1)); n != 0 || err != io.EOF && !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the connection of a server that has died: %d octets, %v", n, err)
				}
				conn.Close()
				if err := resets(lab.outside, hostAddr4+":8080"); err != nil {
					t.Errorf("while the server is away: %v", err)
				}
				if err := ping(other); err != nil {
					t.Fatalf("another server's connection: %v", err)
				}
			}
			other.Close()
			p.idle(t)
		})
	}
}

// kill ends the processes of a group that nsenter began: the signal must reach what it has become.
func (p *process) kill(t testing.TB) {
	t.Helper()
	if err := syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.wait(t)
}

// With the container ends usernet, at once, and what is connected is reset.
func TestPortsContainerEnds(t *testing.T) {
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			c := newContainer(t)
			u := begin(t, "--api-socket", socketPath(t), "--port-path", path, "-p", "8080:8080", strconv.Itoa(c.pid))
			echoIn(t, c, ":8080")
			var conns []net.Conn
			for i := range 50 {
				conn := lab.outside.connect(t, "tcp", []string{hostAddr4 + ":8080", "[" + hostAddr6 + "]:8080"}[i%2])
				if err := ping(conn); err != nil {
					t.Fatal(err)
				}
				conns = append(conns, conn)
			}
			syscall.Kill(c.pid, syscall.SIGKILL)
			endsWell(t, u)
			for _, conn := range conns {
				if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("a client of a container that has ended: %v, want ECONNRESET", err)
				}
			}
			if _, err := lab.outside.dial("tcp", hostAddr4+":8080"); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("dial afterwards: %v, want ECONNREFUSED", err)
			}
		})
	}
}

// Thousands connect at once: as many as there are files for are served, the others are reset, and nobody is left to wait.
// Nothing of them stays.
func TestPortsCrowd(t *testing.T) {
	needs(t, "curl", "prlimit")
	most := 5000
	if raceDetector {
		most = 1000 // each takes it ten times as long
	}
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := visible(t, 65536, "--port-path", path, "-p", "8080:8080", "-p", "8081:8081")
			echoIn(t, p.c, ":8080")
			p.c.net.serveTCP(t, ":8081", echo)
			rest := func() (files, routines, heap int) {
				if err := errors.Join(reaches(lab.outside, hostPort(8080)), reaches(lab.outside, hostPort(8081))); err != nil {
					t.Errorf("at rest: %v", err)
				}
				p.idle(t)
				return p.fds(t), p.goroutines(t), p.heap(t)
			}
			rest() // what is made once
			files, routines, _ := rest()
			heap := 0
			for round := range 2 {
				places := p.info(t).Ports.MaxConnections
				places -= places / 8 // which are kept for other forwards
				clients := min(most, fileLimit(t)-200)
				served, reset, failed, done := crowd(t, hostAddr4+":8080", clients)
				if served < min(clients, places) || served+reset != clients || failed != 0 {
					t.Errorf("round %d: of %d clients %d were served and %d reset, with %d places", round, clients, served, reset, places)
				}
				peak := p.rss(t)
				if err := reaches(lab.outside, hostPort(8081)); err != nil {
					t.Errorf("the other forward: %v", err)
				}
				if alive := done(); alive != served {
					t.Errorf("round %d: %d of %d connections still carry", round, alive, served)
				}
				// Up to 48 sockets of each of four kinds lie ready, whenever they were asked for.
				eventually(t, "the files are closed and the goroutines have ended", func() bool {
					f, r, h := rest()
					if round == 0 {
						heap = h
					}
					return f <= files+4*48 && r <= routines+8 && h <= heap+2<<20
				})
				f, r, h := rest()
				t.Logf("files %d, then %d; goroutines %d, then %d; heap %d KiB, then %d; resident %d KiB, then %d",
					files, f, routines, r, heap>>10, h>>10, peak, p.rss(t))
			}
		})
	}
}

// heap is what usernet's memory holds after a collection, in octets.
func (p *publisher) heap(t testing.TB) (n int) {
	t.Helper()
	text := p.get(t, "/v1/usernet/debug/pprof/heap?gc=1&debug=1")
	_, after, _ := strings.Cut(text, "# HeapAlloc = ")
	if _, err := fmt.Sscanf(after, "%d", &n); err != nil {
		t.Fatalf("%v: %s", err, tail(text))
	}
	return n
}

// fileLimit is how many files a process of the tests may have.
func fileLimit(t testing.TB) int {
	t.Helper()
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		t.Fatal(err)
	}
	return int(min(r.Max, 1<<20))
}

// With hardly a file to its name usernet makes clients wait, or resets them, and goes on as soon as there are files again.
func TestPortsNoFiles(t *testing.T) {
	needs(t, "prlimit")
	const clients = 300
	for _, path := range portPaths {
		for _, files := range []int{64, 200} {
			t.Run(fmt.Sprintf("%s %d", path, files), func(t *testing.T) {
				p := &publisher{c: newContainer(t), socket: socketPath(t)}
				p.usernet = withFiles(lab.home, files).begin(t, "--api-socket", p.socket, "--port-path", path,
					"-p", "8080:8080", "-p", "8081:8080/tcp4", strconv.Itoa(p.c.pid))
				p.c.net.serveTCP(t, ":8080", echo)
				server := lab.outside.serveTCP(t, outsideAddr4+":0", echo)
				for range 2 {
					var conns []net.Conn
					for range clients {
						if conn, err := lab.outside.dial("tcp", hostAddr4+":8080"); err == nil { // else it was reset at once
							conn.Write([]byte("x"))
							conns = append(conns, conn)
						}
					}
					// The first of them is served, and the last of them is not: it was reset, or nobody has heard it.
					served, last := 0, time.Now().Add(time.Second)
					for _, conn := range conns {
						conn.SetReadDeadline(last)
						if n, _ := conn.Read(make([]byte, 1)); n == 1 {
							served++
						}
					}
					t.Logf("%d of %d clients are served", served, clients)
					if served == 0 || served == clients {
						t.Errorf("%d of %d clients are served: they should be some", served, clients)
					}
					for _, conn := range conns {
						conn.Close()
					}
					for _, port := range []uint16{8080, 8081} {
						eventually(t, "clients are served again", func() bool { return reaches(lab.outside, hostPort(port)) == nil })
					}
					eventually(t, "the container reaches the outside again", func() bool { return reaches(p.c.net, server) == nil })
					p.idle(t)
				}
				if strings.Contains(p.out.String(), "level=ERROR") {
					t.Error("an error is in the log")
				}
				p.end(t)
			})
		}
	}
}

// A limit that is reached all of a sudden ends no listener: clients wait, and are served once there are files again.
func TestPortsFilesRunOut(t *testing.T) {
	for _, path := range portPaths {
		t.Run(path, func(t *testing.T) {
			p := publish(t, "--port-path", path, "-p", "8080:8080", "-p", "8081:8080")
			p.c.net.serveTCP(t, ":8080", echo)
			if err := reaches(lab.outside, hostPort(8080)); err != nil {
				t.Fatal(err)
			}
			limit := func(soft uint64) (was uint64) {
				t.Helper()
				var l unix.Rlimit
				if err := unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_NOFILE, nil, &l); err != nil {
					t.Fatal(err)
				}
				was, l.Cur = l.Cur, soft
				if err := unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_NOFILE, &l, nil); err != nil {
					t.Fatal(err)
				}
				return was
			}
			for range 2 {
				was := limit(8)
				var conns []net.Conn
				for i := range 40 {
					conn := lab.outside.connect(t, "tcp", hostPort(uint16(8080+i%2)).String())
					if _, err := conn.Write([]byte("x")); err != nil {
						t.Fatal(err)
					}
					conns = append(conns, conn)
				}
				// The first of each port may have a file that was free still; nobody is reset.
				conns[39].SetReadDeadline(time.Now().Add(200 * time.Millisecond))
				if n, err := conns[39].Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("without files: %d octets, %v; want a wait", n, err)
				}
				limit(was)
				for i, conn := range conns {
					conn.SetReadDeadline(time.Now().Add(patience))
					if n, err := conn.Read(make([]byte, 1)); n != 1 {
						t.Errorf("client %d: %d octets, %v", i, n, err)
					}
					conn.Close()
				}
				p.idle(t)
			}
		})
	}
}

// Ten thousand ports, or as many as there are files for, are published by one request and listed by another; none is lost.
func TestPortsMany(t *testing.T) {
	needs(t, "prlimit", "curl")
	p := visible(t, 65536)
	p.c.net.serveTCP(t, ":8080", tellPeer)
	n := min(10000, p.info(t).Ports.MaxForwards-1)
	last := 20000 + n - 1
	start := time.Now()
	p.mustAsk(t, "port", "add", fmt.Sprintf("%s:20000-%d:30000-%d", hostAddr4, last, 30000+n-1))
	added := time.Since(start)
	start = time.Now()
	all := p.list(t)
	t.Logf("%d ports are added in %v and listed in %v; %d KiB", n, added, time.Since(start), p.rss(t))
	if len(all) != n {
		t.Fatalf("%d forwards, want %d", len(all), n)
	}
	for i, f := range all {
		if f.ID != i+1 || int(f.HostPort) != 20000+i || int(f.ContainerPort) != 30000+i {
			t.Fatalf("the forward at %d is %+v", i, f)
		}
	}
	for _, i := range []int{0, n / 2, n - 1} {
		p.c.net.serveTCP(t, fmt.Sprintf(":%d", 30000+i), tellPeer)
		if seen, own, err := peerSeen(lab.outside, hostPort(uint16(20000+i)).String()); err != nil || seen != own {
			t.Errorf("port %d: the server sees %v of %v, %v", 20000+i, seen, own, err)
		}
	}
	// One too many, with its remedy.
	if limit := p.info(t).Ports.MaxForwards; n == limit-1 {
		p.add(t, hostAddr4+":19998:80")
		out, code := p.ask(t, "port", "add", hostAddr4+":19999:80")
		if code == 0 {
			t.Error("more ports are published than may be")
		}
		saysAll(t, out, "ulimit -n")
	}
	ids := []string{"port", "remove"}
	for i := range 1000 {
		ids = append(ids, strconv.Itoa(i+1))
	}
	p.mustAsk(t, ids...)
	if all := p.list(t); len(all) < n-1000 || all[0].ID != 1001 {
		t.Errorf("%d forwards are left, from %d on", len(all), all[0].ID)
	}
}

// Where the helper in the namespace is killed its clients are served by the stack, under their own address; of servers on the
// container's loopback it is said that they are not reached.
func TestPortsHelperKilled(t *testing.T) {
	if raceDetector {
		return // it needs cgo, with which there is no sandbox that keeps another helper from being started
	}
	p := publish(t, "-p", "8080:8080", "-p", "8081:8081", "-p", "9053:9053/udp")
	p.c.net.serveTCP(t, ":8080", tellPeer)
	p.c.net.serveTCP(t, "127.0.0.1:8081", tellPeer)
	if seen := servedAs(t, 8081); seen.String() != outsideAddr4 {
		t.Errorf("before, the server on the loopback sees %v", seen)
	}
	children := childrenOf(p.info(t).PID)
	if len(children) != 1 {
		t.Fatalf("usernet has the children %v, want its helper", children)
	}
	if err := syscall.Kill(children[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the loss is told of", func() bool {
		if seen := servedAs(t, 8080); seen.String() != outsideAddr4 {
			t.Errorf("the server sees %v", seen)
		}
		i := p.info(t).Ports
		return i.IPv4.Path == "stack" && !i.IPv4.Loopback && strings.Contains(i.IPv4.WhyNotKernel, "start usernet again")
	})
	eventually(t, "what was made ahead is used up", func() bool { return resets(lab.outside, hostAddr4+":8081") == nil })
	for _, f := range p.list(t) {
		if !strings.Contains(f.Note, "the container's loopback alone is not reached") {
			t.Errorf("port %d: note %q", f.HostPort, f.Note)
		}
	}
	// Nobody is left who could put the container's routing back, which is an error that says so.
	p.signal(t, syscall.SIGTERM)
	if code := p.wait(t); code != 1 || !strings.Contains(p.out.String(), "may be left in the namespace") {
		t.Errorf("usernet ended with status %d", code)
	}
}
