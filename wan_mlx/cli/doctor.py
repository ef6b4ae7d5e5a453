"""``python -m wan_mlx.doctor``: whether this machine computes correctly, how fast, and how to mend it if not.

The first thing to run, and the output to paste into a bug report: paths in the home folder are shown as ``~``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .. import check_backend
from ..storage import home_folder
from .flags import Parser

if TYPE_CHECKING:
    from .selftest import Check

DESCRIPTION = "Whether this machine computes correctly, how fast, and how to mend it if not."
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


def main(argv: list[str] | None = None) -> int:
    """Look at the machine, print the findings; 0 if nothing failed, 1 otherwise."""
    parser = Parser(prog="python -m wan_mlx.doctor", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--store-reference", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check_backend()
    from . import selftest

    if args.store_reference:
        print(selftest.store_reference())
        return 0

    def show(line: str) -> None:
        if not args.json:
            print(private(line), flush=True)

    started = time.perf_counter()
    about, checks = selftest.machine(), []
    for name, value in about.items():
        show(f"{name:<10}{value}")
    for check in selftest.all_checks():
        checks.append(check)
        show(f"{MARKS[check.status]} {check.name}: {check.said}" + (f"\n     {check.advice}" if check.advice else ""))
    failed = any(check.status == "fail" for check in checks)
    rates, seconds = ({}, None) if failed else selftest.rates()
    for name, rate in rates.items():
        show(f"     {name}: {rate:.3g} TFLOP/s")
    verdict = judge(checks, seconds)
    show(f"{verdict}\n({time.perf_counter() - started:.0f} s)")
    if args.json:
        found = {"machine": about, "checks": [vars(check) for check in checks], "tflops": rates, "verdict": verdict}
        print(private(json.dumps(found, indent=1, ensure_ascii=False)))
    return 1 if failed else 0


def judge(checks: list[Check], seconds: float | None) -> str:
    """The verdict in a sentence or two; ``seconds`` of denoising, None if it does not fit."""
    if bad := [check for check in checks if check.status == "fail"]:
        names = ", ".join(check.name for check in bad)
        return f"{len(bad)} of {len(checks)} checks failed: {names}. First: {bad[0].advice}"
    doubtful = ", ".join(check.name for check in checks if check.status == "warn")
    said = "All is well" + f" ({doubtful}: see above)" * bool(doubtful)
    if seconds is None:
        return f"{said}, but T2V-1.3B does not fit into the free memory at 832x480, 81 frames: --plan says what does."
    units = (("days", 86400), ("h", 3600), ("min", 60))
    unit, size = next(((unit, size) for unit, size in units if seconds >= 1.5 * size), ("s", 1))
    return (f"{said}. At these rates T2V-1.3B denoises 832x480, 81 frames, 50 steps in about "
            f"{seconds / size:,.1f} {unit}.")  # fmt: skip


def private(text: str) -> str:
    """``text`` with the home folder as ``~``."""
    home = home_folder() or Path("/")
    for folder in sorted({str(home), os.path.realpath(home)} - {"/"}, key=len, reverse=True):
        text = text.replace(folder, "~")
    return text
