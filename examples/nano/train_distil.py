"""Stage 3: a LoRA with which the transformer goes in four steps without guidance where it goes in twenty with it.

The transformer samples from noise; its latents at the four levels that matter are kept. With the LoRA it then learns to
go from each of them to the next in one step: first from where it was, at the end also from where it now gets to.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import models
import numpy as np
import torch
import world
from measure import FOUR_STEPS, noise_for, text_model
from training import CAPTIONS, Clock, Trainer, half, nothing_said, say

RANK, RATE = 14, 7e-4
LEARNS = re.compile(r"^blocks\..*\.weight|time_proj\.weight")
STEPS, FINE = 4, 5  # FINE steps of the teacher in each of the student's
TEACHING = 0.35  # of the time, in which the teacher samples
ALONE = 0.6  # of the training, until the student also starts from where it has got to


@torch.no_grad()
def teach(model, short, sets, empty, args, seconds: float):
    """Per size: latents at the STEPS + 1 levels (N, STEPS + 1, 16, t, h, w), context and bias; bfloat16."""
    begun, sigmas, rng = time.monotonic(), models.levels(STEPS * FINE), np.random.default_rng(6)
    found = [([], [], []) for _ in sets]
    for turn in range(10**6):
        if turn >= len(sets) and time.monotonic() - begun > seconds:
            break
        # Every size once first, so that time may run out at any moment.
        which = turn if turn < len(sets) else int(rng.choice(len(sets), p=world.SIZE_SHARE))
        clips, batch = sets[which], args.batch // 2 if which == 1 else args.batch
        index = torch.randint(len(clips.context), (batch,), device=empty.device)
        caption = torch.randint(CAPTIONS, (batch,), device=empty.device)
        context, bias = clips.context[index, caption].float(), models.padding_bias(clips.words[index, caption])
        nothing, silent = empty.expand_as(context).contiguous(), models.padding_bias(torch.ones_like(index))
        x = noise_for(world.SIZES[which], batch, 100_000 + turn, empty.device)
        kept = [x.to(torch.bfloat16)]
        for step in range(STEPS * FINE):
            t = torch.full((batch,), float(1000 * sigmas[step]), device=empty.device)
            with half():
                short.bias = bias
                said = model(x, t, context, return_dict=False)[0].float()
                short.bias = silent
                unsaid = model(x, t, nothing, return_dict=False)[0].float()
            x = x + float(sigmas[step + 1] - sigmas[step]) * (unsaid + args.guidance * (said - unsaid))
            if step % FINE == FINE - 1:
                kept.append(x.to(torch.bfloat16))
        for part, values in zip(found[which], (torch.stack(kept, 1), context.to(torch.bfloat16), bias), strict=True):
            part.append(values)
    say(f"the teacher made {[sum(map(len, pairs)) for pairs, _, _ in found]} clips")
    return [tuple(torch.cat(part) for part in parts) for parts in found]


class LowRank(torch.nn.Module):
    """The blocks' matrices of a model as they were, plus products of two thin ones each, which alone are trained.

    The model is run with its own weights, as it was compiled: `write` sets them, `take` hands their gradients on.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        pairs = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and LEARNS.search(n)]
        self.names, self.weights = [name for name, _ in pairs], [weight for _, weight in pairs]
        self.begin = [weight.detach().clone() for weight in self.weights]
        self.others = list(model.parameters())
        device = self.begin[0].device
        self.down = torch.nn.ParameterList(
            torch.randn(RANK, w.shape[1], device=device) * w.shape[1] ** -0.5 for w in self.begin
        )
        self.up = torch.nn.ParameterList(torch.zeros(len(w), RANK, device=device) for w in self.begin)

    @torch.no_grad()
    def write(self) -> None:
        with torch.autocast(self.begin[0].device.type, enabled=False):
            for weight, begin, up, down in zip(self.weights, self.begin, self.up, self.down, strict=True):
                weight.copy_(begin + up @ down)

    @torch.no_grad()
    def take(self) -> None:
        for weight, up, down in zip(self.weights, self.up, self.down, strict=True):
            up.grad, down.grad = weight.grad @ down.T, up.T @ weight.grad
        for weight in self.others:
            weight.grad = None

    def save(self, path: Path) -> None:
        """As Diffusers and PEFT write one."""
        from safetensors.torch import save_file

        state = {}
        for name, up, down in zip(self.names, self.up, self.down, strict=True):
            layer = f"transformer.{name.removesuffix('.weight')}"
            state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = down, up
        save_file({name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in state.items()}, path)


def train_distil(args, device, workers, begun: float, seconds: float, sets) -> dict:
    """Writes ``args.out``/four_steps.safetensors; ``sets``: as `train_dit` returns them."""
    model, short, encoder = text_model(args.out, device)
    empty = nothing_said(encoder)
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    taught = teach(model, short, sets, empty, args, TEACHING * seconds)
    lora, clock = LowRank(model), Clock(begun + seconds, args.steps)
    trainer = Trainer([lora], clock, RATE, 100, 0.998, gather=lora.take, weight_decay=0.0, betas=(0.9, 0.99))
    sigmas = torch.as_tensor(models.levels(STEPS), device=device, dtype=torch.float32)

    def move(x, sigma, context):
        return model(x, 1000 * sigma, context, return_dict=False)[0].float()

    def loss_of(which: int, alone: bool):
        states, contexts, biases = taught[which]
        lora.write()
        count = args.batch // 2 if which == 1 else args.batch
        index = torch.randint(len(states), (count,), device=device)
        place = torch.randint(STEPS, (count,), device=device)
        context, short.bias = contexts[index].float(), biases[index]
        x, target = states[index, place].float(), states[index, place + 1].float()
        sigma, following = sigmas[place], sigmas[place + 1]
        if alone:  # from where the student itself gets to, every other one: its errors are then its own to mend
            with torch.no_grad():
                before = (place - 1).clamp(min=0)
                came = states[index, before].float()
                length = (sigma - sigmas[before]).view(-1, 1, 1, 1, 1)
                came = came + length * move(came, sigmas[before], context)
                own = (place > 0) & (torch.rand(count, device=device) < 0.5)
                x = torch.where(own.view(-1, 1, 1, 1, 1), came, x)
        wanted = (target - x) / (following - sigma).view(-1, 1, 1, 1, 1)
        error = ((move(x, sigma, context) - wanted) ** 2).mean((1, 2, 3, 4))
        # As errors of the latents that follow, but the first steps, which are short, are not forgotten.
        return (error * (sigma - following)).mean() * STEPS

    def keep(averaged):
        averaged.save(args.out / FOUR_STEPS)
        say("saved")

    trainer.keep = keep
    chooser = np.random.default_rng(7)
    while clock.progress() < 1:
        which, alone = int(chooser.choice(len(taught), p=world.SIZE_SHARE)), clock.progress() > ALONE
        trainer.step(lambda which=which, alone=alone: loss_of(which, alone), (which, alone))
    keep(*trainer.averaged())
    say(f"{clock.step} steps")
    return {"log": trainer.log}
