"""``wan-mlx doctor``: whether this machine computes correctly, how fast, what it makes, how to mend it.

The first thing to run, and the output to paste into a bug report: paths in the home folder are shown as ``~``. With
``--share`` it ends with a block without names and paths, for a report or for docs/times.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import check_backend
from ..storage import home_folder
from .flags import Parser

if TYPE_CHECKING:
    from .selftest import Check

DESCRIPTION = "Whether this machine computes correctly, how fast, and what it can make."
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}
# Around the block to share; docs/make_times.py looks for them.
BEGIN, END = "--- wan_mlx doctor ---", "--- end ---"
RUN = "run: MODEL, WIDTHxHEIGHT, FRAMES, STEPS, OPTIONS, SECONDS, PEAK GiB"


def build_parser() -> Parser:
    parser = Parser(prog="wan-mlx doctor", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--share", action="store_true", help="end with a block to paste, without names and paths")
    parser.add_argument("--store-reference", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Look at the machine, print the findings; 0 if nothing failed, 1 otherwise."""
    args = build_parser().parse_args(argv)
    check_backend()
    from . import macos, measure, selftest

    if args.store_reference:
        print(selftest.store_reference())
        return 0

    def show(line: str) -> None:
        if not args.json:
            print(private(line), flush=True)

    checks: list[Check] = []

    def look(found: Iterable[Check]) -> bool:
        """Note and show; whether nothing failed so far."""
        for check in found:
            checks.append(check)
            advice = f"\n     {check.advice}" if check.advice else ""
            show(f"{MARKS[check.status]} {check.name}: {check.said}{advice}")
        return not any(check.status == "fail" for check in checks)

    started = time.perf_counter()
    about = selftest.machine()
    for name, value in about.items():
        show(f"{name:<10}{value}")
    good = look(macos.checks()) and look(selftest.all_checks())
    if good:
        show("     measuring this machine ...")
    tflops, said = measure.all_rates(look) if good else ({}, [])
    look([selftest.videos()])
    for name, rate in tflops.items():
        show(f"     {name}: {rate:.3g} TFLOP/s")
    makes = measure.makes(tflops)
    for line in (*said, *makes):
        show(f"     {line}")
    verdict = judge(checks)
    show(f"{verdict}\n({time.perf_counter() - started:.0f} s)")
    if args.json:
        found = {"machine": about, "checks": [vars(check) for check in checks], "tflops": tflops, "advice": said,
                 "makes": makes, "verdict": verdict}  # fmt: skip
        print(private(json.dumps(found, indent=1, ensure_ascii=False)))
    elif args.share:
        shared = block(selftest.shared(), checks, tflops, [*said, *makes])
        show("\nAdd a line for each run that you timed, and paste from the first to the last dashes:\n" + shared)
    return 1 if any(check.status == "fail" for check in checks) else 0


def judge(checks: list[Check]) -> str:
    """The verdict in a sentence."""
    if bad := [check for check in checks if check.status == "fail"]:
        names = ", ".join(check.name for check in bad)
        return f"{len(bad)} of {len(checks)} checks failed: {names}. First: {bad[0].advice}"
    doubtful = ", ".join(check.name for check in checks if check.status == "warn")
    return "All is well" + f" ({doubtful}: see above)" * bool(doubtful) + "."


def block(about: dict[str, str], checks: list[Check], tflops: dict[str, float], said: list[str]) -> str:
    """The lines to share: no check's own words are in them, since those may name folders."""
    lines = [f"{name}: {value}" for name, value in about.items()]
    for status in MARKS:
        names = [check.name for check in checks if check.status == status]
        lines.append(f"{status}: {len(names)}" + f" ({', '.join(names)})" * (status != "ok" and bool(names)))
    lines.append("TFLOP/s: " + ", ".join(f"{name} {rate:.3g}" for name, rate in tflops.items()))
    lines += [f"{check.name}: {check.said}" for check in checks if check.name.startswith("longest dispatch")]
    return "\n".join([BEGIN, *lines, *said, RUN, END])


def private(text: str) -> str:
    """``text`` with the home folder as ``~``."""
    home = home_folder() or Path("/")
    for folder in sorted({str(home), os.path.realpath(home)} - {"/"}, key=len, reverse=True):
        text = text.replace(folder, "~")
    return text
