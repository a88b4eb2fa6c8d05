package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// iperfParams ask for an iperf3 server that serves one test.
type iperfParams struct {
	Port    uint16
	Timeout time.Duration
}

// opIperfServer is ready when the server listens, and ends with its test.
func opIperfServer(ctx context.Context, p iperfParams, ready func(), release <-chan struct{}) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, p.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "iperf3", "--server", "--one-off", "--port", fmt.Sprint(p.Port))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var out tail
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for !listens(p.Port) {
		select {
		case err := <-ended:
			return nil, fmt.Errorf("iperf3 --server: %w: %s", err, out.String())
		case <-time.After(time.Millisecond):
		}
	}
	ready()
	select {
	case <-ended: // whatever it says, the client knows better
	case <-release:
		cancel()
		<-ended
	}
	return struct{}{}, nil
}

// listens tells whether a TCP socket of this namespace listens on port.
func listens(port uint16) (found bool) {
	err := listeners(func(p uint16) { found = found || p == port })
	return err == nil && found
}

// listeners calls f for the port of each TCP socket of this namespace that listens.
func listeners(f func(port uint16)) error {
	for _, name := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		text, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			const listen = "0A"
			if fields := strings.Fields(line); len(fields) > 3 && fields[3] == listen {
				_, hex, _ := strings.Cut(fields[1], ":")
				port, err := strconv.ParseUint(hex, 16, 16)
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				f(uint16(port))
			}
		}
	}
	return nil
}

// transfer is what an iperf3 test of TCP moved.
type transfer struct {
	Octets      float64 // that arrived
	Seconds     float64
	Retransmits float64 // of the sender's kernel
}

// bitsPerSecond of payload.
func (t transfer) bitsPerSecond() float64 { return t.Octets * 8 / t.Seconds }

// parseIperf reads the output of iperf3 --json.
func parseIperf(text []byte) (transfer, error) {
	var r struct {
		Error string
		End   struct {
			Sent struct {
				Retransmits float64
			} `json:"sum_sent"`
			Received struct {
				Seconds float64
				Bytes   float64
			} `json:"sum_received"`
		}
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return transfer{}, fmt.Errorf("iperf3's report: %w", err)
	}
	if r.Error != "" {
		return transfer{}, errors.New("iperf3: " + r.Error)
	}
	if r.End.Received.Bytes <= 0 || r.End.Received.Seconds <= 0 {
		return transfer{}, errors.New("iperf3: nothing was received")
	}
	return transfer{Octets: r.End.Received.Bytes, Seconds: r.End.Received.Seconds, Retransmits: r.End.Sent.Retransmits}, nil
}

// iperf runs a TCP test between two agents. reverse makes the client download.
func iperf(ctx context.Context, c *contender, streams int, reverse bool, d time.Duration) (transfer, error) {
	limit := d + 10*time.Second
	server := c.server.start("iperf", iperfParams{Port: iperfPort, Timeout: limit})
	if err := server.waitReady(ctx); err != nil {
		return transfer{}, err
	}
	args := []string{"iperf3", "--client", c.addr.String(), "--port", fmt.Sprint(c.port(iperfPort)), "--json",
		"--parallel", fmt.Sprint(streams), "--connect-timeout", "3000"}
	if reverse {
		args = append(args, "--reverse")
	}
	args = append(args, "--time", fmt.Sprint(max(1, int(d.Round(time.Second).Seconds())))) // it knows whole seconds only
	var out runResult
	err := c.client.do(ctx, "run", runParams{Args: args, Timeout: limit}, &out)
	if err != nil {
		return transfer{}, errors.Join(err, server.release(ctx))
	}
	t, err := parseIperf([]byte(out.Stdout))
	if err != nil {
		return t, errors.Join(err, server.release(ctx))
	}
	return t, server.wait(ctx, nil)
}
