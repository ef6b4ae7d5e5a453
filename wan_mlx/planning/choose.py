"""The planner: the fastest `Plan` within a memory budget.

It works from sizes alone (`planning.sizes`, `planning.peak_memory`, `planning.flops`), so it runs before any download.
The budget is for MLX; Python, its packages and the finished frames take about a gigabyte on top.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from ..geometry import WAN_2_1, Geometry
from ..hub.resolve import is_cached, preset_of, resolve
from ..lasting import computes
from ..models.execution import TOKENS_AT_ONCE
from ..models.vae_tiling import SMALLEST_TILE
from ..options import named
from ..presets import EXPERTS, PRESETS, Preset, find_preset, preset_for
from ..request_builder import size_of
from ..types import Request
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.load import config_of, parameters_of
from ..weights.parameters import Parameters
from . import flops as work
from . import peak_memory as peaks
from . import speed
from .machine import available_memory, parse_memory
from .plan import FILL, Plan, Row
from .sizes import Networks, WeightBytes, sizes_of

T = TypeVar("T")
# Choices to try, from the fastest to the smallest: transformer resident or streamed, and the number of tokens at once.
_PIECES = sorted({TOKENS_AT_ONCE, 8192, 4096, 2048}, reverse=True)
LADDER = [*((False, pieces) for pieces in _PIECES), *((True, pieces) for pieces in _PIECES), (True, 1024)]
MANY_TILES = 256  # above so many in a frame not every number of them is tried
# In a prompt; umT5 reads at most 512, and the default negative prompt has about as many as this.
TEXT_TOKENS = 128


@dataclass(frozen=True)
class Wanted:
    """The video that a plan is for, and how its model is opened.

    Attributes:
        name: of the model, for the title.
        request: the video; its text does not matter.
        quantize, memory, vae_tiling: as for `WanPipeline.from_pretrained`.
        kept: whether transformer and VAE stay loaded from one video to the next.
    """

    name: str
    request: Request
    quantize: str | None = None
    memory: str | int | None = None
    vae_tiling: str | tuple[int, int] | None = None
    kept: bool = False

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(t, h, w) of the latents to denoise; each reference image is one more latent frame."""
        t, h, w = self.request.latent_shape
        return t + len(self.request.src_ref_images), h, w


@computes
def plan(
    model: str | Path,
    width: int | None = None,
    height: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    memory: str | int | None = None,
    *,
    size: str | tuple[int, int] | None = None,
    dtype: str = "bfloat16",
    quantize: str | int | None = None,
    guidance_scale: float | tuple[float, float] | None = None,
    vae_tiling: str | tuple[int, int] | None = None,
    quantize_high: str | int | None = None,
    quantize_low: str | int | None = None,
    parts: Mapping[str, str | Path | None] | None = None,
    measure: bool = False,
) -> Plan:
    """Plan a video in a memory budget: whether it fits, and how. Downloads nothing and reads no weights.

    Args:
        model: a preset's name, a published model's hub id, or a local model (whose own sizes are used).
        width, height, num_frames, steps, guidance_scale: None takes the model's defaults.
        size: instead of width and height, as for a call of a pipeline: "16:9", "480p", "832x480".
        memory: the limit for MLX, such as "8GB"; None or "auto" takes this machine's free memory.
        dtype, quantize, vae_tiling, quantize_high, quantize_low: as for `WanPipeline.from_pretrained`.
        parts: name in `presets.GIVEN_APART` → a file or folder used in place of the part of ``model``, both on this
            machine.
        measure: give times too, if it fits: parts of the networks are timed for some seconds (`planning.speed`).

    Returns:
        The `Plan`; print it for a table. `Plan.fits` says whether it fits, `Plan.advice` which changes would help.

    Raises:
        ValueError: an argument is wrong, or the model is on a hub and not one of `PRESETS`.
        WeightsError: a local model is not whole, or its parts are not of one model.
    """
    parse_memory(memory), parse_tiling(vae_tiling)
    quantize = named("quantize").meaning(quantize)
    own = tuple(named("quantize").meaning(mode) for mode in (quantize_high, quantize_low))
    preset, checkpoint = find_model(model, parts)
    sizes = lru_cache(partial(sizes_of, checkpoint or preset, dtype, own=own))
    geometry = sizes(quantize).geometry
    width, height = size_of(preset, geometry, named("size").meaning(size), width, height)
    frames = preset.num_frames if num_frames is None else num_frames
    geometry.check_size(width, height)
    geometry.check_frames(frames)
    defaults = preset.sampling_for(width, height)
    steps = defaults.steps if steps is None else steps
    named("steps").check(steps)
    guidance = defaults.guidance_scale if guidance_scale is None else guidance_scale
    sampling = (steps, guidance, defaults.shift, "unipc")
    request = Request("", "", width, height, frames, *sampling, seed=0, geometry=geometry)
    wanted = Wanted(preset.name, request, quantize, memory, vae_tiling)
    return plan_video(wanted, sizes, measure, None if checkpoint is None else partial(parameters_of, checkpoint))


def plan_video(
    wanted: Wanted,
    sizes: Callable[[str | None], Networks],
    measure: bool = False,
    parameters: Callable[[mx.Dtype, str | None], Parameters] | None = None,
) -> Plan:
    """The plan of a video: with advice if it does not fit, or with times if asked for.

    Args:
        wanted: the video.
        sizes: quantisation → the model's networks.
        measure: give times: parts of the networks are timed for some seconds.
        parameters: (dtype, quantisation) → the transformer's, if its weights are local: then reading is timed too.
    """
    nets = sizes(wanted.quantize)
    found = choose(nets, wanted)
    if not found.fits:  # the timed code might not fit either
        return replace(found, advice=tuple(_advice(found, wanted, sizes)))
    if measure:
        reading = parameters and parameters(nets.dtype, wanted.quantize)
        rates = speed.measure_rates(found, nets, wanted.latent_shape, wanted.request.passes, reading)
        found = speed.with_seconds(found, rates)
    return found


def choose(nets: Networks, wanted: Wanted) -> Plan:
    """The fastest plan within the budget, or, if there is none, the one that needs least."""
    asked = parse_memory(wanted.memory)
    budget = available_memory() if asked is None else asked
    request, shape = wanted.request, wanted.latent_shape
    c, experts, vae_weights = nets.transformer, [e.weights for e in nets.experts], peaks.vae_weights(nets.vae)

    def stays(stream: bool, all_stay: bool) -> int:
        """Bytes of the transformers that stay from one video to the next."""
        return wanted.kept * (sum if all_stay else max)(_loaded(weights, stream) for weights in experts)

    def denoise(step: tuple[bool, int], all_stay: bool = True) -> int:
        kept = wanted.kept * (stays(step[0], all_stay) - _loaded(nets.weights, step[0]) + vae_weights)
        return peaks.denoise(nets, shape, *step, request.cache != "none") + kept

    def denoise_alone(step: tuple[bool, int]) -> int:
        return denoise(step, all_stay=False)

    step, all_stay = _first_within(FILL * budget, LADDER, denoise), True
    if wanted.kept and step[0] and len(experts) > 1:  # better than streaming: of two experts the one at work
        alone = _first_within(FILL * budget, LADDER, denoise_alone)
        if not alone[0]:
            step, all_stay = alone, False
    stream, tokens_at_once = step
    held = stays(stream, all_stay)

    def vae(stage: str, videos: int, shape: tuple[int, int, int], decoding: bool) -> tuple[tuple[int, int] | None, Row]:
        """The tile, and the stage."""

        def peak(tile: tuple[int, int] | None) -> int:
            return peaks.vae(nets.vae, shape, tile, decoding) + held

        tiling = parse_tiling(wanted.vae_tiling, nets.geometry)
        tiles = tile_choices(shape, nets.geometry) if isinstance(tiling, str) else [tiling]
        tile = _first_within(FILL * budget, tiles[:1] if tiling == "off" else tiles, peak)
        flop = videos * work.vae_flop(nets.vae, shape, decoding) * peaks.tile_work(nets.vae, shape, tile, decoding)
        how = "whole frames" if tile is None else f"tiles of {tile[0]}x{tile[1]}"
        return tile, Row(stage, how, peak(tile), flop, vae_weights)

    rows = [Row("encode text", "streamed", peaks.encode_text(nets, TEXT_TOKENS) + held,
                2 * work.text_flop(nets.text_encoder.config, TEXT_TOKENS),
                nets.text_encoder.weights.stored_blocks)]  # fmt: skip
    if c.has_image_branch:
        images = work.image_tokens(c) // work.IMAGE_TOKENS
        rows.append(Row("encode images", "resident", peaks.encode_images(nets) + held,
                        images * work.image_flop(nets.image_encoder), peaks.encode_images(nets) // 2))  # fmt: skip
    videos = 1 if request.video is not None else {"t2v": 0, "ti2v": 0, "vace": 2}.get(c.model_type, 1)
    encoded = shape
    if c.model_type == "ti2v" and request.image is not None:
        videos, encoded = 1, (1, *shape[1:])
    encode_tile, row = vae("encode video", videos, encoded, decoding=False)
    rows += [row] if videos else []
    forwards = request.steps_made * request.passes
    parts = {name: forwards * flop for name, flop in work.forward_parts(c, nets.geometry.seq_len(shape)).items()}
    times = -(-forwards // len(experts)) if stream else 1
    reads = sum(weights.stored_outside + times * weights.stored_blocks for weights in experts)
    how = "streamed" if stream else "resident"
    how += f", {tokens_at_once} tokens" * (tokens_at_once != TOKENS_AT_ONCE)
    rows.append(Row("denoise", how, denoise(step, all_stay), sum(parts.values()), reads, parts["self attention"]))
    decode_tile, row = vae("decode", 1, shape, decoding=True)
    rows.append(row)
    title = f"{wanted.name} {request.width}x{request.height}, {request.num_frames} frames"
    chosen = asked is not None
    return Plan(title, budget, chosen, stream, tokens_at_once, decode_tile, encode_tile, tuple(rows), all_stay=all_stay)


def parse_tiling(text: str | tuple[int, int] | None, geometry: Geometry = WAN_2_1) -> str | tuple[int, int]:
    """``--vae-tiling``: "auto", "off", or the largest tile in pixels as "WxH" or (width, height).

    Raises:
        ValueError: another form, or a side that is too small or no multiple of the pixels per latent.
    """
    if text is None or text in ("auto", "off"):
        return text or "auto"
    if isinstance(text, str):
        match = re.fullmatch(r"(\d+)(?:[x*×](\d+))?", text.strip().lower())
        sides = (int(match[1]), int(match[2] or match[1])) if match else ()
    else:
        sides = text
    if len(sides) != 2:
        raise ValueError(f"vae_tiling is {text!r}, expected auto, off, or a tile's size in pixels such as 384x256")
    for side in sides:
        if side < SMALLEST_TILE or side % geometry.spatial:
            nearest = max(SMALLEST_TILE, round(side / geometry.spatial) * geometry.spatial)
            raise ValueError(
                f"vae_tiling is {text!r}, expected multiples of {geometry.spatial} from {SMALLEST_TILE} pixels; "
                f"nearest to {side}: {nearest}"
            )
    width, height = sides
    return width, height


def _loaded(weights: WeightBytes, stream: bool) -> int:
    """Bytes of a transformer's weights that stay in memory."""
    return weights.outside if stream else weights.all


def _first_within(room: float, choices: Sequence[T], peak: Callable[[T], int]) -> T:
    """The first choice whose peak is within ``room``; if there is none, that with the lowest."""
    for choice in choices:
        if peak(choice) <= room:
            return choice
    return min(choices, key=peak)


@lru_cache
def tile_choices(latent_shape: tuple[int, int, int], geometry: Geometry = WAN_2_1) -> list[tuple[int, int] | None]:
    """Whole frames first, then tiles (width, height) in pixels from large to small; smaller tiles have more margins."""
    (_, h, w), each = latent_shape, geometry.spatial
    found: list[tuple[int, int] | None] = [None]
    count, most = 2, (each * h // SMALLEST_TILE or 1) * (each * w // SMALLEST_TILE or 1)
    while count <= most:
        grids = [(rows, count // rows) for rows in range(1, min(count, h) + 1) if count % rows == 0]
        tiles = [(each * -(-w // columns), each * -(-h // rows)) for rows, columns in grids]
        tiles = [tile for tile in tiles if min(tile) >= SMALLEST_TILE]
        if tiles:
            found.append(min(tiles, key=sum))  # the squarest tile has the least margin
        count += 1 if count < MANY_TILES else count // 8
    return found


def _advice(plan: Plan, wanted: Wanted, sizes: Callable[[str | None], Networks]) -> Iterator[str]:
    """Options that would make a plan fit, each alone."""
    request, geometry = wanted.request, wanted.request.geometry

    def fits(changed: Wanted) -> bool:
        try:
            return choose(sizes(changed.quantize), changed).fits
        except ValueError:  # this mode is not valid for this model, or it is quantised already
            return False

    def with_request(**change: int) -> Wanted:
        return replace(wanted, request=replace(request, **change))  # type: ignore[arg-type]

    smaller = [[geometry.nearest_side(round(side * share)) for side in (request.width, request.height)]
               for share in (0.75, 0.65, 0.5, 0.35)]  # fmt: skip
    fewer = [n for n in map(geometry.nearest_frames, (61, 49, 33, 17, 5, 1)) if n < request.num_frames]
    changes = [
        [(f"--quantize {mode}", replace(wanted, quantize=mode)) for mode in ("q8", "q4") if wanted.quantize is None],
        [(f"--size {width}x{height}", with_request(width=width, height=height)) for width, height in smaller],
        [(f"--frames {frames}", with_request(num_frames=frames)) for frames in fewer],
    ]
    for choices in changes:
        if option := next((option for option, changed in choices if fits(changed)), None):
            yield option
    if plan.chosen:
        least = choose(sizes(wanted.quantize), replace(wanted, memory=10**8)).peak
        yield f"--memory {least / FILL / 1e9 + 0.05:.1f}GB"


def find_model(
    model: str | Path, parts: Mapping[str, str | Path | None] | None = None
) -> tuple[Preset, Checkpoint | None]:
    """The preset of ``model`` and, if the model is local, its `Checkpoint`; ``parts``: as `plan` takes them.

    Raises:
        ValueError: the model is on a hub, and its sizes are not known; or parts are given, and not all is here.
    """
    given = {name: place for name, place in (parts or {}).items() if place is not None}
    if away := [place for place in (model, *given.values()) if not is_cached(place)]:
        preset = None if {*EXPERTS} & {*given} else PRESETS.get(str(model)) or preset_of(model)
        if preset is not None:
            return preset, None
        if given:
            raise ValueError(f"{away[0]} is not on this machine, and the plan of a model whose parts are given apart "
                             "is made from their files")  # fmt: skip
        if not Path(model).expanduser().exists():
            raise ValueError(f"the sizes of {model} are not known before it is here; known: {', '.join(PRESETS)}")
    checkpoint = open_checkpoint(resolve(model), {name: resolve(place) for name, place in given.items()})
    if checkpoint.model:
        return find_preset(checkpoint.model), checkpoint
    return preset_for(config_of(checkpoint), len(checkpoint.of_kind("transformer"))), checkpoint
