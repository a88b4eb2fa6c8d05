// Command usernet gives a network namespace a working network without root.
//
// The files, in the order in which a life passes through them:
//
//	main.go      which command; exit statuses
//	options.go   argv to options, a pure function
//	flags.go     the flags; help.go their text
//	slirp.go     slirp4netns's command line, by package slirp4netns, to the same options; dialect.go knows it when it sees it
//	plan.go      the addresses of the namespace, a pure function; shadow.go what they hide
//	attach.go    usernet PID|PATH: what the process does before and after the engine
//	run.go       usernet run: the same around a child process; stage.go is that child,
//	             etcfiles.go and mounts.go its files, terminal.go its terminal, userns.go its IDs,
//	             guard.go a process that ends it all when run is killed
//	engine.go    namespace, TAP, stack, forwarder and DNS put together, run and taken down
//	life.go      what ends a life: signals, a hung-up descriptor, the namespace's end
//	fds.go       descriptors and files given by flags
//	keeper.go    the shared mode: the process that holds its namespaces; daemon.go the one that serves its networks,
//	             daemonnet.go one network, member.go and memberports.go one member
//	shared.go    how an entry finds the daemon, or starts it; sharedflags.go and sharedcmd.go its commands, runnet.go run's part
//	stats.go     what was counted, in the log at the end
//	sandbox.go   what the process gives up once all is open; caps.go, root.go, landlock.go, seccomp.go its parts,
//	             cgo.go and nocgo.go whether there can be one
package main
