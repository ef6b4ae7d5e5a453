"""Stage 2: the transformer, by flow matching on encoded clips."""

from __future__ import annotations

import models
import numpy as np
import torch
import world
from training import (
    Clock,
    Trainer,
    channels_last,
    draw_batch,
    encode_clips,
    flow_matching,
    load_vae,
    nothing_said,
    save,
    say,
    start_from,
)


def train_dit(args, device, workers, begun: float, seconds: float) -> dict:
    """Text encoder, VAE and tokenizer are those of ``args.start``, and stay as they are."""
    if not args.start:
        raise SystemExit("train.py dit: --start is missing: a folder with a text encoder, such as wan_mlx/assets/nano")
    _, encoder, model = start_from(args.start, args.out)
    encoder, model = encoder.to(device).requires_grad_(False), model.to(device).eval()
    tokenizer = models.load_tokenizer(args.out / "tokenizer" / "spiece.model")
    vae = load_vae(args.out, device)
    fast = channels_last(vae) if device.type == "cuda" else vae
    sets = encode_clips(fast, encoder, workers, tokenizer, args, args.encoding * seconds)
    log = train(model, sets, nothing_said(encoder), args, Clock(begun + seconds, args.steps), args.out / "transformer")
    return {"log": log, "sets": sets}


def train(model, sets, empty, args, clock: Clock, folder) -> list[dict]:
    """Flow matching of ``model`` on ``sets``; ``folder`` gets its average. Returns the log."""
    short = models.use_short_text(model)
    if empty.is_cuda:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    trainer = Trainer([model], clock, args.rate, args.warmup, 0.999, weight_decay=0.01, betas=(0.9, 0.99))

    def keep(averaged):
        save(averaged, folder)
        say("saved")

    def loss_of(which: int):
        drawn = draw_batch(sets[which], args.batch // 2 if which == 1 else args.batch, empty)
        short.bias = drawn.bias

        def predict(x, t):
            x = x if drawn.condition is None else torch.cat([x, drawn.condition], 1)
            return model(x, t, drawn.context, drawn.features, return_dict=False)[0]

        return flow_matching(predict, drawn.latents, drawn.boxes)

    trainer.keep = keep
    chooser = np.random.default_rng(4)
    while clock.progress() < 1:
        which = int(chooser.choice(len(sets), p=world.SIZE_SHARE))
        trainer.step(lambda which=which: loss_of(which), which)
    keep(*trainer.averaged())
    say(f"{clock.step} steps")
    return trainer.log
