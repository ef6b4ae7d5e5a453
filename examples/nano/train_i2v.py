"""Stage 4, nano-i2v: the first frame is given, the caption tells how it goes on."""

from __future__ import annotations

import models
import numpy as np
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
    flow_matching,
    load_vae,
    save,
    say,
    start_from,
)

NAMES = ("transformer", "image_encoder")


def train_i2v(args, device, workers) -> dict:
    """Train transformer and image encoder; text encoder, VAE and tokenizer are those of ``args.start``."""
    if not args.start:
        raise SystemExit("train.py i2v: --start is missing: the MLX folder of the trained nano")
    _, text_encoder, start = start_from(args.start, args.out)
    tokenizer = models.load_tokenizer(args.out / "tokenizer" / "spiece.model")
    vae = load_vae(args.out, device)
    glyphs = render.atlas(device)
    fast = channels_last(vae) if device.type == "cuda" else vae
    sets = encode_clips(fast, workers, tokenizer, glyphs, args, args.encoding * args.seconds, given=True)

    text_encoder = text_encoder.to(device).requires_grad_(False)
    if (args.out / "image_encoder").exists():  # it goes on
        model = models.WanTransformer3DModel.from_pretrained(args.out / "transformer", torch_dtype=torch.float32)
        image_encoder = models.CLIPVisionModel.from_pretrained(args.out / "image_encoder", dtype=torch.float32)
    else:
        model, image_encoder = models.new_i2v_transformer(start), models.new_image_encoder()
    model, image_encoder = model.to(device).train(), image_encoder.to(device).train()
    short = models.use_short_text(model)
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    clock = Clock(args.seconds, args.steps)
    trainer = Trainer(
        [model, image_encoder], clock, args.rate or 1e-3, args.warmup, 0.999, weight_decay=0.01, betas=(0.9, 0.99)
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
        given = models.with_mask(clips.start[index].float()), clips.image[index]
        latents, boxes = clips.latents[index].float(), clips.boxes[index].float()
        trainer.step(velocity_loss, model, text_encoder, image_encoder, short, latents, caption, boxes, given)

    keep(*trainer.averaged())
    say(f"{clock.step} steps")
    return {"steps": clock.step, "log": trainer.log}


def velocity_loss(model, text_encoder, image_encoder, short, latents, ids, boxes, given):
    condition, image = given
    context, short.bias = models.encode_text(text_encoder, ids)
    features = models.encode_image(image_encoder, image)
    return flow_matching(
        lambda x, t: model(torch.cat([x, condition], 1), t, context, features, return_dict=False)[0], latents, boxes
    )
