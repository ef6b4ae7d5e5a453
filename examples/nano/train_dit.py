"""Stage 2: text encoder and transformer together, by flow matching on encoded clips."""

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


def velocity_loss(model, encoder, short, latents, ids, boxes):
    context, short.bias = models.encode_text(encoder, ids)
    return flow_matching(lambda x, t: model(x, t, context, return_dict=False)[0], latents, boxes)


def train_dit(args, device, workers) -> dict:
    path = args.out / "tokenizer" / "spiece.model"
    if args.start:
        _, encoder, model = start_from(args.start, args.out)
    else:
        models.build_tokenizer(path)
        encoder, model = models.new_text_encoder(models.load_tokenizer(path).vocab_size()), models.new_transformer()
    tokenizer = models.load_tokenizer(path)
    vae = load_vae(args.out, device)
    glyphs = render.atlas(device)
    fast = channels_last(vae) if device.type == "cuda" else vae
    sets = encode_clips(fast, workers, tokenizer, glyphs, args, args.encoding * args.seconds)

    encoder, model = encoder.to(device).requires_grad_(not args.keep_text), model.to(device).train()
    trained = {"transformer": model} if args.keep_text else {"transformer": model, "text_encoder": encoder}
    short = models.use_short_text(model)
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    clock = Clock(args.seconds, args.steps)
    rate = args.rate or (8e-4 if args.start else 1e-3)
    trainer = Trainer([*trained.values()], clock, rate, args.warmup, 0.999, weight_decay=0.01, betas=(0.9, 0.99))

    def keep(*averaged):
        for module, name in zip(averaged, trained, strict=True):
            save(module, args.out / name)
        say("saved")

    trainer.keep = keep
    batch = args.batch or 256
    chooser = np.random.default_rng(4)
    while clock.progress() < 1:
        which = int(chooser.choice(len(sets), p=world.SIZE_SHARE))
        clips = sets[which]
        index = torch.randint(len(clips.latents), (batch // 2 if which == 1 else batch,), device=device)
        caption = clips.ids[index, torch.randint(CAPTIONS, index.shape, device=device)].long()
        latents, boxes = clips.latents[index].float(), clips.boxes[index].float()
        trainer.step(velocity_loss, model, encoder, short, latents, blur_words(caption), boxes)

    keep(*trainer.averaged())
    say(f"{clock.step} steps")
    return {"steps": clock.step, "log": trainer.log}
