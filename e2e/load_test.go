package e2e

import (
	"fmt"
	"io"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Ten thousand connections come and go, then a thousand stay idle and go: no file and no memory to speak of is left.
func TestNothingLeftOfManyConnections(t *testing.T) {
	server := lab.outside.serveTCP(t, outsideAddr4+":0", echo)
	c := newContainer(t)
	// By who may look at its files afterwards: a sandboxed process of home's shows them to the machine's root alone.
	u := lab.root.begin(t, "--log-level", "info", strconv.Itoa(c.pid))
	t.Cleanup(func() { u.end(t) })
	measure := func(when string) (fds, rss int) {
		fds = u.fds(t)
		rss, err := strconv.Atoi(strings.Fields(u.status(t, "VmRSS"))[0])
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%-24s %5d files %7d KiB %3s threads", when, fds, rss, u.status(t, "Threads"))
		return fds, rss
	}
	if err := reaches(c.net, server); err != nil {
		t.Fatal(err)
	}
	filesAtFirst, _ := measure("at first")

	start := time.Now()
	c.must(t, helper("churn", server.String(), "10000")...)
	took := time.Since(start)
	_, _ = measure(fmt.Sprintf("after 10000 in %.1fs", took.Seconds()))

	var in io.WriteCloser
	idle := c.start(t, func(cmd *exec.Cmd) {
		var err error
		if in, err = cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
	}, helper("idle", server.String(), "1000")...)
	idle.has(t, "open")
	filesIdle, rssIdle := measure("1000 idle")
	if filesIdle < 1000 {
		t.Errorf("%d files with 1000 connections: the measure is wrong", filesIdle)
	}
	in.Close()
	if code := idle.wait(t); code != 0 || !strings.Contains(idle.out.String(), "alive") {
		t.Errorf("the idle connections ended with %d, %q", code, idle.out)
	}
	eventually(t, "the files of the connections are closed", func() bool { return u.fds(t) <= filesAtFirst+8 })
	// A second round must not need more than the first did: what grows by the round is a leak. It is smaller, because half of
	// the ephemeral ports are in TIME-WAIT by now, and a kernel that has used up the odd ones searches long.
	c.must(t, helper("churn", server.String(), "2500")...)
	eventually(t, "the files of the second round are closed", func() bool { return u.fds(t) <= filesAtFirst+8 })
	// The race detector keeps a shadow of each octet that was ever used, so that its memory says nothing.
	if _, rss := measure("after 2500 more"); rss > 2*rssIdle && !raceDetector {
		t.Errorf("%d KiB after a second round, %d at the peak of the first", rss, rssIdle)
	}
}

// usernet ends as promptly in the midst of work, told so or because its namespace has gone.
func TestEndsUnderLoad(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, c *container, u *usernet){
		"SIGTERM":            func(t *testing.T, c *container, u *usernet) { u.signal(t, syscall.SIGTERM) },
		"the container ends": func(t *testing.T, c *container, u *usernet) { syscall.Kill(c.pid, syscall.SIGKILL) },
	} {
		t.Run(name, func(t *testing.T) {
			var served atomic.Int32
			server := lab.outside.serveTCP(t, outsideAddr4+":0", func(conn *net.TCPConn) {
				served.Add(1)
				echo(conn)
			})
			c := newContainer(t)
			u := begin(t, strconv.Itoa(c.pid))
			c.start(t, nil, helper("churn", server.String(), "1000000")...)
			datagrams := c.net.connect(t, "udp", server.String())
			eventually(t, "connections come and go", func() bool {
				datagrams.Write(pattern[:1000])
				return served.Load() > 500
			})
			end(t, c, u)
			endsWell(t, u)
		})
	}
}
