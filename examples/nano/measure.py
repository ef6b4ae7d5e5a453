"""What trained weights show, in PyTorch: percent of held-out prompts right, per size, and how well the VAE gives back.

The weights are read again from where the stages saved them. "truth" is the same clips as they are painted, "VAE" the
same through the VAE: no model can be read better than the first, and hardly better than the second.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import models
import numpy as np
import reading
import render
import torch
import world
from training import encode_normalised, film_strips, half, load_vae, say, then_grey, to_bytes

FOUR_STEPS = "four_steps.safetensors"
PROMPTS, OF_TWO, IMAGES = 512, 128, 256  # per size
AT_ONCE, DECODED = 64, 16


def text_model(folder: Path, device, lora: str | None = None):
    """Transformer, its `ShortText` and the text encoder of ``folder``; ``lora``: a file there, merged."""
    encoder = models.UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).to(device).eval()
    model = models.WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    if lora:
        models.merge_lora(model, folder / lora)
    model = model.to(device).eval()
    return model, models.use_short_text(model), encoder


def beside(folder: Path) -> Path:
    """Where nano-i2v stands beside nano's ``folder``."""
    return folder.with_name(folder.name + "-i2v")


def counted(args, count: int) -> int:
    return (args.prompts or count) if args.clips is None else 2


class Reader:
    """Has clips read by processes while others are made, and says how many are right."""

    def __init__(self, workers, name: str, prompts, two: bool = False):
        self.workers, self.name, self.prompts, self.two = workers, name, prompts, two
        self.jobs, self.kept, self.first = [], [], []

    def add(self, video: torch.Tensor, given: torch.Tensor | None = None) -> None:
        """Video (B, 3, T, H, W) in [-1, 1]; ``given``: uint8 (B, 3, H, W), its first frames as asked for."""
        clips = to_bytes(video)
        if given is not None:
            error = ((clips[:, :, 0].float() - given.float()) / 255).square().mean((1, 2, 3))
            self.first.extend((-10 * (error + 1e-12).log10()).tolist())
        for clip in clips.permute(0, 2, 3, 4, 1).cpu().numpy():
            self.kept.append(clip if len(self.kept) < 12 else None)
            self.jobs.append(self.workers.submit(reading.measure_two if self.two else reading.measure, clip))

    def table(self) -> dict[str, Any]:
        readings = [job.result() for job in self.jobs]
        score = reading.score_two if self.two else reading.score
        scores = [score(r, scene) for r, (_, scene) in zip(readings, self.prompts, strict=True)]
        table: dict[str, Any] = {"prompts": len(scores), **reading.summarise(scores)}
        rows = zip(scores, self.prompts, strict=True)
        if chinese := [right["all four"] for right, (prompt, _) in rows if not prompt.isascii()]:
            table["all four, Chinese"] = round(100 * float(np.mean(chinese)), 1)
        if self.first:
            table["first frame, dB"] = [round(float(f(self.first)), 1) for f in (np.mean, np.min)]
        say(f"{self.name}: {table}")
        wrong = [
            [prompt, [t.motion for t in scene.things], np.array(read, object).tolist()]
            for (prompt, scene), read, right in zip(self.prompts, readings, scores, strict=True)
            if not right["all four"]
        ]
        if not self.two:
            table["wrong, by motion"] = dict(collections.Counter(motions[0] for _, motions, _ in wrong))
            say(f"{self.name}: wrong {table['wrong, by motion']}")
        return {**table, "wrong": wrong[:24]}

    def strips(self, folder: Path) -> None:
        clips = [clip for clip in self.kept if clip is not None]
        film_strips(folder / f"{self.name.replace(', ', '_').replace(' ', '_')}.png", clips)


def painted(scenes, glyphs, size):
    """Batches of the scenes' clips and boxes."""
    for start in range(0, len(scenes), DECODED):
        packed = render.upload([render.pack(list(scenes[start : start + DECODED]))], glyphs.device)
        yield render.paint(packed, glyphs, *size[:2])


def noise_for(size, count: int, seed: int, device) -> torch.Tensor:
    width, height, frames = size
    shape = (16, (frames - 1) // 4 + 1, height // 8, width // 8)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(device)


@torch.no_grad()
def made(folder: Path, vae, workers, device, args, name: str = "transformer", two: bool = False) -> list[Reader]:
    """Readers of nano's videos, per size; ``name``: "transformer", or "four_steps" with the LoRA for these."""
    model, short, encoder = text_model(folder, device, FOUR_STEPS if name == "four_steps" else None)
    tokenizer = models.load_tokenizer(folder / "tokenizer" / "spiece.model")
    mean, std = models.latent_scale(vae, device)
    readers = []
    for size in world.SIZES:
        count = counted(args, OF_TWO if two else PROMPTS)
        prompts = (world.prompts_of_two if two else world.held_out_prompts)(count, size)
        readers.append(reader := Reader(workers, f"nano {name}{', two' if two else ''}, {'x'.join(map(str, size))}",
                                        prompts, two))  # fmt: skip
        for start in range(0, count, AT_ONCE):
            part = [prompt for prompt, _ in prompts[start : start + AT_ONCE]]
            ids = torch.as_tensor(models.token_rows(tokenizer, part)).long().to(device)
            noise = noise_for(size, len(part), start, device)
            with half():
                if name == "four_steps":
                    latents = models.in_four(models.guided(model, short, encoder, ids, 1), noise)
                else:
                    velocity = models.guided(model, short, encoder, ids, args.guidance)
                    latents = models.sample(velocity, noise, args.sampling)
                for piece in (latents * std + mean).split(DECODED):
                    reader.add(models.decode(vae, piece).float())
    say(f"{readers[0].name} and other sizes made")
    return readers


@torch.no_grad()
def truth(vae, workers, device, args) -> list[Reader]:
    """Readers of the clips as they are painted, and as the VAE gives them back."""
    glyphs, readers = render.atlas(device, digits=False), []
    for size in world.SIZES:
        for two in (False, True):
            count = counted(args, 128 if two else 256)
            prompts = (world.prompts_of_two if two else world.held_out_prompts)(count, size)
            name = f"{', two' if two else ''}, {'x'.join(map(str, size))}"
            pair = [Reader(workers, of + name, prompts, two) for of in ("truth", "VAE")]
            for video, _ in painted([scene for _, scene in prompts], glyphs, size):
                pair[0].add(video)
                with half():
                    pair[1].add(models.decode(vae, models.encode(vae, video)[0]).float())
            readers += pair
    return readers


@torch.no_grad()
def animated(folder: Path, vae, workers, device, args) -> list[Reader]:
    """Readers of nano-i2v's videos on held-out first frames and motions, and how well the first frame is kept."""
    model, short, encoder = text_model(folder, device)
    image_encoder = models.CLIPVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32)
    image_encoder = image_encoder.to(device).eval()
    tokenizer = models.load_tokenizer(folder / "tokenizer" / "spiece.model")
    glyphs, readers = render.atlas(device, digits=False), []
    mean, std = models.latent_scale(vae, device)
    for size in world.SIZES:
        count = counted(args, IMAGES)
        prompts = world.held_out_images(count, size)
        readers.append(reader := Reader(workers, f"nano-i2v, {'x'.join(map(str, size))}", prompts))
        images = torch.cat([to_bytes(video[:, :, 0]) for video, _ in painted([s for _, s in prompts], glyphs, size)])
        for start in range(0, count, AT_ONCE):
            image = images[start : start + AT_ONCE]
            ids = models.token_rows(tokenizer, [prompt for prompt, _ in prompts[start : start + AT_ONCE]])
            ids = torch.as_tensor(ids).long().to(device)
            begin = torch.cat([encode_normalised(vae, then_grey(i, size[2])) for i in image.split(DECODED)]).float()
            with half():
                given = (models.with_mask(begin), models.encode_image(image_encoder, image).float())
                velocity = models.guided(model, short, encoder, ids, args.guidance, given)
                latents = models.sample(velocity, noise_for(size, len(image), start, device), args.sampling)
                for piece, first in zip((latents * std + mean).split(DECODED), image.split(DECODED), strict=True):
                    reader.add(models.decode(vae, piece).float(), first)
    say(f"{readers[0].name} and other sizes made")
    return readers


def measure_all(args, device, workers, measured: set[str]) -> list[Reader]:
    """Readers of what there is in ``args.out`` and is not ``measured``."""
    other, readers = beside(args.out), []
    vae = load_vae(args.out if (args.out / "vae").exists() else other, device)
    there = {"truth": args.out, "i2v": other, "transformer": args.out / "transformer",
             "four_steps": args.out / FOUR_STEPS}  # fmt: skip
    for name in sorted(set(args.measure.split(",")) - measured - {"two"}):
        if not there[name].exists():
            continue
        measured.add(name)
        if name == "truth":
            readers += truth(vae, workers, device, args)
        elif name == "i2v":
            readers += animated(other, vae, workers, device, args)
        else:
            readers += made(args.out, vae, workers, device, args, name)
            if "two" in args.measure:
                readers += made(args.out, vae, workers, device, args, name, two=True)
    return readers
