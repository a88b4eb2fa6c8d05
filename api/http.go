package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	rootlesskit "github.com/rootless-containers/rootlesskit/v3/pkg/api"
	"github.com/rootless-containers/rootlesskit/v3/pkg/api/router"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"golang.org/x/sys/unix"

	"usernet/portdriver"
)

// noPorts is what is said of ports where there is no driver for them.
const noPorts = "usernet publishes no ports here"

// handler is all that is spoken over HTTP.
func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	router.AddRoutes(mux, s.rootlesskit())

	paths := map[string]map[string]http.HandlerFunc{
		"/v1/usernet/info":          {"GET": s.getInfo},
		"/v1/usernet/metrics":       {"GET": s.getMetrics},
		"/v1/usernet/forwards":      {"GET": s.getForwards, "POST": s.postForwards},
		"/v1/usernet/forwards/{id}": {"GET": s.getForward, "DELETE": s.deleteForward},
	}
	maps.Copy(paths, s.networks())
	for path, methods := range paths {
		for method, h := range methods {
			mux.HandleFunc(method+" "+path, h)
		}
		var allowed []string
		if methods["GET"] != nil {
			allowed = append(allowed, "GET", "HEAD")
		}
		for _, m := range []string{"POST", "DELETE"} {
			if methods[m] != nil {
				allowed = append(allowed, m)
			}
		}
		allow := strings.Join(allowed, ", ")
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", allow)
			fail(w, &Error{Status: http.StatusMethodNotAllowed, Code: CodeMethod, Message: r.Method + " means nothing here; there is " + allow})
		})
	}
	if s.cfg.Pprof {
		s.profiles(mux)
	}
	mux.HandleFunc("/v1/usernet/", func(w http.ResponseWriter, r *http.Request) {
		fail(w, &Error{Status: http.StatusNotFound, Code: CodeNotFound, Message: "there is no " + r.URL.Path})
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.begin() {
			panic(http.ErrAbortHandler)
		}
		defer s.serving.Done()
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		mux.ServeHTTP(w, r)
	})
}

// rootlesskit is what its router asks.
func (s *Server) rootlesskit() *router.Backend {
	b := &router.Backend{
		StateDir:      filepath.Dir(s.file.Path()),
		ChildPID:      s.info().ContainerPID,
		NetworkDriver: networkInfo{s},
	}
	if s.cfg.Rootlesskit != nil {
		b.PortDriver = portBackend{s.cfg.Rootlesskit, s}
	}
	return b
}

// networkInfo describes the network in rootlesskit's words.
type networkInfo struct{ s *Server }

func (n networkInfo) Info(context.Context) (*rootlesskit.NetworkDriverInfo, error) {
	info := n.s.info()
	out := &rootlesskit.NetworkDriverInfo{Driver: "usernet", IPv6: info.IPv6 != nil}
	for _, a := range []*Addresses{info.IPv4, info.IPv6} {
		if a == nil {
			continue
		}
		if out.ChildIP == nil {
			out.ChildIP = net.IP(a.Container.Addr().AsSlice())
		}
		if a.DNS.IsValid() {
			out.DNS = append(out.DNS, net.IP(a.DNS.AsSlice()))
		}
	}
	return out, nil
}

// portBackend is a Manager that says which it is.
type portBackend struct {
	port.Manager
	s *Server
}

func (p portBackend) Info(context.Context) (*rootlesskit.PortDriverInfo, error) {
	out := &rootlesskit.PortDriverInfo{Driver: "usernet", Protos: portdriver.Protos}
	// dockerd then publishes to the container's address and not to its loopback.
	if ports := p.s.info().Ports; ports != nil && ports.IPv4 != nil {
		out.DisallowLoopbackChildIP = !ports.IPv4.Loopback
	}
	return out, nil
}

// info is what the Config says, filled up.
func (s *Server) info() Info {
	info := s.cfg.Info()
	info.APIVersion, info.PID = Version, os.Getpid()
	if info.Interface.Offloads == nil {
		info.Interface.Offloads = []string{}
	}
	if info.Ports == nil {
		info.Ports = s.portsInfo()
	}
	return info
}

// portsInfo is what the driver says of itself, if it does.
func (s *Server) portsInfo() *portdriver.Info {
	d, ok := s.cfg.Ports.(interface{ Info() portdriver.Info })
	if !ok {
		return nil
	}
	ports := d.Info()
	return &ports
}

func (s *Server) getInfo(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, s.info()) }

// getForwards writes them one by one: 10 000 are some 3 MB, which need not lie in memory at once.
func (s *Server) getForwards(w http.ResponseWriter, _ *http.Request) {
	var list []portdriver.Forward
	if s.cfg.Ports != nil {
		list = s.cfg.Ports.List()
	}
	writeForwards(w, http.StatusOK, list)
}

func writeForwards(w http.ResponseWriter, status int, list []portdriver.Forward) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	b := bufio.NewWriterSize(w, 16<<10)
	_, _ = b.WriteString(`{"forwards":[`)
	e := json.NewEncoder(b)
	for i := range list {
		if i > 0 {
			_ = b.WriteByte(',')
		}
		_ = e.Encode(forwardOf(list[i]))
	}
	_, _ = b.WriteString("]}\n")
	_ = b.Flush() // a client that has gone needs no answer
}

func (s *Server) postForwards(w http.ResponseWriter, r *http.Request) {
	specs, err := readAdd(r.Body)
	if err != nil {
		failWith(w, err)
		return
	}
	if s.cfg.Ports == nil {
		fail(w, badRequest("%s", noPorts))
		return
	}
	added, err := s.cfg.Ports.Add(r.Context(), specs...)
	if err != nil {
		failWith(w, err)
		return
	}
	writeForwards(w, http.StatusCreated, added)
}

// readAdd reads an AddRequest.
func readAdd(body io.Reader) ([]portdriver.Spec, error) {
	var request AddRequest
	if err := decode(body, &request); err != nil {
		return nil, err
	}
	var specs []portdriver.Spec
	for _, text := range request.Publish {
		more, err := portdriver.ParseSpec(text)
		if err != nil {
			return nil, badRequest("%v", err)
		}
		if specs = append(specs, more...); len(specs) > maxAdd {
			break
		}
	}
	for _, f := range request.Forwards {
		specs = append(specs, f.driver())
	}
	for _, s := range specs {
		if s.HostPath != "" && !filepath.IsAbs(s.HostPath) {
			return nil, badRequest("%q is not an absolute path: a client's directory is not known here", s.HostPath)
		}
	}
	switch {
	case len(specs) == 0:
		return nil, badRequest(`nothing to publish: "publish" or "forwards" must say what`)
	case len(specs) > maxAdd:
		return nil, &Error{Status: http.StatusRequestEntityTooLarge, Code: CodeTooLarge, Message: fmt.Sprintf("more than %d forwards in one request", maxAdd)}
	}
	return specs, nil
}

func (s *Server) getForward(w http.ResponseWriter, r *http.Request) {
	id, err := s.forwardID(r)
	if err != nil {
		failWith(w, err)
		return
	}
	f, ok := s.cfg.Ports.Get(id)
	if !ok {
		failWith(w, portdriver.ErrUnknownID{ID: id})
		return
	}
	answer(w, http.StatusOK, forwardOf(f))
}

// deleteForward takes a forward away. With ?drain=true its connections live on until they end by themselves.
func (s *Server) deleteForward(w http.ResponseWriter, r *http.Request) {
	id, err := s.forwardID(r)
	if err != nil {
		failWith(w, err)
		return
	}
	drain, err := readDrain(r.URL.RawQuery)
	if err != nil {
		failWith(w, err)
		return
	}
	if err := s.cfg.Ports.Remove(r.Context(), id, drain); err != nil {
		failWith(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// readDrain is as strict as readAdd: who has misspelt drain wants no connection to be reset.
func readDrain(query string) (drain bool, err error) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return false, badRequest("%v", err)
	}
	for key, value := range values {
		if key != "drain" || len(value) > 1 {
			return false, badRequest("?%s: there is drain, once, and nothing else", query)
		}
		if drain, err = strconv.ParseBool(value[0]); err != nil {
			return false, badRequest("drain is true or false, not %q", value[0])
		}
	}
	return drain, nil
}

func (s *Server) forwardID(r *http.Request) (int, error) {
	text := r.PathValue("id")
	id, err := strconv.ParseInt(text, 10, 32)
	if err != nil {
		return 0, badRequest("%q is no ID of a forward", text)
	}
	if s.cfg.Ports == nil {
		return 0, portdriver.ErrUnknownID{ID: int(id)}
	}
	return int(id), nil
}

func answer(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		fail(w, &Error{Status: http.StatusInternalServerError, Code: CodeInternal, Message: err.Error()})
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n'))
}

func badRequest(format string, args ...any) *Error {
	return &Error{Status: http.StatusBadRequest, Code: CodeBadRequest, Message: fmt.Sprintf(format, args...)}
}

func fail(w http.ResponseWriter, e *Error) { answer(w, e.Status, e) }

func failWith(w http.ResponseWriter, err error) { fail(w, problem(err)) }

// problem puts an error into the words of the API.
func problem(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	e := &Error{Status: http.StatusBadRequest, Code: CodeBadRequest, Message: err.Error()}
	is := func(status int, code string) *Error {
		e.Status, e.Code = status, code
		return e
	}
	if conflict, ok := errors.AsType[portdriver.ErrConflict](err); ok {
		e.Conflict = conflict.ID
		return is(http.StatusConflict, CodeConflict)
	}
	if status, code, ok := networkProblem(err); ok {
		return is(status, code)
	}
	switch {
	case errors.As(err, new(portdriver.ErrUnknownID)):
		return is(http.StatusNotFound, CodeUnknownID)
	case errors.As(err, new(*http.MaxBytesError)):
		return is(http.StatusRequestEntityTooLarge, CodeTooLarge)
	case errors.Is(err, unix.EADDRINUSE):
		return is(http.StatusConflict, CodeInUse)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return is(http.StatusConflict, CodeNotAvailable)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return is(http.StatusForbidden, CodeNotPermitted)
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.Is(err, portdriver.ErrClosed), errors.As(err, new(portdriver.ErrLimit)):
		return is(http.StatusServiceUnavailable, CodeBusy)
	}
	return e
}
