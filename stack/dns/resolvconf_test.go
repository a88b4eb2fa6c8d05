package dns

import (
	"reflect"
	"strings"
	"testing"
)

func TestParseResolvConf(t *testing.T) {
	for _, tt := range []struct {
		name, text               string
		servers, search, options string // fields
	}{
		{"empty", "", "127.0.0.1:53 [::1]:53", "", ""},
		{"plain", "nameserver 192.0.2.1\n", "192.0.2.1:53", "", ""},
		{"no newline at the end", "nameserver 192.0.2.1", "192.0.2.1:53", "", ""},
		{"tabs and CR", "nameserver\t192.0.2.1 \r\n", "192.0.2.1:53", "", ""},
		{"IPv6 and scope", "nameserver 2001:db8::1\nnameserver fe80::1%eth0\n", "[2001:db8::1]:53 [fe80::1%eth0]:53", "", ""},
		{"stub resolver", "# made by systemd\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n", "127.0.0.53:53", ".", "edns0 trust-ad"},
		{"mapped", "nameserver ::ffff:192.0.2.1\n", "192.0.2.1:53", "", ""},
		{"first three", "nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n",
			"192.0.2.1:53 192.0.2.2:53 192.0.2.3:53", "", ""},
		{"bad ones do not count", "nameserver\nnameserver x\nnameserver 1.2.3.4.5\nnameserver 192.0.2.9\n", "192.0.2.9:53", "", ""},
		{"comments", "#nameserver 192.0.2.1\n;nameserver 192.0.2.2\nnameserver 192.0.2.3#x\nnameserver 192.0.2.4;y\nnameserver 192.0.2.5 # z\n",
			"192.0.2.3:53 192.0.2.4:53 192.0.2.5:53", "", ""},
		{"last search counts", "search a.example b.example\nsearch c.example d.example\n", "127.0.0.1:53 [::1]:53", "c.example d.example", ""},
		{"domain after search", "search a.example b.example\ndomain c.example d.example\n", "127.0.0.1:53 [::1]:53", "c.example", ""},
		{"options add up", "options ndots:2\noptions rotate timeout:1\n", "127.0.0.1:53 [::1]:53", "", "ndots:2 rotate timeout:1"},
		{"unknown words", "lookup file bind\nfamily inet4\nsortlist 1.2.3.4\nnameservers 192.0.2.1\n", "127.0.0.1:53 [::1]:53", "", ""},
	} {
		s := parseResolvConf([]byte(tt.text))
		var servers []string
		for _, a := range s.servers {
			servers = append(servers, a.String())
		}
		if got := strings.Join(servers, " "); got != tt.servers {
			t.Errorf("%s: servers %q, want %q", tt.name, got, tt.servers)
		}
		if got := strings.Join(s.search, " "); got != tt.search {
			t.Errorf("%s: search %q, want %q", tt.name, got, tt.search)
		}
		if got := strings.Join(s.options, " "); got != tt.options {
			t.Errorf("%s: options %q, want %q", tt.name, got, tt.options)
		}
	}
}

func TestParseServer(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1":            "192.0.2.1:53",
		"192.0.2.1:5353":       "192.0.2.1:5353",
		"127.0.0.53":           "127.0.0.53:53",
		"2001:db8::1":          "[2001:db8::1]:53",
		"[2001:db8::1]":        "[2001:db8::1]:53",
		"[2001:db8::1]:5353":   "[2001:db8::1]:5353",
		"::1":                  "[::1]:53",
		"fe80::1%eth0":         "[fe80::1%eth0]:53",
		"[fe80::1%eth0]:5353":  "[fe80::1%eth0]:5353",
		"::ffff:192.0.2.1":     "192.0.2.1:53",
		"[::ffff:192.0.2.1]:5": "192.0.2.1:5",
		"":                     "not an address",
		"resolver.example":     "not an address",
		"192.0.2.1:":           "not an address",
		"192.0.2.1:65536":      "not an address",
		"192.0.2.1:domain":     "not an address",
		"[192.0.2.1]":          "not an address",
		"[192.0.2.1]:53":       "not an address",
		"2001:db8::1]:53":      "not an address",
		"192.0.2.1 ":           "not an address",
		"192.0.2.1:0":          "port 0",
		"[::1]:0":              "port 0",
		"0.0.0.0":              "write 127.0.0.1 or ::1",
		"::":                   "write 127.0.0.1 or ::1",
		"224.0.0.251":          "not the address of one host",
		"255.255.255.255":      "not the address of one host",
		"ff02::fb":             "not the address of one host",
		"fe80::1":              "fe80::1%eth0",
	} {
		got, err := ParseServer(in)
		if err != nil {
			if got.IsValid() || !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %v, want %q", in, err, want)
			}
			continue
		}
		if got.String() != want {
			t.Errorf("%q: %v, want %q", in, got, want)
		}
	}
}

// Whatever the octets, there are one to three servers on port 53, and words have no space
// in them; to write it down and read it again changes nothing.
func FuzzResolvConf(f *testing.F) {
	for _, s := range []string{
		"", "nameserver 192.0.2.1\nsearch a b\noptions x\n", "nameserver fe80::1%e\n", "#\n;\n\n \n", "domain a b\nnameserver 1;2\n",
		"nameserver 0.0.0.0\x00\nsearch \xff\n", "nameserver ::1%#\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		s := parseResolvConf(text)
		if len(s.servers) < 1 || len(s.servers) > maxServers {
			t.Fatalf("%d servers", len(s.servers))
		}
		var again strings.Builder
		for _, a := range s.servers {
			if !a.IsValid() || a.Port() != 53 || a.Addr() != a.Addr().Unmap() {
				t.Errorf("server %v", a)
			}
			again.WriteString("nameserver " + a.Addr().String() + "\n")
		}
		for _, w := range append(append([]string(nil), s.search...), s.options...) {
			if w == "" || strings.ContainsAny(w, " \t\r\n") {
				t.Errorf("word %q", w)
			}
		}
		if len(s.search) > 0 {
			again.WriteString("search " + strings.Join(s.search, " ") + "\n")
		}
		if len(s.options) > 0 {
			again.WriteString("options " + strings.Join(s.options, " ") + "\n")
		}
		if back := parseResolvConf([]byte(again.String())); !reflect.DeepEqual(s, back) {
			t.Errorf("%+v\nbecame %+v", s, back)
		}
	})
}
