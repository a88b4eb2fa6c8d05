package main

import (
	"strings"
	"testing"
)

func TestMeansSlirp(t *testing.T) {
	for args, want := range map[string]bool{
		// As podman, buildah and rootlesskit call it.
		"--disable-host-loopback --mtu=65520 --enable-sandbox -c -e 3 -r 4 --netns-type=path /run/netns/n tap0": true,
		"--mtu 65520 -r 3 -c 4711 tap0":              true,
		"--mtu 65520 -r 3 --cidr 10.0.3.0/24 1 tap0": true,
		"-ce3 -r4 4711 tap0":                         true,
		"4711 --enable-sandbox":                      true,
		"--netns-type path /n":                       true,
		// Ours.
		"":                                  false,
		"4711":                              false,
		"--mtu 1500 4711 tap0":              false,
		"-p 8080:80 --configure 4711":       false,
		"--ready-fd 3 --exit-fd=4 4711":     false,
		"--help":                            false,
		"--version":                         false,
		"-h":                                false,
		"run sh -c true":                    false,
		"run -- ls -r":                      false,
		"port add -c":                       false,
		"info -r":                           false,
		"4711 -- -r":                        false,
		"--disable-host-loopbackwards 4711": false,
		"-":                                 false,
		"-v":                                false,
		"-c 4711":                           false,
	} {
		if got := meansSlirp(strings.Fields(args)); got != want {
			t.Errorf("usernet %s: slirp4netns's words %v, want %v", args, got, want)
		}
	}
}

// TestSlirpOptionsAreNotOurs: by none of the options that tell the dialects apart is anything of ours meant.
func TestSlirpOptionsAreNotOurs(t *testing.T) {
	f := newFlags(false)
	for _, name := range slirpLongs {
		if f.set.Lookup(name) != nil {
			t.Errorf("--%s is an option of usernet's own", name)
		}
	}
	for _, short := range slirpShorts {
		if f.set.ShorthandLookup(string(short)) != nil {
			t.Errorf("-%c is an option of usernet's own", short)
		}
	}
}

// TestHelpForSlirpCallers: callers give an option only where --help has it, and look for it before they give any.
func TestHelpForSlirpCallers(t *testing.T) {
	help := helpText()
	for _, option := range []string{
		"--disable-host-loopback", "--mtu", "--enable-sandbox", "--enable-seccomp", "--cidr", "--outbound-addr", "--enable-ipv6", // podman
		"--netns-type", "--api-socket", // rootlesskit
	} {
		if !strings.Contains(help, option) {
			t.Errorf("%s is not in the help", option)
		}
	}
}
