package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// rootlesskit's own client publishes, lists and withdraws.
func TestPortsRootlessctl(t *testing.T) {
	needs(t, "rootlessctl")
	p := publish(t)
	p.c.net.serveTCP(t, ":8080", tellPeer)
	ctl := func(args ...string) string {
		t.Helper()
		return lab.home.must(t, append([]string{"rootlessctl", "--socket", p.socket}, args...)...)
	}
	if got := ctl("add-ports", "0.0.0.0:8080:8080/tcp", hostAddr4+":5353:5353/udp", "[::1]:8081:8080/tcp6"); got != "1\n2\n3\n" {
		t.Errorf("add-ports says %q, want 1, 2 and 3", got)
	}
	if seen, _, err := peerSeen(lab.outside, hostAddr4+":8080"); err != nil || seen.Addr().String() != outsideAddr4 {
		t.Errorf("the server sees %v, %v", seen, err)
	}
	if _, err := lab.outside.dial("tcp", "["+hostAddr6+"]:8080"); err == nil {
		t.Error("0.0.0.0 is published on IPv6 too")
	}
	list := strings.Join(strings.Fields(ctl("list-ports")), " ")
	saysAll(t, list, "1 tcp 0.0.0.0 8080 8080", "2 udp "+hostAddr4+" 5353 5353", "3 tcp6 ::1 8081 8080")
	saysAll(t, ctl("list-ports", "--json"), `"parentPort":8080`)
	saysAll(t, ctl("info"), "usernet", "tcp6")
	if out, code := lab.home.run(t, "rootlessctl", "--socket", p.socket, "add-ports", "0.0.0.0:8080:81/tcp"); code == 0 || !strings.Contains(out, "conflict with ID 1") {
		t.Errorf("add-ports of what is published: %q, status %d", out, code)
	}
	if got := ctl("remove-ports", "1", "2"); got != "1\n2\n" {
		t.Errorf("remove-ports says %q", got)
	}
	if all := p.list(t); len(all) != 1 || all[0].ID != 3 {
		t.Errorf("%+v, want the third", all)
	}
}

// slirp4netns's JSON, by tools that end their sending side before they read, and by such that do not.
func TestPortsSlirpJSON(t *testing.T) {
	needs(t, "socat", "ncat")
	p := publish(t)
	p.c.net.serveTCP(t, ":8080", tellPeer)
	add := func(port int) string {
		return fmt.Sprintf(`{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"0.0.0.0","host_port":%d,"guest_addr":"","guest_port":8080}}`, port)
	}
	for _, client := range []string{"socat -t 20 - UNIX-CONNECT:", "ncat -U ", "ncat --no-shutdown -U "} {
		say := func(request string) string {
			t.Helper()
			return lab.home.sh(t, "echo '"+request+"' | "+client+p.socket)
		}
		got := say(add(8080))
		var answer struct{ Return struct{ ID int } }
		unmarshal(t, got, &answer)
		if answer.Return.ID == 0 {
			t.Errorf("%s: add says %s", client, got)
		}
		if seen, _, err := peerSeen(lab.outside, hostAddr4+":8080"); err != nil || seen.Addr().String() != outsideAddr4 {
			t.Errorf("the server sees %v, %v", seen, err)
		}
		saysAll(t, say(add(8080)), "slirp_add_hostfwd failed")
		saysAll(t, say(`{"execute":"list_hostfwd"}`), fmt.Sprintf(`"entries":[{"id":%d,"proto":"tcp","host_addr":"0.0.0.0","host_port":8080,"guest_addr":"10.0.2.100","guest_port":8080}]`, answer.Return.ID))
		saysAll(t, say(`{"execute":"add_hostfwd","arguments":{"host_port":1,"guest_port":1}}`), "bad arguments.proto")
		if got := say(fmt.Sprintf(`{"execute":"remove_hostfwd","arguments":{"id":%d}}`, answer.Return.ID)); strings.TrimSpace(got) != `{"return":{}}` {
			t.Errorf("%s: remove says %s", client, got)
		}
	}
}

// What curl asks for by hand, and what it gets where it is wrong.
func TestPortsCurl(t *testing.T) {
	needs(t, "curl")
	p := publish(t, "--pprof", "-p", "0:8080")
	p.c.net.serveTCP(t, ":8080", tellPeer)
	all := p.list(t)
	if len(all) != 1 || all[0].HostPort == 0 {
		t.Fatalf("%+v, want the port that the kernel has picked", all)
	}
	if _, _, err := peerSeen(lab.outside, hostPort(all[0].HostPort).String()); err != nil {
		t.Error(err)
	}
	url := "http://usernet/v1/usernet/"
	curl := func(args ...string) string {
		t.Helper()
		return lab.home.must(t, append([]string{"curl", "-sS", "--unix-socket", p.socket}, args...)...)
	}
	added := forwards(t, curl(url+"forwards", "-d", `{"publish":["127.0.0.1:0:8080","127.0.0.1:0:8080/udp"]}`))
	if len(added) != 2 || added[0].HostPort == 0 || added[1].HostPort == 0 || added[0].Path != "kernel" || added[1].Path != "tap" {
		t.Errorf("%+v", added)
	}
	saysAll(t, curl(url+"forwards", "-d", `{"publish":["8080:80"],"no":1}`), `"code":"bad-request"`)
	saysAll(t, curl("-X", "DELETE", url+"forwards/77"), `"code":"unknown-id"`)
	saysAll(t, p.get(t, "/v1/info"), `"apiVersion":"1.1.3"`)
	saysAll(t, p.get(t, "/v1/usernet/debug/pprof/goroutine?debug=1"), "goroutine profile:")
	if n := p.metric(t, "usernet_forwards"); n != 3 {
		t.Errorf("%v forwards by the metrics, want 3", n)
	}
	// A person asks, and gets a table with the same.
	saysAll(t, p.mustAsk(t, "port", "list"), "ID  PROTO", fmt.Sprintf("*:%d", all[0].HostPort), "127.0.0.1:", "kernel", "tap")
	saysAll(t, p.mustAsk(t, "info"), "by the kernel path", "container 10.0.2.100/24", "3 of at most")
}

// All of a range or nothing, and what is in the way is told with the remedy.
func TestPortsNotToBeHad(t *testing.T) {
	p := publish(t, "-p", "8090:8080")
	taken := lab.host.listen(t, hostAddr4+":9005")
	for _, test := range []struct {
		spec string
		want []string
	}{
		{hostAddr4 + ":9000-9010:9000-9010", []string{"9005", "address already in use", "ss -Hntlp 'sport = 9005'"}},
		{"9000-9010:9000-9010", []string{"9005", "address already in use"}},
		{"8090:8080", []string{"conflict", "1"}},
		{hostAddr4 + ":8090:8080", []string{"8090", "already in use", "the forward with ID 1 has it"}},
		{"198.51.100.77:8080:80", []string{"198.51.100.77", "ip address"}},
		{"8080", nil},
		{"65536:80", []string{"65536"}},
		{"9000-9001:9000-9002", []string{"9000-9001"}},
		{"127.0.0.1:80/sctp:80", []string{"80"}},
	} {
		out, code := p.ask(t, "port", "add", "9100:9100", test.spec)
		if test.want == nil {
			if code != 0 {
				t.Errorf("port add %s: status %d: %s", test.spec, code, out)
			}
			p.mustAsk(t, "port", "remove", "2", "3")
			continue
		}
		if code != 1 {
			t.Errorf("port add %s: status %d: %s", test.spec, code, out)
		}
		saysAll(t, out, test.want...)
		if all := p.list(t); test.want != nil && len(all) != 1 {
			t.Fatalf("port add %s has left %+v", test.spec, all)
		}
		for _, free := range []string{"9000", "9010", "9100"} {
			l := lab.host.listen(t, hostAddr4+":"+free) // or the test ends here
			l.Close()
		}
	}
	taken.Close()
	if all := p.add(t, "9000-9010:9000-9010"); len(all) != 11 {
		t.Errorf("%d forwards of a range of 11", len(all))
	}
	// Before there is a network, what cannot be had is the end.
	out, code := lab.home.run(t, binary, "-p", "9005:1", fmt.Sprint(newContainer(t).pid))
	if code != 1 {
		t.Errorf("status %d: %s", code, out)
	}
	saysAll(t, out, "9005", "address already in use")
}

// Privileged ports are for whoever may, and others are told about the sysctl.
func TestPortsPrivileged(t *testing.T) {
	const start = "ipv4/ip_unprivileged_port_start"
	if err := sysctl(lab.host, start, "1024"); err != nil {
		t.Fatal(err)
	}
	p := publish(t)
	p.c.net.serveTCP(t, ":8080", tellPeer)
	out, code := p.ask(t, "port", "add", "80:8080")
	if realRoot {
		if _, _, err := peerSeen(lab.outside, hostAddr4+":80"); code != 0 || err != nil {
			t.Errorf("root publishes port 80: status %d, %s, %v", code, out, err)
		}
		return
	}
	if code == 0 {
		t.Error("port 80 is published by an ordinary user")
	}
	saysAll(t, out, "permission denied", "ports below 1024 are privileged", "net.ipv4.ip_unprivileged_port_start=80")
	t.Cleanup(func() { sysctl(lab.host, start, "1024") })
	if err := sysctl(lab.host, start, "80"); err != nil {
		t.Fatal(err)
	}
	p.add(t, "80:8080")
	if _, _, err := peerSeen(lab.outside, hostAddr4+":80"); err != nil {
		t.Error(err)
	}
}

// The control socket is its user's alone, and not the container's.
func TestPortsSocketIsOurs(t *testing.T) {
	needs(t, "curl", "setpriv")
	p := publish(t)
	if mode := lab.root.must(t, "stat", "-c", "%a %F", p.socket); mode != "600 socket\n" {
		t.Errorf("the socket is %q, want 600 socket", mode)
	}
	question := []string{"curl", "-sS", "--max-time", "20", "--unix-socket", p.socket, "http://usernet/v1/usernet/info"}
	lab.home.must(t, question...)
	// The container sees the file here, and its root is the very same user.
	for name, args := range map[string][]string{
		"curl":    question,
		"usernet": {binary, "info", "--socket", p.socket},
		"JSON":    {"sh", "-c", `echo '{"execute":"list_hostfwd"}' | socat -t 20 - UNIX-CONNECT:` + p.socket + " | grep -q entries"},
	} {
		if out, code := p.c.run(t, args...); code == 0 {
			t.Errorf("%s in the container is answered: %s", name, out)
		}
	}
	p.has(t, "is in another network namespace") // once: the log is not for strangers to fill
	second := p.socket + "2"
	out, code := lab.home.run(t, runLine("--api-socket", second, "--", "sh", "-c", "test -S "+second+" && echo it is there; "+strings.Join(question[:5], " ")+" "+second+" http://usernet/v1/info")...)
	if code == 0 || !strings.Contains(out, "it is there") || strings.Contains(out, "apiVersion") {
		t.Errorf("the command of usernet run is answered, or does not see the socket: %s", out)
	}
	if !realRoot {
		return // one user is all there is in the lab; root's run has others
	}
	p = publish(t)
	for _, path := range []string{filepath.Dir(p.socket), p.socket} {
		if err := os.Chmod(path, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	stranger := []string{"setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups"}
	question[5] = p.socket
	if out, code := lab.home.run(t, append(stranger, question...)...); code == 0 {
		t.Errorf("another user is answered: %s", out)
	}
	p.has(t, "uid 4242")
}

// What lies in the socket's place: a dead one is replaced, a live one and a file are not. It goes at the end.
func TestPortsSocketPlace(t *testing.T) {
	socket := socketPath(t)
	c := newContainer(t)
	pid := fmt.Sprint(c.pid)

	writeFile(t, socket, "precious")
	out, code := lab.home.run(t, binary, "--api-socket", socket, pid)
	if text, _ := os.ReadFile(socket); code != 1 || string(text) != "precious" {
		t.Errorf("with a file in the place: status %d, the file has %q", code, text)
	}
	saysAll(t, out, socket, "no socket")
	os.Remove(socket)

	first := begin(t, "--api-socket", socket, "-p", "8080:8080", pid)
	if out, code := lab.home.run(t, binary, "--api-socket", socket, fmt.Sprint(newContainer(t).pid)); code != 1 || !strings.Contains(out, "in use by a running process") {
		t.Errorf("with a live socket in the place: status %d, %s", code, out)
	}
	// One that is killed leaves it, and the next one on the same container replaces it and publishes the same.
	first.signal(t, syscall.SIGKILL)
	first.wait(t)
	if !isThere(socket) {
		t.Fatal("the socket has gone with SIGKILL: the test means nothing")
	}
	c.net.serveTCP(t, ":8080", tellPeer)
	second := &publisher{usernet: launch(t, "--api-socket", socket, "-p", "8080:8080", pid), c: c, socket: socket}
	for _, to := range []string{hostAddr4, hostAddr6} {
		if seen, own, err := peerSeen(lab.outside, net.JoinHostPort(to, "8080")); err != nil || seen != own {
			t.Errorf("after the restart the server sees %v of %v, %v", seen, own, err)
		}
	}
	if f := second.list(t); len(f) != 1 || f[0].Path != "kernel" || f[0].Note != "" {
		t.Errorf("after the restart %+v, want the kernel path", f)
	}
	second.end(t)
	if isThere(socket) {
		t.Error("the socket is there after the end")
	}

	// Without a name it is where clients look.
	run := filepath.Dir(socket)
	if err := os.Chmod(run, 0o700); err != nil {
		t.Fatal(err)
	}
	there := lab.home
	there.prefix = append(append([]string{}, there.prefix...), "env", "XDG_RUNTIME_DIR="+run)
	third := there.begin(t, "-p", "8080:8080", pid)
	if got := there.must(t, binary, "port", "list"); !strings.Contains(got, "*:8080") {
		t.Errorf("port list says %s", got)
	}
	third.end(t)
	if left, _ := filepath.Glob(run + "/usernet/*"); len(left) > 0 {
		t.Errorf("left at the end: %v", left)
	}
}
