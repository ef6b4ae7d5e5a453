"""How alike a draft and its video are: nano makes both of the same prompts and seeds, and pixels are read.

    python benchmarks/draft_likeness.py [--prompts 16] [--size 128x128] [--frames 17] [--steps 12]

A draft is half as wide and high, so that of 128x128 it is 64x64, which nano never saw: it tells what a draft keeps of
a model that has few sizes. Shape, colour, background and motion are those of ``examples/nano/reading.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import wan_mlx

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "nano"))
import reading  # noqa: E402
import world  # noqa: E402

READ = {"shape": "kind", "colour": "colour", "background": "background", "motion": "motion"}


def enlarged(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    asked = world.held_out_prompts(args.prompts, (width, height, args.frames))
    pipes = {draft: wan_mlx.WanPipeline.from_pretrained("nano", progress=False, draft=draft) for draft in (False, True)}
    given = dict(size=args.size, num_frames=args.frames, steps=args.steps)
    alike, right = {name: 0 for name in READ}, {(draft, name): 0 for draft in pipes for name in READ}
    correlation = []
    for seed, (prompt, scene) in enumerate(asked):
        frames = {draft: pipe(prompt, seed=seed, **given).frames for draft, pipe in pipes.items()}
        frames[True] = enlarged(frames[True], (width, height))
        found = {draft: reading.measure(of) for draft, of in frames.items()}
        for name, of in READ.items():
            alike[name] += getattr(found[False], of) == getattr(found[True], of)
            for draft in pipes:
                right[draft, name] += reading.score(found[draft], scene)[name]
        correlation.append(np.corrcoef(frames[False].ravel(), frames[True].ravel())[0, 1])
        print(prompt, *(f"| {value}" for of in found.values() for value in of[:4]), flush=True)
    print(f"{len(asked)} prompts, {args.size}, {args.frames} frames, {args.steps} steps; alike, video as asked, "
          f"draft as asked; correlation of pixels {np.median(correlation):.2f} (median)")  # fmt: skip
    for name in READ:
        print(f"  {name:<11}{alike[name]:>3} {right[False, name]:>3} {right[True, name]:>3}")


if __name__ == "__main__":
    main()
