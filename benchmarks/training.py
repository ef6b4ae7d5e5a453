"""A training step's seconds and peak memory at true sizes, with random weights, beside Diffusers with PEFT on CUDA.

    python benchmarks/training.py --against diffusers --json training.json
    python benchmarks/training.py --only 1.3B-still 14B-still-q4
    python benchmarks/training.py --only 1.3B-81 --parts --set 1.3B-81:training.block_backward.TOKENS_AT_ONCE=4096

A process per engine and model (`training_worker.py`) has one case ready at a time; both engines take turns. A step is
forward, backward, the gradients' norm and AdamW; LoRAs of rank 32 on every linear layer of the blocks, batch 1, in
bfloat16. Streamed cases read a file whose blocks are one block's bytes, from the system's cache: reading takes as long
as from memory, not as from a disk.

Each row tells what issue 24 asks: a share of Diffusers' seconds and peak, or GiB; and what ``--plan`` says. ``--parts``
tells a step's stages, and milliseconds of single operations; with ``--set`` also the stages with other numbers in the
package.
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
    "1.3B-33": ("resident", (1.2, 1.0, None)),
    "1.3B-still": ("resident", (1.2, 1.0, None)),
    "1.3B-81": ("resident", (1.0, 0.7, None)),
    "14B-still-q4": ("q4", (None, None, 12.0)),
    "1.3B-33-streamed": ("streamed", (None, None, 3.7)),
    "1.3B-still-streamed": ("streamed", (None, None, 2.7)),
    "5B-still-streamed": ("streamed", (None, None, 4.0)),
    "14B-still-streamed": ("streamed", (None, None, 7.0)),
    "14B-33-streamed": ("streamed", (None, None, 9.5)),
}
AGAINST = ("1.3B-81", "1.3B-33", "1.3B-still")


class Worker:
    """A process of one engine and model, which is told what to do and answers with one line."""

    def __init__(self, engine: str, model: str, *more: str):
        command = [sys.executable, "-u", str(HERE / "training_worker.py"), engine, model, *more]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self._said.put(json.loads(line))
        self._said.put(None)

    def tell(self, what: str, **more: Any) -> None:
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"do": what, **more}) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended, as `said` will tell

    def said(self, until: float) -> dict[str, Any] | None:
        """Its answer; None if it has ended, or says nothing before then: then it is ended."""
        try:
            found = self._said.get(timeout=max(0.1, until - time.monotonic()))
        except queue.Empty:
            found = None
        if found is None:
            self.process.kill()
        return found


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


def other_numbers(text: str) -> tuple[str, dict[str, float]]:
    """``CASE:module.NAME=1,module.OTHER=2`` → the case, and the numbers by name."""
    case, _, changes = text.partition(":")
    pairs = [one.split("=") for one in changes.split(",")]
    return case, {f"wan_mlx.{name}": json.loads(value) for name, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--against", choices=["diffusers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="also tell a step's stages, and single operations")
    parser.add_argument("--set", nargs="+", default=[], type=other_numbers, metavar="CASE:MODULE.NAME=N",
                        help="with --parts: a case's stages with other numbers in the package")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="also compare gradients with those in float32")
    parser.add_argument("--seconds", type=float, default=1e6, help="end after these")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a case may take")
    parser.add_argument("--ready", type=float, default=600, help="seconds that a process may take to get ready")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.monotonic()
    until = began + args.seconds
    workers: dict[tuple[str, str], Worker] = {}
    for name in args.only:
        for engine in ("wan_mlx", *([args.against] if args.against and name in AGAINST else [])):
            model = case_of(name)["model"]
            workers[engine, model] = workers.get((engine, model)) or Worker(engine, model)
    checker = Worker("wan_mlx", case_of(args.only[0])["model"], "checks") if args.check else None
    soon = min(until, began + args.ready)
    rows: list[dict[str, Any]] = []
    say = threading.Lock()

    def run(name: str, engines: dict[str, Worker], rounds: int) -> None:
        case, limit = case_of(name), min(until, time.monotonic() + args.limit)
        found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
        for worker in engines.values():
            worker.tell("prepare", case=case)
        for engine, worker in engines.items():
            if (first := worker.said(limit)) and not rounds:
                found[engine].append(first)
        for count in range(rounds):
            for engine, worker in engines.items():
                worker.tell("step")
                if measured := worker.said(limit):
                    found[engine].append(measured)
                    told = f"{measured['seconds']:.3f} s, {measured['peak_gib']:.2f} GiB"
                    print(f"    {name} {engine} round {count + 1}: {told}", flush=True)
        best = {
            engine: {**case, "engine": engine, **min(runs, key=lambda run: run["seconds"]),
                     "all": [run["seconds"] for run in runs], "peak_gib": max(run["peak_gib"] for run in runs)}
            for engine, runs in found.items() if runs
        }  # fmt: skip
        with say:
            for engine in engines:
                if engine not in best:
                    print(f"{name:<22}{engine:<11} was not measured", flush=True)
                    continue
                row = best[engine]
                told = verdict(row, best.get("diffusers")) if engine == "wan_mlx" else ""
                print(f"{name:<22}{engine:<11}{row['seconds']:>8.3f} s{row['peak_gib']:>8.2f} GiB  {told}", flush=True)
            rows.extend(best.values())
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))

    def ask(what: str, worker: Worker, before: str, **given: Any) -> None:
        worker.tell(what, given=given)
        if answer := worker.said(min(until, time.monotonic() + args.limit)):
            told = ", ".join(f"{key} {value}" for key, value in answer.items())
            print(f"    {time.monotonic() - began:.0f} s: {before}: {told}", flush=True)

    def stages(name: str, worker: Worker) -> None:
        for case, changes in [(name, {}), *args.set] if args.parts else []:
            if case == name:
                told = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())
                ask("stages", worker, f"{name} {told}".strip(), changes=changes)

    timed = [name for name in args.only if name in AGAINST]
    for name in timed:
        engines = {engine: worker for (engine, model), worker in workers.items() if model == case_of(name)["model"]}
        if name == timed[0]:
            for worker in engines.values():
                worker.said(soon)
            print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
        run(name, engines, args.rounds)
        stages(name, engines["wan_mlx"])
    if args.parts and timed:
        ask("parts", engines["wan_mlx"], "ms")

    def memory(model: str) -> None:
        """The cases of a model in which only the peak counts; those of several models side by side."""
        worker = workers["wan_mlx", model]
        if not any(case_of(name)["model"] == model for name in timed):
            worker.said(soon)
        for name in args.only:
            if name not in AGAINST and case_of(name)["model"] == model:
                run(name, {"wan_mlx": worker}, 0)
                if CASES[name][0] != "streamed":
                    stages(name, worker)

    def check(worker: Worker) -> None:
        worker.said(soon)
        ask("check", worker, "gradients in bfloat16")

    threads = [threading.Thread(target=memory, args=(model,)) for engine, model in workers if engine == "wan_mlx"]
    if checker:
        threads.append(threading.Thread(target=check, args=(checker,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if checker:
        checker.process.kill()
    for worker in workers.values():
        worker.process.kill()


if __name__ == "__main__":
    main()
