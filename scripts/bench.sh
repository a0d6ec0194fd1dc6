#!/bin/sh
# Benchmarks, one after another. Each figure stands beside a peer's or a ceiling's from the same run.
#
#   scripts/bench.sh            all of them
#   scripts/bench.sh FILTER     those whose name has FILTER in it: verifier, ima, netboot, imaging, iscsi, boot-storm, ceph, ceph-boot-storm, fleet
#
# Ends with a table; target/bench/results.jsonl has the same for programs.
set -eu
cd "$(dirname "$0")/.."

results=target/bench/results.jsonl
mkdir -p target/bench

# The peers come with services that listen everywhere. We start them ourselves, on loopback.
if ! dpkg-query --show tgt tgt-rbd tftpd-hpa libefivar1 >/dev/null 2>&1; then
    scripts/install-dependencies.sh scripts/bench-packages.txt
    if [ -d /run/systemd/system ]; then
        sudo=''
        [ "$(id -u)" -eq 0 ] || sudo=sudo
        $sudo systemctl disable --now tgt tftpd-hpa
    fi
fi

# Keylime's verifier, which reads boot logs with tpm2-tools and libefivar. Without PyPI the figures have ceilings only.
keylime=target/bench/keylime
if [ ! -e "$keylime/ready" ]; then
    if python3 -m venv "$keylime" && "$keylime/bin/pip" install -q -r verifier/benches/keylime/requirements.txt; then
        touch "$keylime/ready"
    else
        echo "bench: Keylime could not be installed; its figures are left out" >&2
    fi
fi
if [ -e "$keylime/ready" ]; then
    ASSAY_BENCH_KEYLIME=$PWD/$keylime/bin/python
    export ASSAY_BENCH_KEYLIME
fi

# One selection of crates for all, so that nothing is compiled twice.
crates='-p assay -p assay-imaging -p assay-qemu-lab -p assay-verifier -p assay-netboot'
benches='--bench verifier --bench ima --bench netboot --bench imaging --bench iscsi --bench boot_storm --bench ceph'
# shellcheck disable=SC2086
cargo bench --locked $crates $benches --no-run

# An export's process and its companion, which `assay` finds beside itself.
# shellcheck disable=SC2086
cargo build --release --locked $crates --bin assay-export --bin assay-rbd-disk

# The fleet is programs, not a bench target: a verifier as it ships, and the tool that drives it.
fleet=no
case fleet in *"${1:-}"*) fleet=yes ;; esac
if [ $fleet = yes ]; then
    # shellcheck disable=SC2086
    cargo build --release --locked $crates --bins
fi
: >"$results"

# In a process group of its own, which `timeout` ends as one; what the benchmarks start ends with them.
# shellcheck disable=SC2086
timeout 1800 cargo bench --locked $crates $benches -- ${1:-} >>"$results" &
running=$!
trap 'kill "$running" 2>/dev/null || true; rm -rf target/tmp/iscsi-bench-* target/tmp/imaging-bench-* target/tmp/storm-bench-* target/tmp/ceph-bench-*' EXIT
trap 'exit 130' INT TERM
wait "$running" || {
    echo "bench: a benchmark failed, or all took more than 30 minutes; what it said is above" >&2
    exit 1
}
if [ $fleet = yes ]; then
    timeout 1200 scripts/bench-fleet.py target/release/qemu-lab >>"$results"
    rm -rf target/tmp/fleet-bench
fi
[ -s "$results" ] || {
    echo "bench: none is called '${1:-}'; there are verifier, ima, netboot, imaging, iscsi, boot-storm, ceph, ceph-boot-storm and fleet" >&2
    exit 2
}
scripts/bench-table.py "$results"
