package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
)

// withAPI starts a program for a new container, with its API.
func withAPI(t testing.TB, program string, flags ...string) (*container, *slirp, string) {
	t.Helper()
	c, socket := newContainer(t), socketPath(t)
	return c, lab.home.startSlirp(t, program, append(flags, "-c", "--api-socket="+socket, strconv.Itoa(c.pid), "tap0")...), socket
}

// Ports are published with podman's octets, and answered with slirp4netns's; whom a server sees is the same with both.
func TestSlirpAPI(t *testing.T) {
	for name, program := range slirps(t) {
		t.Run(name, func(t *testing.T) {
			c, _, socket := withAPI(t, program)
			c.net.serveOnly(t, "0.0.0.0:8000", tellPeer)
			c.net.serveUDP(t, container4+":8000", func(from netip.AddrPort, _ []byte) []byte { return []byte(from.Addr().String()) })
			free := lab.host.listenOn(t, "tcp4", "0.0.0.0:0")
			port := netip.MustParseAddrPort(free.Addr().String()).Port()
			free.Close()
			for _, step := range []struct{ request, answer string }{
				{addHostfwd("tcp", "0.0.0.0", port, "", 8000), `{"return":{"id":1}}`},
				{addHostfwd("udp", "0.0.0.0", port, container4, 8000), `{"return":{"id":2}}`},
			} {
				if got := tell(t, socket, step.request); got != step.answer {
					t.Fatalf("%s: %s, want %s", step.request, got, step.answer)
				}
			}
			for _, client := range []struct {
				at       *place
				to, seen string
			}{{lab.outside, hostAddr4, outsideAddr4}, {lab.host, "127.0.0.1", gateway4}} {
				to := netip.AddrPortFrom(netip.MustParseAddr(client.to), port)
				if seen, _, err := peerSeen(client.at, to.String()); err != nil || seen.Addr().String() != client.seen {
					t.Errorf("TCP to %s: the server sees %v, %v, want %s", to, seen, err, client.seen)
				}
				if name == "slirp4netns" && client.at == lab.host {
					continue // its container's answer does not come back
				}
				if seen := ask(t, client.at, to, "who"); seen != client.seen {
					t.Errorf("UDP to %s: the server sees %v, want %s", to, seen, client.seen)
				}
			}
			// A list has its entries in one place or the other, or in both.
			var list struct {
				Entries []map[string]any
				Return  struct{ Entries []map[string]any }
			}
			unmarshal(t, tell(t, socket, `{"execute":"list_hostfwd"}`), &list)
			if name == "usernet" && len(list.Return.Entries) != len(list.Entries) {
				t.Errorf("the list is not the same in both places: %+v", list)
			}
			want := map[string]any{"id": 1., "proto": "tcp", "host_addr": "0.0.0.0", "host_port": float64(port), "guest_addr": container4, "guest_port": 8000.}
			if len(list.Entries) != 2 || fmt.Sprint(list.Entries[0]) != fmt.Sprint(want) {
				t.Errorf("%v is listed, want first %v", list.Entries, want)
			}
			for _, answer := range []string{`{"return":{}}`, `{"error":{"desc":"bad request: remove_hostfwd: bad arguments.id"}}`} {
				if got := tell(t, socket, `{"execute":"remove_hostfwd","arguments":{"id":1}}`); got != answer {
					t.Errorf("remove: %s, want %s", got, answer)
				}
			}
			if _, err := lab.outside.dial("tcp", hostPort(port).String()); err == nil {
				t.Error("what was removed still takes connections")
			}
		})
	}
}

// An IPv6 address may be published as well, with and without IPv6 inside.
func TestSlirpAPIIPv6(t *testing.T) {
	for _, flags := range [][]string{{"-6"}, nil} {
		c, _, socket := withAPI(t, asSlirp(t), flags...)
		c.net.serve(t, "tcp", "[::]:8000", echo)
		free := lab.host.listenOn(t, "tcp6", "["+hostAddr6+"]:0")
		port := netip.MustParseAddrPort(free.Addr().String()).Port()
		free.Close()
		if got := tell(t, socket, addHostfwd("tcp", hostAddr6, port, "", 8000)); got != `{"return":{"id":1}}` {
			t.Fatal(got)
		}
		if err := reaches(lab.outside, netip.AddrPortFrom(netip.MustParseAddr(hostAddr6), port)); err != nil {
			t.Errorf("flags %v: %v", flags, err)
		}
	}
}

// What fails says why in its desc, behind the words that slirp4netns has, and fits into the one read that podman does.
func TestSlirpAPISaysWhy(t *testing.T) {
	_, _, socket := withAPI(t, asSlirp(t))
	taken := netip.MustParseAddrPort(lab.host.listenOn(t, "tcp4", "127.0.0.1:0").Addr().String())
	requests := map[string][]string{
		addHostfwd("tcp", "127.0.0.1", taken.Port(), "", 80):  {"address already in use"},
		addHostfwd("tcp", "192.0.2.77", 8000, "", 80):         {"cannot assign requested address"},
		addHostfwd("tcp", "127.0.0.1", 8000, "10.0.2.7.", 80): {"bad arguments.guest_addr"},
	}
	if !realRoot {
		requests[addHostfwd("tcp", "0.0.0.0", 80, "", 80)] = []string{"permission denied", "net.ipv4.ip_unprivileged_port_start=80"}
	}
	for request, want := range requests {
		text := tell(t, socket, request)
		var answer struct{ Error struct{ Desc string } }
		if err := json.Unmarshal([]byte(text), &answer); err != nil || len(text) > 2048 || !strings.HasPrefix(answer.Error.Desc, "bad request: add_hostfwd: ") {
			t.Errorf("%s: %q, %v", request, text, err)
		}
		saysAll(t, answer.Error.Desc, want...)
	}
}

// A client that says nothing, which stops slirp4netns for as long as it likes, stops nobody.
func TestSlirpAPISilentClient(t *testing.T) {
	c, _, socket := withAPI(t, asSlirp(t))
	var silent net.Conn
	var err error
	lab.host.do(func() { silent, err = net.Dial("unix", socket) })
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if got := tell(t, socket, `{"execute":"list_hostfwd"}`); got != `{"return":{"entries":[]},"entries":[]}` {
		t.Error(got)
	}
	works(t, c.net, echoServers(t)[:1])
}
