"""What previews cost beside a step: time of both at true sizes, on whatever device this runs.

    python benchmarks/preview_cost.py                        # previews alone, and a step's work
    python benchmarks/preview_cost.py --tflops 15            # of a device whose transformer runs at that rate
    python benchmarks/preview_cost.py --taehv taew2_1.pth    # with TAEHV, too

Latents are noise, which compresses worst. The rate of a machine is what ``python -m wan_mlx.doctor`` measures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from wan_mlx.media.preview import enlarge, latent_map, sheet_of, tiny_preview
from wan_mlx.media.write import save_video
from wan_mlx.models.configs import VAEConfig
from wan_mlx.models.taehv import TAEHVConfig
from wan_mlx.planning.flops import forward_parts, vae_flop
from wan_mlx.presets import PRESETS
from wan_mlx.weights.taehv import load_taehv

import mlx.core as mx
import numpy as np

CASES = [("t2v-1.3B", (21, 60, 104)), ("t2v-14B", (21, 60, 104)), ("t2v-14B", (21, 90, 160))]


def taehv_flop(config: TAEHVConfig, latent_shape: tuple[int, int, int], small: bool = False) -> float:
    """Floating-point operations of decoding latents (t, h, w); a multiply-add counts as two."""
    frames, height, width = latent_shape
    pixels = frames * height * width
    flop = pixels * 18 * config.z_dim * config.widths[0]
    for dim, next_dim, grow in zip(config.widths, config.widths[1:], config.grows, strict=False):
        flop += pixels * 3 * 18 * 4 * dim**2  # three blocks of convolutions 2d -> d, d -> d, d -> d
        pixels *= 1 if small else 4
        grow = 1 if small else grow
        flop += pixels * 2 * dim * dim * grow
        pixels *= grow
        flop += pixels * 18 * dim * next_dim
    return float(flop + pixels * 18 * config.widths[-1] * 3 * config.patch**2)


def best(function: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, help="of the transformer on this device")
    parser.add_argument("--taehv", metavar="FILE")
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    previewers = {"linear map": latent_map(VAEConfig())}
    if args.taehv:
        previewers["TAEHV"] = partial(tiny_preview, load_taehv(args.taehv))
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in CASES:
            preset = PRESETS[name]
            step = 2 * sum(forward_parts(preset.transformer, preset.geometry.seq_len(shape)).values())  # two passes
            latents = mx.array(np.random.default_rng(0).normal(size=(1, *shape, 16)).astype(np.float32))
            mx.eval(latents)
            for kind, previewer in previewers.items():
                frames = previewer(latents)
                map_time = best(lambda: previewer(latents), args.times)  # noqa: B023 - called at once

                def write(frames: np.ndarray = frames) -> None:
                    save_video(Path(folder) / "a.webp", enlarge(frames), 4, {})
                    save_video(Path(folder) / "a.png", sheet_of(frames)[None], 1, {})

                whole = map_time + best(write, args.times)
                said = f"{name} {shape}: {kind} {map_time * 1e3:.1f} ms, with both files {whole * 1e3:.0f} ms; "
                said += f"a step is {step / 1e12:.0f} TFLOP"
                if args.tflops:
                    seconds = step / args.tflops / 1e12
                    said += f" = {seconds:.1f} s, of which that is {100 * whole / seconds:.2f} %"
                print(said)
            for kind, small in (("TAEHV's small decode", True), ("TAEHV's draft", False)):
                work = taehv_flop(TAEHVConfig(), shape, small)
                print(f"    {kind}: {work / 1e12:.1f} TFLOP, {100 * work / step:.2f} % of that step; "
                      f"the VAE's decode: {vae_flop(VAEConfig(), shape, decoding=True) / 1e12:.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
