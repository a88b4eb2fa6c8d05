package network

import (
	"strconv"
	"strings"
)

// Zone is the domain below which each network has its own, unless it is given another: web.usernet.internal. The resolver answers
// for all of it, so that no name in it is ever asked elsewhere. "internal" is reserved for names that mean something in one place
// only (ICANN, 2024), where a top-level domain of our own could be sold to somebody tomorrow.
const Zone = "usernet.internal"

const (
	maxLabel  = 63               // RFC 1035 §2.3.4
	maxName   = 253              // in text, without the last dot; the same section
	maxDomain = maxName - 1 - 63 // with room for the longest member's name before it
)

// checkName looks at the name of a network or a member. It has to be a label of the DNS, a part of a file's name and
// an argument that is no flag; of these the DNS asks most. The underscore is no host name's (RFC 1123 §2.1), but
// in those that people give their containers, and resolvers look it up.
func checkName(what, s string) error {
	if err := checkLabel(what, s, s); err != nil {
		return err
	}
	return checkLast(what, s, s)
}

// checkDotted looks at a name of one label or more.
func checkDotted(what, s string, longest int) error {
	if len(s) > longest {
		return invalidf("%s %q: has %d octets, and %d are possible", what, s, len(s), longest)
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if err := checkLabel(what, s, l); err != nil {
			return err
		}
	}
	return checkLast(what, s, labels[len(labels)-1])
}

func checkLabel(what, s, label string) error {
	bad := len(label) == 0 || len(label) > maxLabel
	for i := 0; i < len(label) && !bad; i++ {
		c := label[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		inside := i > 0 && i < len(label)-1
		bad = !alnum && (!inside || c != '-' && c != '_')
	}
	if !bad {
		return nil
	}
	hint := ""
	if low := strings.ToLower(label); low != label && checkLabel(what, low, low) == nil {
		hint = "; did you mean " + strconv.Quote(strings.ToLower(s)) + "?"
	}
	return invalidf("%s %q: must be 1 to 63 of a-z, 0-9, - and _, with a letter or digit at both ends%s", what, s, hint)
}

// checkLast refuses names that programs do not look up: what inet_aton(3) takes for an address, and those that resolvers
// answer themselves (RFC 6761 §6.3, RFC 6762 §3).
func checkLast(what, s, label string) error {
	digits, base := label, 10
	if rest, ok := strings.CutPrefix(label, "0x"); ok {
		digits, base = rest, 16
	}
	if _, err := strconv.ParseUint(digits, base, 32); err == nil {
		return invalidf("%s %q: programs take %q for an address, and would never ask for it: put a letter into it", what, s, label)
	}
	if label == "localhost" || label == "local" && s != label {
		return invalidf("%s %q: programs do not ask a name server for %q: choose another", what, s, label)
	}
	return nil
}

// checkDomain looks at the domain of a network of that name.
func checkDomain(network, domain string) error {
	if domain == network+"."+Zone {
		return nil
	}
	if err := checkDotted("domain", domain, maxDomain); err != nil {
		return err
	}
	if within(domain, Zone) {
		return invalidf("domain %q: what is in %s belongs to other networks: choose another, or leave --dns-domain out for %s.%s", domain, Zone, network, Zone)
	}
	if domain == "local" || within(domain, "arpa") {
		return invalidf("domain %q: means something else (RFC 6762, RFC 3172): choose another, or leave --dns-domain out for %s.%s", domain, network, Zone)
	}
	return nil
}

// within tells whether a name is a domain or below it.
func within(name, domain string) bool {
	rest, ok := strings.CutSuffix(name, domain)
	return ok && (rest == "" || strings.HasSuffix(rest, "."))
}

// checkIfname looks at what a member's interface is to be called: dev_valid_name of the kernel, without names that mean others.
func checkIfname(s string) error {
	bad := len(s) == 0 || len(s) > 15 || s[0] == '-' || s == "." || s == ".."
	for i := 0; i < len(s) && !bad; i++ {
		bad = s[i] <= ' ' || s[i] > '~' || strings.IndexByte("/:%", s[i]) >= 0
	}
	if bad {
		return invalidf("interface %q: must be 1 to 15 printable characters, without / : and %%, and not begin with -", s)
	}
	if s == "lo" || s == "all" || s == "default" {
		return invalidf("interface %q: is another one, or all of them, to the kernel: choose another name", s)
	}
	return nil
}
