#!/bin/sh
# Fuzzing without further tools: libFuzzer is built from its crate.
#
#   scripts/fuzz.sh run TARGET SECONDS    one target for long, guided by coverage; new inputs in target/fuzz/TARGET
set -eu
cd "$(dirname "$0")/.."

case "${1:-}" in
run)
    target=${2:?which target? fuzz/targets/ has them}
    mkdir -p "target/fuzz/$target" "fuzz/seeds/$target"
    # Coverage for our crates and their dependencies, on the pinned compiler: the flags that cargo-fuzz sets, less the
    # address sanitizer, which needs a nightly and which safe Rust has little use for.
    RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1" \
        cargo build --locked -p assay-fuzz --bin "fuzz-$target" --target-dir target/fuzz/build --target x86_64-unknown-linux-gnu
    exec "target/fuzz/build/x86_64-unknown-linux-gnu/debug/fuzz-$target" -max_total_time="${3:-600}" -max_len=65536 \
        -rss_limit_mb=2048 -artifact_prefix="target/fuzz/$target-" "target/fuzz/$target" "fuzz/seeds/$target"
    ;;
*)
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
