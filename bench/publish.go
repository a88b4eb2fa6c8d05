package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// A forward leads from a port of every IPv4 address of the host, and of IPv6 where the peer has it, to one of the container.
type forward struct {
	proto           string // tcp or udp
	host, container uint16
}

// forwards are all that a peer publishes of a container's servers.
func (p *peer) forwards() []forward {
	var fs []forward
	for _, port := range append([]uint16{iperfPort, whoPort}, echoPorts...) {
		fs = append(fs, forward{"tcp", port + p.shift, port})
	}
	for _, port := range []uint16{echoPorts[0], floodPort, whoPort} {
		fs = append(fs, forward{"udp", port + p.shift, port})
	}
	return fs
}

const (
	manyPorts = 10000
	// manyFrom is the first of them: below the ports that clients get, and above those of the servers.
	manyFrom = 14000
)

// manyForwards are for the axis that publishes as many, to nobody.
func manyForwards() []forward {
	fs := make([]forward, manyPorts)
	for i := range fs {
		fs[i] = forward{"tcp", uint16(manyFrom + i), uint16(manyFrom + i)}
	}
	return fs
}

// A portAPI publishes ports while a peer runs.
type portAPI interface {
	add(ctx context.Context, f forward) error
	list(ctx context.Context) (int, error) // how many there are
	close()
}

// answerLimit is more than any list of manyPorts.
const answerLimit = 16 << 20

// slirpSocket is the path of slirp4netns's API: a connection for each request.
type slirpSocket string

func slirpAPI(socket string) portAPI { return slirpSocket(socket) }

func (s slirpSocket) add(ctx context.Context, f forward) error {
	answer, err := s.ask(ctx, map[string]any{"execute": "add_hostfwd", "arguments": map[string]any{
		"proto": f.proto, "host_addr": "0.0.0.0", "host_port": f.host, "guest_port": f.container}})
	if err == nil && !strings.Contains(string(answer), `"return"`) {
		err = fmt.Errorf("publish port %d: %s", f.host, answer)
	}
	return err
}

func (s slirpSocket) list(ctx context.Context) (int, error) {
	answer, err := s.ask(ctx, map[string]any{"execute": "list_hostfwd"})
	if err != nil {
		return 0, err
	}
	var list struct{ Entries []struct{} }
	err = json.Unmarshal(answer, &list)
	return len(list.Entries), err
}

func (s slirpSocket) ask(ctx context.Context, request any) ([]byte, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", string(s))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(readyLimit)); err != nil {
		return nil, err
	}
	if err := json.NewEncoder(conn).Encode(request); err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(conn, answerLimit))
}

func (slirpSocket) close() {}

// restSocket speaks rootlesskit's REST, over a connection that it keeps.
type restSocket struct{ client *http.Client }

func restAPI(socket string) portAPI {
	var d net.Dialer
	return restSocket{&http.Client{Timeout: readyLimit, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) },
	}}}
}

func (s restSocket) add(ctx context.Context, f forward) error {
	_, err := s.ask(ctx, http.MethodPost, http.StatusCreated, map[string]any{
		"proto": f.proto, "parentIP": "0.0.0.0", "parentPort": f.host, "childPort": f.container})
	return err
}

func (s restSocket) list(ctx context.Context) (int, error) {
	answer, err := s.ask(ctx, http.MethodGet, http.StatusOK, nil)
	if err != nil {
		return 0, err
	}
	var list []struct{}
	err = json.Unmarshal(answer, &list)
	return len(list), err
}

func (s restSocket) ask(ctx context.Context, method string, want int, body any) ([]byte, error) {
	text, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://unix/v1/ports", bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	answer, err := s.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	text, err = io.ReadAll(io.LimitReader(answer.Body, answerLimit))
	if err == nil && answer.StatusCode != want {
		err = fmt.Errorf("%s /v1/ports: %s: %s", method, answer.Status, text)
	}
	return text, err
}

func (s restSocket) close() { s.client.CloseIdleConnections() }

// measureMany publishes port after port while the peer runs, and lists them; of a peer that publishes only at its start it is
// the start that is timed.
func measureMany(ctx context.Context, c *contender, _ time.Duration) (map[string]float64, error) {
	if c.manage == nil {
		return map[string]float64{addSeconds.unit: c.instance.ready.Seconds()}, manyListen()
	}
	idle, err := rssAfter(ctx, c, settleIdle)
	if err != nil {
		return nil, err
	}
	shared, err := c.account.pss()
	if err != nil {
		return nil, err
	}
	api := c.manage(c.instance.socket)
	defer api.close()
	begin := time.Now()
	for i, f := range manyForwards() {
		if err := api.add(ctx, f); err != nil {
			return nil, fmt.Errorf("after %d: %w", i, err)
		}
	}
	added := time.Now()
	n, err := api.list(ctx)
	listed := time.Now()
	if err == nil && n != manyPorts {
		err = fmt.Errorf("%d are listed", n)
	}
	if err := errors.Join(err, manyListen()); err != nil {
		return nil, err
	}
	full, err := rssAfter(ctx, c, settle)
	return map[string]float64{
		addSeconds.unit: added.Sub(begin).Seconds(), listSeconds.unit: listed.Sub(added).Seconds(), bothSeconds.unit: listed.Sub(begin).Seconds(),
		idleMiB.unit: float64(idle) / (1 << 20), pssMiB.unit: shared / (1 << 20), kibPort.unit: float64(full-idle) / 1024 / manyPorts,
	}, errors.Join(err, ctx.Err())
}

// manyListen tells whether there is a socket for each: bench itself is in host.
func manyListen() error {
	listen := map[uint16]bool{}
	err := listeners(func(port uint16) {
		if port >= manyFrom && port < manyFrom+manyPorts {
			listen[port] = true
		}
	})
	if err == nil && len(listen) != manyPorts {
		err = fmt.Errorf("%d of %d ports listen", len(listen), manyPorts)
	}
	return err
}
