package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"usernet/portdriver"
)

// slirp4netns's dialect: one JSON object to a connection, one answer without spaces or newline, the end.
//
//	{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"0.0.0.0","host_port":8080,"guest_addr":"","guest_port":80}}
//	{"execute":"remove_hostfwd","arguments":{"id":1}}
//	{"execute":"list_hostfwd"}
//
// Its answers are its own to the octet, and clients compare some. Where it crashes (no proto), lies (port 70000, the reason of a
// failure), blocks (on a client that says nothing) or misreads (a request in two pieces), we do not. Its addresses are IPv4;
// ours may be IPv6 on either side.

const (
	// maxSlirp octets and more are "too large", as there.
	maxSlirp = 4096

	// What a client still sends after its request is read for so long and so far: closing a Unix socket with unread
	// octets makes the client's next read an error, and some read the answer only after that.
	slirpDrain         = 64 << 10
	slirpDrainPatience = time.Second
)

// errSlirp is a request's own fault, in slirp4netns's words.
type errSlirp string

func (e errSlirp) Error() string { return "bad request: " + string(e) }

// slirp answers one request.
func (s *Server) slirp(ctx context.Context, c *conn) {
	defer context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })()
	request, err := readSlirp(c)
	var answer any
	if err == nil {
		answer, err = s.executeSlirp(ctx, request)
	} else if !errors.As(err, new(errSlirp)) {
		return // no request came; there is nobody to answer
	}
	if err != nil {
		s.cfg.Log.Debug("control socket: request failed", "dialect", "slirp4netns", "error", err)
		answer = map[string]any{"error": map[string]string{"desc": err.Error()}}
	}
	body := encodeSlirp(answer)
	_ = c.SetWriteDeadline(time.Now().Add(s.patience))
	if _, err := c.Write(body); err != nil {
		return
	}
	if u, ok := c.Conn.(*net.UnixConn); ok && u.CloseWrite() == nil && ctx.Err() == nil {
		_ = c.SetReadDeadline(time.Now().Add(slirpDrainPatience))
		_, _ = io.CopyN(io.Discard, c, slirpDrain)
	}
}

func encodeSlirp(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return []byte(`{"error":{"desc":"internal error"}}`)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// readSlirp reads one object. It takes as many pieces as it takes, and no end of file: clients of slirp4netns need not
// shut down their side.
func readSlirp(r io.Reader) (map[string]any, error) {
	limited := &io.LimitedReader{R: r, N: maxSlirp}
	value, err := decodeOnce(json.NewDecoder(limited), asIs) // as deep as 4095 octets can be
	switch {
	case limited.N <= 0:
		return nil, errSlirp("too large message")
	case err == nil:
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.As(err, new(*json.SyntaxError)),
		errors.As(err, new(*json.UnmarshalTypeError)), // a number that is none, as 1e700
		errors.As(err, new(errTwice)), isTimeout(err):
		return nil, errSlirp("cannot parse JSON")
	default:
		return nil, err
	}
	object, ok := value.(map[string]any)
	if !ok {
		return nil, errSlirp("json_object() failed")
	}
	return object, nil
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

type slirpID struct {
	ID int `json:"id"`
}

type slirpEntry struct {
	ID        int    `json:"id"`
	Proto     string `json:"proto"`
	HostAddr  string `json:"host_addr"`
	HostPort  uint16 `json:"host_port"`
	GuestAddr string `json:"guest_addr"`
	GuestPort uint16 `json:"guest_port"`
}

// executeSlirp does what the request says.
func (s *Server) executeSlirp(ctx context.Context, request map[string]any) (any, error) {
	what, ok := request["execute"].(string)
	if !ok {
		return nil, errSlirp("no execute found")
	}
	arguments, _ := request["arguments"].(map[string]any)
	switch what {
	case "add_hostfwd":
		spec, err := slirpSpec(arguments)
		if err != nil {
			return nil, errSlirp("add_hostfwd: bad arguments." + err.Error())
		}
		if s.cfg.Ports == nil {
			return nil, errSlirp("add_hostfwd: slirp_add_hostfwd failed: " + noPorts)
		}
		added, err := s.cfg.Ports.Add(ctx, spec)
		if err != nil {
			// The words that are known, then what they do not say.
			return nil, errSlirp(fmt.Sprintf("add_hostfwd: slirp_add_hostfwd failed: %v", err))
		}
		return map[string]any{"return": slirpID{added[0].ID}}, nil
	case "remove_hostfwd":
		id, ok := integer(arguments["id"])
		if !ok {
			return nil, errSlirp("remove_hostfwd: bad arguments.id")
		}
		if s.cfg.Ports == nil {
			return nil, errSlirp("remove_hostfwd: bad arguments.id")
		}
		switch err := s.cfg.Ports.Remove(ctx, id, false); {
		case errors.As(err, new(portdriver.ErrUnknownID)):
			return nil, errSlirp("remove_hostfwd: bad arguments.id")
		case err != nil:
			return nil, errSlirp(fmt.Sprintf("remove_hostfwd: slirp_remove_hostfwd failed: %v", err))
		}
		return map[string]any{"return": struct{}{}}, nil
	case "list_hostfwd":
		// The manual says the first, the binary says the second.
		entries := s.slirpEntries()
		return struct {
			Return  any `json:"return"`
			Entries any `json:"entries"`
		}{map[string]any{"entries": entries}, entries}, nil
	}
	return nil, errSlirp("unknown execute")
}

// slirpSpec reads the arguments of add_hostfwd. The error is the name of the first that is wrong. slirp4netns's clients
// expect that what listens everywhere listens at 0.0.0.0.
func slirpSpec(arguments map[string]any) (portdriver.Spec, error) {
	spec := portdriver.Spec{Host: netip.IPv4Unspecified()}
	var ok bool
	if spec.Proto, ok = arguments["proto"].(string); !ok || spec.Proto != "tcp" && spec.Proto != "udp" {
		return spec, errors.New("proto")
	}
	if spec.Host, ok = slirpAddr(arguments["host_addr"], netip.IPv4Unspecified()); !ok {
		return spec, errors.New("host_addr")
	}
	if spec.HostPort, ok = slirpPort(arguments["host_port"]); !ok {
		return spec, errors.New("host_port")
	}
	if spec.Container, ok = slirpAddr(arguments["guest_addr"], netip.Addr{}); !ok {
		return spec, errors.New("guest_addr")
	}
	if spec.ContainerPort, ok = slirpPort(arguments["guest_port"]); !ok {
		return spec, errors.New("guest_port")
	}
	return spec, nil
}

// slirpAddr reads an address; none and "" mean otherwise.
func slirpAddr(v any, otherwise netip.Addr) (netip.Addr, bool) {
	text, isText := v.(string)
	if v == nil || isText && text == "" {
		return otherwise, true
	}
	a, err := netip.ParseAddr(text)
	return a, isText && err == nil && !a.Is4In6()
}

func slirpPort(v any) (uint16, bool) {
	n, ok := integer(v)
	return uint16(n), ok && n >= 1 && n <= 65535
}

// integer is the whole number that v is.
func integer(v any) (int, bool) {
	f, ok := v.(float64)
	if !ok || f != float64(int32(f)) {
		return 0, false
	}
	return int(f), true
}

// slirpEntries are the forwards that the dialect can tell of: from an address, or all of them, and a port.
func (s *Server) slirpEntries() []slirpEntry {
	entries := []slirpEntry{}
	if s.cfg.Ports == nil {
		return entries
	}
	var own4, own6 netip.Addr
	info := s.cfg.Info()
	if info.IPv4 != nil {
		own4 = info.IPv4.Container.Addr()
		own6 = own4 // a client that speaks IPv6 gets there, too
	}
	if info.IPv6 != nil {
		own6 = info.IPv6.Container.Addr()
	}
	for _, f := range s.cfg.Ports.List() {
		if f.Spec.HostPath != "" {
			continue
		}
		proto := strings.TrimRight(f.Spec.Proto, "46")
		host, guest := f.Spec.Host, f.Spec.Container
		if !host.IsValid() {
			host = netip.IPv4Unspecified()
			if strings.HasSuffix(f.Spec.Proto, "6") {
				host = netip.IPv6Unspecified()
			}
		}
		if !guest.IsValid() {
			guest = own4
			if host.Is6() {
				guest = own6
			}
		}
		entries = append(entries, slirpEntry{f.ID, proto, host.String(), f.Spec.HostPort, guest.String(), f.Spec.ContainerPort})
	}
	return entries
}
