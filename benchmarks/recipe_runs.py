"""Distilled recipes at true sizes: whole runs by the command line, from its start to the .mp4, on random weights.

    python benchmarks/recipe_runs.py [fastwan-5B lightx2v-4step] [--folder DIR] [--json recipe_runs.json]

FastWan-5B makes 1280x704 and 121 frames in three steps, lightx2v's LoRAs for T2V-A14B 832x480 and 81 frames in four.
The files that a user would download are written first, in bfloat16 (24 and 70 GB; the LoRAs have rank 64): give a
folder in memory where disks are slow. The pictures are noise; seconds and bytes are real, though x264 finds noise
harder than a video. ``--tiny`` shrinks networks and videos, to try the script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from memory_table import Bench, machine, tiny, write
from wan_mlx.presets import BUNDLED, PRESETS

import mlx.core as mx

RUNS = {"fastwan-5B": ("ti2v-5B", "1280x704", 121), "lightx2v-4step": ("t2v-A14B", "832x480", 81)}
RANK = 64
GIB = 2**30


def lora(folder: Path, model: str, expert: str, shrunk: bool) -> Path:
    """A LoRA of every matrix of a model's blocks, as lightx2v names them."""
    c = (tiny(PRESETS[model]) if shrunk else PRESETS[model]).transformer
    names = [f"{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
    wide, shapes = {"ffn.0": (c.ffn_dim, c.dim), "ffn.2": (c.dim, c.ffn_dim)}, {}
    for key in (f"{block}.{name}" for block in range(c.num_layers) for name in names):
        out, into = wide.get(key.split(".", 1)[1], (c.dim, c.dim))
        module = f"diffusion_model.blocks.{key}"
        shapes |= {f"{module}.lora_down.weight": (RANK, into), f"{module}.lora_up.weight": (out, RANK)}
    path = folder / f"{model}_{expert}_lightx2v_4step.safetensors"
    return write(path, shapes, mx.bfloat16, seed=2 + (expert == "low"), ours=False)


def made(part: str, model: str, folder: Path, shrunk: bool) -> Path:
    """One file of a model, written unless it is there."""
    mx.set_default_device(mx.cpu)  # of a process that only writes
    if part in ("high", "low"):
        return lora(folder, model, part, shrunk)
    presets = {name: tiny(preset) if shrunk else preset for name, preset in PRESETS.items()}
    return Bench(folder, presets).file(part, model)


def command(recipe: str, files: dict[str, Path], shrunk: bool, output: Path) -> list[str]:
    model, size, frames = RUNS[recipe]
    if shrunk:
        size, frames = "128x64", 5
    given = {"model": files["transformer"], "task": model, "text-encoder": files["text_encoder"], "vae": files["vae"],
             "tokenizer": BUNDLED["nano"] / "tokenizer.model", "recipe": recipe, "size": size, "frames": frames,
             "seed": 0, "prompt": "a red circle moves right on a blue background", "output": output}  # fmt: skip
    if "low_noise" in files:
        given |= {"low-noise": files["low_noise"], "lora-high": files["high"], "lora-low": files["low"]}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "wan_mlx.generate", *flags, "--no-prompt-cache", "--overwrite", "--json"]


def files_of(recipe: str, folder: Path, shrunk: bool) -> dict[str, Path]:
    """Those of a recipe's model, written at once unless they are there."""
    model = RUNS[recipe][0]
    parts = ["transformer", "text_encoder", "vae"]
    parts += ["low_noise", "high", "low"] if PRESETS[model].experts == 2 else []
    started = time.perf_counter()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        writing = {part: pool.submit(made, part, model, folder, shrunk) for part in parts}
        files = {part: future.result() for part, future in writing.items()}
    print(f"{recipe}: files written in {time.perf_counter() - started:.1f} s", flush=True)
    return files


def run(recipe: str, files: dict[str, Path], folder: Path, shrunk: bool) -> dict:
    """A whole run: seconds and peak of each stage, and of all."""
    output = folder / f"{recipe}.mp4"
    started, rows = time.perf_counter(), []
    with subprocess.Popen(command(recipe, files, shrunk, output), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event, at = json.loads(line), time.perf_counter() - started
            row = {"at": round(at, 2), **{key: event[key] for key in ("name", "index", "seconds") if key in event}}
            if event["event"] in ("stage", "step", "result"):
                row |= {"peak_gib": round(event["peak_bytes"] / GIB, 2)} if "peak_bytes" in event else {}
                rows.append({"event": event["event"], **row})
                print(recipe, *(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            elif event["event"] == "error":
                raise SystemExit(event["message"])
    seconds = time.perf_counter() - started
    print(f"{recipe}: {seconds:.1f} s from the command to {output.stat().st_size / 1e6:.1f} MB of .mp4", flush=True)
    return {"recipe": recipe, "seconds": seconds, "events": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=[], help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--folder", type=Path, help="where to write the weights (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="only write the weights")
    parser.add_argument("--tiny", action="store_true", help="small networks and videos, to try the script")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        done = []
        for recipe in args.recipes or RUNS:
            files = files_of(recipe, folder, args.tiny)
            if args.write:
                continue
            done.append(run(recipe, files, folder, args.tiny))
            if args.json:  # after each, so that what is cut short has not been for nothing
                args.json.write_text(json.dumps({"machine": machine(), "runs": done}, indent=1))


if __name__ == "__main__":
    main()
