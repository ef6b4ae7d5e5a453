"""A training step's seconds and peak memory at true sizes, with random weights, beside Diffusers with PEFT on CUDA.

    python benchmarks/training.py --against diffusers --json training.json
    python benchmarks/training.py --only 1.3B-still 14B-still-q4

Every case is a process of its own (`training_worker.py`). They get ready side by side and are then measured one after
the other; both engines take turns. A step is forward, backward, the gradients' norm and AdamW; LoRAs of rank 32 on
every linear layer of the blocks, batch 1, in bfloat16. Streamed cases read a file whose blocks are one block's bytes,
from the system's cache: reading takes as long as from memory, not as from a disk.

``worth`` compares with what was asked: seconds with Diffusers' of the same size, peaks with a number of GiB or a share
of Diffusers' peak.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SIZES = {"still": ("832x480", 1), "33": ("480x272", 33), "81": ("832x480", 81)}
MODELS = {"1.3B": "t2v-1.3B", "14B": "t2v-14B", "5B": "ti2v-5B"}
# Name → base, and what is asked: (share of Diffusers' seconds, share of its peak or None, GiB or None).
CASES = {
    "1.3B-81": ("resident", (1.0, 0.7, None)),
    "1.3B-33": ("resident", (1.2, 1.0, None)),
    "1.3B-still": ("resident", (1.2, 1.0, None)),
    "14B-still-q4": ("q4", (None, None, 12.0)),
    "1.3B-33-streamed": ("streamed", (None, None, 3.7)),
    "1.3B-still-streamed": ("streamed", (None, None, 2.7)),
    "5B-still-streamed": ("streamed", (None, None, 4.0)),
    "14B-still-streamed": ("streamed", (None, None, 7.0)),
    "14B-33-streamed": ("streamed", (None, None, 9.5)),
}
AGAINST = ("1.3B-81", "1.3B-33", "1.3B-still")


class Worker:
    """A process that has one case ready, and measures it when told to."""

    def __init__(self, engine: str, case: dict[str, Any]):
        command = [sys.executable, "-u", str(HERE / "training_worker.py"), engine, json.dumps(case)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.engine, self.case = engine, case
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self._said.put(json.loads(line))
        self._said.put(None)

    def said(self, until: float) -> dict[str, Any] | None:
        """What it says next; None if it has ended, or says nothing before then."""
        try:
            return self._said.get(timeout=max(0.1, until - time.monotonic()))
        except queue.Empty:
            return None

    def measure(self, what: str, until: float) -> dict[str, Any] | None:
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        except OSError:
            return None
        return self.said(until)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def case_of(name: str) -> dict[str, Any]:
    model, size, *_ = name.split("-")
    shape, frames = SIZES[size]
    base, asked = CASES[name]
    return {"name": name, "model": MODELS[model], "size": shape, "frames": frames, "base": base, "asked": asked}


def verdict(row: dict[str, Any], other: dict[str, Any] | None) -> str:
    """What was asked of a case, and whether it is so."""
    seconds, share, most = row["asked"]
    told = []
    if other and seconds:
        told.append(f"{row['seconds'] / other['seconds']:.2f} x seconds (<= {seconds})")
    if other and share:
        told.append(f"{row['peak_gib'] / other['peak_gib']:.2f} x peak (<= {share})")
    if most:
        told.append(f"{row['peak_gib']:.2f} of {most} GiB")
    if row.get("plan_gib"):
        told.append(f"plan {row['plan_gib']:.2f} GiB: {row['plan_gib'] / row['peak_gib']:.2f}")
    if row.get("plan_seconds"):
        told.append(f"{row['plan_seconds']:.2f} s: {row['plan_seconds'] / row['seconds']:.2f}")
    return ", ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--against", choices=["diffusers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="also time the parts of a step")
    parser.add_argument("--seconds", type=float, default=1e6, help="end after these")
    parser.add_argument("--ready", type=float, default=600, help="seconds that a process may take to get ready")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    started = time.monotonic()
    groups: list[list[Worker]] = []
    for name in args.only:
        engines = ["wan_mlx", *([args.against] if args.against and name in AGAINST else [])]
        groups.append([Worker(engine, case_of(name)) for engine in engines])
    rows: list[dict[str, Any]] = []
    soon = min(until, time.monotonic() + args.ready)
    ready = {id(worker) for group in groups for worker in group if worker.said(soon)}  # all, before any is timed
    print(f"{len(ready)} processes are ready after {time.monotonic() - started:.0f} s", flush=True)
    for group in groups:
        alive = [worker for worker in group if id(worker) in ready]
        found: dict[str, list[dict[str, Any]]] = {worker.engine: [] for worker in alive}
        for _ in range(args.rounds):
            for worker in alive:
                if measured := worker.measure("step", until):
                    found[worker.engine].append(measured)
        more = {}
        for worker in alive:
            if args.parts and worker.engine == "wan_mlx":
                more = worker.measure("parts", until) or {}
        best = {}
        for engine, runs in found.items():
            if runs:
                best[engine] = {**group[0].case, "engine": engine, **min(runs, key=lambda run: run["seconds"]),
                                "all": [run["seconds"] for run in runs],
                                "peak_gib": max(run["peak_gib"] for run in runs),
                                **(more if engine == "wan_mlx" else {})}  # fmt: skip
        for engine, row in best.items():
            told = verdict(row, best.get("diffusers")) if engine == "wan_mlx" else ""
            print(
                f"{row['name']:<22}{engine:<11}{row['seconds']:>8.3f} s{row['peak_gib']:>8.2f} GiB  {told}", flush=True
            )
            if more and engine == "wan_mlx":
                print(f"    {more}", flush=True)
        rows += best.values()
        missing = [worker for worker in group if worker.engine not in best]
        for worker in missing:
            print(f"{group[0].case['name']:<22}{worker.engine:<11} was not measured", flush=True)
        for worker in group:
            worker.close()
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
