"""Teach nano something new by a LoRA, and count how often it then shows it, and what it knew before.

    python examples/nano/teach.py colour --output learned

Paints 16 clips of things in a colour that nano never saw, named by a word that it does not know, trains on them, and
reads from pixels what videos of other prompts show: with the new word, and with old words alone. ``stills`` is the same
with pictures of things that stand still, ``shape`` teaches an outline, from 96 clips, on a GPU. What nano knows is
guarded by `Recipe`'s ``preserve``. Settings of the trainer follow as NAME=VALUE: ``steps=200 learning_rate=1e-3``. It
needs torch, for painting; on a Linux CPU OpenBLAS makes it several times as fast (docs/training.md).
"""

from __future__ import annotations

import argparse
import json
import time
from ast import literal_eval
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import render
import world
from PIL import Image
from reading import measure, score, summarise
from world import Scene, Thing

WORD, LIME = "zorb", (160, 230, 30)
CLIPS = {"colour": 16, "stills": 16, "shape": 96}
SETTINGS: dict[str, dict[str, Any]] = {
    "colour": {"preserve": 0.35},
    "stills": {"preserve": 0.5},
    "shape": {"preserve": 0.3, "rank": 32, "batch": 4, "steps": 1700},
}
PROMPTS = 24
DTYPE = "float32"  # in which a CPU with a good BLAS is quicker
STEPS = 12  # of the videos that are read: the model that was trained, with guidance, not its form of four steps


def know(what: str) -> None:
    """Put the new thing among the world's, under its word, so that it is painted and read."""
    if what == "shape":
        known = world.shape_levels()
        x, y = world.glyph_grid()
        cross = np.minimum(0.36 - np.minimum(abs(x), abs(y)), 1.0 - np.maximum(abs(x), abs(y)))
        world.SHAPES = (*world.SHAPES, WORD)
        world.shape_levels = lambda: np.concatenate([known, cross[None]]).astype(np.float32)
    else:
        world.COLOURS[WORD] = LIME


def scenes(what: str, new: bool, count: int, seed: int) -> list[Scene]:
    """Scenes of one thing each, with what is new or without it; shapes come in turn, the rest is drawn."""
    rng = np.random.default_rng(seed)
    colours, shapes = ([name for name in names if name != WORD] for names in (world.COLOURS, world.SHAPES))
    found: list[Scene] = []
    while len(found) < count:
        kind, colour = shapes[len(found) % len(shapes)], str(rng.choice(colours))
        if new:
            kind, colour = (WORD, colour) if what == "shape" else (kind, WORD)
        background, motion = str(rng.choice(list(world.BACKGROUNDS))), str(rng.choice(world.MOTIONS))
        if world.exists(colour, background):
            found.append(Scene((Thing(kind, colour, motion),), background, seed=int(rng.integers(2**31))))
    return found


def write_data(what: str, folder: Path) -> None:
    """Clips, or the first frame of each, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    glyphs, rng = render.atlas("cpu", digits=False), np.random.default_rng(1)
    for number, scene in enumerate(scenes(what, True, CLIPS[what], seed=1)):
        if what == "stills":  # a picture of something that moves would teach that moving is standing still
            scene = replace(scene, things=(replace(scene.things[0], motion="still"),))
        video, _ = render.paint(render.upload([render.pack([scene])], "cpu"), glyphs, scene.width, scene.height)
        frames = ((video[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        first, *others = map(Image.fromarray, frames[:1] if what == "stills" else frames)
        first.save(folder / f"{number:02d}.webp", lossless=True, save_all=bool(others), append_images=others,
                   duration=62, loop=0)  # fmt: skip
        (folder / f"{number:02d}.txt").write_text(world.caption(scene, rng, complete=True))


def prompts(what: str, new: bool) -> list[tuple[str, Scene]]:
    """Prompts of combinations that were not trained."""
    trained = [details(scene) for scene in scenes(what, True, CLIPS[what], seed=1)]
    rng = np.random.default_rng(50 + new)
    found = [one for one in scenes(what, new, 2 * PROMPTS, seed=100 + new) if details(one) not in trained]
    return [(world.caption(one, rng, complete=True), one) for one in found[:PROMPTS]]


def value_of(text: str) -> Any:
    """A number, or words as they are: ``timesteps=uniform-shift``."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def details(scene: Scene) -> tuple[str, ...]:
    thing = scene.things[0]
    return thing.kind, thing.colour, thing.motion, scene.background


def judge(pipe: Any, asks: list[tuple[str, Scene]]) -> dict[str, float]:
    """Percent right, per detail."""
    videos = (pipe(prompt, seed=number, steps=STEPS) for number, (prompt, _) in enumerate(asks))
    return summarise([score(measure(video.frames), scene) for video, (_, scene) in zip(videos, asks, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("colour", "stills", "shape"))
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="of wan_mlx.training.train")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    args = parser.parse_args()

    from wan_mlx import WanPipeline
    from wan_mlx.training import TrainStep, train

    old_words = [*(world.SHAPES if args.what == "shape" else world.COLOURS)]
    settings = {**SETTINGS[args.what], "preserve_words": ",".join(old_words), "dtype": DTYPE}
    settings |= {name: value_of(text) for name, _, text in (one.partition("=") for one in args.settings)}
    know(args.what)
    write_data(args.what, args.output / "clips")
    began = time.monotonic()

    def say(step: TrainStep) -> None:
        if step.step % 10 == 0:
            print(f"step {step.step} of {step.total}: loss {step.loss:.4f}, {step.seconds:.1f} s", flush=True)

    lora = train(args.output / "clips", "nano", args.output / WORD, trigger=WORD, callback=say, **settings)
    seconds = round(time.monotonic() - began)
    print(f"{seconds} s of training", flush=True)
    found: dict[str, Any] = {"what": args.what, "settings": settings, "seconds": seconds}
    pipe = WanPipeline.from_pretrained("nano", loras=[lora], dtype=DTYPE, progress=False, prompt_cache=False)
    with pipe.keep_loaded():
        for name, new in (("new word", True), ("old words", False)):
            found[name] = judge(pipe, prompts(args.what, new))
            print(name, found[name], flush=True)
    (args.output / "judged.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
