"""Stage 2: the transformer, by flow matching on encoded clips."""

from __future__ import annotations

import models
import numpy as np
import torch
from training import (
    Clock,
    Stock,
    Trainer,
    channels_last,
    draw_batch,
    flow_matching,
    load_vae,
    nothing_said,
    pick_size,
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
    stock = Stock(fast, encoder, workers, tokenizer, args)
    clock = Clock(begun + seconds, args.steps)
    return train(model, stock, nothing_said(encoder), args, clock, args.out / "transformer")


FIRST = 12.0  # seconds at most, in which clips are encoded before the first step
FRESH = 7  # steps for 32 fresh clips; twice as many clips at the beginning


def train(model, stock: Stock, empty, args, clock: Clock, folder) -> dict:
    """Flow matching of ``model`` on clips of ``stock``; ``folder`` gets its average. Returns the log."""
    stock.fill(min(FIRST, 0.05 * (clock.seconds - clock.begin)))
    short = models.use_short_text(model)
    if empty.is_cuda:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    trainer = Trainer([model], clock, args.rate, args.warmup, 0.999, weight_decay=0.01, betas=(0.9, 0.99))

    def keep(averaged):
        save(averaged, folder)
        say("saved")

    def loss_of(which: int):
        drawn = draw_batch(stock.sets[which], args.batch // 2 if which == 1 else args.batch, empty)
        short.bias = drawn.bias

        def predict(x, t):
            x = x if drawn.condition is None else torch.cat([x, drawn.condition], 1)
            return model(x, t, drawn.context, drawn.features, return_dict=False)[0]

        return flow_matching(predict, drawn.latents, drawn.boxes)

    trainer.keep = keep
    chooser = np.random.default_rng(4)
    while clock.progress() < 1:
        if clock.step % (FRESH // 2 if clock.progress() < 0.15 else FRESH) == 0:
            stock.more(pick_size(chooser))
        which = pick_size(chooser)
        trainer.step(lambda which=which: loss_of(which), which)
    keep(*trainer.averaged())
    say(f"{clock.step} steps, {stock.made} clips")
    return {"steps": clock.step, "clips": stock.made, "log": trainer.log}
