// Package slirp4netns knows slirp4netns's command line, so that whoever starts that program can start usernet instead:
// its argv, its help and version as callers search them, what it prints at the start, and its words for what goes wrong.
//
// Everything here is pure: argv in, Options or text out. What the options mean is done elsewhere, as for usernet's own flags.
//
//	getopt.go    argv to single options, by the rules of getopt_long(3)
//	options.go   these to Options, with its checks and their messages
//	text.go      help, version, and the lines at the start
//	failure.go   a failure in its words
//
// The messages are part of the interface: podman shows them, and scripts compare them. Where slirp4netns crashes, hangs or
// says what is not so, the text is ours.
package slirp4netns
