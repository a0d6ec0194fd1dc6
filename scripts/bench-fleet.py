#!/usr/bin/env python3
"""Runs `qemu-lab fleet` and prints each figure beside its bar, as the benchmarks' JSON lines."""

import json
import subprocess
import sys


def fleet(lab, nodes, interval, duration):
    arguments = ["--nodes", nodes, "--interval", interval, "--duration", duration]
    arguments += ["--enrolling", 32, "--output", "json"]
    command = [lab, "fleet", "--folder", "target/tmp/fleet-bench", *map(str, arguments)]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    if report["errors"] or report["failed"]:
        sys.exit(f"bench: the fleet of {nodes} had errors: {report['errors']}, {report['failed']} not admitted")
    return report


def say(figure, unit, ours, bar, better):
    line = {"bench": "fleet", "figure": figure, "unit": unit, "ours": round(ours, 3), "against": "the bar",
            "theirs": bar, "ratio": round(ours / bar, 4), "better": better}
    print(json.dumps(line), flush=True)


def main(lab):
    report = fleet(lab, 1_000, 1, 30)
    say("attestations, 1,000 nodes each second", "1/s", report["pushes_per_second"], 1_000, "higher")
    say("their p99", "ms", report["push"]["p99_ms"], 50, "lower")
    say("admissions, enrolment to hand-over", "1/s", report["admitted_per_second"], 1, "higher")
    report = fleet(lab, 10_000, 60, 120)
    say("10,000 nodes each minute: verifier", "cores", report["verifier_cores"], 1, "lower")
    say("10,000 nodes each minute: its memory", "MiB", report["verifier_peak_rss_mib"], 512, "lower")
    say("10,000 nodes each minute: p99", "ms", report["push"]["p99_ms"], 50, "lower")


main(*sys.argv[1:])
