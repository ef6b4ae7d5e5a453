"""Stage 3, nano-i2v: the first frame is given, the caption tells how it goes on."""

from __future__ import annotations

import json

import models
import numpy as np
import reading
import render
import torch
import world
from training import (
    CAPTIONS,
    Clock,
    Trainer,
    blur_words,
    channels_last,
    encode_clips,
    encode_normalised,
    film_strips,
    flow_matching,
    half,
    load_vae,
    save,
    say,
    start_from,
    then_grey,
    to_bytes,
)

NAMES = ("transformer", "image_encoder")


def train_i2v(args, device, workers) -> dict:
    """Train transformer and image encoder; text encoder, VAE and tokenizer are those of ``args.start``."""
    if not args.start:
        raise SystemExit("train.py i2v: --start is missing: the MLX folder of the trained nano")
    text_encoder, start = start_from(args.start, args.out)
    tokenizer = models.load_tokenizer(args.out / "tokenizer" / "spiece.model")
    vae = load_vae(args.out, device)
    glyphs = render.atlas(device)
    fast = channels_last(vae) if device.type == "cuda" else vae
    sets = encode_clips(fast, workers, tokenizer, glyphs, args, 0.16 * args.seconds, given=True)

    text_encoder = text_encoder.to(device).requires_grad_(False)
    model = models.new_i2v_transformer(start).to(device).train()
    image_encoder = models.new_image_encoder().to(device).train()
    short = models.use_short_text(model)
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    clock = Clock(args.seconds, args.steps)
    trainer = Trainer(
        [model, image_encoder], clock, args.rate or 1e-3, 300, 0.999, weight_decay=0.01, betas=(0.9, 0.99)
    )

    def keep(*averaged):
        for module, name in zip(averaged, NAMES, strict=True):
            save(module, args.out / name)
        say("saved")

    trainer.keep = keep
    batch = args.batch or 256
    chooser = np.random.default_rng(5)
    while clock.progress() < 1:
        which = int(chooser.choice(len(sets), p=world.SIZE_SHARE))
        clips = sets[which]
        index = torch.randint(len(clips.latents), (batch // 2 if which == 1 else batch,), device=device)
        caption = blur_words(clips.ids[index, torch.randint(CAPTIONS, index.shape, device=device)].long())
        given = with_mask(clips.start[index].float()), clips.image[index]
        latents, boxes = clips.latents[index].float(), clips.boxes[index].float()
        trainer.step(velocity_loss, model, text_encoder, image_encoder, short, latents, caption, boxes, given)

    keep(*trainer.averaged())
    say(f"{clock.step} steps; measuring")
    result = {"steps": clock.step, "log": trainer.log}
    (args.out / "i2v.json").write_text(json.dumps(result))
    result["accuracy"] = accuracy(vae, text_encoder.eval(), tokenizer, workers, glyphs, args, device)
    return result


def with_mask(start: torch.Tensor) -> torch.Tensor:
    """(B, 20, t, h, w): which of a latent frame's four frames are given, then the latents ``start``."""
    mask = torch.zeros_like(start[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, start], 1)


def velocity_loss(model, text_encoder, image_encoder, short, latents, ids, boxes, given):
    condition, image = given
    context, short.bias = models.encode_text(text_encoder, ids)
    features = models.encode_image(image_encoder, image)
    return flow_matching(
        lambda x, t: model(torch.cat([x, condition], 1), t, context, features, return_dict=False)[0], latents, boxes
    )


@torch.no_grad()
def accuracy(vae, text_encoder, tokenizer, workers, glyphs, args, device) -> dict:
    """On held-out images and motions, per size: percent shown right, and how well the first frame is kept."""
    model = models.WanTransformer3DModel.from_pretrained(args.out / "transformer", torch_dtype=torch.float32)
    model = model.to(device).eval()
    image_encoder = models.CLIPVisionModel.from_pretrained(args.out / "image_encoder", dtype=torch.float32)
    image_encoder = image_encoder.to(device).eval()
    short = models.use_short_text(model)
    mean, std = models.latent_scale(vae, device)
    table = {}
    for index, (width, height, frames) in enumerate(world.SIZES):
        count = (96 if index == 0 else 32) if args.clips is None else 2
        prompts = world.held_out_images(count, (width, height, frames))
        packed = render.upload([render.pack([scene for _, scene in prompts])], device)
        image = torch.cat([
            to_bytes(render.paint({n: v[i : i + 8] for n, v in packed.items()}, glyphs, width, height)[0][:, :, 0])
            for i in range(0, count, 8)
        ])  # fmt: skip
        ids = torch.as_tensor(models.token_rows(tokenizer, [p for p, _ in prompts])).long().to(device)
        shape = (16, (frames - 1) // 4 + 1, height // 8, width // 8)
        noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(index)).to(device)
        clips = []
        for part in torch.arange(count, device=device).split(32):
            start = torch.cat([encode_normalised(vae, then_grey(i, frames)) for i in image[part].split(8)]).float()
            with half():
                features = models.encode_image(image_encoder, image[part]).float()
                latents = models.sample(
                    model, short, text_encoder, ids[part], noise[part],
                    steps=12 if args.clips is None else 2, given=(with_mask(start), features),
                )  # fmt: skip
            for piece in (latents * std + mean).split(8):
                clips.extend(to_bytes(models.decode(vae, piece)).permute(0, 2, 3, 4, 1).cpu().numpy())
        readings = list(workers.map(reading.measure, clips))
        scores = [reading.score(r, scene) for r, (_, scene) in zip(readings, prompts, strict=True)]
        kept = [
            psnr(clip[0], first) for clip, first in zip(clips, image.permute(0, 2, 3, 1).cpu().numpy(), strict=True)
        ]
        name = f"{width}x{height}x{frames}"
        table[name] = {
            **reading.summarise(scores),
            "prompts": count,
            "first frame, dB": [round(float(f(kept)), 1) for f in (np.mean, np.min)],
        }
        say(f"{name}: {table[name]}")
        table[name]["wrong"] = [
            [prompt, scene.things[0].motion, *r]
            for (prompt, scene), r, right in zip(prompts, readings, scores, strict=True)
            if not right["motion"]
        ][:12]
        if index == 0:
            film_strips(args.out / "samples.png", clips[:12])
    return table


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between two uint8 pictures."""
    return float(-10 * np.log10(np.mean((a / 255.0 - b / 255.0) ** 2) + 1e-12))
