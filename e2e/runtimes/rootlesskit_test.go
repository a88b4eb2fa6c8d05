package runtimes

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// kits are the versions of rootlesskit that people have, and how they make the network.
var kits = []struct {
	name, program string
	flags         []string
}{
	{"1.1", kit1, nil},
	{"3", kit3, nil},
	{"3 with a detached network", kit3, []string{"--detach-netns"}},
}

// What rootlesskit is asked for is what the container has: the TAP is rootlesskit's, and with it the offloads are used.
func TestRootlesskitNetwork(t *testing.T) {
	lab := needLab(t)
	lab.outside.serve(t, "tcp", outsideAddr4+":8000")
	lab.outside.serve(t, "tcp", "["+outsideAddr6+"]:8000")
	lab.outside.serveEcho(t, outsideAddr4+":8001")
	for _, version := range kits {
		for _, c := range []struct {
			name    string
			flags   []string
			tap     string
			mtu     int
			network string // all but the last octet
		}{
			{name: "by default", tap: "tap0", mtu: 65520, network: "10.0.2."},
			{name: "all asked for", flags: []string{"--cidr=192.168.77.0/24", "--mtu=1400", "--ifname=eth7", "--ipv6"}, tap: "eth7", mtu: 1400, network: "192.168.77."},
		} {
			t.Run(version.name+"/"+c.name, func(t *testing.T) {
				k := startKit(t, lab, version.program, append(append([]string{"--disable-host-loopback"}, version.flags...), c.flags...)...)
				tap := k.tap(t, lab, c.tap)
				if d := tap.LinkInfo.Data; tap.MTU != c.mtu || !d.VnetHdr || d.MultiQueue || !d.Persist {
					t.Errorf("%+v: want MTU %d, a virtio-net header, one queue, persistent", tap, c.mtu)
				}
				if got := k.must(t, lab, "ip", "-4", "-oneline", "address", "show", c.tap); !strings.Contains(got, " "+c.network+"100/24 ") {
					t.Errorf("address: %s", got)
				}

				if got, err := k.inside.get("http://" + outsideAddr4 + ":8000/"); got != hostAddr4 {
					t.Errorf("outside sees a client at %q: %v", got, err)
				}
				if got, err := k.inside.askUDP(outsideAddr4+":8001", "hello "); !strings.HasPrefix(got, "hello "+hostAddr4+":") {
					t.Errorf("outside answers %q: %v", got, err)
				}
				if got := k.must(t, lab, "dig", "+short", "@"+c.network+"3", "outside.test", "A"); got != outsideAddr4 {
					t.Errorf("outside.test is at %q", got)
				}
				if len(version.flags) == 0 { // else its programs are in the host's network, and have its resolv.conf
					if got := k.must(t, lab, "getent", "ahostsv4", "outside.test"); !strings.HasPrefix(got, outsideAddr4) {
						t.Errorf("outside.test is at %q by resolv.conf", got)
					}
				}
				if strings.Contains(strings.Join(c.flags, " "), "--ipv6") {
					// By router advertisement: rootlesskit leaves IPv6 to the kernel.
					eventually(t, func() error {
						got, err := k.inside.get("http://[" + outsideAddr6 + "]:8000/")
						if err == nil && got != hostAddr6 {
							err = fmt.Errorf("outside sees a client at %q", got)
						}
						return err
					})
					if got := k.must(t, lab, "dig", "+short", "@fd00::3", "outside.test", "AAAA"); got != outsideAddr6 {
						t.Errorf("outside.test is at %q", got)
					}
				} else if got := k.must(t, lab, "ip", "-6", "-oneline", "address", "show", c.tap, "scope", "global"); got != "" {
					t.Errorf("without --ipv6: %s", got)
				}
			})
		}
	}
}

// Our own name works as well as slirp4netns's.
func TestRootlesskitWithUsernetByName(t *testing.T) {
	lab := needLab(t)
	lab.outside.serve(t, "tcp", outsideAddr4+":8000")
	for _, version := range kits {
		t.Run(version.name, func(t *testing.T) {
			k := beginKit(t, lab, version.program, "usernet", append([]string{"--disable-host-loopback", "--port-driver=slirp4netns"}, version.flags...)...)
			if got, err := k.inside.get("http://" + outsideAddr4 + ":8000/"); got != hostAddr4 {
				t.Errorf("outside sees a client at %q: %v", got, err)
			}
		})
	}
}

// slirp4netns opens the host's loopback unless it is told otherwise, and rootlesskit's users know it that way.
func TestRootlesskitHostLoopback(t *testing.T) {
	lab := needLab(t)
	lab.host.serve(t, "tcp", "127.0.0.1:8000")
	for _, version := range kits {
		t.Run(version.name, func(t *testing.T) {
			open := startKit(t, lab, version.program, version.flags...)
			if got, err := open.inside.get("http://10.0.2.2:8000/"); got != "127.0.0.1" {
				t.Errorf("open: the host sees a client at %q: %v", got, err)
			}
			shut := startKit(t, lab, version.program, append([]string{"--disable-host-loopback"}, version.flags...)...)
			if got, err := shut.inside.get("http://10.0.2.2:8000/"); err == nil {
				t.Errorf("shut: the host sees a client at %q", got)
			}
		})
	}
}

// Ports are published when rootlesskit starts and later, taken away, and published again, and their servers see who asks.
func TestRootlesskitPorts(t *testing.T) {
	lab := needLab(t)
	// Who the container's server sees: of TCP from outside, from the host by its address and by its loopback, of UDP from outside.
	type clients struct{ outside, host, loopback, udp string }
	byStack := clients{outsideAddr4, hostAddr4, "10.0.2.2", outsideAddr4}
	for _, version := range kits {
		for _, c := range []struct {
			driver string
			want   clients
		}{
			{"slirp4netns", byStack},
			// From within the container, whatever the client: unless it is the third version, which keeps the address.
			{"builtin", map[bool]clients{
				false: {"127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.1"},
				true:  {outsideAddr4, hostAddr4, "127.0.0.1", "127.0.0.1"},
			}[version.program == kit3]},
		} {
			t.Run(version.name+"/"+c.driver, func(t *testing.T) {
				k := startKit(t, lab, version.program, append([]string{"--disable-host-loopback", "--port-driver=" + c.driver, "--publish=0.0.0.0:8080:80/tcp"}, version.flags...)...)
				k.inside.serve(t, "tcp", "0.0.0.0:80")
				k.inside.serveEcho(t, "0.0.0.0:53")
				sees := func(from *place, address, want string) {
					t.Helper()
					if got, err := from.get("http://" + address + "/"); got != want {
						t.Errorf("from %s by %s the server sees %q, want %q: %v", from.name, address, got, want, err)
					}
				}
				// It starts the container's command before it has published.
				eventually(t, func() error {
					ports, err := k.ctl(lab, "list-ports", "--json")
					if err == nil && !strings.Contains(ports, `"id":1,`) {
						err = errors.New("nothing is published: " + ports)
					}
					return err
				})
				sees(lab.outside, hostAddr4+":8080", c.want.outside)
				sees(lab.host, hostAddr4+":8080", c.want.host)
				sees(lab.host, "127.0.0.1:8080", c.want.loopback)

				added := k.mustCtl(t, lab, "add-ports", "127.0.0.1:8081:80/tcp", "0.0.0.0:5353:53/udp")
				if added != "2\n3" {
					t.Fatalf("the numbers of the new ports: %q", added)
				}
				sees(lab.host, "127.0.0.1:8081", c.want.loopback)
				if err := lab.outside.refused(hostAddr4 + ":8081"); err != nil {
					t.Errorf("published on the loopback only: %v", err)
				}
				got, err := lab.outside.askUDP(hostAddr4+":5353", "hello ")
				if from, _, _ := strings.Cut(strings.TrimPrefix(got, "hello "), ":"); from != c.want.udp {
					t.Errorf("the server of UDP sees %q, want %q: %v", got, c.want.udp, err)
				}

				if list := k.mustCtl(t, lab, "list-ports", "--json"); strings.Count(list, `"id"`) != 3 || !strings.Contains(list, `"parentPort":5353`) {
					t.Errorf("list: %s", list)
				}
				k.mustCtl(t, lab, "remove-ports", "1", "2")
				for _, address := range []string{hostAddr4 + ":8080", "127.0.0.1:8081"} {
					if err := lab.host.refused(address); err != nil {
						t.Errorf("after it was removed: %v", err)
					}
				}
				if got := k.mustCtl(t, lab, "add-ports", "0.0.0.0:8080:80/tcp"); got != "4" {
					t.Errorf("the number of a port that comes back: %q", got)
				}
				sees(lab.outside, hostAddr4+":8080", c.want.outside)
			})
		}
	}
}

// Why a port cannot be published is said to the one who asked, with what helps.
func TestRootlesskitPortErrors(t *testing.T) {
	lab := needLab(t)
	lab.host.serve(t, "tcp", hostAddr4+":8082")
	for _, version := range kits {
		t.Run(version.name, func(t *testing.T) {
			k := startKit(t, lab, version.program, append([]string{"--disable-host-loopback", "--port-driver=slirp4netns"}, version.flags...)...)
			for spec, want := range map[string]string{
				hostAddr4 + ":8082:80/tcp":    "address already in use",
				outsideAddr4 + ":8083:80/tcp": "cannot assign requested address",
				"0.0.0.0:81:80/tcp":           "net.ipv4.ip_unprivileged_port_start=81",
			} {
				if out, err := k.ctl(lab, "add-ports", spec); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("add %s: %q %v, want %q", spec, out, err, want)
				}
			}
			if _, err := k.ctl(lab, "remove-ports", "7"); err == nil {
				t.Error("a port that is not there was removed")
			}
			if got := k.mustCtl(t, lab, "add-ports", "0.0.0.0:8084:80/tcp"); got == "" {
				t.Error("no number after errors")
			}
		})
	}
}

// With rootlesskit's sandbox and seccomp asked for, and without, usernet has no more rights than forwarding takes.
func TestRootlesskitSandbox(t *testing.T) {
	lab := needLab(t)
	lab.outside.serve(t, "tcp", outsideAddr4+":8000")
	for _, version := range kits {
		for _, setting := range []string{"true", "auto", "false"} {
			t.Run(version.name+"/"+setting, func(t *testing.T) {
				sandbox := setting
				if len(version.flags) > 0 && setting == "true" {
					sandbox = "auto" // it refuses to ask for it with a detached network
				}
				k := startKit(t, lab, version.program, append([]string{"--slirp4netns-sandbox=" + sandbox, "--slirp4netns-seccomp=" + setting, "--port-driver=slirp4netns"}, version.flags...)...)
				const bindService = 1 << 10
				for _, p := range k.nets {
					if got := lab.statusOf(t, p.pid, "NoNewPrivs"); got != "1" {
						t.Errorf("process %s: NoNewPrivs %s", p.pid, got)
					}
					if got := lab.statusOf(t, p.pid, "Seccomp"); got != "2" {
						t.Errorf("process %s: Seccomp %s", p.pid, got)
					}
				}
				main := k.nets[0]
				for _, p := range k.nets {
					if lab.statusOf(t, p.pid, "PPid") == k.parent {
						main = p
					}
				}
				var caps uint64
				if _, err := fmt.Sscanf(lab.statusOf(t, main.pid, "CapEff"), "%x", &caps); err != nil || caps&^bindService != 0 {
					t.Errorf("effective capabilities %x: %v", caps, err)
				}
				if got, err := k.inside.get("http://" + outsideAddr4 + ":8000/"); got != hostAddr4 {
					t.Errorf("outside sees a client at %q: %v", got, err)
				}
				k.inside.serve(t, "tcp", "0.0.0.0:80")
				k.mustCtl(t, lab, "add-ports", "0.0.0.0:8080:80/tcp")
				if got, err := lab.outside.get("http://" + hostAddr4 + ":8080/"); got != outsideAddr4 {
					t.Errorf("the container sees a client at %q: %v", got, err)
				}
			})
		}
	}
}

// rootlesskit never asks usernet to end: it kills it, or is killed, and nothing of usernet may stay.
func TestRootlesskitEnds(t *testing.T) {
	lab := needLab(t)
	for _, version := range kits {
		for _, signal := range []string{"TERM", "KILL"} {
			t.Run(version.name+"/"+signal, func(t *testing.T) {
				k := beginKit(t, lab, version.program, "slirp4netns", append([]string{"--port-driver=slirp4netns", "--publish=0.0.0.0:8080:80/tcp"}, version.flags...)...)
				lab.user(t, "kill", "-"+signal, k.parent)
				lab.gone(t, k.nets)
				eventually(t, func() error { return lab.host.refused("127.0.0.1:8080") })
			})
		}
	}
}

// What usernet has against its options reaches the person who started rootlesskit, who must ask for it.
func TestRootlesskitShowsReason(t *testing.T) {
	lab := needLab(t)
	for _, program := range []string{kit1, kit3} {
		_, line := kitLine(t, lab, program, "slirp4netns", "--debug", "--cidr=10.9.0.0/28")
		_, err := lab.try("user", append(line, "true")...)
		if err == nil || !strings.Contains(err.Error(), "prefix length needs to be 1-25") {
			t.Errorf("%s: %v", program, err)
		}
	}
}

// Many octets pass both ways as they are, on the one queue that rootlesskit's TAP has, with both sizes of packets.
func TestRootlesskitBulk(t *testing.T) {
	lab := needLab(t)
	const size = 64 << 20
	sum := make(chan string, 1)
	var l net.Listener
	var err error
	lab.outside.do(func() { l, err = net.Listen("tcp", outsideAddr4+":8002") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	for _, mtu := range []string{"1500", "65520"} {
		t.Run(mtu, func(t *testing.T) {
			k := startKit(t, lab, kit1, "--disable-host-loopback", "--mtu="+mtu)
			go func() { sum <- swap(l, size) }()
			c, err := k.inside.dial("tcp", outsideAddr4+":8002")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			got := exchange(c.(*net.TCPConn), size)
			want := exchangeSum(size)
			if there := <-sum; got != want || there != want {
				t.Errorf("the container has %s and outside %s, want %s", got, there, want)
			}
		})
	}
}

// octets is a stream in which no two of its parts are alike.
func octets(size int64) io.Reader { return io.LimitReader(&counter{}, size) }

type counter struct{ n uint64 }

func (c *counter) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(c.n ^ c.n>>8 ^ c.n>>16 ^ c.n>>24)
		c.n++
	}
	return len(b), nil
}

func exchangeSum(size int64) string { return sumOf(octets(size)) }

func sumOf(r io.Reader) string {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// exchange sends and receives so many octets at the same time, and gives the sum of what it received.
func exchange(c *net.TCPConn, size int64) string {
	c.SetDeadline(time.Now().Add(patience))
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(struct{ io.Writer }{c}, octets(size))
		if err == nil {
			err = c.CloseWrite()
		}
		sent <- err
	}()
	sum := sumOf(c)
	if err := <-sent; err != nil {
		return err.Error()
	}
	return sum
}

// swap is exchange with the next client.
func swap(l net.Listener, size int64) string {
	c, err := l.Accept()
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	return exchange(c.(*net.TCPConn), size)
}
