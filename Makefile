# Targets for people and CI. `make help` lists them.
SHELL := /bin/bash
# A failing test must not be hidden by the filter behind it.
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo 0.0.0-dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
BUILD   := CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)'
# Every fuzz target is run for this long by fuzz-short.
FUZZTIME ?= 3s
# What soak does: some 20 schedules and 2000 requests a second on two cores.
SOAK_SEEDS ?= 50000
SOAK_REQUESTS ?= 1000000
ARGS    ?=
RACE    := GORACE=halt_on_error=1 $(GO) test -race -timeout 30m

# A machine without a fitting Go is told so, instead of failing in the middle of a build.
NEED_GO := $(shell sed -n 's/^go //p' go.mod)
HAVE_GO := $(shell $(GO) env GOVERSION 2>/dev/null | sed 's/^go//')
ifeq ($(HAVE_GO),)
$(error Go is missing: install Go $(NEED_GO) or newer (https://go.dev/doc/install) and put it in PATH, or call make with GO=/path/to/go)
endif
ifneq ($(NEED_GO),$(shell printf '%s\n%s\n' $(NEED_GO) $(HAVE_GO) | sort -V | head -n1))
$(error Go $(HAVE_GO) is too old: go.mod wants $(NEED_GO) or newer)
endif

.PHONY: help build test race lint fuzz-short bench soak demo conformance conformance-setup vm package clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

build: ## static binaries into build/
	@mkdir -p build
	$(BUILD) -o build/ ./cmd/...

test: lint race ## lint, all tests with the race detector, conformance included where its programs are installed
	@# 2000 schedules of the heartbeat; the race detector would make them take a quarter of an hour.
	$(GO) test -timeout 20m -run 'TestSchedules$$' ./agents/heartbeat

race: ## all tests with the race detector, without lint
	$(GO) build ./...
	$(RACE) $$($(GO) list ./... | grep -v /integration/)
	@# These have real processes, hosts and time-outs: one package after the other, or a busy machine looks like a dead one.
	$(RACE) -p 1 ./integration/...

lint: ## gofmt, vet, staticcheck, golangci-lint (pinned by tool lines in go.mod)
	@out=$$(gofmt -l agents bus cmd integration systemd xapi); if [ -n "$$out" ]; then echo "gofmt wants to change:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) tool golangci-lint run --allow-parallel-runners ./...

fuzz-short: ## each fuzz target for FUZZTIME
	@set -e; for pkg in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$pkg 2>/dev/null | grep '^Fuzz' || true); do \
	    echo "fuzz $$pkg $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$pkg | tail -n 1; \
	  done; done

bench: build ## benchmarks of the packages, then the pool's own distributions
	$(GO) test -run '^$$' -bench . -benchtime 1s ./... | grep -v '^?\|no test files\|^PASS\|^ok'
	./build/xostor-demo --bench --xostor ./build/xostor $(ARGS)

soak: ## heartbeat for an hour or two: SOAK_SEEDS fault schedules checked for linearizability, SOAK_REQUESTS requests by 64 clients
	XOSTOR_SOAK_SEEDS=$(SOAK_SEEDS) $(GO) test -count=1 -timeout 12h -run 'TestSchedules$$' -v ./agents/heartbeat | grep -v '^=== '
	XOSTOR_SOAK_REQUESTS=$(SOAK_REQUESTS) $(GO) test -count=1 -timeout 12h -run 'TestLoad$$' -v ./integration/heartbeat | grep -v '^=== '

demo: build ## a whole pool on this machine: watch an agent work (ARGS=--stay, ARGS=--chaos)
	@./build/xostor-demo --xostor ./build/xostor $(ARGS)

conformance-setup: ## install the foreign clients into .tools/ (npm and pip) and name missing Debian packages
	integration/conformance/setup.sh

conformance: conformance-setup ## drive the stand-ins with clients that we did not write
	XOSTOR_TEST_STRICT=1 $(GO) test -count=1 -v ./integration/conformance/... | grep -v '^=== \|^    --- PASS'

vm: ## the heartbeat against a real kernel's nbd client, in an emulated machine (about a minute; wants the machine for itself)
	integration/heartbeat/vm/setup.sh
	XOSTOR_TEST_VM=1 $(GO) test -count=1 -timeout 40m ./integration/heartbeat/vm

package: build ## a tar of the static binaries, licence and documents
	@mkdir -p build/xostor-$(VERSION)
	cp build/xostor build/xostor-heartbeat LICENSE README.md CHANGELOG.md build/xostor-$(VERSION)/
	tar -C build -czf build/xostor-$(VERSION).tar.gz xostor-$(VERSION)
	rm -r build/xostor-$(VERSION)
	@echo "build/xostor-$(VERSION).tar.gz"

clean: ## remove build/ and .tools/
	rm -rf build .tools coverage.out
