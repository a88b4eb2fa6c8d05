package e2e

import (
	"strings"
	"testing"
	"time"
)

func TestPing(t *testing.T) {
	needs(t, "ping")
	c := connected(t)
	for _, target := range []string{gateway4, gateway6, outsideAddr4, outsideAddr6, farAddr4} {
		t.Run(target, func(t *testing.T) {
			c.must(t, "ping", "-c", "2", "-i", "0.2", "-W", "10", target)
		})
	}
	t.Run("large", func(t *testing.T) {
		c.must(t, "ping", "-c", "1", "-W", "10", "-s", "20000", outsideAddr4)
		c.must(t, "ping", "-c", "1", "-W", "10", "-s", "20000", outsideAddr6)
	})
}

// A dead address stays silent: the answer is not made up on the way.
func TestPingDead(t *testing.T) {
	needs(t, "ping")
	c := connected(t)
	for _, target := range []string{deadAddr4, deadAddr6} {
		out, code := c.run(t, "ping", "-c", "1", "-W", "2", target)
		if code != 1 || !strings.Contains(out, "1 packets transmitted, 0 received, 100% packet loss") || strings.Contains(out, "errors") {
			t.Errorf("ping %s: status %d, want 1 and silence:\n%s", target, code, out)
		}
	}
}

// An unreachable address says so.
func TestPingUnreachable(t *testing.T) {
	needs(t, "ping")
	c := connected(t)
	for target, want := range map[string]string{badAddr4: "Destination Host Unreachable", badAddr6: "No route"} {
		out, code := c.run(t, "ping", "-c", "1", "-W", "10", target)
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("ping %s: status %d, want 1 and %q:\n%s", target, code, want, out)
		}
	}
}

// Where the host forbids ping sockets the container is told, and the log has the remedy, once.
func TestPingForbidden(t *testing.T) {
	needs(t, "ping")
	c := newContainer(t)
	if err := sysctl(lab.host, "ipv4/ping_group_range", "1 0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sysctl(lab.host, "ipv4/ping_group_range", "0 0"); err != nil {
			t.Error(err)
		}
	})
	u := attach(t, c)
	c.must(t, "ping", "-c", "1", "-W", "10", gateway4) // it always answers
	for target, want := range map[string]string{outsideAddr4: "Packet filtered", outsideAddr6: "Administratively prohibited"} {
		out, code := c.run(t, "ping", "-c", "2", "-i", "0.2", "-W", "10", target)
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("ping %s: status %d, want 1 and %q:\n%s", target, code, want, out)
		}
	}
	if n := strings.Count(u.out.String(), "ping_group_range"); n != 1 {
		t.Errorf("the log names ping_group_range %d times, want once", n)
	}
}

// traceroute -U finds the hops, by the errors that the host's UDP sockets queue.
func TestTraceroute(t *testing.T) {
	needs(t, "traceroute")
	c := connected(t)
	start := time.Now()
	out := c.must(t, "traceroute", "-n", "-U", "-w", "3", "-q", "1", "-N", "1", "-m", "6", farAddr4)
	t.Logf("%v\n%s", time.Since(start), out)
	near := strings.Index(out, outsideAddr4)
	far := strings.LastIndex(out, farAddr4)
	if near < 0 || far < near {
		t.Errorf("want %s and then %s among the hops", outsideAddr4, farAddr4)
	}
}
