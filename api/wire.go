package api

import (
	"fmt"
	"net/netip"
	"time"

	"usernet/portdriver"
)

// Version is that of the API below /v1/usernet, not of the program. The second number grows with what is added,
// the first with what is taken away; the path has the first.
const Version = "1.0"

// A Spec is a forward to be: from a port or a socket file of the host to a port of the container.
type Spec struct {
	Proto         string     `json:"proto"`              // tcp, tcp4, tcp6, udp, udp4 or udp6
	Host          netip.Addr `json:"host,omitzero"`      // address of the host to listen at; none: all
	HostPort      uint16     `json:"hostPort,omitempty"` // 0: the kernel picks one
	HostPath      string     `json:"hostPath,omitempty"` // of a Unix socket to listen at, instead of Host and HostPort
	Container     netip.Addr `json:"container,omitzero"` // none: the container's own, of the client's family
	ContainerPort uint16     `json:"containerPort"`
}

// A Forward is one that stands, with what it has done so far. Octets are payload.
type Forward struct {
	ID int `json:"id"` // from 1, never used again
	Spec
	Auto      bool   `json:"auto"`           // published because somebody listens there
	Path      string `json:"path"`           // what new connections take: kernel, stack, or tap (UDP, as a rule)
	Note      string `json:"note,omitempty"` // why not the kernel's, and the like
	Active    uint64 `json:"active"`         // connections, or clients of UDP, now
	Total     uint64 `json:"total"`          // since the start
	Refused   uint64 `json:"refused"`        // that the container did not take
	OctetsIn  uint64 `json:"octetsIn"`       // host → container
	OctetsOut uint64 `json:"octetsOut"`      // container → host
	Draining  bool   `json:"draining"`       // removed, but connections remain
}

// Forwards is what POST and GET /v1/usernet/forwards answer.
type Forwards struct {
	Forwards []Forward `json:"forwards"`
}

// An AddRequest asks for forwards: all of them, or none where one is not to be had.
type AddRequest struct {
	Publish  []string `json:"publish,omitempty"`  // as after -p: "127.0.0.1:8080:80/tcp", "9000-9010:9000-9010"
	Forwards []Spec   `json:"forwards,omitempty"` // the same, taken apart
}

// An Error is the body of every answer of ours that is not 2xx.
type Error struct {
	Status   int    `json:"-"`                  // of HTTP
	Code     string `json:"code"`               // what to branch on; the constants below
	Message  string `json:"message"`            // what to show, with the remedy
	Conflict int    `json:"conflict,omitempty"` // ID of the forward that is in the way, with CodeConflict
}

func (e *Error) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("the server answered %d", e.Status)
	}
	return e.Message
}

// What an Error.Code can be.
const (
	CodeBadRequest   = "bad-request"   // 400: not understood, or it cannot mean anything
	CodeUnknownID    = "unknown-id"    // 404
	CodeNotFound     = "not-found"     // 404: no such path
	CodeMethod       = "method"        // 405
	CodeConflict     = "conflict"      // 409: another forward is there, or another network or member has it
	CodeExhausted    = "exhausted"     // 409: no address, or no place for another, is left
	CodeInUse        = "in-use"        // 409: somebody else listens there
	CodeNotAvailable = "not-available" // 409: not an address of this host
	CodeNotPermitted = "not-permitted" // 403: a privileged port, and the like
	CodeTooLarge     = "too-large"     // 413
	CodeBusy         = "busy"          // 503: out of descriptors or memory, or about to end
	CodeInternal     = "internal"      // 500
)

// Info says what runs and how. Its zero values are left out, except where zero says something.
type Info struct {
	APIVersion string    `json:"apiVersion"`
	Version    string    `json:"version"` // of the program
	PID        int       `json:"pid"`
	Started    time.Time `json:"started"`

	Namespace    string `json:"namespace"`              // the network namespace that it serves, as it was named
	ContainerPID int    `json:"containerPID,omitempty"` // where it was named so, or started by us

	Interface Interface  `json:"interface"`
	IPv4      *Addresses `json:"ipv4,omitempty"`
	IPv6      *Addresses `json:"ipv6,omitempty"`
	Sandbox   bool       `json:"sandbox"`

	Ports *portdriver.Info `json:"ports,omitempty"` // absent: nothing can be published
}

// Interface is the container's TAP.
type Interface struct {
	Name     string   `json:"name"`
	MTU      int      `json:"mtu"` // octets of an IP packet
	MAC      string   `json:"mac,omitempty"`
	Queues   int      `json:"queues"`
	Offloads []string `json:"offloads"` // in use: csum, tso4, tso6, tso_ecn, uso4, uso6
}

// Addresses are those of one family.
type Addresses struct {
	Container netip.Prefix `json:"container"`
	Gateway   netip.Addr   `json:"gateway"`
	DNS       netip.Addr   `json:"dns,omitzero"`
}

func forwardOf(f portdriver.Forward) Forward {
	return Forward{
		ID: f.ID, Spec: specOf(f.Spec), Auto: f.Auto, Path: f.Path, Note: f.Note,
		Active: f.Active, Total: f.Total, Refused: f.Refused, OctetsIn: f.OctetsIn, OctetsOut: f.OctetsOut, Draining: f.Draining,
	}
}

func specOf(s portdriver.Spec) Spec {
	return Spec{Proto: s.Proto, Host: s.Host, HostPort: s.HostPort, HostPath: s.HostPath, Container: s.Container, ContainerPort: s.ContainerPort}
}

func (s Spec) driver() portdriver.Spec {
	return portdriver.Spec{Proto: s.Proto, Host: s.Host, HostPort: s.HostPort, HostPath: s.HostPath, Container: s.Container, ContainerPort: s.ContainerPort}
}
