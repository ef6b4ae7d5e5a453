"""How long a run is predicted to take and how long it takes, stage by stage, one right after the other on this machine.

    python benchmarks/time_prediction.py [--model nano] [--cases 128x128x17x12 ...] [--repeat 3] [--json times.json]

The prediction is what ``--plan`` prints; the run is the pipeline's, from prompt to frames, without writing a file.
Other programs' work shows in both, if not alike: the system's load average is printed along.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import wan_mlx

import mlx.core as mx
import numpy as np

PROMPT = "a red circle moves right on a blue background"
# Stages of a run, and of a plan, that are the same thing.
SAME = {
    "conditioning": ("encode text", "encode images", "encode video"),
    "denoise": ("denoise",),
    "decode": ("decode",),
}
STAGES = tuple(SAME)


def parse_case(text: str) -> tuple[int, int, int, int]:
    """128x128x17x12: width, height, frames, steps."""
    case = tuple(int(number) for number in text.split("x"))
    if len(case) != 4:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxHEIGHTxFRAMESxSTEPS")
    return case


def compare(pipe: wan_mlx.WanPipeline, case: tuple[int, int, int, int]) -> dict:
    """Seconds of each of `STAGES`, predicted and measured."""
    width, height, frames, steps = case
    sources = {}
    if pipe.config.has_image_branch:
        sources["image"] = np.full((height, width, 3), 99, np.uint8)
        if pipe.preset.task == "flf2v":
            sources["last_image"] = sources["image"]
    request = pipe.request(PROMPT, width=width, height=height, num_frames=frames, steps=steps, seed=0, **sources)
    started = time.perf_counter()
    plan = pipe.plan(request, measure=True)
    planning = time.perf_counter() - started
    plan.check()
    run = pipe.run(request)
    for _ in run:
        pass
    predicted, measured = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    for row in plan.rows:
        predicted[next(stage for stage, rows in SAME.items() if row.stage in rows)] += row.seconds
    for report in run.reports:
        measured["denoise" if report.name == "load transformer" else report.name] += report.seconds
    return {"predicted": predicted, "measured": measured, "planning": planning, "load": os.getloadavg()[0]}


def whole(row: dict) -> float:
    """Predicted by measured, of the whole run."""
    return sum(row["predicted"].values()) / sum(row["measured"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano", help="anything --model of the command line takes that is here")
    parser.add_argument("--cases", type=parse_case, nargs="+", metavar="WxHxFRAMESxSTEPS",
                        default=[(64, 64, 5, 12), (128, 128, 17, 12), (192, 128, 25, 6)])  # fmt: skip
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize")
    parser.add_argument("--memory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options = {"dtype": args.dtype, "quantize": args.quantize, "memory": args.memory}
    pipe = wan_mlx.WanPipeline.from_pretrained(args.model, progress=False, prompt_cache=False, **options)
    print(f"{'':<20}" + "".join(f"{stage:>22}" for stage in STAGES) + f"{'whole':>8}{'planning':>10}{'load':>6}")
    rows = []
    for case in args.cases:
        name = "x".join(map(str, case))
        for _ in range(args.repeat):
            row = {"case": name, **compare(pipe, case)}
            rows.append(row)
            pairs = [(row["predicted"][stage], row["measured"][stage]) for stage in STAGES]
            cells = "".join(f"{p:>9.2f}{m:>8.2f}{p / m:>5.2f}" for p, m in pairs)
            print(f"{name:<20}{cells}{whole(row):>8.2f}{row['planning']:>8.1f} s{row['load']:>6.1f}", flush=True)
        print(f"{name:<20}median of the whole: {statistics.median(whole(r) for r in rows if r['case'] == name):.2f}")
    if args.json:
        machine = {"backend": str(mx.default_device()), "system": platform.platform(), "mlx": mx.__version__}
        machine |= {key: str(value) for key, value in mx.device_info().items()}
        args.json.write_text(json.dumps({"machine": machine, "options": options, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
