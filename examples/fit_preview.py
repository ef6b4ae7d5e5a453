"""Fit the colours of previews: the linear map from latents to what the VAE decodes them to.

    python examples/fit_preview.py --model ./Wan2.1-T2V-1.3B --clips clips/*.mp4
    python examples/fit_preview.py --model nano --world 48 --save nano --source "..."

Clips are encoded and decoded again; the decoded pixels, averaged over the 8x8 pixels and the frames that a latent
stands for, are fitted by least squares on three clips of four; the first latent frame, which stands for one frame and
is another thing to the VAE, has a map of its own. The correlation is of the other clips. ``--save NAME``
writes the map into wan_mlx/assets/latent_rgb.json, from where every model of the same latents takes it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import wan_mlx  # before mlx, so that on a Mac float32 means float32

# isort: split
import mlx.core as mx
import numpy as np

from wan_mlx.hub.resolve import resolve
from wan_mlx.media.preview import MAPS, map_preview, read_maps
from wan_mlx.media.read import cover, open_video, to_float
from wan_mlx.models.vae import VAE


def world_clips(count: int) -> Iterator[np.ndarray]:
    """Clips of nano's training world, float32 (17, 128, 128, 3) in [-1, 1]; needs torch and scikit-learn."""
    sys.path.insert(0, str(Path(__file__).parent / "nano"))
    import render
    import world

    glyphs = render.atlas("cpu")
    for index in range(count):
        scene = world.sample_scene(np.random.default_rng([7, index]), world.SIZES[0])
        video, _ = render.paint(render.upload([render.pack([scene])], "cpu"), glyphs, 128, 128)
        yield video[0].permute(1, 2, 3, 0).numpy()


def file_clips(paths: list[str], size: tuple[int, int], num_frames: int) -> Iterator[np.ndarray]:
    """The first frames of each video, float32 (num_frames, H, W, 3) in [-1, 1]."""
    width, height = size
    for path in paths:
        clip = open_video(path)
        count = (min(num_frames, clip.num_frames) - 1) // 4 * 4 + 1
        yield np.stack([to_float(cover(frame, height, width)) for frame in clip.read(range(count))])


def shrink(frames: np.ndarray, factor: int) -> np.ndarray:
    """Decoded frames (4n+1, H, W, 3) → the average that each latent stands for, (n+1, H/factor, W/factor, 3)."""
    count, height, width, _ = frames.shape
    small = frames.reshape(count, height // factor, factor, width // factor, factor, 3).mean((2, 4))
    return np.concatenate([small[:1], small[1:].reshape(-1, 4, *small.shape[1:]).mean(1)])


def pairs(vae: VAE, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents (t, h, w, C) of a clip, and the colours (t, h, w, 3) that the VAE decodes them to."""
    latents = vae.encode(mx.array(clip)[None])
    decoded = np.concatenate([np.array(frames[0]) for frames in vae.decode(latents)])
    return np.array(latents[0]), shrink(decoded, vae.geometry.spatial)


def fit(latents: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares: latents (N, C), colours (N, 3) → factors (C, 3), bias (3,)."""
    design = np.concatenate([latents, np.ones((len(latents), 1))], axis=1).astype(np.float64)
    solution, *_ = np.linalg.lstsq(design, colours.astype(np.float64), rcond=None)
    return solution[:-1], solution[-1]


def fit_both(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    """The map of a latent space, from latents (t, h, w, C) and colours (t, h, w, 3) of clips."""
    maps = []
    for frames in (slice(1, None), slice(0, 1)):
        latents, colours = (
            np.concatenate([pair[i][frames].reshape(-1, pair[i].shape[-1]) for pair in pairs]) for i in (0, 1)
        )
        factors, bias = fit(latents, colours)
        maps.append({"factors": factors.round(4).tolist(), "bias": bias.round(4).tolist()})
    return {**maps[0], "first": maps[1]}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clips", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--world", type=int, default=0, metavar="N", help="N clips of nano's world")
    parser.add_argument("--size", default="416x240", metavar="WxH")
    parser.add_argument("--frames", type=int, default=17, metavar="N")
    parser.add_argument("--save", metavar="NAME")
    parser.add_argument("--source", default="fitted by examples/fit_preview.py")
    args = parser.parse_args()
    size = tuple(map(int, args.size.split("x")))
    vae = wan_mlx.load_vae(resolve(args.model))
    found = [pairs(vae, clip) for clip in (*file_clips(args.clips, size, args.frames), *world_clips(args.world))]
    if len(found) < 4:
        parser.error(f"{len(found)} clips were given, expected at least 4")
    fitted, others = [p for i, p in enumerate(found) if i % 4], found[::4]
    entry = fit_both(fitted)
    shown = [(map_preview(entry, mx.array(latents)[None]), colours) for latents, colours in others]
    each = [correlation(*pair) for pair in shown]
    print(f"{len(fitted)} clips fitted; on {len(others)} others: correlation "
          f"{correlation(*(np.concatenate([pair[i].ravel() for pair in shown]) for i in (0, 1))):.4f}, "
          f"of a clip {min(each):.4f} to {max(each):.4f}")  # fmt: skip
    entry = {"source": args.source, "mean": list(vae.config.mean), "std": list(vae.config.std), **entry}
    if args.save:
        MAPS.write_text(write(read_maps() | {args.save: entry}), encoding="utf-8")
    else:
        print(write({"map": entry}))


def write(maps: dict) -> str:
    """JSON with a line for each value."""
    blocks = []
    for name, entry in maps.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entry.items()]
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    main()
