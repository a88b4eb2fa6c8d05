// Package client speaks to the control socket of a running usernet.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"

	"usernet/api"
	"usernet/network"
)

// maxError bounds what is read of an answer that is no error of ours.
const maxError = 64 << 10

// A Client asks one server. Its methods may be called concurrently. What the server refuses is an *api.Error.
type Client struct {
	path string
	http *http.Client
}

// New makes a client of the server at a socket. Nothing is connected yet.
func New(path string) *Client {
	var d net.Dialer
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", path) },
		DisableCompression: true,
		// A connection costs little here, and one kept alive may end just when the next request is sent.
		DisableKeepAlives: true,
	}}}
}

// Close lets go of what the Client holds. It can be used again.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Info tells what runs and how.
func (c *Client) Info(ctx context.Context) (info api.Info, err error) {
	err = c.do(ctx, http.MethodGet, "info", nil, &info)
	return info, err
}

// Add publishes all that is asked for, or nothing. Ports that the kernel has picked are in the answer, which has the order of
// the request: Publish, then Forwards.
func (c *Client) Add(ctx context.Context, request api.AddRequest) ([]api.Forward, error) {
	var out api.Forwards
	err := c.do(ctx, http.MethodPost, "forwards", request, &out)
	return out.Forwards, err
}

// List tells of all forwards.
func (c *Client) List(ctx context.Context) ([]api.Forward, error) {
	var out api.Forwards
	err := c.do(ctx, http.MethodGet, "forwards", nil, &out)
	return out.Forwards, err
}

// Get tells of one forward.
func (c *Client) Get(ctx context.Context, id int) (f api.Forward, err error) {
	err = c.do(ctx, http.MethodGet, "forwards/"+strconv.Itoa(id), nil, &f)
	return f, err
}

// Remove takes a forward away: new connections are refused at once. Those that stand are reset, or with drain left
// to end by themselves.
func (c *Client) Remove(ctx context.Context, id int, drain bool) error {
	path := "forwards/" + strconv.Itoa(id)
	if drain {
		path += "?drain=true"
	}
	return c.do(ctx, http.MethodDelete, path, nil, nil)
}

// Networks lists those of the shared mode.
func (c *Client) Networks(ctx context.Context) ([]network.Network, error) {
	var out api.NetworkList
	err := c.do(ctx, http.MethodGet, "networks", nil, &out)
	return out.Networks, err
}

// Network describes one, with its members.
func (c *Client) Network(ctx context.Context, name string) (n network.Network, err error) {
	err = c.do(ctx, http.MethodGet, "networks/"+url.PathEscape(name), nil, &n)
	return n, err
}

// CreateNetwork makes one.
func (c *Client) CreateNetwork(ctx context.Context, cfg network.Config) (n network.Network, err error) {
	err = c.do(ctx, http.MethodPost, "networks", cfg, &n)
	return n, err
}

// RemoveNetwork removes one that has no members.
func (c *Client) RemoveNetwork(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, "networks/"+url.PathEscape(name), nil, nil)
}

// Attach makes a namespace a member of a network.
func (c *Client) Attach(ctx context.Context, name string, request api.AttachRequest) (a api.Attached, err error) {
	err = c.do(ctx, http.MethodPost, "networks/"+url.PathEscape(name)+"/members", request, &a)
	return a, err
}

// Detach ends a membership.
func (c *Client) Detach(ctx context.Context, name, member string) error {
	return c.do(ctx, http.MethodDelete, "networks/"+url.PathEscape(name)+"/members/"+url.PathEscape(member), nil, nil)
}

// Metrics copies the counters to w, in Prometheus's text format.
func (c *Client) Metrics(ctx context.Context, w io.Writer) error {
	return c.request(ctx, http.MethodGet, "metrics", nil, func(body io.Reader) error {
		_, err := io.Copy(w, body)
		return err
	})
}

// do sends in, if it is not nil, and reads the answer into out, if that is not nil.
func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	return c.request(ctx, method, path, in, func(body io.Reader) error {
		if out == nil {
			return nil
		}
		return json.NewDecoder(body).Decode(out)
	})
}

func (c *Client) request(ctx context.Context, method, path string, in any, read func(io.Reader) error) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://usernet/v1/usernet/"+path, body)
	if err != nil {
		return err
	}
	if in != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	answer, err := c.http.Do(r)
	if err != nil {
		return c.explain(err)
	}
	defer answer.Body.Close()
	if answer.StatusCode/100 != 2 {
		return refusal(answer)
	}
	if err := read(answer.Body); err != nil {
		return fmt.Errorf("the answer of %s: %w", c.path, err)
	}
	return nil
}

// explain says what to do about a socket that does not answer.
func (c *Client) explain(err error) error {
	err = unwrapURL(err)
	dial, ok := errors.AsType[*net.OpError](err)
	switch dialling := ok && dial.Op == "dial"; {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s: %w", c.path, err)
	case dialling && errors.Is(err, syscall.ENOENT):
		return fmt.Errorf("%w: no usernet has its control socket there", err)
	case dialling && errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: the usernet that made this socket has ended", err)
	case dialling && errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%w: it belongs to another user", err)
	case dialling:
		return err
	}
	// net/http's error for an end that came before the request was sent has no name that others could use.
	early := strings.HasSuffix(err.Error(), "server closed idle connection")
	if !early && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("%s is the socket of something else, it seems: %w", c.path, err)
	}
	return fmt.Errorf("%s closed the connection without an answer: only the user who started it, and root, may ask: %w", c.path, err)
}

// unwrapURL takes off what net/http says of the URL, which is none that anybody knows.
func unwrapURL(err error) error {
	for {
		inner, ok := err.(interface {
			Unwrap() error
			Timeout() bool
		})
		if _, isNet := err.(*net.OpError); !ok || isNet {
			return err
		}
		err = inner.Unwrap()
	}
}

// refusal is the server's error.
func refusal(answer *http.Response) error {
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxError))
	if err != nil {
		return err
	}
	e := &api.Error{}
	if json.Unmarshal(body, e) != nil || e.Code == "" {
		*e = api.Error{Message: fmt.Sprintf("the server answered %s: %s", answer.Status, bytes.TrimSpace(body))}
	}
	e.Status = answer.StatusCode
	return e
}
