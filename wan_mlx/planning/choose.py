"""The planner: the fastest `Plan` within a memory budget.

It works from sizes alone (`planning.sizes`, `planning.peak_memory`, `planning.flops`), so it runs before any download.
The budget is for MLX; Python, its packages and the finished frames take about a gigabyte on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import mlx.core as mx

from ..geometry import WAN_2_1, Geometry
from ..hub.resolve import is_cached, preset_of, resolve
from ..models.execution import TOKENS_AT_ONCE
from ..models.vae_tiling import SMALLEST_TILE, parse_tiling
from ..presets import PRESETS, Preset, find_preset, preset_for
from ..types import Request
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.load import config_of, parameters_of
from ..weights.parameters import Parameters
from . import flops as work
from . import peak_memory as peaks
from .machine import available_memory, parse_memory
from .plan import FILL, Plan, Row
from .sizes import Networks, sizes_of
from .speed import timed

# Choices to try, from the fastest to the smallest: transformer resident or streamed, and the number of tokens at once.
_PIECES = sorted({TOKENS_AT_ONCE, 8192, 4096, 2048}, reverse=True)
LADDER = [*((False, pieces) for pieces in _PIECES), *((True, pieces) for pieces in _PIECES), (True, 1024)]
# In a prompt; umT5 reads at most 512, and the default negative prompt has about as many as this.
TEXT_TOKENS = 128


def choose(
    nets: Networks,
    title: str,
    latent_shape: tuple[int, int, int],
    forwards: int,
    memory: str | int | None = None,
    vae_tiling: str | tuple[int, int] | None = None,
    step_cache: bool = False,
    videos: int | None = None,
    kept: bool = False,
) -> Plan:
    """The fastest plan within a budget, or, if there is none, the one that needs least.

    Args:
        nets: the model.
        title: names the model and the video.
        latent_shape: (t, h, w), reference images included.
        forwards: of the transformer, in the whole run.
        memory: as for `parse_memory`.
        vae_tiling: as for `parse_tiling`.
        step_cache: whether a step cache keeps residuals.
        videos: how many videos are encoded; None: one if the model needs it.
        kept: whether transformer and VAE stay loaded from one video to the next.
    """
    asked = parse_memory(memory)
    budget = available_memory() if asked is None else asked
    room = FILL * budget
    tiling, c = parse_tiling(vae_tiling, nets.geometry), nets.transformer
    itemsize = 4  # of the VAE
    vae_weights = kept * peaks.vae_weights(nets.vae, itemsize)

    def loaded(stream: bool) -> int:
        return sum(peaks.load_transformer(expert.weights, stream) for expert in nets.experts)

    def denoise(step: tuple[bool, int]) -> int:
        beside = kept * (loaded(step[0]) - peaks.load_transformer(nets.weights, step[0]))  # the other experts
        return peaks.denoise(nets, latent_shape, *step, step_cache) + beside + vae_weights

    stream, tokens_at_once = next((step for step in LADDER if denoise(step) <= room), min(LADDER, key=denoise))
    held = kept * loaded(stream)
    tile_for = {}
    for name, peak in (("decode", peaks.decode), ("encode", peaks.encode)):
        tiles: list[tuple[int, int] | None] = [None]
        if tiling != "off":
            tiles = list(tile_choices(latent_shape, nets.geometry)) if isinstance(tiling, str) else [tiling]

        def needs(tile, peak=peak) -> int:
            return peak(nets.vae, latent_shape, tile, itemsize) + held

        tile_for[name] = next((tile for tile in tiles if needs(tile) <= room), min(tiles, key=needs))
    if videos is None:
        videos = {"t2v": 0, "vace": 2}.get(c.model_type, 1)
    rows = [Row("encode text", "blocks streamed", peaks.encode_text(nets, TEXT_TOKENS) + held,
                2 * work.text_flop(nets.text_encoder.config, TEXT_TOKENS),
                nets.text_encoder.weights.stored_blocks)]  # fmt: skip
    if c.has_image_branch:
        images = work.image_tokens(c) // work.IMAGE_TOKENS
        rows.append(Row("encode images", "resident", peaks.encode_images(nets) + held,
                        images * work.image_flop(nets.image_encoder), peaks.encode_images(nets) // 2))  # fmt: skip
    vae_bytes = peaks.vae_weights(nets.vae, 4)
    if videos:
        tile = tile_for["encode"]
        flop = videos * work.encode_flop(nets.vae, latent_shape) * peaks.tile_work(nets.vae, latent_shape, tile, False)
        peak = peaks.encode(nets.vae, latent_shape, tile, itemsize) + held
        rows.append(Row("encode video", _tiled(tile), peak, flop, vae_bytes))
    parts = {name: forwards * flop for name, flop in work.forward_parts(c, nets.geometry.seq_len(latent_shape)).items()}
    times = -(-forwards // len(nets.experts)) if stream else 1
    reads = sum(w.stored_outside + times * w.stored_blocks for w in (expert.weights for expert in nets.experts))
    pieces = f", {tokens_at_once} tokens at once" * (tokens_at_once != TOKENS_AT_ONCE)
    how = ("blocks streamed" if stream else "resident") + pieces
    row = Row("denoise", how, denoise((stream, tokens_at_once)), sum(parts.values()), reads, parts["self attention"])
    rows.append(row)
    tile = tile_for["decode"]
    flop = work.decode_flop(nets.vae, latent_shape) * peaks.tile_work(nets.vae, latent_shape, tile, True)
    peak = peaks.decode(nets.vae, latent_shape, tile, itemsize) + held
    rows.append(Row("decode", _tiled(tile), peak, flop, vae_bytes))
    return Plan(title, budget, asked is not None, stream, tokens_at_once, tile_for["decode"], tile_for["encode"],
                tuple(rows))  # fmt: skip


def tile_choices(latent_shape: tuple[int, int, int], geometry: Geometry = WAN_2_1) -> list[tuple[int, int] | None]:
    """Whole frames first, then tiles (width, height) in pixels from large to small; smaller tiles have more margins."""
    (_, h, w), each = latent_shape, geometry.spatial
    found: list[tuple[int, int] | None] = [None]
    for count in range(2, 1 + (each * h // SMALLEST_TILE or 1) * (each * w // SMALLEST_TILE or 1)):
        grids = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
        tiles = [(each * -(-w // columns), each * -(-h // rows)) for rows, columns in grids]
        tiles = [tile for tile in tiles if min(tile) >= SMALLEST_TILE]
        if tiles:
            found.append(min(tiles, key=sum))  # the squarest tile has the least margin
    return found


def _tiled(tile: tuple[int, int] | None) -> str:
    return "whole frames" if tile is None else f"tiles of {tile[0]}x{tile[1]}"


def plan(
    model: str | Path,
    width: int | None = None,
    height: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    memory: str | int | None = None,
    *,
    dtype: str = "bfloat16",
    quantize: str | None = None,
    guidance_scale: float | None = None,
    vae_tiling: str | tuple[int, int] | None = None,
    measure: bool = False,
) -> Plan:
    """Plan a video in a memory budget: whether it fits, and how. Downloads nothing and reads no weights.

    Args:
        model: a preset's name, a published model's hub id, or a local model (whose own sizes are used).
        width, height, num_frames, steps, guidance_scale: None takes the model's defaults.
        memory: the limit for MLX, such as "8GB"; None or "auto" takes this machine's free memory.
        dtype, quantize, vae_tiling: as for `WanPipeline.from_pretrained`.
        measure: give times too, if it fits: parts of the networks are timed for some seconds (`planning.speed`).

    Returns:
        The `Plan`; print it for a table. `Plan.fits` says whether it fits, `Plan.advice` which changes would help.

    Raises:
        ValueError: an argument is wrong, or the model is on a hub and not one of `PRESETS`.
    """
    parse_memory(memory), parse_tiling(vae_tiling)
    preset, checkpoint = find_model(model)
    sizes = lru_cache(partial(sizes_of, checkpoint or preset, dtype))
    geometry = sizes(quantize).geometry
    width, height = width or preset.size[0], height or preset.size[1]
    frames = preset.num_frames if num_frames is None else num_frames
    geometry.check_size(width, height)
    geometry.check_frames(frames)
    defaults = preset.sampling_for(width, height)
    steps = defaults.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    guidance = defaults.guidance_scale if guidance_scale is None else guidance_scale
    wanted = Wanted(width, height, frames, steps, passes=1 if guidance == 1 else 2)
    parameters = None if checkpoint is None else partial(parameters_of, checkpoint)
    return best(wanted, preset.name, sizes, quantize, memory, vae_tiling, measure=measure, parameters=parameters)


def plan_request(
    request: Request,
    name: str,
    sizes: Callable[[str | None], Networks],
    quantize: str | None = None,
    memory: str | int | None = None,
    vae_tiling: str | tuple[int, int] | None = None,
    kept: bool = False,
    parameters: Callable[[mx.Dtype, str | None], Parameters] | None = None,
) -> Plan:
    """The plan of a request: which networks are resident, streamed or tiled, and each stage's peak.

    Args:
        request: of the model.
        name, sizes, quantize, memory, vae_tiling, kept: as for `best`.
        parameters: given, the plan has times too.
    """
    wanted = Wanted(
        request.width, request.height, request.num_frames, request.steps_made,
        passes=1 if request.guidance_scale == 1 else 2,
        references=len(request.src_ref_images),
        step_cache=request.cache not in (None, "none"),
        videos=None if request.video is None else 1,
    )  # fmt: skip
    return best(wanted, name, sizes, quantize, memory, vae_tiling, kept, parameters is not None, parameters)


@dataclass(frozen=True)
class Wanted:
    """The video that a plan is for.

    Attributes:
        width, height, num_frames: its size.
        steps, passes: number of steps, and of forwards in each.
        references: number of reference images; each is one more latent frame.
        step_cache: whether there is a step cache.
        videos: how many videos are encoded; None: the number that this kind of model needs.
    """

    width: int
    height: int
    num_frames: int
    steps: int
    passes: int
    references: int = 0
    step_cache: bool = False
    videos: int | None = None

    def latent_shape(self, geometry: Geometry) -> tuple[int, int, int]:
        """(t, h, w) of the latents to denoise."""
        t, h, w = geometry.latent_shape(self.width, self.height, self.num_frames)
        return t + self.references, h, w


def best(
    wanted: Wanted,
    name: str,
    sizes: Callable[[str | None], Networks],
    quantize: str | None = None,
    memory: str | int | None = None,
    vae_tiling: str | tuple[int, int] | None = None,
    kept: bool = False,
    measure: bool = False,
    parameters: Callable[[mx.Dtype, str | None], Parameters] | None = None,
) -> Plan:
    """The plan for a video, with advice if it does not fit.

    Args:
        wanted: the video.
        name: of the model, for the title.
        sizes: quantisation → the model's networks.
        quantize, memory, vae_tiling: as for `WanPipeline.from_pretrained`.
        kept: whether transformer and VAE stay loaded from one video to the next.
        measure: give times too, if it fits: parts of the networks are timed for some seconds.
        parameters: (dtype, quantisation) → the transformer's, if its weights are local: then reading is timed too.
    """

    def choice(wanted: Wanted = wanted, quantize: str | None = quantize, memory: str | int | None = memory) -> Plan:
        nets = sizes(quantize)
        return choose(
            nets,
            f"{name} {wanted.width}x{wanted.height}, {wanted.num_frames} frames",
            wanted.latent_shape(nets.geometry),
            wanted.passes * wanted.steps,
            memory,
            vae_tiling,
            wanted.step_cache,
            wanted.videos,
            kept,
        )

    nets = sizes(quantize)
    found = with_advice(choice(), choice, wanted, nets.geometry, quantize)
    if measure:
        reading = parameters and parameters(nets.dtype, quantize)
        found = timed(found, nets, wanted.latent_shape(nets.geometry), wanted.passes, reading)
    return found


def with_advice(
    plan: Plan, choice: Callable[..., Plan], wanted: Wanted, geometry: Geometry, quantize: str | None
) -> Plan:
    """The plan; if it does not fit, with options that would help, each alone.

    Args:
        plan: as requested.
        choice: makes a plan with one change: the video, quantize or memory.
        wanted, quantize: as requested.
        geometry: the model's.
    """
    if plan.fits:
        return plan
    found = []
    if quantize is None:
        for mode in ("q8", "q4"):
            try:
                if choice(quantize=mode).fits:
                    found.append(f"--quantize {mode}")
                    break
            except ValueError:  # the sizes are not valid for this model, or it is quantised already
                break
    for share in (0.75, 0.65, 0.5, 0.35):
        width, height = (geometry.nearest_side(round(side * share)) for side in (wanted.width, wanted.height))
        if choice(replace(wanted, width=width, height=height)).fits:
            found.append(f"--size {width}x{height}")
            break
    for fewer in map(geometry.nearest_frames, (61, 49, 33, 17, 5, 1)):
        if fewer < wanted.num_frames and choice(replace(wanted, num_frames=fewer)).fits:
            found.append(f"--frames {fewer}")
            break
    if plan.chosen:
        least = choice(memory=10**8).peak / FILL
        found.append(f"--memory {least / 1e9 + 0.05:.1f}GB")
    return replace(plan, advice=tuple(found))


def find_model(model: str | Path) -> tuple[Preset, Checkpoint | None]:
    """The preset of ``model`` and, if the model is local, its `Checkpoint`.

    Raises:
        ValueError: the model is on a hub, and its sizes are not known.
    """
    if not is_cached(model):
        preset = PRESETS.get(str(model)) or preset_of(model)
        if preset is None and not Path(model).expanduser().exists():
            raise ValueError(f"the sizes of {model} are not known before it is here; known: {', '.join(PRESETS)}")
        if preset is not None:
            return preset, None
    checkpoint = open_checkpoint(resolve(model))
    return find_preset(checkpoint.model) if checkpoint.model else preset_for(config_of(checkpoint)), checkpoint
