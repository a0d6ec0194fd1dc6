#!/bin/sh
# Builds the agent (small), then its UKI and Reference Values, into target/agent-image/.
set -eu
cd "$(dirname "$0")/.."
cargo build --locked --profile agent -p assay-ramdisk-agent --bin assay-agent
cargo build --locked --workspace --bins --features assay/failpoints
exec target/debug/agent-image build --agent target/agent/assay-agent --out target/agent-image
