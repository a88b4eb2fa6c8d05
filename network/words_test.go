package network

import (
	"fmt"
	"strings"
	"testing"
)

func TestCheckName(t *testing.T) {
	long := strings.Repeat("a", 63)
	for name, word := range map[string]string{
		"web": "", "a": "", "my_app-2": "", "2048-game": "", "eth0": "", long: "", "0xg": "", "99999999999": "", "local": "", "0": "address",
		"": "1 to 63", long + "a": "1 to 63", "-web": "1 to 63", "web-": "1 to 63", "_web": "1 to 63", "a.b": "1 to 63", "a/b": "1 to 63",
		"..": "1 to 63", "a b": "1 to 63", "é": "1 to 63", "a\x00b": "1 to 63", "Web": `did you mean "web"?`, "-Web": "both ends",
		"42": "address", "4294967295": "address", "0x7f000001": "address", "localhost": "name server",
	} {
		err := checkName("name", name)
		if word == "" {
			want(t, err, nil)
		} else {
			want(t, err, ErrInvalid, word)
		}
	}
}

func TestAliases(t *testing.T) {
	label := strings.Repeat("a", 63)
	for alias, word := range map[string]string{
		"db": "", "db.example.org": "", "1.2.3.x": "", label + "." + label + "." + label + "." + label[:61]: "",
		"": "1 to 63", "db.": "1 to 63", ".db": "1 to 63", "a..b": "1 to 63", "DB.example.org": `did you mean "db.example.org"?`,
		"10.89.0.5": "address", "db.0x10": "address", "x.localhost": "name server", "db.local": "name server",
		label + "." + label + "." + label + "." + label[:62]: "253 are possible",
	} {
		_, err := checkAliases("web", []string{alias})
		if word == "" {
			want(t, err, nil)
		} else {
			want(t, err, ErrInvalid, word)
		}
	}
	got, err := checkAliases("web", []string{"a", "web", "b", "a"})
	want(t, err, nil)
	if strings.Join(got, " ") != "a b" {
		t.Error(got)
	}
	many := make([]string, maxAliases+1)
	for i := range many {
		many[i] = fmt.Sprint("n-", i)
	}
	_, err = checkAliases("web", many)
	want(t, err, ErrExhausted, "64")
}

func TestCheckDomain(t *testing.T) {
	for domain, word := range map[string]string{
		"web.usernet.internal": "", "lab": "", "example.org": "", "my_lab.x": "", "xusernet.internal": "", "internal": "",
		"db.usernet.internal": "other networks", "x.web.usernet.internal": "other networks", "usernet.internal": "other networks",
		"": "1 to 63", "lab.": "1 to 63", "Lab": `"lab"`, "10": "address", "a.local": "name server", "local": "RFC 6762",
		"arpa": "RFC 3172", "10.in-addr.arpa": "RFC 3172", "localhost": "name server",
		strings.Repeat("a.", 94) + "a": "", strings.Repeat("a.", 94) + "aa": "189 are possible",
	} {
		err := checkDomain("web", domain)
		if word == "" {
			want(t, err, nil)
		} else {
			want(t, err, ErrInvalid, word)
		}
	}
	// The longest name of a member fits before the longest domain.
	if n := maxDomain + 1 + maxLabel; n != maxName {
		t.Error(n)
	}
}

func TestCheckIfname(t *testing.T) {
	for name, word := range map[string]string{
		"eth0": "", "a": "", "wg-home": "", "eth0.5": "", "a2345678901234b": "",
		"": "15", "a2345678901234bc": "15", ".": "15", "..": "15", "a/b": "15", "a b": "15", "a:1": "15", "a%d": "15", "-a": "15", "é": "15", "a\n": "15",
		"lo": "another", "all": "another", "default": "another",
	} {
		err := checkIfname(name)
		if word == "" {
			want(t, err, nil)
		} else {
			want(t, err, ErrInvalid, word)
		}
	}
}

func TestMAC(t *testing.T) {
	own := addr("10.89.1.5")
	for text, word := range map[string]string{
		"02:00:00:00:00:01": "", "00:16:3e:01:02:03": "", "52:54:00:12:34:56": "", "52:56:0a:59:01:05": "",
		"52:56:0a:59:01:06": "own", "52:55:0a:59:01:01": "own", "52:57:0a:59:01:01": "own: choose another, such as 02:57:0a:59:01:01",
		"01:00:5e:00:00:01": "multicast", "ff:ff:ff:ff:ff:ff": "multicast", "00:00:00:00:00:00": "no interface",
	} {
		err := mac(text).check(own)
		if word == "" {
			want(t, err, nil)
		} else {
			want(t, err, ErrInvalid, word)
		}
	}
	for _, bad := range []string{"", "02:00:00:00:00", "02:00:00:00:00:00:00:01", "x"} {
		_, err := ParseMAC(bad)
		want(t, err, ErrInvalid, "six octets")
	}
	for _, m := range []MAC{{}, {2, 0, 0, 0, 0, 1}} {
		b, err := m.MarshalText()
		want(t, err, nil)
		back := MAC{9}
		want(t, back.UnmarshalText(b), nil)
		if back != m {
			t.Errorf("%q: %v", b, back)
		}
	}
	var m MAC
	want(t, m.UnmarshalText([]byte("1:2")), ErrInvalid)
}
