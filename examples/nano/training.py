"""What the stages of training share: the clock, the optimiser, drawing clips, encoding them, weights on disk."""

from __future__ import annotations

import collections
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
CAPTIONS = 4  # captions kept per clip
SAVE_EVERY = 60  # seconds between checkpoints


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
    """AdamW, and Muon for the blocks' matrices, with warm-up and cosine decay over a ``Clock``, gradient clipping,
    bfloat16 autocast, and an average.

    On a GPU a step is recorded once for each ``key`` and then replayed: launching thousands of small kernels from
    Python takes longer than they do. So a loss draws all that changes from step to step on the device, itself.
    ``gather`` is called when gradients are there; ``keep``, if set, with the averaged modules every SAVE_EVERY seconds,
    so that a run cut short leaves some.
    """

    def __init__(
        self,
        modules: list[torch.nn.Module],
        clock: Clock,
        rate: float,
        warmup: int,
        average: float,
        gather=None,
        **adam,
    ):
        self.clock, self.rate, self.warmup, self.average, self.gather = clock, rate, warmup, average, gather
        named = [pair for module in modules for pair in module.named_parameters() if pair[1].requires_grad]
        self.params = [p for _, p in named]
        self.means = [p.detach().clone() for p in self.params]
        cuda = self.params[0].is_cuda
        self.now = torch.tensor(rate, device=self.params[0].device)
        matrices = [p for name, p in named if name.startswith("blocks.") and p.ndim == 2]
        self.muon = Muon(matrices, self.now)
        apart = {id(p) for p in matrices}
        others = [p for p in self.params if id(p) not in apart]
        self.optimizer = torch.optim.AdamW(others, lr=self.now, fused=cuda, capturable=cuda, **adam)
        self.modules, self.log, self.recent = modules, [], []
        self.keep, self.kept = None, time.monotonic()
        self.graphs, self.seen, self.pool, self.record = {}, {}, None, cuda

    def step(self, loss_of, key: object = None) -> None:
        """One step on ``loss_of()``; one ``key``, one computation on tensors of one shape."""
        clock = self.clock
        rate = self.rate * min(1, (clock.step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * clock.progress()))
        self.now.fill_(rate)
        loss = self._recorded(loss_of, key) if self.record and key is not None else self._plain(loss_of)
        clock.step += 1
        self.recent.append(loss.clone())
        if clock.step % 50 == 0 or clock.step == 5:  # also keeps the clock honest: the device is waited for
            value = float(torch.stack(self.recent).float().mean())
            self.recent.clear()
            self.log.append({"step": clock.step, "seconds": round(time.monotonic() - START, 1), "loss": value})
            if clock.step % 500 == 0 or clock.step in (5, 50, 100):
                say(f"step {clock.step} loss {value:.5f} rate {rate:.1e} progress {clock.progress():.2f}")
            if not math.isfinite(value):
                raise RuntimeError(f"loss is {value} at step {clock.step}; lower the learning rate")
            if self.keep is not None and time.monotonic() - self.kept > SAVE_EVERY:
                self.keep(*self.averaged())
                self.kept = time.monotonic()

    def _plain(self, loss_of) -> torch.Tensor:
        with half():
            loss = loss_of()
        loss.backward()
        if self.gather is not None:
            self.gather()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.muon.step()
        for p in self.params:
            p.grad = None
        with torch.no_grad():
            torch._foreach_lerp_(self.means, self.params, 1 - self.average)
        return loss.detach()

    def _recorded(self, loss_of, key) -> torch.Tensor:
        if key not in self.graphs:
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] <= 3:  # compiles, and makes the optimiser's state
                aside = torch.cuda.Stream()
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):
                    loss = self._plain(loss_of)
                torch.cuda.current_stream().wait_stream(aside)
                return loss
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            try:
                with torch.cuda.graph(graph, pool=self.pool):
                    loss = self._plain(loss_of)
            except Exception as reason:
                say(f"not recorded: {reason}")
                self.record = False
                torch.cuda.synchronize()
                return self._plain(loss_of)
            self.pool = graph.pool()
            self.graphs[key] = graph, loss
        graph, loss = self.graphs[key]
        graph.replay()
        return loss

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


class Muon:
    """Momentum, made orthogonal before it is added (Jordan et al. 2024), as large as AdamW's (Liu et al. 2025)."""

    def __init__(self, params: list[torch.nn.Parameter], rate: torch.Tensor, decay: float = 0.01):
        self.rate, self.decay, self.groups = rate, decay, {}
        for p in params:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.momenta = {shape: torch.zeros(len(group), *shape, device=group[0].device)
                        for shape, group in self.groups.items()}  # fmt: skip

    @torch.no_grad()
    def step(self) -> None:
        for shape, group in self.groups.items():
            gradient, momentum = torch.stack([p.grad for p in group]), self.momenta[shape]
            momentum.lerp_(gradient, 0.05)
            change = orthogonal(gradient.lerp(momentum, 0.95)).float() * (-0.2 * max(shape) ** 0.5 * self.rate)
            torch._foreach_mul_(group, 1 - self.decay * self.rate)
            torch._foreach_add_(group, list(change.unbind(0)))


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(n, r, c) with all singular values near 1, by five Newton-Schulz iterations in bfloat16."""
    x = matrices.bfloat16()
    upright = x.shape[1] > x.shape[2]
    x = x.mT if upright else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if upright else x


def half():
    """bfloat16 autocast on a GPU; on the CPU it would only be slower."""
    # Without its cache: a weight first cast where no gradients are kept would stay without one.
    return torch.autocast("cuda", torch.bfloat16, torch.cuda.is_available(), cache_enabled=False)


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

    stored, wanted, state = unpacked(load_file(path)), module.state_dict(), {}
    for name, key in canonical_keys(recognise(wanted), wanted).items():
        tensor, keys = stored.pop(name), (key,) if isinstance(key, str) else key  # several: packed into one there
        for key, part in zip(keys, tensor.chunk(len(keys)), strict=True):
            shape = wanted[key].shape
            if len(shape) >= 4:  # channels last there
                part = part.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
            state[key] = part.reshape(shape).float()
    if stored:
        raise RuntimeError(f"{path} holds tensors that {type(module).__name__} has no place for: {sorted(stored)[:5]}")
    module.load_state_dict({**wanted, **state})
    return module


def unpacked(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices that are packed in eight bits, four in a word and 64 to a scale and a bias, as matrices."""
    for layer in [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]:
        scales, biases = (stored.pop(f"{layer}.{part}").float()[..., None] for part in ("scales", "biases"))
        values = stored[f"{layer}.weight"].view(torch.uint8).unflatten(-1, (-1, 64)).float()
        stored[f"{layer}.weight"] = (values * scales + biases).flatten(-2)
    return stored


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
    """Encoded clips of one size, normalised latents, and what is said of them; the last two are for nano-i2v alone.

    Text and image encoders stay as they are in these stages, so all is encoded once, in bfloat16.
    """

    filled: torch.Tensor  # (): how many of the N places are
    latents: torch.Tensor  # (N, 16, t, h, w)
    boxes: torch.Tensor  # bool (N, 1, t, h, w): where things are
    context: torch.Tensor  # (N, CAPTIONS, SHORT_LEN, 128)
    words: torch.Tensor  # (N, CAPTIONS): tokens of each caption
    features: torch.Tensor | None = None  # (N, 257, IMAGE_DIM): of the first frame
    start: torch.Tensor | None = None  # (N, 16, t, h, w): latents of the first frame followed by grey


class Batch(NamedTuple):
    """Drawn from `Clips`; ``bias`` goes with ``context`` as `models.ShortText` says."""

    latents: torch.Tensor
    boxes: torch.Tensor
    context: torch.Tensor
    bias: torch.Tensor
    features: torch.Tensor | None
    condition: torch.Tensor | None


def draw_batch(clips: Clips, count: int, empty: torch.Tensor) -> Batch:
    """``count`` clips with one of their captions each, or in one of ten with none: ``empty`` (1, SHORT_LEN, 128)."""
    device = clips.latents.device
    index = (torch.rand(count, device=device) * clips.filled).long()
    which = torch.randint(CAPTIONS, (count,), device=device)
    silent = torch.rand(count, device=device) < 0.1
    context = torch.where(silent[:, None, None], empty, clips.context[index, which].float())
    bias = models.padding_bias(clips.words[index, which].masked_fill(silent, 1))
    features, condition = None, None
    if clips.start is not None:
        features, condition = clips.features[index].float(), models.with_mask(clips.start[index].float())
    return Batch(clips.latents[index].float(), clips.boxes[index].float(), context, bias, features, condition)


class Stock:
    """Encoded clips of each size, on the device; with ``image_encoder`` those of nano-i2v.

    `more` has processes draw, and encodes, 32 fresh ones at a time. When the places are filled, they take those of the
    oldest: what is trained on is hardly ever seen more than a few dozen times. Tensors stay where they are, so that
    recorded steps go on with what is in them.
    """

    DRAWN = 256

    def __init__(self, vae, encoder, workers, tokenizer, args, image_encoder=None):
        self.vae, self.encoder, self.image_encoder, self.tokenizer = vae, encoder, image_encoder, tokenizer
        self.workers, self.device = workers, next(vae.parameters()).device
        self.glyphs = render.atlas(self.device)
        places, self.chunk = (24576, 32) if args.clips is None else (args.clips, 2)
        self.places = [max(int(places * share) // self.chunk, 1) * self.chunk for share in world.SIZE_SHARE]
        self.made, self.sets = [0] * len(world.SIZES), [None] * len(world.SIZES)
        self.scenes = [None] * len(world.SIZES)  # drawn ones, and how many of them have been encoded
        self.jobs = [collections.deque() for _ in world.SIZES]
        self.seed = 0
        for which in (*range(len(world.SIZES)),) * 2:
            self._order(which)

    def _order(self, which: int) -> None:
        self.seed += 1
        given, size = self.image_encoder is not None, world.SIZES[which]
        self.jobs[which].append(self.workers.submit(_draw, 9000 + self.seed, self.DRAWN, size, False, given))

    @torch.no_grad()
    def more(self, which: int) -> None:
        """``chunk`` more clips of one size."""
        if self.scenes[which] is None:
            packed, captions = self.jobs[which].popleft().result()
            self._order(which)
            ids = torch.as_tensor(models.token_rows(self.tokenizer, captions)).to(self.device).long()
            self.scenes[which] = render.upload([packed], self.device), ids.view(self.DRAWN, CAPTIONS, -1), 0
        packed, ids, begin = self.scenes[which]
        part = slice(begin, begin + self.chunk)
        self.scenes[which] = (packed, ids, part.stop) if part.stop < self.DRAWN else None
        values = self._encoded(pick(packed, part), ids[part], world.SIZES[which])
        if self.sets[which] is None:
            empty = (torch.zeros(self.places[which], *v.shape[1:], dtype=v.dtype, device=self.device) for v in values)
            self.sets[which] = Clips(torch.zeros((), device=self.device), *empty)
        at = self.made[which] % self.places[which]
        for kept, value in zip(self.sets[which][1:], values, strict=False):
            kept[at : at + self.chunk] = value
        self.made[which] += self.chunk
        self.sets[which].filled.fill_(min(self.made[which], self.places[which]))

    def _encoded(self, packed, ids, size) -> list[torch.Tensor]:
        """All but the first field of `Clips`."""
        video, boxes = render.paint(packed, self.glyphs, *size[:2])
        boxes = F.max_pool3d(torch.cat([boxes[:, :, :1].expand(-1, -1, 3, -1, -1), boxes], 2), (4, 8, 8)) > 0
        ids = some_unknown(ids.flatten(0, 1))
        context = models.encode_text(self.encoder, ids)[0].to(torch.bfloat16).unflatten(0, (-1, CAPTIONS))
        values = [encode_normalised(self.vae, video), boxes, context, (ids != models.PAD).sum(1).view(-1, CAPTIONS)]
        if self.image_encoder is None:
            return values
        image = to_bytes(video[:, :, 0])
        with half():
            features = models.encode_image(self.image_encoder, image).to(torch.bfloat16)
        return [*values, features, encode_normalised(self.vae, then_grey(image, size[2]))]

    def fill(self, seconds: float) -> None:
        """Clips of each size for so long, a few of each at least."""
        begun, turn = time.monotonic(), 0
        chooser = np.random.default_rng(5)
        while turn < 2 * len(self.sets) or time.monotonic() - begun < seconds:
            which = turn % len(self.sets) if turn < 2 * len(self.sets) else pick_size(chooser)
            self.more(which)
            turn += 1
            if turn % 16 == 0 and self.device.type == "cuda":
                torch.cuda.synchronize()
        say(f"{self.made} clips encoded, of {world.SIZES}")


def pick_size(rng: np.random.Generator) -> int:
    return int(rng.choice(len(world.SIZES), p=world.SIZE_SHARE))


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


def some_unknown(ids: torch.Tensor) -> torch.Tensor:
    """Captions (N, SHORT_LEN) as trained on: in one of eight some words are unknown."""
    rows = torch.rand(len(ids), 1, device=ids.device)
    word = ids > models.UNK
    return torch.where(word & (rows > 0.875) & (torch.rand(ids.shape, device=ids.device) < 0.2), models.UNK, ids)


def nothing_said(encoder) -> torch.Tensor:
    """The context (1, SHORT_LEN, 128) of an empty caption."""
    ids = torch.full((1, models.SHORT_LEN), models.PAD, device=next(encoder.parameters()).device)
    ids[:, 0] = models.EOS
    with torch.no_grad():
        return models.encode_text(encoder, ids)[0]


def film_strips(path: Path, clips: list[np.ndarray]) -> None:
    """One row per clip, every other frame side by side."""
    from PIL import Image

    Image.fromarray(np.concatenate([np.concatenate(list(clip[::2]), 1) for clip in clips])).save(path)
