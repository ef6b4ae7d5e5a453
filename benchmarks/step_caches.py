"""What a step cache saves and what it costs: forwards computed, seconds, and PSNR against the run without.

Seconds are those of denoising and, in brackets, those of all processor cores for whole runs, which other programs on
the machine disturb less.

    python benchmarks/step_caches.py nano --calibrate
    python benchmarks/step_caches.py FOLDER --json step_caches.json

The model stays loaded; each cache makes the same videos (prompts times seeds) as the run without one. ``steps=14`` is
no cache, but a run of so many steps. The number of forwards of MagCache and Spectrum, and with it the time, does not
depend on the weights, so a folder of random ones (``random_checkpoint.py``) tells their speed at real sizes; of the
others it tells what looking costs when nothing can be left out. PSNR means something only for a trained model.

TeaCache and MagCache need constants, which are published for Wan-AI's models alone. ``--calibrate`` measures them for
any other model, by one run that computes everything, and prints them as ``assets/step_caches.json`` has them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from speed import machine
from wan_mlx import WanPipeline
from wan_mlx.caching import COND
from wan_mlx.caching.residual import MAGCACHE, TEACACHE, ResidualCache
from wan_mlx.runs import run

import mlx.core as mx
import numpy as np

CANDIDATES = (
    "teacache:0.05", "teacache:0.08", "teacache:0.1", "teacache:0.2", "magcache", "magcache:0.12:4", "magcache:0.24:6",
    "easycache:0.05", "easycache:0.1", "easycache:0.2", "spectrum:2:0.25", "spectrum", "spectrum:2:3",
    "spectrum:2:0.75:hidden", "steps=25", "steps=14", "steps=10",
)  # fmt: skip
FEWER = "steps="
PROMPTS = ("a red circle moves right on a blue background", "a yellow star spins on a grey background")


def psnr(videos: list[np.ndarray], others: list[np.ndarray]) -> float:
    """Of uint8 frames, in dB, over all videos together; infinite if all are equal."""
    pairs = zip(videos, others, strict=True)
    error = np.mean([np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2) for a, b in pairs])
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


class Recorder(ResidualCache):
    """Computes everything, and notes from step to step, for each pass, what the caches would have to know."""

    def __init__(self, steps: int):
        super().__init__(steps, threshold=1.0)
        self.ratios: list[list[float]] = [[], []]
        self.changes: list[tuple[float, float, float]] = []  # of time, of its projection, of what leaves the blocks

    def velocity(self, branch, forward):
        own = self.branches[branch]

        def through(x, this_pass, run_blocks):
            after = run_blocks(x)
            now = {"time": this_pass.time, "projection": this_pass.modulation, "after": after, "residual": after - x}
            now = {name: array.astype(mx.float32) for name, array in now.items()}
            if own.arrays:
                sizes = [mx.linalg.norm(arrays["residual"], axis=-1) for arrays in (now, own.arrays)]
                self.ratios[branch].append((sizes[0] / sizes[1]).mean().item())
                if branch == COND:
                    names = ("time", "projection", "after")
                    self.changes.append(tuple(relative_change(now[name], own.arrays[name]) for name in names))
            own.arrays = now
            own.computed += 1
            mx.eval(list(now.values()))
            return after

        return forward(through=through)


def relative_change(now: mx.array, before: mx.array) -> float:
    return (mx.abs(now - before).mean() / mx.abs(before).mean()).item()


def calibrate(pipe: WanPipeline, prompt: str, options: dict) -> None:
    """Measure the constants of a model and enter them under its preset's name, for this process."""
    request = pipe.request(prompt, **options)
    recorder = Recorder(request.steps)
    make_cache, run.make_cache = run.make_cache, lambda *args: recorder
    try:
        pipe(prompt, seed=1, **options)
    finally:
        run.make_cache = make_cache
    cond, uncond = (recorder.ratios[branch] or recorder.ratios[COND] for branch in range(2))
    ratios = tuple(round(value, 5) for pair in zip(cond, uncond, strict=True) for value in pair)
    changes = np.array(recorder.changes)
    fits = [tuple(np.polyfit(changes[:, column], changes[:, 2], 4).tolist()) for column in range(2)]
    name = pipe.preset.name
    TEACACHE[name] = {"threshold": 0.1, "mode": "plain", "plain": fits[0], "ret": fits[1]}
    MAGCACHE[name] = {"threshold": 0.12, "most_skips": 2, "retention": 0.2, "ratios": ratios}
    print(json.dumps({"teacache": {name: TEACACHE[name]}, "magcache": {name: MAGCACHE[name]}}))


def available(pipe: WanPipeline, options: dict) -> list[str]:
    """The candidates that this model and number of steps allow, each once."""
    found, reasons = {}, set()
    for cache in CANDIDATES:
        if cache.startswith(FEWER):
            found[cache] = cache
            continue
        try:
            found.setdefault(pipe.request(PROMPTS[0], cache=cache, **options).cache, cache)
        except ValueError as error:
            reasons.add(str(error))
    for reason in sorted(reasons):
        print(reason)
    return list(found.values())


def runs(pipe: WanPipeline, cache: str, prompts: list[str], seeds: range, options: dict) -> dict:
    """Frames, and totals over prompts and seeds."""
    frames, seconds, computed, asked, begun = [], 0.0, 0, 0, time.process_time()
    if cache.startswith(FEWER):
        cache, options = "none", {**options, "steps": int(cache.removeprefix(FEWER))}
    for prompt in prompts:
        for seed in seeds:
            video = pipe(prompt, seed=seed, cache=cache, **options)
            frames.append(video.frames)
            seconds += next(stage.seconds for stage in video.stages if stage.name == "denoise")
            forwards = video.settings["forwards"]
            computed, asked = computed + forwards[0], asked + forwards[1]
    count = len(frames)
    cores = (time.process_time() - begun) / count
    return {"frames": frames, "seconds": seconds / count, "of_cores": cores, "computed": computed / count,
            "forwards": asked / count}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="nano, a folder, or a hub id")
    parser.add_argument("--task", help="preset whose constants and defaults are used")
    parser.add_argument("--size", help="such as 832x480 (default: the model's)")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--caches", help="with commas between (default: all that the model allows)")
    parser.add_argument("--prompt", action="append", help="again for more (default: two that nano knows)")
    parser.add_argument("--seeds", type=int, default=1, help="how many for each prompt")
    parser.add_argument("--calibrate", action="store_true", help="measure TeaCache's and MagCache's constants first")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    width, height = (int(n) for n in args.size.split("x")) if args.size else (None, None)
    options = {"width": width, "height": height, "num_frames": args.frames, "steps": args.steps}
    pipe = WanPipeline.from_pretrained(args.model, dtype=args.dtype, preset=args.task, progress=False)
    prompts, seeds = args.prompt or list(PROMPTS), range(1, args.seeds + 1)
    rows = []
    with pipe.keep_loaded():
        pipe(prompts[0], seed=1, **{**options, "steps": 2})  # load, and compile what is compiled once
        if args.calibrate:
            calibrate(pipe, prompts[0], options)
        caches = args.caches.split(",") if args.caches else available(pipe, options)
        full = None
        for cache in ["none", *caches]:
            got = runs(pipe, cache, prompts, seeds, options)
            full = full or got
            row = {
                "cache": cache if "=" in cache else pipe.request(prompts[0], cache=cache, **options).cache,
                "computed": got["computed"],
                "forwards": got["forwards"],
                "seconds": got["seconds"],
                "of_cores": got["of_cores"],
                "speedup": full["seconds"] / got["seconds"],
                "psnr": psnr(full["frames"], got["frames"]),
            }
            rows.append(row)
            print("{cache:<26}{computed:6g} of {forwards:<6g}{seconds:9.2f} s{speedup:8.2f}x ({of_cores:.1f} s)"
                  "{psnr:9.2f} dB".format(**row), flush=True)  # fmt: skip
    if args.json:
        request = pipe.request(prompts[0], **options)
        size = {"width": request.width, "height": request.height, "frames": request.num_frames, "steps": request.steps}
        report = {"machine": machine(), "model": args.model, "dtype": args.dtype, **size, "prompts": prompts,
                  "seeds": args.seeds, "rows": rows}  # fmt: skip
        args.json.write_text(json.dumps(report, indent=1).replace("Infinity", "null"))


if __name__ == "__main__":
    main()
