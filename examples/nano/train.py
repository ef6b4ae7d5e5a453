"""Trains the nano model: first the VAE, then text encoder and transformer together. One command per stage.

    python examples/nano/train.py vae --out DIR
    python examples/nano/train.py dit --out DIR [--vae DIR] [--start DIR]

Each stage fits itself into ``--seconds`` on whatever device there is (H200: 390 and 480), then measures what it made.
DIR receives vae/, transformer/, text_encoder/ and tokenizer/ in the layout of Diffusers, weights rounded to bfloat16,
and a JSON log per stage. With ``--steps`` the schedule counts steps instead of seconds and so does not depend on speed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import evaluate
import models
import numpy as np
import render
import torch
import torch.nn.functional as F
import world

START = time.monotonic()
CAPTIONS = 8  # captions kept per clip
WINDOW = 64  # side of the windows the VAE trains on first


class Clock:
    """Progress in [0, 1] through a budget of seconds since the program started, or of steps since ``begin``."""

    def __init__(self, seconds: float, steps: int | None):
        self.seconds, self.steps, self.step = seconds, steps, 0
        self.begin = time.monotonic() - START

    def progress(self) -> float:
        if self.steps:
            return min(self.step / self.steps, 1.0)
        return min((time.monotonic() - START - self.begin) / max(self.seconds - self.begin, 1e-6), 1.0)


class Trainer:
    """AdamW with warm-up and cosine decay over a ``Clock``, gradient clipping, bfloat16 autocast, and an average."""

    def __init__(self, modules: list[torch.nn.Module], clock: Clock, rate: float, warmup: int, average: float, **adam):
        self.clock, self.rate, self.warmup, self.average = clock, rate, warmup, average
        self.params = [p for module in modules for p in module.parameters()]
        self.means = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.params, lr=rate, fused=self.params[0].is_cuda, **adam)
        self.modules, self.log, self.recent = modules, [], []

    def step(self, loss_of, *args) -> None:
        clock = self.clock
        rate = self.rate * min(1, (clock.step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * clock.progress()))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with half():
            loss = loss_of(*args)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.step += 1
        torch._foreach_lerp_(self.means, self.params, 1 - min(self.average, (1 + clock.step) / (10 + clock.step)))
        self.recent.append(loss.detach())
        if clock.step % 50 == 0 or clock.step == 5:  # also keeps the clock honest: the device is waited for
            value = float(torch.stack(self.recent).float().mean())
            self.recent.clear()
            self.log.append({"step": clock.step, "seconds": round(time.monotonic() - START, 1), "loss": value})
            if clock.step % 250 == 0 or clock.step == 5:
                say(f"step {clock.step} loss {value:.5f} rate {rate:.1e} progress {clock.progress():.2f}")
            if not math.isfinite(value):
                raise RuntimeError(f"loss is {value} at step {clock.step}; lower the learning rate")

    def averaged(self) -> list[torch.nn.Module]:
        """Copies of the modules with the averaged weights."""
        means = iter(self.means)
        copies = [copy.deepcopy(module).eval() for module in self.modules]
        with torch.no_grad():
            for module in copies:
                for p in module.parameters():
                    p.copy_(next(means))
        return copies


def half():
    """bfloat16 autocast on a GPU; on the CPU it would only be slower."""
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


# --- clips: drawn by worker processes, painted on the device ----------------------------------------------------


def _draw(seed: int, count: int, size: tuple[int, int, int], held: bool):
    """``count`` packed scenes and CAPTIONS captions of each, a third of them Chinese."""
    rng = np.random.default_rng([seed, *size, int(held)])
    scenes = [world.sample_scene(rng, size, held) for _ in range(count)]
    captions = [world.caption(s, rng, "zh" if rng.random() < 0.35 else "en") for s in scenes for _ in range(CAPTIONS)]
    return render.pack(scenes), captions


def draw(workers, seed: int, count: int, size, device, held: bool = False):
    """Packed scenes on ``device`` and their captions, the same whatever the number of workers."""
    chunks = [min(256, count - start) for start in range(0, count, 256)]
    jobs = [workers.submit(_draw, seed * 1000 + i, n, size, held) for i, n in enumerate(chunks)]
    packs, captions = zip(*(job.result() for job in jobs), strict=True)
    return render.upload(list(packs), device), [text for part in captions for text in part]


def pick(packed: dict[str, torch.Tensor], index: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value[index] for name, value in packed.items()}


def windows(packed, width: int, height: int, side: int) -> torch.Tensor:
    """For each clip the corner (B, 2) of a window around its thing at some moment."""
    b, things, frames, _ = packed["centre"].shape
    rows = torch.arange(b, device=packed["centre"].device)
    which = (torch.rand_like(packed["radius"][:, 0, 0]) < 0.5).long() * (packed["radius"][:, 1, 0] > 0)
    moment = torch.randint(frames, (b,), device=rows.device)
    corner = packed["centre"][rows, which, moment] - side / 2 + torch.randn(b, 2, device=rows.device) * side / 8
    return corner.round().clamp(min=0).minimum(torch.tensor([width - side, height - side], device=rows.device))


# --- stage 1: VAE ----------------------------------------------------------------------------------------------


def vae_loss(vae, video, boxes):
    """2 MSE + 0.5 L1 + 3e-5 KL; pixels in the things' boxes weigh six times the others."""
    mean, logvar = models.encode(vae, video)
    latents = mean.float() + torch.exp(0.5 * logvar.float()) * torch.randn_like(mean, dtype=torch.float32)
    error = models.decode(vae, latents).float() - video
    weight = 1 + 5 * boxes
    weight = weight / weight.mean()
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).sum(1).mean()
    return 2 * (weight * error**2).mean() + 0.5 * (weight * error.abs()).mean() + 3e-5 * kl


def channels_last(module):
    """Lay out the weights of 3D convolutions as GPUs like them; ``Module.to`` stumbles over those of 2D ones."""
    for p in module.parameters():
        if p.ndim == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
    return module


def train_vae(args, device, workers) -> dict:
    clip_sizes = world.SIZES
    count = 6144 if args.clips is None else args.clips
    pools = [draw(workers, 1, max(count // (1 if i == 0 else 8), 16), s, device)[0] for i, s in enumerate(clip_sizes)]
    glyphs = render.atlas(device)
    say(f"clips drawn: {[len(p['slope']) for p in pools]}")
    vae = models.one_pass(models.new_vae()).to(device).train()
    if device.type == "cuda":
        channels_last(vae)
    loss_fast = torch.compile(vae_loss, dynamic=False) if device.type == "cuda" else vae_loss
    clock = Clock(args.seconds, args.steps)
    trainer = Trainer([vae], clock, 1.5e-3, 100, 0.998, weight_decay=0.0, betas=(0.9, 0.99))
    batch, small = args.batch or 16, max((args.batch or 16) // 2, 1)
    announced = False
    while clock.progress() < 1:
        # Windows around the things first: cheap steps, full of edges. Then whole clips, every sixth of another size.
        whole = clock.progress() > 0.4
        if whole and not announced:
            say(f"whole clips from step {clock.step}")
            announced = True
        other = whole and clock.step % 6 == 5
        which = 1 + (clock.step // 6) % 3 if other else 0
        width, height, _ = clip_sizes[which]
        n = small if other else batch if whole else 4 * batch
        packed = pick(pools[which], torch.randint(len(pools[which]["slope"]), (n,), device=device))
        with torch.no_grad():
            corner = None if whole else windows(packed, width, height, WINDOW)
            video, boxes = render.paint(packed, glyphs, width, height, corner, 0 if whole else WINDOW)
        video = video.contiguous(memory_format=torch.channels_last_3d)
        # The odd sizes run uncompiled: compiling for each would cost more than it saves.
        trainer.step(vae_loss if other else loss_fast, vae, video, boxes.contiguous())

    (vae,) = trainer.averaged()
    mean, std = latent_statistics(vae, pools, glyphs, args)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    exact = {"psnr, unrounded": reconstruction(vae, workers, glyphs, clip_sizes[0], args)}
    save(vae, args.out / "vae")
    say("saved; measuring")
    vae = load_vae(args.out, device)
    psnr = {f"{w}x{h}x{t}": reconstruction(vae, workers, glyphs, (w, h, t), args) for w, h, t in clip_sizes}
    for name, value in {**exact, **psnr}.items():
        say(f"{name}: {value}")
    return {"steps": clock.step, "psnr": psnr, **exact, "latents_mean": mean, "latents_std": std, "log": trainer.log}


@torch.no_grad()
def latent_statistics(vae, pools, glyphs, args) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of the latents over all sizes."""
    parts = []
    for packed, (width, height, _) in zip(pools, world.SIZES, strict=True):
        for start in range(0, min(len(packed["slope"]), 512 if args.clips is None else 16), 16):
            index = torch.arange(start, min(start + 16, len(packed["slope"])), device=glyphs.device)
            video, _ = render.paint(pick(packed, index), glyphs, width, height)
            parts.append(models.encode(vae, video)[0].transpose(0, 1).flatten(1))
    values = torch.cat(parts, 1).double()
    return values.mean(1).tolist(), values.std(1).tolist()


@torch.no_grad()
def reconstruction(vae, workers, glyphs, size, args) -> dict[str, float]:
    """Mean PSNR in dB over held-out clips, of whole frames and within the things' bounding boxes."""
    width, height, _ = size
    packed, _ = draw(workers, 2, 64 if args.clips is None else 4, size, glyphs.device, held=True)
    whole, inside = [], []
    for start in range(0, len(packed["slope"]), 8):
        index = torch.arange(start, min(start + 8, len(packed["slope"])), device=glyphs.device)
        video, boxes = render.paint(pick(packed, index), glyphs, width, height)
        video = ((video + 1) * 127.5).round() / 127.5 - 1  # what a file would hold
        error = (models.decode(vae, models.encode(vae, video)[0]).clamp(-1, 1) - video).double().square() / 4
        whole.append(-10 * error.mean((1, 2, 3, 4)).log10())
        inside.append(-10 * ((error * boxes).sum((1, 2, 3, 4)) / (3 * boxes.sum((1, 2, 3, 4)))).log10())
    return {"whole": round(float(torch.cat(whole).mean()), 2), "boxes": round(float(torch.cat(inside).mean()), 2)}


def save(module, folder: Path) -> None:
    """Write a module as Diffusers and transformers do, its weights rounded to bfloat16."""
    copy.deepcopy(module).to("cpu", torch.bfloat16, memory_format=torch.contiguous_format).save_pretrained(folder)


def load_vae(folder: Path, device):
    """The stage's VAE, ready for whole clips; also checks that it agrees with the chunk-by-chunk form."""
    vae = models.AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    probe = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        chunked = vae.encode(probe).latent_dist.mean
        error = (models.encode(models.one_pass(vae), probe)[0] - chunked).abs().max() / chunked.abs().max()
    if error > 1e-4:
        raise RuntimeError(f"one pass and chunks differ by {error:.1e} (relative), expected at most 1e-4")
    return vae.to(device)


# --- stage 2: text encoder and transformer ----------------------------------------------------------------------


@torch.no_grad()
def encode_clips(vae, workers, tokenizer, glyphs, args, deadline: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each size (latents (N, 16, t, h, w), normalised; token ids (N, CAPTIONS, SHORT_LEN))."""
    device = glyphs.device
    mean, std = models.latent_scale(vae, device)
    total = 36000 if args.clips is None else args.clips
    counts = [max(int(total * share), 8) for share in world.SIZE_SHARE]
    begun, sets = time.monotonic() - START, []
    for index, (size, count) in enumerate(zip(world.SIZES, counts, strict=True)):
        packed, captions = draw(workers, 3, count, size, device)
        limit = begun + (deadline - begun) * sum(counts[: index + 1]) / sum(counts)
        ids = torch.as_tensor(models.token_rows(tokenizer, captions)).view(count, CAPTIONS, -1)
        parts = []
        for start in range(0, count, 32):
            video, _ = render.paint(pick(packed, slice(start, start + 32)), glyphs, *size[:2])
            with half():
                latents = models.encode(vae, video.contiguous(memory_format=torch.channels_last_3d))[0]
            parts.append(((latents.float() - mean) / std).to(torch.bfloat16))
            if start % 1024 == 0 and device.type == "cuda":
                torch.cuda.synchronize()
            if time.monotonic() - START > limit and len(parts) * 32 >= 256:
                break
        latents = torch.cat(parts)
        sets.append((latents, ids[: len(latents)].to(device)))
        longest = int((ids > 0).sum(-1).max())
        say(f"{size}: {len(latents)} of {count} clips encoded, captions of at most {longest} tokens")
    return sets


def velocity_loss(model, encoder, short, latents, ids):
    """Flow matching: x_t = (1 - s) x_0 + s noise, the target is noise - x_0, the model is told 1000 s."""
    noise = torch.randn_like(latents)
    u = torch.rand(len(latents), device=latents.device)
    s = models.SHIFT * u / (1 + (models.SHIFT - 1) * u)
    context, short.bias = models.encode_text(encoder, ids)
    mix = s.view(-1, 1, 1, 1, 1)
    prediction = model((1 - mix) * latents + mix * noise, 1000 * s, context, return_dict=False)[0]
    return F.mse_loss(prediction.float(), noise - latents)


def blur_words(ids: torch.Tensor) -> torch.Tensor:
    """Captions as trained on: one in ten is empty, and in one of eight some words become unknown."""
    rows = torch.rand(len(ids), 1, device=ids.device)
    word = ids > models.UNK
    ids = torch.where(word & (rows > 0.875) & (torch.rand(ids.shape, device=ids.device) < 0.2), models.UNK, ids)
    empty = torch.zeros_like(ids)
    empty[:, 0] = models.EOS
    return torch.where(rows < 0.1, empty, ids)


def train_dit(args, device, workers) -> dict:
    vae = load_vae(args.vae or args.out, device)
    path = args.out / "tokenizer" / "spiece.model"
    models.build_tokenizer(path)
    tokenizer = models.load_tokenizer(path)
    glyphs = render.atlas(device)
    fast = channels_last(vae) if device.type == "cuda" else vae
    sets = encode_clips(fast, workers, tokenizer, glyphs, args, 0.16 * args.seconds)

    if args.start:
        encoder = models.UMT5EncoderModel.from_pretrained(args.start / "text_encoder", dtype=torch.float32)
        model = models.WanTransformer3DModel.from_pretrained(args.start / "transformer", torch_dtype=torch.float32)
    else:
        encoder, model = models.new_text_encoder(tokenizer.vocab_size()), models.new_transformer()
    encoder, model = encoder.to(device).train(), model.to(device).train()
    short = models.use_short_text(model)
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    clock = Clock(args.seconds, args.steps)
    trainer = Trainer([model, encoder], clock, 1e-3, 300, 0.999, weight_decay=0.01, betas=(0.9, 0.99))
    batch = args.batch or 256
    chooser = np.random.default_rng(4)
    while clock.progress() < 1:
        which = int(chooser.choice(len(sets), p=world.SIZE_SHARE))
        latents, ids = sets[which]
        index = torch.randint(len(latents), (batch // 2 if which == 1 else batch,), device=device)
        caption = ids[index, torch.randint(CAPTIONS, index.shape, device=device)].long()
        trainer.step(velocity_loss, model, encoder, short, latents[index].float(), blur_words(caption))

    for module, name in zip(trainer.averaged(), ("transformer", "text_encoder"), strict=True):
        save(module, args.out / name)
    say("saved; measuring")
    result = {"steps": clock.step, "log": trainer.log}
    (args.out / "dit.json").write_text(json.dumps(result))
    result["accuracy"] = accuracy(vae, tokenizer, workers, args, device)
    return result


@torch.no_grad()
def accuracy(vae, tokenizer, workers, args, device) -> dict:
    """Percent of held-out prompts shown right, per size, from the saved and reloaded weights; also a film strip."""
    encoder = models.UMT5EncoderModel.from_pretrained(args.out / "text_encoder", dtype=torch.float32).to(device).eval()
    model = models.WanTransformer3DModel.from_pretrained(args.out / "transformer", torch_dtype=torch.float32)
    model = model.to(device).eval()
    short = models.use_short_text(model)
    mean, std = models.latent_scale(vae, device)
    table = {}
    for index, (width, height, frames) in enumerate(world.SIZES):
        prompts = world.held_out_prompts((96 if index == 0 else 48) if args.clips is None else 2)
        shape = (16, (frames - 1) // 4 + 1, height // 8, width // 8)
        clips = []
        for start in range(0, len(prompts), 48):
            part = prompts[start : start + 48]
            ids = torch.as_tensor(models.token_rows(tokenizer, [p for p, _ in part])).long().to(device)
            noise = torch.randn(len(part), *shape, generator=torch.Generator().manual_seed(start)).to(device)
            with half():
                latents = models.sample(model, short, encoder, ids, noise, steps=20 if args.clips is None else 2)
            for piece in (latents * std + mean).split(8):
                video = models.decode(vae, piece).clamp(-1, 1)
                clips.extend(((video + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy())
        readings = list(workers.map(evaluate.measure, clips))
        scores = [evaluate.score(r, scene) for r, (_, scene) in zip(readings, prompts, strict=True)]
        name = f"{width}x{height}x{frames}"
        table[name] = {**evaluate.summarise(scores), "prompts": len(prompts)}
        say(f"{name}: {table[name]}")
        for (prompt, _), reading, right in zip(prompts, readings, scores, strict=True):
            if not all(right.values()) and len(table[name].setdefault("wrong", [])) < 8:
                table[name]["wrong"].append([prompt, *reading])
        if index == 0:
            film_strips(args.out / "samples.png", clips[:12])
    return table


def film_strips(path: Path, clips: list[np.ndarray]) -> None:
    """One row per clip, every other frame side by side."""
    from PIL import Image

    Image.fromarray(np.concatenate([np.concatenate(list(clip[::2]), 1) for clip in clips])).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "dit"))
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and logs")
    parser.add_argument("--vae", type=Path, help="folder with the first stage's vae/ (default: --out)")
    parser.add_argument("--start", type=Path, help="dit: go on from this folder's transformer/ and text_encoder/")
    parser.add_argument("--seconds", type=float, help="end of training, from the start of the program")
    parser.add_argument("--steps", type=int, help="train exactly this many steps instead")
    parser.add_argument(
        "--batch", type=int, help="clips per step (16 whole clips for the VAE, 256 for the transformer)"
    )
    parser.add_argument("--clips", type=int, help="clips drawn; also makes the evaluation tiny, for a trial run")
    args = parser.parse_args()
    args.seconds = args.seconds or {"vae": 390, "dit": 480}[args.stage]
    args.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")  # before CUDA starts: its state does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_one_thread) as workers:
        list(workers.map(abs, range(64)))
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch._dynamo.config.cache_size_limit = 64
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result = {"vae": train_vae, "dit": train_dit}[args.stage](args, device, workers)
    (args.out / f"{args.stage}.json").write_text(json.dumps(result, indent=1))
    say("done")


def _one_thread() -> None:
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
