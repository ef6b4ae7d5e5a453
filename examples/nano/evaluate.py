"""How often the models in the package show what they are asked for, over prompts that were held out in training.

    python examples/nano/evaluate.py --output evaluation.json --jobs 2

nano gets prompts, nano-i2v first frames too, which PyTorch paints; the colour, background, motion and shape in each
video are read from its pixels. Prints a table per model, in percent; the JSON has every video's reading as well.
On a GPU the table is a matter of a minute or two with ten jobs; on two CPU cores of hours (``--dtype float32`` is the
faster there, ``--quick`` only shows that it runs).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import world
from reading import measure, score, summarise
from world import Scene

MODELS = ("nano", "nano-i2v")
COUNTS = {"nano": (96, 48, 48, 48), "nano-i2v": (48, 16, 16, 16)}  # videos at each of world.SIZES
QUICK = (2, 0, 1, 0)


class Ask(NamedTuple):
    """One video to make; ``image``, uint8 (H, W, 3), is its first frame where the model is given one."""

    prompt: str
    scene: Scene
    image: np.ndarray | None = None

    @property
    def size(self) -> str:
        return f"{self.scene.width}x{self.scene.height}, {self.scene.frames} frames"


def held_out(counts: Sequence[int], with_images: bool = False) -> list[Ask]:
    """Held-out prompts, ``counts`` of them at each of `world.SIZES`, with first frames or without."""
    asks = []
    for count, size in zip(counts, world.SIZES, strict=True):
        if not with_images:
            asks += [Ask(*pair) for pair in world.held_out_prompts(count, size)]
        elif count:
            pairs = world.held_out_images(count, size)
            first = first_frames([scene for _, scene in pairs])
            asks += [Ask(*pair, image) for pair, image in zip(pairs, first, strict=True)]
    return asks


def first_frames(scenes: Sequence[Scene]) -> list[np.ndarray]:
    """uint8 (H, W, 3) of each scene; one thing each, no digits."""
    return [frames[0] for frames, _ in clips(scenes)]


def clips(scenes: Sequence[Scene]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """uint8 (T, H, W, 3) of each scene as in training, and bool (T, H, W) that is true in the thing's bounding box."""
    import render

    glyphs = render.atlas("cpu", digits=False)
    for scene in scenes:
        packed = render.upload([render.pack([scene])], "cpu")
        video, boxes = render.paint(packed, glyphs, scene.width, scene.height)
        yield ((video[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy(), boxes[0, 0].numpy() > 0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between two uint8 pictures."""
    return float(-10 * np.log10(np.mean((a / 255.0 - b / 255.0) ** 2) + 1e-12))


def evaluate(
    model: str,
    asks: Sequence[Ask],
    jobs: int = 1,
    dtype: str = "bfloat16",
    steps: int | None = None,
    seen: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Make and read every video of ``asks`` in ``jobs`` processes; a row per video, in the order they were done.

    ``steps`` None is the preset's number; ``seen`` is called with all rows so far whenever there is one more.
    """
    rows = []
    # Not forked: neither MLX's streams nor CUDA survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_open, initargs=(model, dtype)) as pool:
        try:
            for done in as_completed([pool.submit(_make, ask, steps) for ask in asks]):
                rows.append(done.result())
                seen(rows)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return rows


def _open(model: str, dtype: str) -> None:
    """A worker's pipeline, kept loaded until its process ends."""
    global pipe, kept
    import wan_mlx

    pipe = wan_mlx.WanPipeline.from_pretrained(model, dtype=dtype, progress=False, prompt_cache=False)
    kept = pipe.keep_loaded()
    kept.__enter__()


def _make(ask: Ask, steps: int | None) -> dict[str, Any]:
    begun, scene = time.monotonic(), ask.scene
    options = {"width": scene.width, "height": scene.height, "num_frames": scene.frames, "seed": scene.seed}
    video = pipe(ask.prompt, steps=steps, **options, **({} if ask.image is None else {"image": ask.image}))
    seconds = time.monotonic() - begun
    if video.frames.shape != (scene.frames, scene.height, scene.width, 3):
        raise RuntimeError(f"a video of {video.frames.shape} was made for {ask.size}")
    read, thing = measure(video.frames), scene.things[0]
    kept_db = {} if ask.image is None else {"first frame, dB": round(psnr(video.frames[0], ask.image), 2)}
    return {
        "size": ask.size,
        "prompt": ask.prompt,
        "asked": [thing.colour, scene.background, thing.motion, thing.kind],
        "read": list(read),
        "right": score(read, scene),
        **kept_db,
        "seconds": round(seconds, 2),
    }


def tabulate(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per size: how many videos, percent right of each detail, and how well the first frame is kept."""
    table = {}
    for size in dict.fromkeys(f"{w}x{h}, {frames} frames" for w, h, frames in world.SIZES):
        if not (here := [row for row in rows if row["size"] == size]):
            continue
        table[size] = {"videos": len(here), **summarise([row["right"] for row in here])}
        if decibels := [row["first frame, dB"] for row in here if "first frame, dB" in row]:
            table[size] |= {"first frame, dB": round(float(np.mean(decibels)), 1), "least dB": round(min(decibels), 1)}
        table[size]["seconds a video"] = round(float(np.mean([row["seconds"] for row in here])), 2)
    return table


def markdown(table: dict[str, dict[str, float]]) -> str:
    """``table`` as Markdown, one row per size."""
    columns = list(next(iter(table.values())))
    lines = ["| size | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(
        lines + [f"| {name} | " + " | ".join(f"{row[c]:g}" for c in columns) + " |" for name, row in table.items()]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one of the two alone")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--jobs", type=int, default=1, help="processes that make videos at the same time")
    parser.add_argument("--dtype", default="bfloat16", help="of the transformer: bfloat16, float16 or float32")
    parser.add_argument("--videos", type=int, help="at 128x128 with 17 frames, and half as many at each other size")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the preset's)")
    parser.add_argument("--quick", action="store_true", help="a few videos in four steps: only whether it runs")
    args = parser.parse_args()

    import mlx.core as mx

    import wan_mlx

    steps, begun = 4 if args.quick else args.steps, time.monotonic()
    about = {"wan_mlx": wan_mlx.__version__, "device": mx.device_info().get("device_name", "CPU"), "dtype": args.dtype,
             "jobs": args.jobs, "steps": steps}  # fmt: skip
    found: dict[str, Any] = {}

    def write(model: str, rows: list[dict[str, Any]]) -> None:
        found[model] = {"table": tabulate(rows), "videos": rows}
        seconds = round(time.monotonic() - begun, 1)
        args.output.write_text(json.dumps({**about, "seconds": seconds, **found}, ensure_ascii=False, indent=1))

    for model in [args.model] if args.model else MODELS:
        counts = QUICK if args.quick else COUNTS[model]
        if args.videos:
            counts = (args.videos, *[(args.videos + 1) // 2] * 3)
        asks = held_out(counts, with_images=model == "nano-i2v")

        def seen(rows: list[dict[str, Any]], model: str = model, total: int = len(asks)) -> None:
            row = rows[-1]
            wrong = [detail for detail, right in row["right"].items() if not right]
            print(f"{model} {len(rows)}/{total} {row['prompt']}: {'wrong ' + ', '.join(wrong) if wrong else 'right'}",
                  flush=True)  # fmt: skip
            if len(rows) % 8 == 0 or len(rows) == total:
                write(model, rows)

        evaluate(model, asks, args.jobs, args.dtype, steps, seen)
    for model, result in found.items():
        print(f"\n{model}, {about['device']}, {args.dtype}\n{markdown(result['table'])}")
    print(f"\n{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
