package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A device is usernet with a device of the container's in the place of its namespace, as slirp4netns's command line has it.
type device struct {
	*usernet
	ready *os.File // of which nothing has been read
	api   string
}

// startDevice runs the dialect. The passed files are descriptors from 4 on; 3 is the ready one.
func startDevice(t testing.TB, passed []*os.File, args ...string) *device {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	d := &device{ready: r, api: filepath.Join(shortDir(t), "api")}
	args = append([]string{binary, "slirp4netns", "--ready-fd=3", "--api-socket=" + d.api, "--enable-ipv6"}, args...)
	d.usernet = &usernet{lab.home.start(t, func(cmd *exec.Cmd) { cmd.ExtraFiles = append([]*os.File{w}, passed...) }, args...)}
	w.Close()
	return d
}

// waitReady waits for the ready descriptor's word, and has the end checked.
func (d *device) waitReady(t testing.TB) {
	t.Helper()
	b := make([]byte, 8)
	if err := d.ready.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if n, err := d.ready.Read(b); err != nil || string(b[:n]) != "1" {
		t.Fatalf("the ready descriptor got %q, %v", b[:n], err)
	}
	t.Cleanup(func() {
		select {
		case <-d.ended:
		default:
			d.end(t)
		}
	})
}

// isReady tells whether there is something to read already.
func (d *device) isReady(t testing.TB) (ready bool) {
	t.Helper()
	raw, err := d.ready.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		n, _ := unix.Ppoll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, &unix.Timespec{}, nil)
		ready = n != 0
	}); err != nil {
		t.Fatal(err)
	}
	return ready
}

// ask sends one request to the API socket.
func (d *device) ask(t testing.TB, request string) string {
	t.Helper()
	var c net.Conn
	eventually(t, "the API socket takes connections", func() (ok bool) {
		var err error
		c, err = net.Dial("unix", d.api)
		return err == nil
	})
	defer c.Close()
	if _, err := c.Write([]byte(request)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

// shortDir is a directory that home can write to, with a name that leaves room for a socket's.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(scratch, "d")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// addTAP makes a TAP in the container's network and returns its descriptor.
func (c *container) addTAP(t testing.TB, flags uint16) *os.File {
	t.Helper()
	var f *os.File
	var err error
	c.net.do(func() { f, err = makeTAP("tap0", flags) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func makeTAP(name string, flags uint16) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// configure is what whoever made the device does with it, which includes the address that a router advertises.
func (c *container) configure(t testing.TB) {
	t.Helper()
	for _, step := range []string{
		"link set lo up", "link set tap0 up", "address add 10.0.2.100/24 dev tap0", "route add default via 10.0.2.2",
		"address add fd00::100/64 dev tap0 nodad", "route add default via fd00::2",
	} {
		c.must(t, append([]string{"ip"}, strings.Fields(step)...)...)
	}
}

// carries looks whether all kinds of traffic pass, with the container's side at from.
func (d *device) carries(t testing.TB, c *container) {
	t.Helper()
	works(t, c.net, echoServers(t))
	c.must(t, "ping", "-c", "1", "-W", "10", gateway4)
	url := lab.outside.serveHTTP(t, outsideAddr4+":0", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { writePattern(w, 20<<20) }))
	c.must(t, "curl", "-sS", "-o", filepath.Join(shortDir(t), "file"), url)
	c.net.serveTCP(t, ":8080", tellPeer)
	saysAll(t, d.ask(t, `{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":8080,"guest_port":8080}}`), `"id":1`)
	if seen, _, err := peerSeen(lab.outside, hostAddr4+":8080"); err != nil || seen.Addr().String() != outsideAddr4 {
		t.Errorf("the server behind the published port sees %v, %v", seen, err)
	}
}

func TestTAPDescriptor(t *testing.T) {
	needs(t, "ip", "ping", "curl")
	for name, flags := range map[string]uint16{
		"plain":       unix.IFF_TAP | unix.IFF_NO_PI,
		"header":      unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR,
		"multi-queue": unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE,
	} {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t)
			tap := c.addTAP(t, flags)
			c.configure(t)
			d := startDevice(t, []*os.File{tap}, "--netns-type=tapfd", "4")
			d.waitReady(t)
			d.carries(t, c)
			d.end(t)
			if !hasInterface(t, c, "tap0") {
				t.Error("the interface is gone, and it is not usernet's")
			}
		})
	}
}

// The interface's end is the only sign of the container's.
func TestTAPDescriptorDeleted(t *testing.T) {
	needs(t, "ip")
	c := newContainer(t)
	tap := c.addTAP(t, unix.IFF_TAP|unix.IFF_NO_PI)
	d := startDevice(t, []*os.File{tap}, "--netns-type=tapfd", "4")
	d.waitReady(t)
	c.must(t, "ip", "link", "del", "tap0")
	endsWell(t, d.usernet)
	if _, err := os.Lstat(d.api); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the API socket: %v", err)
	}
}

func TestTAPDescriptorRefused(t *testing.T) {
	c := newContainer(t)
	file, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	tun := c.addTAP(t, unix.IFF_TUN|unix.IFF_NO_PI)
	for _, r := range []struct{ name, fd, want string }{
		{"no file", "9", "descriptor 9 is no TAP"},
		{"a file", "4", "descriptor 4: it is no TAP"},
		{"a TUN", "5", "is a TUN and no TAP"},
		{"the ready descriptor", "3", "descriptor 3 is given twice"},
	} {
		t.Run(r.name, func(t *testing.T) {
			d := startDevice(t, []*os.File{file, tun}, "--netns-type=tapfd", r.fd)
			if code := d.wait(t); code != 1 {
				t.Errorf("status %d, want 1", code)
			}
			saysAll(t, d.out.String(), r.want)
		})
	}
}

// A machine's kernel behind the socket: a container whose TAP a small program connects to it.
func TestBess(t *testing.T) {
	needs(t, "ip", "ping", "curl")
	c := newContainer(t)
	path := filepath.Join(shortDir(t), "bess")
	d := startDevice(t, nil, "--target-type=bess", path)
	saysAll(t, d.ask(t, `{"execute":"list_hostfwd"}`), `"entries":[]`)
	if d.isReady(t) {
		t.Error("ready before the client is there")
	}
	machine := c.start(t, nil, helper("wire", path)...)
	machine.has(t, "wired")
	d.waitReady(t)
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket's file, with a client: %v", err)
	}
	c.configure(t)
	d.carries(t, c)
	machine.signal(t, syscall.SIGKILL) // its end is ours
	endsWell(t, d.usernet)
}

// wire SOCKET makes tap0, connects it to the socket, and says "wired".
func helperWire(args []string) error {
	tap, err := makeTAP("tap0", unix.IFF_TAP|unix.IFF_NO_PI)
	if err != nil {
		return err
	}
	fd, err := connectBess(args[0])
	if err != nil {
		return err
	}
	fmt.Println("wired")
	ends := make(chan error)
	pump := func(from, to int) {
		b := make([]byte, 65536)
		for {
			n, err := unix.Read(from, b)
			if err == nil && n == 0 {
				err = errors.New("it hung up")
			}
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err == nil {
				_, err = unix.Write(to, b[:n])
			}
			if err != nil && !errors.Is(err, unix.EIO) { // EIO: the interface is down
				ends <- err
				return
			}
		}
	}
	go pump(int(tap.Fd()), fd)
	go pump(fd, int(tap.Fd()))
	return <-ends
}

func connectBess(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect to %s: %w", path, err)
	}
	return fd, nil
}

// arpRequest asks who is the gateway.
func arpRequest() []byte {
	f := make([]byte, 60)
	copy(f, bytes.Repeat([]byte{0xff}, 6))
	copy(f[6:], []byte{2, 0, 0, 0, 0, 9, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 9, 10, 0, 2, 100})
	copy(f[38:], []byte{10, 0, 2, 2})
	return f
}

// What is no frame is dropped, and what is one is answered all the same.
func TestBessBrokenFrames(t *testing.T) {
	path := filepath.Join(shortDir(t), "bess")
	d := startDevice(t, nil, "--target-type=bess", path)
	saysAll(t, d.ask(t, `{"execute":"list_hostfwd"}`), `"entries":[]`)
	fd, err := connectBess(path)
	if err != nil {
		t.Fatal(err)
	}
	client := os.NewFile(uintptr(fd), "client")
	defer client.Close()
	d.waitReady(t)
	for _, size := range []int{0, 1, 13, 1515, 9000, 100000} {
		if err := unix.Send(fd, make([]byte, size), 0); err != nil {
			t.Fatal(size, err)
		}
		if err := unix.Send(fd, arpRequest(), 0); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, 2048)
		for {
			n, err := unix.Read(fd, answer) // the test's time bounds it
			if err != nil || n == 0 {
				t.Fatalf("after a message of %d octets: %v", size, err)
			}
			if n >= 42 && bytes.Equal(answer[12:14], []byte{8, 6}) && answer[21] == 2 {
				break
			}
		}
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	endsWell(t, d.usernet)
}

// Nobody comes: it can be ended all the same, and leaves nothing.
func TestBessWithoutClient(t *testing.T) {
	for name, exit := range map[string]bool{"SIGTERM": false, "exit-fd": true} {
		t.Run(name, func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			defer w.Close()
			path := filepath.Join(shortDir(t), "bess")
			d := startDevice(t, []*os.File{r}, "--exit-fd=4", "--target-type=bess", path)
			saysAll(t, d.ask(t, `{"execute":"list_hostfwd"}`), `"entries":[]`)
			if exit {
				w.Close()
			} else {
				d.signal(t, syscall.SIGTERM)
			}
			endsWell(t, d.usernet)
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the socket's file: %v", err)
			}
			if d.isReady(t) { // its end is not a word
				if n, _ := d.ready.Read(make([]byte, 1)); n != 0 {
					t.Error("it said that it was ready")
				}
			}
		})
	}
}

// A virtual machine that has no other network: User-Mode Linux, with the host's files as its own. Its address comes by DHCP.
func TestBessUserModeLinux(t *testing.T) {
	needs(t, "linux.uml", "busybox", "ip", "ping", "curl")
	dir := shortDir(t)
	url := lab.outside.serveHTTP(t, outsideAddr4+":0", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "page from outside") }))
	lease := filepath.Join(dir, "lease")
	for name, text := range map[string]string{
		lease: `[ "$1" != bound ] || { ip address add $ip/$mask dev $interface; ip route add default via $router; echo "leased $ip dns $dns mtu $mtu"; }`,
		filepath.Join(dir, "init"): `mount -t proc proc /proc
ip link set vec0 up
busybox udhcpc -i vec0 -f -n -q -s ` + lease + `
ping -c 1 -W 10 ` + gateway4 + `
curl -sS ` + url + `
busybox poweroff -f`,
	} {
		if err := os.WriteFile(name, []byte("#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "bess")
	d := startDevice(t, nil, "--target-type=bess", path)
	saysAll(t, d.ask(t, `{"execute":"list_hostfwd"}`), `"entries":[]`)
	machine := lab.home.start(t, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "TMPDIR="+dir) },
		"linux.uml", "mem=128M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "init="+filepath.Join(dir, "init"),
		"vec0:transport=bess,dst="+path, "con=null", "con0=fd:0,fd:1", "quiet", "panic=-1")
	d.waitReady(t)
	machine.wait(t)
	saysAll(t, machine.out.String(), "leased 10.0.2.100 dns 10.0.2.3 mtu 1500", "1 received", "page from outside")
	endsWell(t, d.usernet)
}
