"""Stage 3: a LoRA with which the transformer goes in four steps without guidance where it goes in twenty with it.

The transformer samples from noise; its latents at the four levels that matter are kept. With the LoRA it then learns to
go from each of them to the next in one step: first from where it was, then also from where it gets to by itself.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import models
import numpy as np
import torch
import world
from measure import FOUR_STEPS, text_model
from training import Clock, Trainer, draw, half, nothing_said, pick_size, say, some_unknown

RANK, RATE = 16, 7e-4
LEARNS = re.compile(r"^blocks\..*\.weight|time_proj\.weight")
STEPS, FINE = 4, 5  # FINE steps of the teacher in each of the student's
TEACHING = 0.28  # of the time, in which the teacher samples
ALONE = 0.3  # of the training, until the student also starts from where it has got to


@torch.no_grad()
def captions(encoder, workers, tokenizer, device, args) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per size: contexts (N, SHORT_LEN, 128) in bfloat16 and how many tokens each has."""
    found = []
    for size in world.SIZES:
        texts = draw(workers, 8, 4096 if args.clips is None else args.clips, size, device)[1]
        ids = some_unknown(torch.as_tensor(models.token_rows(tokenizer, texts)).long().to(device))
        context = torch.cat([models.encode_text(encoder, part)[0].to(torch.bfloat16) for part in ids.split(8192)])
        found.append((context, (ids != models.PAD).sum(1)))
    return found


class Teacher:
    """Guided velocities of batches of one shape; on a GPU recorded once and then replayed."""

    def __init__(self, model, short, empty, guidance: float):
        self.model, self.short, self.empty, self.guidance = model, short, empty, guidance
        self.graph, self.inputs, self.output = None, None, None

    def __call__(self, *inputs):
        """Of latents, timestep (1,), context and bias; the result is overwritten by the next call."""
        if not inputs[0].is_cuda:
            return self._plain(*inputs)
        if self.graph is None:
            self.inputs = [x.clone() for x in inputs]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    self._plain(*self.inputs)
            torch.cuda.current_stream().wait_stream(aside)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self._plain(*self.inputs)
        for kept, value in zip(self.inputs, inputs, strict=True):
            kept.copy_(value)
        self.graph.replay()
        return self.output

    def _plain(self, x, timestep, context, bias):
        count = len(x)
        self.short.bias = torch.cat([bias, models.padding_bias(torch.ones(count, dtype=torch.long, device=x.device))])
        both = torch.cat([context, self.empty.expand_as(context)])
        with half():
            v = self.model(torch.cat([x, x]), timestep.expand(2 * count), both, return_dict=False)[0].float()
        said, unsaid = v.chunk(2)
        return unsaid + self.guidance * (said - unsaid)


@torch.no_grad()
def teach(model, short, told, empty, args, seconds: float):
    """Per size: latents at the STEPS + 1 levels (N, STEPS + 1, 16, t, h, w), context and bias; bfloat16."""
    begun, sigmas, rng = time.monotonic(), models.levels(STEPS * FINE), np.random.default_rng(6)
    found, teachers = [([], [], []) for _ in told], [Teacher(model, short, empty, args.guidance) for _ in told]
    for turn in range(10**6):
        if turn >= len(told) and time.monotonic() - begun > seconds:
            break
        # Every size once first, so that time may run out at any moment.
        which = turn if turn < len(told) else pick_size(rng)
        (contexts, words), batch = told[which], args.batch // 2 if which == 1 else args.batch
        index = torch.randint(len(contexts), (batch,), device=empty.device)
        context, bias = contexts[index].float(), models.padding_bias(words[index])
        width, height, frames = world.SIZES[which]
        x = torch.randn(batch, 16, (frames - 1) // 4 + 1, height // 8, width // 8, device=empty.device)
        kept = [x.to(torch.bfloat16)]
        for step in range(STEPS * FINE):
            t = torch.full((1,), float(1000 * sigmas[step]), device=empty.device)
            x = x + float(sigmas[step + 1] - sigmas[step]) * teachers[which](x, t, context, bias)
            if step % FINE == FINE - 1:
                kept.append(x.to(torch.bfloat16))
        for part, values in zip(found[which], (torch.stack(kept, 1), context.to(torch.bfloat16), bias), strict=True):
            part.append(values)
        if turn % 8 == 0 and x.is_cuda:
            torch.cuda.synchronize()
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
    def go_on(self, path: Path) -> None:
        """Begin with the products in a file of `save`, of this rank or less."""
        from safetensors.torch import load_file

        state = load_file(path)
        for name, up, down in zip(self.names, self.up, self.down, strict=True):
            layer = f"transformer.{name.removesuffix('.weight')}"
            first, second = (state[f"{layer}.lora_{part}.weight"] for part in "AB")
            down[: len(first)] = first
            up[:, : len(first)] = second

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


def train_distil(args, device, workers, begun: float, seconds: float) -> dict:
    """Writes ``args.out``/four_steps.safetensors."""
    model, short, encoder = text_model(args.out, device)
    empty = nothing_said(encoder)
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    tokenizer = models.load_tokenizer(args.out / "tokenizer" / "spiece.model")
    told = captions(encoder, workers, tokenizer, device, args)
    taught = teach(model, short, told, empty, args, TEACHING * seconds)
    lora, clock = LowRank(model), Clock(begun + seconds, args.steps)
    if args.start and (args.start / FOUR_STEPS).exists():
        lora.go_on(args.start / FOUR_STEPS)
    trainer = Trainer([lora], clock, RATE, 100, 0.998, gather=lora.take, weight_decay=0.0, betas=(0.9, 0.99))
    sigmas = torch.as_tensor(models.levels(STEPS), device=device, dtype=torch.float32)

    def move(x, sigma, context):
        return model(x, 1000 * sigma, context, return_dict=False)[0].float()

    reached = [states.clone() for states, _, _ in taught]  # where the student got to when it was last there
    alone = torch.zeros((), device=device)  # how often it starts from there

    def loss_of(which: int):
        states, contexts, biases = taught[which]
        lora.write()
        count = args.batch // 2 if which == 1 else args.batch
        index = torch.randint(len(states), (count,), device=device)
        place = torch.randint(STEPS, (count,), device=device)
        context, short.bias = contexts[index].float(), biases[index]
        x, target = states[index, place].float(), states[index, place + 1].float()
        sigma, following = sigmas[place], sigmas[place + 1]
        # From where the student itself gets to: its errors are then its own to mend.
        own = (torch.rand(count, device=device) < alone).view(-1, 1, 1, 1, 1)
        x = torch.where(own, reached[which][index, place].float(), x)
        wanted = (target - x) / (following - sigma).view(-1, 1, 1, 1, 1)
        velocity = move(x, sigma, context)
        with torch.no_grad():
            came = x + velocity * (following - sigma).view(-1, 1, 1, 1, 1)
            reached[which][index, place + 1] = came.to(states.dtype)
        error = ((velocity - wanted) ** 2).mean((1, 2, 3, 4))
        # As errors of the latents that follow, but the first steps, which are short, are not forgotten.
        return (error * (sigma - following)).mean() * STEPS

    def keep(averaged):
        averaged.save(args.out / FOUR_STEPS)
        say("saved")

    trainer.keep = keep
    chooser = np.random.default_rng(7)
    while clock.progress() < 1:
        which = pick_size(chooser)
        alone.fill_(0.5 if clock.progress() > ALONE else 0.0)
        trainer.step(lambda which=which: loss_of(which), which)
    keep(*trainer.averaged())
    say(f"{clock.step} steps")
    return {"steps": clock.step, "log": trainer.log}
