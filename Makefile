# Everything that a person or CI does here. `make help` lists it.
# Nothing needs to be done first: each target installs the Debian packages that it needs (scripts/packages.txt).

CARGO ?= cargo
# One selection of crates and features for every build, so that nothing is compiled twice. The crash points do nothing
# unless FAILPOINTS arms them, and a release build has none.
EVERYTHING := --workspace --features assay/failpoints --locked

# What opens a database, beside the libraries.
ON_POSTGRESQL := --lib --test api --test identity --test attestation --test renewals --test reappraisal --test agreement --test attacks_release \
	--test life_cycle --test faults --test crash --test crash_images --test images --test trees

# Optimised, and with a debug build's checks: overflow panics.
QUICK := --config profile.dev.package.assay-verifier.opt-level=3 --config profile.dev.package.assay-tpm.opt-level=3

.DEFAULT_GOAL := help
.PHONY: help lab test test-postgresql check bench openapi fuzz-smoke fuzz exhaustive agent-image build test-build dependencies toolchain clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

lab: agent-image ## Boot a node through the airlock into its tenant's Debian, and see a tampered one refused; STORE=ceph: with its disk on Ceph
	@target/debug/qemu-lab run --store $(or $(STORE),local)

test: check test-build ## Run everything that must pass
	@scripts/agent-image.sh
	$(CARGO) test $(EVERYTHING)
	$(MAKE) test-postgresql

test-postgresql: toolchain dependencies ## The tests of whatever keeps a database, on PostgreSQL
	ASSAY_TEST_DATABASE=postgresql $(CARGO) test $(EVERYTHING) $(ON_POSTGRESQL)

check: toolchain dependencies ## Format, lints, licences and bans
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(EVERYTHING) --all-targets -- -D warnings
	@scripts/deny.sh

bench: toolchain dependencies ## Benchmarks: each figure is a ratio to a peer or a ceiling from the same run
	@scripts/bench.sh
	@$(MAKE) --no-print-directory bench-revocation

bench-revocation: agent-image ## Bad evidence until port, frames and iSCSI session are cut, a hundred times (bar: p99 under 1 s)
	@target/debug/qemu-lab --folder target/bench/revocation scenario revoke --runs 100

openapi: toolchain dependencies ## Write docs/openapi/*.json anew
	ASSAY_UPDATE_OPENAPI=1 $(CARGO) test $(EVERYTHING) --test openapi

fuzz-smoke: toolchain dependencies ## Every fuzz target for a moment, from its seeds
	$(CARGO) test $(EVERYTHING) --test smoke

fuzz: toolchain dependencies ## One fuzz target for long, with coverage: make fuzz TARGET=event_log SECONDS=600
	@scripts/fuzz.sh run "$(TARGET)" "$(or $(SECONDS),600)"

exhaustive: toolchain dependencies ## Every cut and every flipped bit of every event log and measurement list of ASSAY_CORPUS
	ASSAY_EXHAUSTIVE=1 $(CARGO) test $(EVERYTHING) $(QUICK) --test event_log_corpus --test ima_corpus -- --nocapture

agent-image: build ## Build the agent's UKI and print its Reference Values
	@scripts/agent-image.sh

build: toolchain dependencies
	$(CARGO) build $(EVERYTHING) --bins

test-build: toolchain dependencies
	$(CARGO) test $(EVERYTHING) --no-run

dependencies:
	@scripts/install-dependencies.sh

toolchain:
	@command -v $(CARGO) >/dev/null || { \
	  echo "No cargo found. Install Rust with rustup (https://rustup.rs), then open a new shell and run make again." >&2; exit 1; }

clean: ## Remove everything that was built
	$(CARGO) clean
