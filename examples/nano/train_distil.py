"""Stage 3: a small change to the transformer with which four steps without guidance go where twenty with it went.

The trained model samples from noise, in FINE steps with guidance 3; its latents at the four levels that matter are
kept. A LoRA then learns to go from each of them to the next in one step, from where it has got to by itself, too.
"""

from __future__ import annotations

import models
import numpy as np
import torch
import world
from measure import FOUR_STEPS, noise_for, text_model
from training import Clock, Trainer, half, say

STEPS, FINE = 4, 5  # FINE steps of the teacher in each of the student's
RANK = 14
TEACHING = 0.35  # of the time, at most, in which the teacher samples
PAIRS = 24576


@torch.no_grad()
def teach(args, device, deadline: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per size: latents at the STEPS + 1 levels (N, STEPS + 1, 16, t, h, w), bfloat16, and token ids (N, SHORT_LEN)."""
    model, short, encoder = text_model(args.out, device)
    tokenizer = models.load_tokenizer(args.out / "tokenizer" / "spiece.model")
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    sigmas = models.levels(STEPS * FINE)
    total = PAIRS if args.clips is None else args.clips
    batch = 256 if device.type == "cuda" else 2
    rng = np.random.default_rng(6)
    found = [([], []) for _ in world.SIZES]
    share = [0.6, 0.14, 0.13, 0.13]
    turn = 0
    clock = Clock(deadline, None)
    while turn < len(share) or (turn * batch < total and clock.progress() < 1):
        # Every size once first, so that time may run out at any moment.
        which = int(rng.choice(len(share), p=share)) if turn >= len(share) else turn
        size = world.SIZES[which]
        scenes = [world.sample_scene(rng, size) for _ in range(batch)]
        texts = [world.caption(s, rng, "zh" if rng.random() < 0.35 else "en", rng.random() < 0.5) for s in scenes]
        ids = torch.as_tensor(models.token_rows(tokenizer, texts)).long().to(device)
        x = noise_for(size, batch, 100_000 + turn, device)
        kept = [x.to(torch.bfloat16)]
        with half():
            velocity = models.guided(model, short, encoder, ids, args.guidance)
            for step in range(STEPS * FINE):
                x = x + (sigmas[step + 1] - sigmas[step]) * velocity(x, 1000 * sigmas[step])
                if step % FINE == FINE - 1:
                    kept.append(x.to(torch.bfloat16))
        found[which][0].append(torch.stack(kept, 1))
        found[which][1].append(ids.to(torch.int16))
        turn += 1
    say(f"{turn * batch} samples of the teacher")
    return [tuple(torch.cat(part) for part in pair) for pair in found]


def step_loss(model, encoder, short, x, target, sigma, following, ids):
    """Of one step from ``x`` (B, 16, t, h, w), each row at its own level, to where the teacher was at the next."""
    context, short.bias = models.encode_text(encoder, ids)
    wide = (-1, 1, 1, 1, 1)
    velocity = model(x, 1000 * sigma, context, return_dict=False)[0].float()
    wanted = (target - x) / (following - sigma).view(wide)
    error = ((velocity - wanted) ** 2).mean((1, 2, 3, 4))
    # As errors of the latents that follow, but the first steps, which are short, are not forgotten.
    return (error * (sigma - following)).mean() * 4


def train_distil(args, device, workers) -> dict:
    from safetensors.torch import save_file

    begun = Clock(args.seconds, None)
    sets = teach(args, device, begun.begin + TEACHING * (args.seconds - begun.begin))
    model, short, encoder = text_model(args.out, device)
    encoder.requires_grad_(False)
    models.add_lora(model, RANK)
    model = model.to(device).train()
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    clock = Clock(args.seconds, args.steps)
    trainer = Trainer([model], clock, args.rate or 1.5e-3, 100, 0.998, weight_decay=0.0, betas=(0.9, 0.99))
    sigmas = torch.as_tensor(models.levels(STEPS), device=device, dtype=torch.float32)
    batch = args.batch or 256
    chooser = np.random.default_rng(7)
    share = np.array([len(ids) for _, ids in sets], float)

    def keep(averaged):
        save_file(models.lora_state(averaged), args.out / FOUR_STEPS)
        say("saved")

    trainer.keep = keep
    while clock.progress() < 1:
        which = int(chooser.choice(len(sets), p=share / share.sum()))
        states, ids = sets[which]
        index = torch.randint(len(ids), (batch // 2 if which == 1 else batch,), device=device)
        place = torch.randint(STEPS, index.shape, device=device)
        text = ids[index].long()
        x, target = states[index, place].float(), states[index, place + 1].float()
        if clock.step % 2 and clock.progress() > 0.15:
            # From where the student itself gets to: its errors are then its own to mend.
            with torch.no_grad(), half():
                before = (place - 1).clamp(min=0)
                context, short.bias = models.encode_text(encoder, text)
                came = states[index, before].float()
                moved = (sigmas[before + 1] - sigmas[before]).view(-1, 1, 1, 1, 1)
                came = came + moved * model(came, 1000 * sigmas[before], context, return_dict=False)[0].float()
                x = torch.where((place > 0).view(-1, 1, 1, 1, 1), came, x)
        trainer.step(step_loss, model, encoder, short, x, target, sigmas[place], sigmas[place + 1], text)

    keep(*trainer.averaged())
    say(f"{clock.step} steps")
    return {"steps": clock.step, "log": trainer.log}
