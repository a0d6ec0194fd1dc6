#!/bin/sh
# Bans, licences and sources of all dependencies. cargo-deny takes minutes to build, so it is used where it is installed;
# elsewhere the same rules that need no tool are checked from cargo's own metadata.
set -eu
cd "$(dirname "$0")/.."
if command -v cargo-deny >/dev/null; then
    exec cargo deny --all-features check bans licenses sources
fi
echo "cargo-deny is not installed (cargo install cargo-deny): checking licences and sources from cargo metadata"
cargo metadata --format-version 1 --locked --all-features | python3 scripts/check-metadata.py deny.toml
