# make alone lists the targets. Everything that is built goes to bin/.

BIN := bin
PLUGIN := vault-plugin-secrets-kaizala
GO ?= go

# The nearest tag names the version; a tree without one has main.go's default.
VERSION ?= $(shell git describe --tags --match 'v[0-9]*' 2>/dev/null)
LDFLAGS := -s -w $(if $(VERSION),-X main.version=$(VERSION))
GOBUILD = CGO_ENABLED=0 $(GO) build -ldflags '$(LDFLAGS)'

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# For fuzz: how long each target runs.
FUZZTIME ?= 30s

.DEFAULT_GOAL := help
.PHONY: help build build-plugin build-emulator vault authserver demo demo-oauth dev test lint bench hang-ups release generate fuzz mutants clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: build-plugin build-emulator ## Build the plugin and the Kaizala emulator into bin/

build-plugin:
	$(GOBUILD) -o $(BIN)/$(PLUGIN) ./cmd/$(PLUGIN)

build-emulator:
	$(GOBUILD) -o $(BIN)/kaizala-emulator ./cmd/kaizala-emulator

vault: ## Build the pinned Vault where it is missing, and print its path
	@scripts/vault.sh

authserver: ## Build zitadel's authorization server where it is missing, and print its path
	@scripts/authserver.sh zitadel

demo: ## Walk through Kaizala's four steps on a real Vault, against the emulator
	@scripts/demo.sh

demo-oauth: ## Walk through the same on an OAuth 2.0 authorization server that others wrote
	@scripts/demo-oauth.sh

dev: ## Start the same Vault and emulator, and leave them running until Ctrl-C
	@scripts/demo.sh --dev

test: build ## Run all tests with the race detector, on a real Vault too
	@scripts/test.sh

lint: ## Run gofmt, go vet, staticcheck and the checks of the scripts
	@STATICCHECK=$(STATICCHECK) scripts/lint.sh

bench: build ## Measure, and print one table
	@scripts/bench.sh

hang-ups: build ## Print what readers who hang up cost in this engine and in oauthapp
	@echo 'This takes a minute; the first time also some minutes to build oauthapp.' >&2
	@VAULT_BIN="$$(scripts/vault.sh demo)" KAIZALA_PLUGIN_BIN='$(CURDIR)/$(BIN)/$(PLUGIN)' \
		$(GO) test -count=1 -v -run '^TestHangUpsBesideOAuthApp$$' ./backend/vaulttest

release: ## Build the release archives into dist/, without publishing
	@scripts/release.sh

generate: ## Write the generated files anew
	$(GO) generate ./...

fuzz: ## Fuzz each fuzz target for FUZZTIME (30s)
	@FUZZTIME=$(FUZZTIME) scripts/fuzz.sh

mutants: ## Change the code and see which changes no test notices; takes an hour or more
	@scripts/mutants.sh

clean: ## Remove what was built, but for the two Vaults that take minutes
	rm -rf $(BIN)/$(PLUGIN) $(BIN)/kaizala-emulator $(BIN)/authserver-* $(BIN)/test $(BIN)/mutants dist
