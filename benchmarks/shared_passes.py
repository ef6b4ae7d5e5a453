"""What it saves that both passes of guidance share the first block's self-attention: a step with and without, in turns.

    python benchmarks/shared_passes.py [t2v-1.3B:5 vace-1.3B:3 t2v-A14B:2] [--size 832x480] [--frames 81]

Random weights in bfloat16; a number behind a colon is how often. Seconds are the least and the median, the peak is
MLX's, beside what `planning.peak_memory.denoise` says; the velocities are compared bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time

from wan_mlx.caching import StepCache
from wan_mlx.denoise import with_condition
from wan_mlx.guidance import Guidance, guided_velocity
from wan_mlx.models.execution import Execution
from wan_mlx.planning import flops, peak_memory
from wan_mlx.planning.sizes import sizes_of
from wan_mlx.planning.speed import random_transformer
from wan_mlx.presets import PRESETS
from wan_mlx.types import Conditioning

import mlx.core as mx

GIB = 2**30


def compare(name: str, times: int, width: int, height: int, frames: int) -> None:
    preset = PRESETS[name]
    nets, c = sizes_of(preset, "bfloat16", None), preset.transformer
    shape, keys = preset.geometry.latent_shape(width, height, frames), iter(mx.random.split(mx.random.key(0), 4))
    noise = mx.random.normal((1, *shape, c.out_dim), key=next(keys))
    texts = (mx.random.normal((1, c.text_len, c.text_dim), key=next(keys)).astype(mx.bfloat16) for _ in range(2))
    vace = mx.random.normal((1, *shape, c.vace_in_dim), key=next(keys)) if c.vace_layers else None
    given = Conditioning(noise, *texts, vace_context=vace)
    mx.eval(given.arrays())
    run = Execution(random_transformer(c, nets))
    model, guidance = with_condition(run, given), Guidance(5.0)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    peaks, found = {}, {}
    for turn in range(times + 1):  # the first compiles kernels
        for shares in (True, False):
            run.shares = shares
            mx.clear_cache()
            mx.reset_peak_memory()
            started = time.perf_counter()
            found[shares] = guided_velocity(model, noise, 500.0, given, guidance, 0, 1, StepCache(1))
            mx.eval(found[shares])
            if turn:
                seconds[shares].append(time.perf_counter() - started)
                peaks[shares] = mx.get_peak_memory()
    same = bool(mx.array_equal(found[True], found[False]))
    tokens = nets.geometry.seq_len(shape)
    saved = sum(flops.shared_parts(c, tokens).values()) / sum(flops.forward_parts(c, tokens).values()) / 2
    print(f"{name} {width}x{height}x{frames} on {mx.default_device()}: {times} turns, same bits: {same}; by FLOP "
          f"{100 * saved:.2f} % less")  # fmt: skip
    for shares in (True, False):
        planned = peak_memory.denoise(nets, shape, False, run.tokens_at_once, shares=shares)
        print(f"  {'shared' if shares else 'apart '}  {min(seconds[shares]):.4f} s, median "
              f"{statistics.median(seconds[shares]):.4f}; peak {peaks[shares] / GIB:.3f} GiB, planned "
              f"{planned / GIB:.3f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["t2v-1.3B:5", "vace-1.3B:3", "t2v-A14B:2"])
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    args = parser.parse_args()
    for text in args.models:
        name, _, times = text.partition(":")
        compare(name, int(times or 3), *map(int, args.size.split("x")), args.frames)
        mx.clear_cache()


if __name__ == "__main__":
    main()
