# Everything that a person or CI does here. `make help` lists it.
# Nothing needs to be done first: each target installs the Debian packages that it needs (scripts/packages.txt).

CARGO ?= cargo
export CARGO_TERM_COLOR ?= auto

.DEFAULT_GOAL := help
.PHONY: help lab test check unit-test lab-test bench openapi fuzz-smoke fuzz agent-image build dependencies toolchain clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

lab: build agent-image ## Boot a node through the airlock into its tenant's Debian, and see a tampered one refused
	@target/debug/qemu-lab run

test: check unit-test fuzz-smoke lab-test ## Run everything that must pass
	@scripts/test-summary.sh

check: toolchain dependencies ## Format, lints, licences and bans, tidiness
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@scripts/deny.sh

unit-test: toolchain dependencies ## Every crate's tests, with real peers (Open vSwitch, swtpm, libiscsi, Redfish)
	$(CARGO) test --workspace --exclude assay-qemu-lab --locked

lab-test: build agent-image ## The end-to-end tests: real firmware, TPM, switch and services
	$(CARGO) test -p assay-qemu-lab --locked

bench: toolchain dependencies ## Benchmarks: each figure is a ratio to a peer or a ceiling from the same run
	@scripts/bench.sh

openapi: toolchain dependencies ## Write docs/openapi/*.json anew
	ASSAY_UPDATE_OPENAPI=1 $(CARGO) test -p assay --test openapi --locked

fuzz-smoke: toolchain dependencies ## Every fuzz target for a moment, from its seeds
	@scripts/fuzz.sh smoke

fuzz: toolchain dependencies ## One fuzz target for long, with coverage: make fuzz TARGET=event_log SECONDS=600
	@scripts/fuzz.sh run "$(TARGET)" "$(or $(SECONDS),600)"

agent-image: toolchain dependencies ## Build the agent's UKI and print its Reference Values
	@scripts/agent-image.sh

build: toolchain dependencies ## Build the binaries that the lab runs
	$(CARGO) build --locked --workspace --bins --features assay/failpoints

dependencies:
	@scripts/install-dependencies.sh

toolchain:
	@command -v $(CARGO) >/dev/null || { \
	  echo "No cargo found. Install Rust with rustup (https://rustup.rs), then open a new shell and run make again." >&2; exit 1; }

clean: ## Remove everything that was built
	$(CARGO) clean
