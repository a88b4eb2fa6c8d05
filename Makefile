# make help lists the targets.

SHELL      := bash
GO         ?= go
PREFIX     ?= /usr/local
DESTDIR    ?=
BIN        := bin/usernet
FUZZTIME   ?= 20000x
BENCHFLAGS ?=
VERSION    ?= $(shell git -c safe.directory='*' describe --tags --always --dirty 2>/dev/null || echo unknown)

# One static binary: no C, no paths of the machine that built it.
export CGO_ENABLED := 0
GOBUILD := $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'

.PHONY: help build install uninstall run test race e2e e2e-runtimes fuzz bench bench-quick bench-podman microbench lint cover golden check clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

build: ## bin/usernet, static
	$(GOBUILD) -o bin/usernet ./cmd/usernet

install: build ## $(DESTDIR)$(PREFIX)/bin/usernet, and slirp4netns beside it, a link to it
	install -d '$(DESTDIR)$(PREFIX)/bin'
	@set -e; cd '$(DESTDIR)$(PREFIX)/bin'; if [ -e slirp4netns ] && [ "$$(readlink slirp4netns)" != usernet ]; then \
		echo "$$PWD/slirp4netns is there and is no link to usernet: remove it, or install elsewhere with PREFIX=" >&2; exit 1; fi
	install -m 755 '$(BIN)' '$(DESTDIR)$(PREFIX)/bin/usernet.new'
	mv -f '$(DESTDIR)$(PREFIX)/bin/usernet.new' '$(DESTDIR)$(PREFIX)/bin/usernet'
	ln -sf usernet '$(DESTDIR)$(PREFIX)/bin/slirp4netns'

uninstall: ## remove what install has made
	@set -e; cd '$(DESTDIR)$(PREFIX)/bin'; if [ "$$(readlink slirp4netns)" = usernet ]; then rm -f slirp4netns; fi; rm -f usernet

run: build ## see it work: a command in a namespace reaches a server of this machine
	@$(GOBUILD) -o bin/demo ./e2e/demo
	@bin/demo bin/usernet

test: build ## every test and fuzz target; as root also as an ordinary user, with what is needed installed
	@FUZZTIME=$(FUZZTIME) .ci/test

e2e: build ## the tests of the built binary only
	@.ci/test e2e

e2e-runtimes: build ## podman 4 and 5, buildah, rootlesskit and docker with the built binary (root, on Debian)
	@.ci/test runtimes

race: ## every test with the race detector (needs a C compiler)
	@.ci/test race

fuzz: ## each fuzz target for FUZZTIME (calls: 20000x; or a time: 5m)
	@FUZZTIME=$(FUZZTIME) .ci/test fuzz

bench: build ## usernet beside slirp4netns, pasta and rootlesskit: some 35 minutes; BENCHFLAGS=-help
	@GO=$(GO) bench/setup
	@$(GOBUILD) -o bin/bench ./bench
	@bin/bench $(BENCHFLAGS)

bench-quick: BENCHFLAGS += -quick
bench-quick: bench ## the core of it in under three minutes

bench-podman: build ## podman run with usernet, with slirp4netns and without a network, in turn (root, on Debian)
	USERNET_BIN=$(CURDIR)/bin/usernet $(GO) test -run '^$$' -bench PodmanRun -benchtime 100x ./e2e/runtimes

microbench: ## the packages' microbenchmarks
	$(GO) test -run '^$$' -bench . -benchmem ./...

lint: ## gofmt, go vet, staticcheck, and who may import whom
	@.ci/lint

cover: ## coverage.out and a line for each package
	@.ci/test cover

golden: ## write the golden files anew; look at the diff
	@.ci/test golden

check: lint test race ## what a change must pass

clean: ## remove what was built
	rm -rf bin coverage.out
