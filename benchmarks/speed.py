"""How fast the networks run at true sizes on this machine, and how much of what the machine can do that is.

    python benchmarks/speed.py                                       # T2V-1.3B, 832x480, 81 frames
    python benchmarks/speed.py --model t2v-14B --items forward
    python benchmarks/speed.py --against diffusers --json speed.json
    python benchmarks/speed.py --before TREE                         # in turns with an earlier wan_mlx, a whole tree
    python benchmarks/speed.py --items text run --checkpoint FOLDER  # FOLDER: see random_checkpoint.py

Weights are random, so nothing is downloaded. Every network gets a process of its own (`speed_worker.py`), and PyTorch's
takes turns with ours, so both see the same machine. Prints a table and, with --json, writes it with the machine's
description. ``of matmul`` and ``of attention`` are fractions of the rates that MLX reaches here in the forward's own
largest matmul and self-attention.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from wan_mlx.planning.flops import forward_parts
from wan_mlx.presets import PRESETS

HERE = Path(__file__).parent
ITEMS = ("matmul", "attention", "forward", "decode", "encode", "text", "run")
AGAINST = ("forward", "decode", "encode")


def forward_flop(name: str, size: tuple[int, int], frames: int) -> float:
    """Operations of one transformer forward, a multiplication and an addition counted as two."""
    preset = PRESETS[name]
    tokens = preset.geometry.seq_len(preset.geometry.latent_shape(*size, frames))
    return sum(forward_parts(preset.transformer, tokens).values())


class Worker:
    """A process that holds one network and measures it when told to.

    ``engine``: "wan_mlx", "diffusers", or the folder of an earlier wan_mlx, which its own worker measures.
    """

    def __init__(self, engine: str, case: dict):
        earlier = engine not in ("wan_mlx", "diffusers")
        script = (Path(engine) / "benchmarks" if earlier else HERE) / "speed_worker.py"
        path = os.pathsep.join(filter(None, [engine, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, str(script), "wan_mlx" if earlier else engine, json.dumps(case)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "PYTHONPATH": path} if earlier else None)  # fmt: skip

    def said(self, key: str):
        for line in self.process.stdout:
            if line.startswith("{") and key in (message := json.loads(line)):
                return message[key]
        raise SystemExit(f"{' '.join(self.process.args)} ended with {self.process.wait()}")

    def measure(self) -> dict:
        self.process.stdin.write("measure\n")
        self.process.stdin.flush()
        return self.said("measured")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(case: dict, engines: list[str], rounds: int) -> list[dict]:
    """Best seconds and highest peak of each engine, which take turns."""
    workers = {engine: Worker(engine, case) for engine in engines}  # they get ready side by side
    for worker in workers.values():
        worker.said("ready")
    results = {engine: [] for engine in engines}
    for _ in range(rounds):
        for engine, worker in workers.items():
            results[engine].append(worker.measure())
    for worker in workers.values():
        worker.close()
    return [
        {**case, **min(runs, key=lambda r: r["seconds"]), "engine": engine, "all": [r["seconds"] for r in runs],
         "peak_gib": max(r["peak_gib"] for r in runs)}
        for engine, runs in results.items()
    ]  # fmt: skip


def cases(args: argparse.Namespace) -> list[dict]:
    shape = {"size": args.size, "frames": args.frames}
    found = []
    for model in args.model:
        base = {"model": model, **shape, "checkpoint": args.checkpoint and str(args.checkpoint), "steps": args.steps}
        for item in args.items:
            if item == "forward":
                modes = [None, *args.quantize]
                found += [{"item": item, **base, "dtype": "bfloat16", "quantize": mode} for mode in modes]
            elif item in ("decode", "encode"):
                found += [{"item": item, **base, "dtype": dtype} for dtype in args.vae_dtype]
            else:
                found.append({"item": item, **base, "dtype": "bfloat16"})
    return found


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    import mlx.core as mx

    info = mx.device_info()
    name = info.get("device_name", platform.processor())
    return {"device": name, "backend": str(mx.default_device()), "system": platform.platform(), "mlx": mx.__version__}


def show(rows: list[dict]) -> None:
    print(f"\n{'':<34}{'engine':<11}{'seconds':>9}{'peak GiB':>10}{'TFLOP/s':>9}{'of matmul':>11}{'of attention':>14}")
    rates = {r["item"]: r["flop"] / r["seconds"] for r in rows if r["item"] in ("matmul", "attention")}
    for row in rows:
        label = " ".join(str(row[k]) for k in ("item", "model", "dtype", "quantize") if row.get(k))
        rate = row["flop"] / row["seconds"] if row["flop"] else None
        text = f"{label:<34}{Path(row['engine']).name:<11}{row['seconds']:>9.3f}{row['peak_gib']:>10.2f}"
        text += f"{rate / 1e12:>9.1f}" if rate else ""
        for name, width in (("matmul", 11), ("attention", 14)):
            text += f"{rate / rates[name]:>{width}.0%}" if rate and name in rates else ""
        print(text, flush=True)
        if "stages" in row:
            print(of_run(row, rows), flush=True)


def of_run(run: dict, rows: list[dict]) -> str:
    """What a whole run consists of, beside what was predicted, and what its forwards and its decode take alone."""
    lines = [f"  {name:<32}{'':<11}{stage['seconds']:>9.1f}{stage['peak_gib']:>10.2f}"
             for name, stage in run["stages"].items()]  # fmt: skip
    lines.append(f"  {'predicted':<32}{'':<11}{run['predicted_seconds']:>9.1f}{run['predicted_gib']:>10.2f}")
    alone = {
        row["item"]: row["seconds"]
        for row in rows
        if row["item"] in ("forward", "decode") and row["engine"] == "wan_mlx" and row["model"] == run["model"]
        and not row.get("quantize") and (row["item"], row["dtype"]) != ("decode", "bfloat16")
    }  # fmt: skip
    if len(alone) == 2:
        forwards = 2 * run["steps"]
        ratio = run["seconds"] / (forwards * alone["forward"] + alone["decode"])
        lines.append(f"  {ratio:.2f} times {forwards} forwards and a decode")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["t2v-1.3B"], choices=list(PRESETS), metavar="MODEL")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--items", nargs="+", default=list(ITEMS[:5]), choices=ITEMS, metavar="ITEM")
    parser.add_argument("--quantize", nargs="*", default=[], help="also time the forward packed so, such as q8 q4")
    parser.add_argument("--vae-dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--against", choices=["diffusers"])
    parser.add_argument("--before", metavar="TREE", help="an earlier wan_mlx's whole folder, to take turns with, too")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--checkpoint", type=Path, help="model folder for the items text and run")
    parser.add_argument("--steps", type=int, default=50, help="of the item run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for case in cases(args):
        engines = ["wan_mlx"]
        if args.before and case["item"] in AGAINST:
            engines.append(args.before)
        if args.against and case["item"] in AGAINST and not case.get("quantize"):
            engines.append(args.against)
        rows += measure(case, engines, args.rounds)
        show(rows[-len(engines) :])
        if args.json:  # after every case, so that what is cut short has not been for nothing
            args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    show(rows)


if __name__ == "__main__":
    main()
