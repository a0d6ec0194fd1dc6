#!/usr/bin/env python3
"""Prints the benchmarks' JSON lines as a table."""

import json
import sys

HEADINGS = ("figure", "unit", "ours", "theirs", "against", "ratio", "")


def number(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def row(line):
    figure = json.loads(line)
    good = "" if figure["better"] == "higher" else "lower is better"
    cells = (f"{figure['bench']}: {figure['figure']}", figure["unit"], number(figure["ours"]), number(figure["theirs"]))
    return (*cells, figure["against"], f"{figure['ratio']:.2f}", good)


def main(path):
    with open(path, encoding="utf-8") as lines:
        rows = [HEADINGS, *map(row, lines)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    right = {2, 3, 5}
    for cells in rows:
        aligned = (cell.rjust(w) if at in right else cell.ljust(w) for at, (cell, w) in enumerate(zip(cells, widths)))
        print("  ".join(aligned).rstrip())


main(*sys.argv[1:])
