"""Frames between frames: 81 at 16 a second become 161 at 32, by RIFE with random weights; seconds and peak memory.

    python benchmarks/interpolation.py                     # 832x480, on whatever device this runs
    python benchmarks/interpolation.py --size 1280x720 --frames 33

The network takes as long whatever its weights are. The video is noise that moves, so that flows are long and gathers
scattered. The peak is MLX's, beside what `planning.peak_memory.rife` says.
"""

from __future__ import annotations

import argparse
import time
from fractions import Fraction

from wan_mlx.media.interpolate import Between, even_moments, frames_at, interpolate
from wan_mlx.models.rife import RIFE
from wan_mlx.planning.flops import rife_flop
from wan_mlx.planning.peak_memory import rife
from wan_mlx.planning.speed import random_weights

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def moving_noise(count: int, height: int, width: int) -> np.ndarray:
    """uint8 (count, H, W, 3): coarse noise that moves by three pixels a frame."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    frame = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return np.stack([np.roll(frame, 3 * number, axis=1) for number in range(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    model = RIFE()
    random_weights(model)
    frames, between = moving_noise(args.frames, height, width), Between(model)
    rate, fps = Fraction(16), Fraction(32)
    between(frames[0], frames[1], 0.5)  # compiles kernels
    mx.clear_cache()
    held, weights = mx.get_active_memory(), sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    mx.reset_peak_memory()
    started = time.perf_counter()
    made = sum(len(chunk) for chunk in interpolate((frame[None] for frame in frames), even_moments(rate, fps), between))
    seconds = time.perf_counter() - started
    assert made == frames_at(args.frames, rate, fps) and not between.cuts
    added = made - args.frames
    flop, peak = rife_flop(width, height), mx.get_peak_memory() - held + weights
    print(f"{args.frames} -> {made} frames at {args.size} on {mx.default_device()}: {seconds:.2f} s, "
          f"{1000 * seconds / added:.1f} ms and {flop / 1e9:.1f} GFLOP a frame, {added * flop / seconds / 1e12:.2f} "
          f"TFLOP/s; peak {peak / 2**20:.0f} MiB, planned {rife(width, height) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
