#!/bin/sh
# Fuzzing without further tools: libFuzzer is built from its crate.
#
#   scripts/fuzz.sh smoke                 every target for a moment, from its seeds (part of `make test`)
#   scripts/fuzz.sh run TARGET SECONDS    one target for long, guided by coverage; new inputs in target/fuzz/TARGET
set -eu
cd "$(dirname "$0")/.."

targets() {
    sed -n 's/^name = "fuzz-\(.*\)"$/\1/p' fuzz/Cargo.toml
}

case "${1:-}" in
smoke)
    cargo build --locked --workspace --bins --features assay/failpoints
    passed=0
    for target in $(targets); do
        mkdir -p "target/fuzz/smoke/$target" "fuzz/seeds/$target"
        log="target/fuzz/smoke/$target.log"
        if ! "target/debug/fuzz-$target" -seed=1 -runs=20000 -max_total_time=10 -max_len=65536 -rss_limit_mb=1024 \
            -artifact_prefix="target/fuzz/$target-" "target/fuzz/smoke/$target" "fuzz/seeds/$target" >"$log" 2>&1; then
            tail -n 40 "$log" >&2
            echo "fuzz target $target failed; the input is target/fuzz/$target-*" >&2
            exit 1
        fi
        passed=$((passed + 1))
    done
    echo "fuzz-smoke: $passed targets passed"
    ;;
run)
    target=${2:?which target? $(targets | tr '\n' ' ')}
    mkdir -p "target/fuzz/$target" "fuzz/seeds/$target"
    # Coverage for our crates and their dependencies, on the pinned compiler: the flags that cargo-fuzz sets, less the
    # address sanitizer, which needs a nightly and which safe Rust has little use for.
    RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1" \
        cargo build --locked -p assay-fuzz --bin "fuzz-$target" --target-dir target/fuzz/build --target x86_64-unknown-linux-gnu
    exec "target/fuzz/build/x86_64-unknown-linux-gnu/debug/fuzz-$target" -max_total_time="${3:-600}" -max_len=65536 \
        -rss_limit_mb=2048 -artifact_prefix="target/fuzz/$target-" "target/fuzz/$target" "fuzz/seeds/$target"
    ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
