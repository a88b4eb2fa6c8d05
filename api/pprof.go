package api

import (
	"context"
	"net/http"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"
)

// profiles answers below /v1/usernet/debug/pprof/ by runtime/pprof; net/http/pprof would put the same on the default mux
// of every program that links us.
func (s *Server) profiles(mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/usernet/debug/pprof/{name}", func(w http.ResponseWriter, r *http.Request) {
		name := r.PathValue("name")
		if name == "profile" {
			cpuProfile(w, r)
			return
		}
		p := pprof.Lookup(name)
		if p == nil {
			var names []string
			for _, p := range pprof.Profiles() {
				names = append(names, p.Name())
			}
			fail(w, &Error{Status: http.StatusNotFound, Code: CodeNotFound, Message: "no such profile; there are profile, " + strings.Join(names, ", ")})
			return
		}
		if gc, _ := strconv.Atoi(r.FormValue("gc")); name == "heap" && gc > 0 {
			runtime.GC() // what is left is in use, as with net/http/pprof
		}
		debug, _ := strconv.Atoi(r.FormValue("debug"))
		contentType := "application/octet-stream"
		if debug > 0 {
			contentType = "text/plain; charset=utf-8"
		}
		w.Header().Set("Content-Type", contentType)
		_ = p.WriteTo(w, debug)
	})
}

// cpuProfile profiles for ?seconds= (1 to 60, 10 without), or until the client goes.
func cpuProfile(w http.ResponseWriter, r *http.Request) {
	seconds := 10
	if text := r.FormValue("seconds"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > 60 {
			fail(w, &Error{Status: http.StatusBadRequest, Code: CodeBadRequest, Message: "seconds is a number from 1 to 60"})
			return
		}
		seconds = n
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(time.Duration(seconds)*time.Second + answerPatience))
	w.Header().Set("Content-Type", "application/octet-stream")
	if err := pprof.StartCPUProfile(w); err != nil {
		fail(w, &Error{Status: http.StatusServiceUnavailable, Code: CodeBusy, Message: err.Error() + ": one profile at a time"})
		return
	}
	defer pprof.StopCPUProfile()
	ctx, cancel := context.WithTimeout(r.Context(), time.Duration(seconds)*time.Second)
	defer cancel()
	<-ctx.Done()
}
