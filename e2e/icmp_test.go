package e2e

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
		// More than one, because a router tells so only once a second (net.ipv4.route.error_cost).
		out, code := c.run(t, "ping", "-c", "3", "-W", "2", target)
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("ping %s: status %d, want 1 and %q:\n%s", target, code, want, out)
		}
	}
}

// Where the host forbids ping sockets the container is told, and the log has the remedy, once.
func TestPingForbidden(t *testing.T) {
	needs(t, "ping")
	// A new network namespace forbids them, and what the lab's host permits it cannot take back: that range would
	// need a group that its user namespace does not have.
	strict, err := newPlace("strict host", func() error { return unix.Unshare(unix.CLONE_NEWNET) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(strict.close)
	for _, step := range []string{
		"ip link set lo up",
		"ip link add world type veth peer name host0",
		"ip link set world up",
		"ip link set host0 up",
		"ip addr add 203.0.113.1/24 dev world",
		"ip addr add 2001:db8::1/64 dev world nodad",
		"ip route add default via 203.0.113.2",
		"ip route add default via 2001:db8::2",
	} {
		if out, err := at(strict, strings.Fields(step)...); err != nil {
			t.Fatalf("%s: %v: %s", step, err, out)
		}
	}
	c := newContainer(t)
	u := where{place: strict, prefix: lab.home.prefix}.begin(t, strconv.Itoa(c.pid))
	t.Cleanup(func() { u.end(t) })
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
