#!/bin/sh
# Builds the agent as it ships, then its UKI and Reference Values, into target/agent-image/.
# The build tool itself, target/debug/agent-image, must be there: `make agent-image` sees to it.
set -eu
cd "$(dirname "$0")/.."
cargo build --locked --profile agent -p assay-ramdisk-agent --bin assay-agent
exec target/debug/agent-image build --agent target/agent/assay-agent --out target/agent-image
