package api

import (
	"context"
	"errors"
	"net/http"
	"net/netip"

	"usernet/network"
)

// Networks is what the server asks of the daemon of the shared mode. Its methods are called concurrently.
type Networks interface {
	Create(ctx context.Context, cfg network.Config) (network.Network, error)
	List() []network.Network
	Get(name string) (network.Network, error)
	Remove(ctx context.Context, name string) error

	Attach(ctx context.Context, name string, request AttachRequest) (Attached, error)
	Detach(ctx context.Context, name, member string) error
}

// An AttachRequest says who joins a network. Zero values leave it to the daemon.
type AttachRequest struct {
	PID  int    `json:"pid,omitempty"`  // a process in the namespace, or
	Path string `json:"path,omitempty"` // a path of it, absolute

	Name    string      `json:"name"`
	Aliases []string    `json:"aliases,omitempty"`
	IPv4    netip.Addr  `json:"ipv4,omitzero"`
	IPv6    netip.Addr  `json:"ipv6,omitzero"`
	MAC     network.MAC `json:"mac,omitzero"`
	Ifname  string      `json:"ifname,omitempty"`
	Publish []string    `json:"publish,omitempty"` // as after -p
}

// Attached is what became of it.
type Attached struct {
	Member  network.Member `json:"member"`
	Socket  string         `json:"socket"`            // the member's control socket
	Search  []string       `json:"search,omitempty"`  // for its resolv.conf, beside the resolver at the gateway
	Options []string       `json:"options,omitempty"` // of the host's resolv.conf
}

// NetworkList is what GET /v1/usernet/networks answers.
type NetworkList struct {
	Networks []network.Network `json:"networks"`
}

// networks are the paths that the daemon of the shared mode has besides.
func (s *Server) networks() map[string]map[string]http.HandlerFunc {
	n := s.cfg.Networks
	if n == nil {
		return nil
	}
	return map[string]map[string]http.HandlerFunc{
		"/v1/usernet/networks": {
			"GET": func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, NetworkList{n.List()}) },
			"POST": func(w http.ResponseWriter, r *http.Request) {
				var cfg network.Config
				err := decode(r.Body, &cfg)
				var made network.Network
				if err == nil {
					made, err = n.Create(r.Context(), cfg)
				}
				answerOr(w, http.StatusCreated, made, err)
			},
		},
		"/v1/usernet/networks/{network}": {
			"GET": func(w http.ResponseWriter, r *http.Request) {
				is, err := n.Get(r.PathValue("network"))
				answerOr(w, http.StatusOK, is, err)
			},
			"DELETE": func(w http.ResponseWriter, r *http.Request) {
				answerOr(w, http.StatusNoContent, nil, n.Remove(r.Context(), r.PathValue("network")))
			},
		},
		"/v1/usernet/networks/{network}/members": {
			"POST": func(w http.ResponseWriter, r *http.Request) {
				var request AttachRequest
				err := decode(r.Body, &request)
				var joined Attached
				if err == nil {
					joined, err = n.Attach(r.Context(), r.PathValue("network"), request)
				}
				answerOr(w, http.StatusCreated, joined, err)
			},
		},
		"/v1/usernet/networks/{network}/members/{member}": {
			"DELETE": func(w http.ResponseWriter, r *http.Request) {
				answerOr(w, http.StatusNoContent, nil, n.Detach(r.Context(), r.PathValue("network"), r.PathValue("member")))
			},
		},
	}
}

// answerOr answers with v, which 204 has none of, or with the error.
func answerOr(w http.ResponseWriter, status int, v any, err error) {
	switch {
	case err != nil:
		failWith(w, err)
	case status == http.StatusNoContent:
		w.WriteHeader(status)
	default:
		answer(w, status, v)
	}
}

// networkProblem gives errors of package network their status and code.
func networkProblem(err error) (status int, code string, ok bool) {
	switch {
	case errors.Is(err, network.ErrInvalid):
		return http.StatusBadRequest, CodeBadRequest, true
	case errors.Is(err, network.ErrNotFound):
		return http.StatusNotFound, CodeNotFound, true
	case errors.Is(err, network.ErrConflict):
		return http.StatusConflict, CodeConflict, true
	case errors.Is(err, network.ErrExhausted):
		return http.StatusConflict, CodeExhausted, true
	}
	return 0, "", false
}
