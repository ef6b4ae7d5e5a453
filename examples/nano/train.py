"""Trains the nano models: first the VAE, then text encoder and transformer together, then nano-i2v. A command each.

    python examples/nano/train.py vae --out DIR
    python examples/nano/train.py dit --out DIR [--vae DIR] [--start MLX-FOLDER]
    python examples/nano/train.py i2v --out DIR2 --start MLX-FOLDER

Each stage fits itself into ``--seconds`` on whatever device there is, then measures what it made. DIR receives vae/,
transformer/, text_encoder/ and tokenizer/ (i2v: image_encoder/ too) in the layout of Diffusers, weights rounded to
bfloat16, and a JSON log per stage. With ``--steps`` the schedule counts steps instead of seconds and so does not
depend on speed. An MLX folder is what ``weights_convert.py`` makes of DIR; wan_mlx/assets/nano is one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
from pathlib import Path

import models
import numpy as np
import reading
import render
import torch
import world
from train_i2v import train_i2v
from training import (
    CAPTIONS,
    Clock,
    Trainer,
    blur_words,
    channels_last,
    draw,
    encode_clips,
    film_strips,
    flow_matching,
    half,
    load_vae,
    pick,
    save,
    say,
    start_from,
    to_bytes,
)

WINDOW = 64  # side of the windows the VAE trains on first


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


# --- stage 2: text encoder and transformer ----------------------------------------------------------------------


def velocity_loss(model, encoder, short, latents, ids, boxes):
    context, short.bias = models.encode_text(encoder, ids)
    return flow_matching(lambda x, t: model(x, t, context, return_dict=False)[0], latents, boxes)


def train_dit(args, device, workers) -> dict:
    path = args.out / "tokenizer" / "spiece.model"
    if args.start:
        encoder, model = start_from(args.start, args.out)
    else:
        models.build_tokenizer(path)
        encoder, model = models.new_text_encoder(models.load_tokenizer(path).vocab_size()), models.new_transformer()
    tokenizer = models.load_tokenizer(path)
    vae = load_vae(args.out if args.start else args.vae or args.out, device)
    glyphs = render.atlas(device)
    fast = channels_last(vae) if device.type == "cuda" else vae
    sets = encode_clips(fast, workers, tokenizer, glyphs, args, 0.16 * args.seconds)

    # When going on, the text encoder stays as it is: nano-i2v shares it.
    encoder, model = encoder.to(device).requires_grad_(not args.start), model.to(device).train()
    trained = {"transformer": model} if args.start else {"transformer": model, "text_encoder": encoder}
    short = models.use_short_text(model)
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    clock = Clock(args.seconds, args.steps)
    rate = args.rate or (8e-4 if args.start else 1e-3)
    trainer = Trainer([*trained.values()], clock, rate, 300, 0.999, weight_decay=0.01, betas=(0.9, 0.99))

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
    say(f"{clock.step} steps; measuring")
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
                video = models.decode(vae, piece)
                clips.extend(to_bytes(video).permute(0, 2, 3, 4, 1).cpu().numpy())
        readings = list(workers.map(reading.measure, clips))
        scores = [reading.score(r, scene) for r, (_, scene) in zip(readings, prompts, strict=True)]
        name = f"{width}x{height}x{frames}"
        table[name] = {**reading.summarise(scores), "prompts": len(prompts)}
        say(f"{name}: {table[name]}")
        for (prompt, _), read, right in zip(prompts, readings, scores, strict=True):
            if not all(right.values()) and len(table[name].setdefault("wrong", [])) < 8:
                table[name]["wrong"].append([prompt, *read])
        if index == 0:
            film_strips(args.out / "samples.png", clips[:12])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "dit", "i2v"))
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and logs")
    parser.add_argument("--vae", type=Path, help="folder with the first stage's vae/ (default: --out)")
    parser.add_argument("--start", type=Path, help="dit, i2v: go on from this MLX folder, such as wan_mlx/assets/nano")
    parser.add_argument("--rate", type=float, help="highest learning rate of the transformer")
    parser.add_argument("--seconds", type=float, help="end of training, from the start of the program")
    parser.add_argument("--steps", type=int, help="train exactly this many steps instead")
    parser.add_argument(
        "--batch", type=int, help="clips per step (16 whole clips for the VAE, 256 for the transformer)"
    )
    parser.add_argument("--clips", type=int, help="clips drawn; also makes the evaluation tiny, for a trial run")
    args = parser.parse_args()
    args.seconds = args.seconds or {"vae": 390, "dit": 640, "i2v": 640}[args.stage]
    args.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")  # before CUDA starts: its state does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_one_thread) as workers:
        list(workers.map(abs, range(64)))
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch._dynamo.config.cache_size_limit = 64
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result = {"vae": train_vae, "dit": train_dit, "i2v": train_i2v}[args.stage](args, device, workers)
    (args.out / f"{args.stage}.json").write_text(json.dumps(result, indent=1))
    say("done")


def _one_thread() -> None:
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
