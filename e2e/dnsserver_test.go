package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// serveDNS answers in the zone "test" by UDP and TCP on port 53 of an address outside:
//
//	NAME.test      A 198.51.100.9, AAAA 2001:db8:1::9
//	who.test       TXT the server's address
//	edns.test      TXT the size that the question's EDNS offers, 0 without
//	big.test       TXT 40 strings of 100 octets; cut and marked when the client's size is smaller
//	fail.test      SERVFAIL
//	absent.test    NXDOMAIN
//	mute.test      nothing at all
func serveDNS(t testing.TB, addr string) {
	t.Helper()
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := answerDNS(q, addr)
		if m == nil {
			return
		}
		if w.LocalAddr().Network() == "udp" {
			size := dns.MinMsgSize
			if opt := q.IsEdns0(); opt != nil {
				size = max(size, int(opt.UDPSize()))
			}
			m.Truncate(size)
		}
		w.WriteMsg(m)
	})
	at := "[" + addr + "]:53"
	if !strings.Contains(addr, ":") {
		at = addr + ":53"
	}
	for _, s := range []*dns.Server{
		{PacketConn: lab.outside.listenUDP(t, at), Handler: handler},
		{Listener: lab.outside.listen(t, at), Handler: handler},
	} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		done := make(chan error, 1)
		go func() { done <- s.ActivateAndServe() }()
		select {
		case <-started:
		case err := <-done:
			t.Fatalf("DNS server on %s: %v", addr, err)
		}
		t.Cleanup(func() {
			s.Shutdown()
			<-done
		})
	}
}

func answerDNS(q *dns.Msg, server string) *dns.Msg {
	m := new(dns.Msg)
	m.SetReply(q)
	m.RecursionAvailable = true
	if opt := q.IsEdns0(); opt != nil {
		m.SetEdns0(4096, opt.Do())
	}
	if len(q.Question) != 1 {
		m.Rcode = dns.RcodeFormatError
		return m
	}
	question := q.Question[0]
	add := func(format string, args ...any) {
		rr, err := dns.NewRR(question.Name + " 60 IN " + fmt.Sprintf(format, args...))
		if err != nil {
			panic(err) // the text is this file's
		}
		if rr.Header().Rrtype == question.Qtype {
			m.Answer = append(m.Answer, rr)
		}
	}
	name := strings.ToLower(question.Name)
	switch {
	case name == "mute.test.":
		return nil
	case name == "fail.test.":
		m.Rcode = dns.RcodeServerFailure
	case name == "absent.test." || !strings.HasSuffix(name, ".test."):
		m.Rcode = dns.RcodeNameError
	case name == "who.test.":
		add("TXT %q", server)
	case name == "edns.test.":
		size := uint16(0)
		if opt := q.IsEdns0(); opt != nil {
			size = opt.UDPSize()
		}
		add("TXT \"%d\"", size)
	case name == "big.test.":
		for i := range 40 {
			add("TXT %q", fmt.Sprintf("%02d%s", i, strings.Repeat("x", 98)))
		}
	default:
		add("A 198.51.100.9")
		add("AAAA 2001:db8:1::9")
	}
	return m
}
