package slirp4netns

import (
	"fmt"
	"strings"
)

// An option is one that the command line has.
type option struct {
	name  string // without "--"
	short byte   // 0: none
	arg   bool   // it takes one
}

// options are in slirp4netns's order, in which an ambiguity lists them. Two are old names that help does not tell of.
var options = []option{
	{"configure", 'c', false},
	{"exit-fd", 'e', true},
	{"ready-fd", 'r', true},
	{"mtu", 'm', true},
	{"cidr", 0, true},
	{"disable-host-loopback", 0, false},
	{"no-host-loopback", 0, false}, // now disable-host-loopback
	{"netns-type", 0, true},
	{"userns-path", 0, true},
	{"api-socket", 'a', true},
	{"enable-ipv6", '6', false},
	{"enable-sandbox", 0, false},
	{"create-sandbox", 0, false}, // now enable-sandbox
	{"enable-seccomp", 0, false},
	{"help", 'h', false},
	{"version", 'v', false},
	{"outbound-addr", 0, true},
	{"outbound-addr6", 0, true},
	{"disable-dns", 0, false},
	{"macaddress", 0, true},
	{"target-type", 0, true},
}

// getopt calls each for the options of args one after the other, by their long name, and returns what is no option. Options may
// stand behind those; behind "--" there are none. Long ones may be cut short as long as one alone is meant.
// program begins the messages, as getopt_long has it. It ends with the first error, of each too.
func getopt(program string, args []string, each func(name, value string) error) (rest []string, err error) {
	for len(args) > 0 {
		a := args[0]
		args = args[1:]
		switch {
		case a == "--":
			return append(rest, args...), nil
		case strings.HasPrefix(a, "--"):
			args, err = long(program, a[2:], args, each)
		case len(a) > 1 && a[0] == '-':
			args, err = cluster(program, a[1:], args, each)
		default: // "-", too
			rest = append(rest, a)
		}
		if err != nil {
			return nil, err
		}
	}
	return rest, nil
}

// long does one long option, without its dashes, and returns the arguments behind it.
func long(program, text string, args []string, each func(name, value string) error) ([]string, error) {
	name, value, given := strings.Cut(text, "=")
	o, err := find(program, name)
	switch {
	case err != nil:
		return nil, err
	case !o.arg && given:
		return nil, fmt.Errorf("%s: option '--%s' doesn't allow an argument", program, o.name)
	case o.arg && !given && len(args) == 0:
		return nil, fmt.Errorf("%s: option '--%s' requires an argument", program, o.name)
	case o.arg && !given:
		value, args = args[0], args[1:]
	}
	return args, each(o.name, value)
}

// find is the option that a name, perhaps cut short, means.
func find(program, name string) (option, error) {
	var found []option
	for _, o := range options {
		if o.name == name {
			return o, nil
		}
		if strings.HasPrefix(o.name, name) {
			found = append(found, o)
		}
	}
	switch len(found) {
	case 0:
		return option{}, fmt.Errorf("%s: unrecognized option '--%s'", program, name)
	case 1:
		return found[0], nil
	}
	var b strings.Builder
	for _, o := range found {
		fmt.Fprintf(&b, " '--%s'", o.name)
	}
	return option{}, fmt.Errorf("%s: option '--%s' is ambiguous; possibilities:%s", program, name, b.String())
}

// cluster does short options that stand together, the last of which may have its argument behind it or in the next word.
func cluster(program, text string, args []string, each func(name, value string) error) ([]string, error) {
	for text != "" {
		o, known := byShort(text[0])
		if !known {
			return nil, fmt.Errorf("%s: invalid option -- '%c'", program, text[0])
		}
		text = text[1:]
		value := ""
		switch {
		case !o.arg:
		case text != "":
			value, text = text, ""
		case len(args) == 0:
			return nil, fmt.Errorf("%s: option requires an argument -- '%c'", program, o.short)
		default:
			value, args = args[0], args[1:]
		}
		if err := each(o.name, value); err != nil {
			return nil, err
		}
	}
	return args, nil
}

func byShort(c byte) (option, bool) {
	for _, o := range options {
		if o.short == c {
			return o, true // no argument holds the octet 0, which is none's
		}
	}
	return option{}, false
}
