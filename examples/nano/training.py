"""What the stages of training share: the clock, the optimiser, drawing clips, encoding them, weights on disk."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import models
import numpy as np
import render
import torch
import torch.nn.functional as F
import world

START = time.monotonic()
CAPTIONS = 8  # captions kept per clip
SAVE_EVERY = 150  # seconds between checkpoints


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
    """AdamW with warm-up and cosine decay over a ``Clock``, gradient clipping, bfloat16 autocast, and an average.

    ``keep``, if set, is called with the averaged modules every SAVE_EVERY seconds, so that a run cut short leaves some.
    """

    def __init__(self, modules: list[torch.nn.Module], clock: Clock, rate: float, warmup: int, average: float, **adam):
        self.clock, self.rate, self.warmup, self.average = clock, rate, warmup, average
        self.params = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.means = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.params, lr=rate, fused=self.params[0].is_cuda, **adam)
        self.modules, self.log, self.recent = modules, [], []
        self.keep, self.kept = None, time.monotonic()

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
            if self.keep is not None and time.monotonic() - self.kept > SAVE_EVERY:
                self.keep(*self.averaged())
                self.kept = time.monotonic()

    def averaged(self) -> list[torch.nn.Module]:
        """Copies of the modules with the averaged weights."""
        means = iter(self.means)
        copies = [copy.deepcopy(module).eval() for module in self.modules]
        with torch.no_grad():
            for module in copies:
                for p in module.parameters():
                    if p.requires_grad:
                        p.copy_(next(means))
        return copies


def half():
    """bfloat16 autocast on a GPU; on the CPU it would only be slower."""
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


# --- clips: drawn by worker processes, painted on the device ----------------------------------------------------


def _draw(seed: int, count: int, size: tuple[int, int, int], held: bool, given: bool):
    """``count`` packed scenes and CAPTIONS captions of each, a third of them Chinese."""
    rng = np.random.default_rng([seed, *size, int(held)])
    scenes = [world.sample_scene(rng, size, held, given) for _ in range(count)]
    tell = world.instruction if given else world.caption
    captions = [tell(s, rng, "zh" if rng.random() < 0.35 else "en") for s in scenes for _ in range(CAPTIONS)]
    return render.pack(scenes), captions


def draw(workers, seed: int, count: int, size, device, held: bool = False, given: bool = False):
    """Packed scenes on ``device`` and their captions, the same whatever the number of workers.

    With ``given``, scenes and captions for a model that is given the first frame.
    """
    chunks = [min(256, count - start) for start in range(0, count, 256)]
    jobs = [workers.submit(_draw, seed * 1000 + i, n, size, held, given) for i, n in enumerate(chunks)]
    packs, captions = zip(*(job.result() for job in jobs), strict=True)
    return render.upload(list(packs), device), [text for part in captions for text in part]


def pick(packed: dict[str, torch.Tensor], index: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value[index] for name, value in packed.items()}


# --- weights on disk ----------------------------------------------------------------------------------------------


def save(module, folder: Path) -> None:
    """Write a module as Diffusers and transformers do, its weights rounded to bfloat16; ``folder`` changes at once."""
    from wan_mlx.storage import new_folder  # needs no MLX

    with new_folder(folder, replace=True) as unfinished:
        copied = copy.deepcopy(module).to("cpu", torch.bfloat16, memory_format=torch.contiguous_format)
        copied.save_pretrained(unfinished)


def from_mlx(module: torch.nn.Module, path: Path) -> torch.nn.Module:
    """Fill ``module`` from one file of an MLX folder: the key maps of wan_mlx.weights, read backwards."""
    from safetensors.torch import load_file

    from wan_mlx.weights.layouts import canonical_keys, recognise  # needs no MLX

    stored, wanted, state = load_file(path), module.state_dict(), {}
    for name, key in canonical_keys(recognise(wanted), wanted).items():
        tensor, shape = stored.pop(name), wanted[key].shape
        if len(shape) >= 4:  # channels last there
            tensor = tensor.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        state[key] = tensor.reshape(shape).float()
    if stored:
        raise RuntimeError(f"{path} holds tensors that {type(module).__name__} has no place for: {sorted(stored)[:5]}")
    module.load_state_dict({**wanted, **state})
    return module


def start_from(folder: Path, out: Path):
    """VAE, text encoder and transformer of ``folder``, as `save` or ``weights_convert.py`` writes one.

    ``out`` gets VAE, text encoder and tokenizer too, where it has none.
    """
    if (folder / "transformer").is_dir():
        vae = models.AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        encoder = models.UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        model = models.WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
        tokenizer = folder / "tokenizer" / "spiece.model"
    else:
        config = json.loads((folder / "config.json").read_text())
        vae = from_mlx(models.new_vae(), folder / "vae.safetensors")
        vae.register_to_config(latents_mean=config["vae"]["mean"], latents_std=config["vae"]["std"])
        encoder = models.new_text_encoder(config["text_encoder"]["vocab_size"])
        encoder = from_mlx(encoder, folder / "text_encoder.safetensors")
        model = from_mlx(models.new_transformer(), folder / "transformer.safetensors")
        tokenizer = folder / "tokenizer.model"
    for name, module in {"vae": vae, "text_encoder": encoder}.items():
        if not (out / name).exists():
            save(module, out / name)
    if not (out / "tokenizer").exists():
        (out / "tokenizer").mkdir()
        shutil.copyfile(tokenizer, out / "tokenizer" / "spiece.model")
    return vae, encoder, model


def channels_last(module):
    """Lay out the weights of 3D convolutions as GPUs like them; ``Module.to`` stumbles over those of 2D ones."""
    for p in module.parameters():
        if p.ndim == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
    return module


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


# --- latents and captions ------------------------------------------------------------------------------------------


class Clips(NamedTuple):
    """Encoded clips of one size. Latents are normalised bfloat16; the last two are for image-conditioned models."""

    latents: torch.Tensor  # (N, 16, t, h, w)
    ids: torch.Tensor  # (N, CAPTIONS, SHORT_LEN) token ids
    boxes: torch.Tensor  # bool (N, 1, t, h, w): where things are
    image: torch.Tensor | None  # uint8 (N, 3, H, W): the first frame
    start: torch.Tensor | None  # (N, 16, t, h, w): latents of the first frame followed by grey


@torch.no_grad()
def encode_clips(vae, workers, tokenizer, glyphs, args, deadline: float, given: bool = False) -> list[Clips]:
    """Clips of each size, as many as fit until ``deadline``, in seconds since the program began."""
    device = glyphs.device
    total = 40000 if args.clips is None else args.clips
    counts = [max(int(total * share), 8) for share in world.SIZE_SHARE]
    begun, sets = time.monotonic() - START, []
    for index, (size, count) in enumerate(zip(world.SIZES, counts, strict=True)):
        packed, captions = draw(workers, 3, count, size, device, given=given)
        limit = begun + (deadline - begun) * sum(counts[: index + 1]) / sum(counts)
        ids = torch.as_tensor(models.token_rows(tokenizer, captions)).view(count, CAPTIONS, -1)
        parts = []
        for start in range(0, count, 32):
            video, boxes = render.paint(pick(packed, slice(start, start + 32)), glyphs, *size[:2])
            latents = encode_normalised(vae, video)
            boxes = F.max_pool3d(torch.cat([boxes[:, :, :1].expand(-1, -1, 3, -1, -1), boxes], 2), (4, 8, 8)) > 0
            if given:
                image = to_bytes(video[:, :, 0])
                parts.append((latents, boxes, image, encode_normalised(vae, then_grey(image, size[2]))))
            else:
                parts.append((latents, boxes))
            if start % 1024 == 0 and device.type == "cuda":
                torch.cuda.synchronize()
            if time.monotonic() - START > limit and len(parts) * 32 >= 256:
                break
        latents, boxes, *first = (torch.cat(column) for column in zip(*parts, strict=True))
        sets.append(Clips(latents, ids[: len(latents)].to(device), boxes, *(first or (None, None))))
        longest = int((ids > 0).sum(-1).max())
        say(f"{size}: {len(latents)} of {count} clips encoded, captions of at most {longest} tokens")
    return sets


def encode_normalised(vae, video: torch.Tensor) -> torch.Tensor:
    """Normalised latents of a batch, bfloat16."""
    mean, std = models.latent_scale(vae, video.device)
    with half():
        latents = models.encode(vae, video.contiguous(memory_format=torch.channels_last_3d))[0]
    return ((latents.float() - mean) / std).to(torch.bfloat16)


def to_bytes(video: torch.Tensor) -> torch.Tensor:
    """[-1, 1] → uint8 levels."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte()


def then_grey(image: torch.Tensor, frames: int) -> torch.Tensor:
    """uint8 (B, 3, H, W) → (B, 3, frames, H, W) in [-1, 1]: the image, then grey, as image to video is conditioned."""
    video = torch.zeros(*image.shape[:2], frames, *image.shape[2:], device=image.device)
    video[:, :, 0] = image.float() / 127.5 - 1
    return video


def flow_matching(predict, latents: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - s) x_0 + s noise, the target is noise - x_0; ``predict`` is given x_t and 1000 s.

    Draws of s are spread evenly over the batch, three in four with the shift used in sampling, the others where shapes
    are decided. Things weigh five times the backdrop, but only at noise levels that leave no doubt where they are: a
    weight that told more than x_t would pull the mean that is learnt.
    """
    noise, count = torch.randn_like(latents), len(latents)
    u = (torch.arange(count, device=latents.device) + torch.rand(count, device=latents.device)) / count
    s = models.SHIFT * u / (1 + (models.SHIFT - 1) * u)
    s = torch.where(torch.rand_like(s) < 0.25, 0.7 + 0.27 * torch.rand_like(s), s)
    mix = s.view(-1, 1, 1, 1, 1)
    error = predict((1 - mix) * latents + mix * noise, 1000 * s).float() - (noise - latents)
    weight = 1 + 4 * boxes * ((0.97 - mix) / 0.1).clamp(0, 1)
    return (weight * error**2).mean()


def blur_words(ids: torch.Tensor) -> torch.Tensor:
    """Captions as trained on: one in ten is empty, and in one of eight some words become unknown."""
    rows = torch.rand(len(ids), 1, device=ids.device)
    word = ids > models.UNK
    ids = torch.where(word & (rows > 0.875) & (torch.rand(ids.shape, device=ids.device) < 0.2), models.UNK, ids)
    empty = torch.zeros_like(ids)
    empty[:, 0] = models.EOS
    return torch.where(rows < 0.1, empty, ids)


def film_strips(path: Path, clips: list[np.ndarray]) -> None:
    """One row per clip, every other frame side by side."""
    from PIL import Image

    Image.fromarray(np.concatenate([np.concatenate(list(clip[::2]), 1) for clip in clips])).save(path)
