"""Trains the nano models: the VAE, the transformer, a LoRA for four steps, nano-i2v. One command, stage after stage.

    python examples/nano/train.py vae --out DIR --start FOLDER --keep-latents
    python examples/nano/train.py dit distil i2v measure --out DIR --start FOLDER --start-i2v FOLDER

Each stage fits itself into its ``--seconds`` on whatever device there is; "measure" says what the videos show of all
that is there and was not measured yet. DIR receives vae/, transformer/, text_encoder/ and tokenizer/ in the layout of
Diffusers, weights rounded to bfloat16, four_steps.safetensors, and a JSON log; DIR-i2v the same of nano-i2v, with its
image_encoder/. FOLDER is such a DIR, or an MLX folder as ``weights_convert.py`` makes of one, such as
wan_mlx/assets/nano (wan_mlx/assets/nano-i2v). With ``--steps`` the schedule counts steps instead of seconds and so does
not depend on speed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import json
import multiprocessing
import os
import time
from pathlib import Path

import models
import render
import torch
import world
from measure import measure_all
from train_distil import train_distil
from train_dit import train_dit
from train_i2v import train_i2v
from training import START, Clock, Trainer, channels_last, draw, load_vae, pick, save, say, start_from

WINDOW = 64  # side of the windows the VAE trains on first


def windows(packed, width: int, height: int, side: int) -> torch.Tensor:
    """For each clip the corner (B, 2) of a window around its thing at some moment."""
    b, things, frames, _ = packed["centre"].shape
    rows = torch.arange(b, device=packed["centre"].device)
    which = (torch.rand_like(packed["radius"][:, 0, 0]) < 0.5).long() * (packed["radius"][:, 1, 0] > 0)
    moment = torch.randint(frames, (b,), device=rows.device)
    corner = packed["centre"][rows, which, moment] - side / 2 + torch.randn(b, 2, device=rows.device) * side / 8
    x, y = corner.round().clamp(min=0).unbind(1)
    return torch.stack([x.clamp(max=width - side), y.clamp(max=height - side)], 1)


# --- stage 1: VAE ----------------------------------------------------------------------------------------------


def vae_loss(vae, video, boxes, before=None, std=None, hold: float = 0.0):
    """2 MSE + 0.5 L1 + 8e-6 KL, pixels in the things' boxes weighing six times the others; the logarithm of the MSE
    within the boxes, which is what PSNR measures; and ``hold`` times the square of what latents moved by, in
    ``std`` (1, 16, 1, 1, 1), from those of the VAE ``before``."""
    mean, logvar = models.encode(vae, video)
    latents = mean.float() + torch.exp(0.5 * logvar.float()) * torch.randn_like(mean, dtype=torch.float32)
    error = models.decode(vae, latents).float() - video
    weight = 1 + 5 * boxes
    weight = weight / weight.mean()
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).sum(1).mean()
    inside = (error**2 * boxes).sum((1, 2, 3, 4)) / (3 * boxes.sum((1, 2, 3, 4)) + 1e-3)
    inside = 0.02 * (inside + 1e-5).log().mean()
    loss = 2 * (weight * error**2).mean() + 0.5 * (weight * error.abs()).mean() + 8e-6 * kl + inside
    if before is None:
        return loss
    with torch.no_grad():
        known = models.encode(before, video)[0].float()
    return loss + hold * ((mean.float() - known) / std).square().mean()


def train_vae(args, device, workers, begun: float, seconds: float) -> dict:
    clip_sizes = world.SIZES
    count = 16384 if args.clips is None else args.clips
    pools = [draw(workers, 1, max(count // (1 if i == 0 else 8), 16), s, device)[0] for i, s in enumerate(clip_sizes)]
    glyphs = render.atlas(device)
    say(f"clips drawn: {[len(p['slope']) for p in pools]}")
    vae = start_from(args.start, args.out)[0] if args.start else models.new_vae()
    vae = models.one_pass(vae).to(device).train()
    before, std = None, None
    if args.hold:
        before, std = copy.deepcopy(vae).requires_grad_(False), models.latent_scale(vae, device)[1]
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(not args.keep_latents)
    if device.type == "cuda":
        channels_last(vae)
        if before is not None:
            channels_last(before)
    # Compiling takes two minutes, which a short training has not.
    fast = torch.compile(vae_loss, dynamic=False) if device.type == "cuda" and not args.keep_latents else vae_loss
    clock = Clock(begun + seconds, args.steps)
    trainer = Trainer([vae], clock, args.rate, 100, 0.998, weight_decay=0.0, betas=(0.9, 0.99))
    batch, small = max(args.batch // 16, 1), max(args.batch // 32, 1)

    def loss_of(which: int, whole: bool):
        width, height, _ = clip_sizes[which]
        n = (small if which else batch) if whole else 4 * batch
        packed = pick(pools[which], torch.randint(len(pools[which]["slope"]), (n,), device=device))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            corner = None if whole else windows(packed, width, height, WINDOW)
            video, boxes = render.paint(packed, glyphs, width, height, corner, 0 if whole else WINDOW)
        video = video.contiguous(memory_format=torch.channels_last_3d)
        # The odd sizes run uncompiled: compiling for each would cost more than it saves.
        return (vae_loss if which else fast)(vae, video, boxes.contiguous(), before, std, args.hold)

    while clock.progress() < 1:
        # Windows around the things first: cheap steps, full of edges. Then whole clips, every third of another size.
        whole = clock.progress() > (0.5 if args.start else 0.4)
        which = 1 + (clock.step // 3) % 3 if whole and clock.step % 3 == 2 else 0
        trainer.step(lambda which=which, whole=whole: loss_of(which, whole), (which, whole))

    (vae,) = trainer.averaged()
    if not args.keep_latents:
        mean, std = latent_statistics(vae, pools, glyphs, args)
        vae.register_to_config(latents_mean=mean, latents_std=std)
    save(vae, args.out / "vae")
    say("saved; measuring")
    vae = load_vae(args.out, device)
    psnr = {f"{w}x{h}x{t}": reconstruction(vae, workers, glyphs, (w, h, t), args) for w, h, t in clip_sizes}
    for name, value in psnr.items():
        say(f"{name}: {value}")
    return {"steps": clock.step, "psnr": psnr, "log": trainer.log}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", choices=STAGES, nargs="+", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and logs")
    parser.add_argument("--start", type=Path, help="go on from this folder, such as wan_mlx/assets/nano")
    parser.add_argument(
        "--start-i2v", type=Path, help="i2v: go on from this MLX folder, such as wan_mlx/assets/nano-i2v"
    )
    parser.add_argument("--warmup", type=int, default=300, help="steps until the highest rate")
    parser.add_argument("--keep-latents", action="store_true", help="vae: only the decoder is trained")
    parser.add_argument("--hold", type=float, default=0.0, help="vae: how much latents are held where they were")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--seconds", type=float, nargs="+", help="for each stage (default: vae 390, dit 360, ...)")
    parser.add_argument("--steps", type=int, help="train exactly this many steps instead")
    parser.add_argument("--batch", type=int, default=256, help="clips per step; the VAE takes a sixteenth")
    parser.add_argument("--clips", type=int, help="clips drawn; also makes the evaluation tiny, for a trial run")
    parser.add_argument("--prompts", type=int, help="measure: per size (default 512)")
    parser.add_argument("--measure", default="transformer,four_steps,two,i2v", help="and truth (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="distil, measure")
    parser.add_argument("--sampling", type=int, default=12, help="measure: steps")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")  # before CUDA starts: its state does not survive a fork
    cores = len(os.sched_getaffinity(0))
    with concurrent.futures.ProcessPoolExecutor(cores, mp_context=context, initializer=_one_thread) as workers:
        list(workers.map(abs, range(64)))
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch._dynamo.config.cache_size_limit = 64
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run(args, device, workers)
    say("done")


def run(args, device, workers) -> None:
    """The stages one after the other; videos are read by the workers while the next stage trains."""
    found, readers, measured = {}, [], set()

    def write() -> None:
        (args.out / "training.json").write_text(json.dumps(found, indent=1))

    def tell(waiting: bool) -> None:
        while readers and (waiting or all(job.done() for job in readers[0].jobs)):
            reader = readers.pop(0)
            found[reader.name] = reader.table()
            write()
            reader.strips(args.out)

    for stage, seconds in zip(args.stages, args.seconds or map(SECONDS.get, args.stages), strict=True):
        say(stage)
        begun = time.monotonic() - START
        if stage == "vae":
            found[stage] = train_vae(args, device, workers, begun, seconds)
        elif stage == "dit":
            found[stage] = train_dit(args, device, workers, begun, seconds)
        elif stage == "distil":
            found[stage] = train_distil(args, device, workers, begun, seconds)
        elif stage == "i2v":
            found[stage] = train_i2v(args, device, workers, begun, seconds)
        else:
            readers += measure_all(args, device, workers, measured)
        write()
        tell(waiting=False)
    tell(waiting=True)


STAGES = ("vae", "dit", "distil", "i2v", "measure")
SECONDS = {"vae": 390, "dit": 360, "distil": 130, "i2v": 170, "measure": 0}


def _one_thread() -> None:
    os.nice(10)  # the process that keeps the GPU busy comes first
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
