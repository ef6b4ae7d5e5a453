"""What fits: a budget of memory → a `Plan` of what is resident, streamed or tiled, with each stage's peak and time.

Made from sizes alone (`planning.peak_memory`, `planning.flops`), so it is there before any download. The budget is
what MLX may hold; Python, its packages and the finished frames come on top, a gigabyte or so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import MemoryPlanError
from ..geometry import WAN_2_1, Geometry
from ..models.configs import ImageEncoderConfig
from ..models.execution import TOKENS_AT_ONCE
from ..models.vae_tiling import SMALLEST_TILE, parse_tiling
from ..presets import Preset
from ..types import Request
from . import flops as work
from . import peak_memory as peaks
from .machine import available_memory, parse_memory
from .peak_memory import Networks

log = logging.getLogger(__name__)

GIB = 2**30
# Predictions are within a tenth of what was measured, above or below (docs/memory.md); a budget is filled up to here.
FILL = 0.96
# Transformer resident or streamed, and how many tokens at once, from the fastest to the smallest.
_PIECES = sorted({TOKENS_AT_ONCE, 8192, 4096, 2048}, reverse=True)
LADDER = [*((False, pieces) for pieces in _PIECES), *((True, pieces) for pieces in _PIECES), (True, 1024)]
# Of a prompt; umT5 reads at most 512, and the default negative prompt has about as many.
TEXT_TOKENS = 128


@dataclass(frozen=True)
class Row:
    """One stage of a plan.

    ``how`` says what is resident, streamed or tiled; ``peak`` and ``reads`` are bytes, ``flop`` floating-point
    operations and ``attention`` those of them that are self-attention, ``seconds`` None where no rate was measured.
    """

    stage: str
    how: str
    peak: int
    flop: float
    reads: int
    attention: float = 0.0
    seconds: float | None = None


def duration(seconds: float) -> str:
    """As people read it: "8.1 s", "12:05" (minutes), "3:20:00" (hours)."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def number(value: float) -> str:
    """Three or four digits that matter, never an exponent: "0.508", "264.1", "652,300"."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Plan:
    """How a run keeps within its memory. Printed, it is a table.

    Attributes:
        title: model and video.
        budget: bytes that MLX may hold; ``chosen`` tells whether they were asked for or found.
        stream: whether the transformer's blocks are read at every pass instead of being resident.
        tokens_at_once: size of the pieces in which tokens are computed where they are independent.
        decode_tile, encode_tile: the VAE's tiles (width, height) in pixels; None for whole frames.
        rows: the stages in order.
        advice: what would fit, if this does not.
    """

    title: str
    budget: int
    chosen: bool
    stream: bool
    tokens_at_once: int
    decode_tile: tuple[int, int] | None
    encode_tile: tuple[int, int] | None
    rows: tuple[Row, ...]
    advice: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes of the stage that takes most."""
        return max(row.peak for row in self.rows)

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None where no rate was measured."""
        seconds = [row.seconds for row in self.rows]
        return None if None in seconds else sum(seconds)

    @property
    def fits(self) -> bool:
        return self.peak <= FILL * self.budget

    @property
    def cache_limit(self) -> int:
        """Bytes of freed memory that MLX may keep for reuse."""
        return max(100_000_000, self.budget - self.peak)

    @property
    def how(self) -> dict[str, Any]:
        """The choices that may tell in the last bits of a video, and the peak that goes with them, as JSON has them."""
        names = ("stream", "tokens_at_once", "decode_tile", "encode_tile", "peak")
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in names}

    def as_begun(self, how: Mapping[str, Any]) -> Plan:
        """This plan with the choices of the run that goes on, so that it does so bit for bit, if they still fit."""
        if not how or how == self.how:
            return self
        if how["peak"] > FILL * self.budget:
            log.warning("there is less memory than when the run began: it goes on in smaller pieces, and the last bits "
                        "may differ")  # fmt: skip
            return self
        choices = {name: tuple(value) if isinstance(value, list) else value for name, value in how.items()}
        del choices["peak"]
        return replace(self, **choices)

    def check(self) -> None:
        """Raise MemoryPlanError, saying what would fit, if this does not."""
        if not self.fits:
            worst = max(self.rows, key=lambda row: row.peak)
            options = "; ".join(self.advice) or "no option makes it fit"
            raise MemoryPlanError(
                f"{self.title} needs about {number(self.peak / GIB)} GiB to {worst.stage}, but plans fill at most "
                f"{number(FILL * self.budget / GIB)} of the {number(self.budget / GIB)} GiB that are "
                f"{'allowed' if self.chosen else 'free'}: {options}"
            )

    def __str__(self) -> str:
        timed = self.seconds is not None
        lines = [
            f"{self.title}, within {number(self.budget / GIB)} GiB {'as asked' if self.chosen else 'of this machine'}",
            f"{'stage':<14}{'how':<42}{'peak GiB':>9}{'TFLOP':>11}{'reads GB':>10}" + f"{'time':>13}" * timed,
        ]
        for row in self.rows:
            seconds = f"{duration(row.seconds):>13}" if timed else ""
            numbers = f"{row.peak / GIB:>9.2f}{number(row.flop / 1e12):>11}{number(row.reads / 1e9):>10}{seconds}"
            lines.append(f"{row.stage:<14}{row.how:<42}{numbers}")
        total = f"{duration(self.seconds):>13}" if timed else ""
        lines.append(
            f"{'whole run':<56}{self.peak / GIB:>9.2f}{number(sum(row.flop for row in self.rows) / 1e12):>11}"
            f"{number(sum(row.reads for row in self.rows) / 1e9):>10}{total}"
        )
        options = "; ".join(self.advice) or "nothing"
        lines.append("it fits" if self.fits else f"it does not fit; what would: {options}")
        return "\n".join(lines)


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
        title: what to call it and the video.
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

    def denoise(step) -> int:
        return peaks.denoise(nets, latent_shape, *step, step_cache) + vae_weights

    stream, tokens_at_once = next((step for step in LADDER if denoise(step) <= room), min(LADDER, key=denoise))
    held = kept * peaks.load_transformer(nets, stream)
    tile_for = {}
    for name, peak in (("decode", peaks.decode), ("encode", peaks.encode)):
        tiles = {"off": [None], "auto": tile_choices(latent_shape, nets.geometry)}.get(tiling, [tiling])

        def needs(tile, peak=peak) -> int:
            return peak(nets.vae, latent_shape, tile, itemsize) + held

        tile_for[name] = next((tile for tile in tiles if needs(tile) <= room), min(tiles, key=needs))
    if videos is None:
        videos = {"t2v": 0, "vace": 2}.get(c.model_type, 1)
    rows = [Row("encode text", "blocks streamed", peaks.encode_text(nets, TEXT_TOKENS) + held,
                2 * work.text_flop(nets.text_encoder, TEXT_TOKENS), nets.text_stored)]  # fmt: skip
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
    w = nets.weights
    reads = w.stored_outside + w.stored_blocks * (forwards if stream else 1)
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
    """Whole frames, then tiles (width, height) in pixels from large to small: the more, the more margins."""
    (_, h, w), each = latent_shape, geometry.spatial
    found: list[tuple[int, int] | None] = [None]
    for count in range(2, 1 + (each * h // SMALLEST_TILE or 1) * (each * w // SMALLEST_TILE or 1)):
        grids = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
        tiles = [(each * -(-w // columns), each * -(-h // rows)) for rows, columns in grids]
        tiles = [tile for tile in tiles if min(tile) >= SMALLEST_TILE]
        if tiles:
            found.append(min(tiles, key=sum))  # the squarest has the least margin
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
    """Whether a video can be made in this memory, and how; nothing is downloaded, no weights are read.

    Args:
        model: a preset's name, a published model's hub id, or a model on this machine (whose own sizes are taken).
        width, height, num_frames, steps, guidance_scale: None takes the model's defaults.
        memory: what MLX may hold, such as "8GB"; None or "auto" what this machine has to spare.
        dtype, quantize, vae_tiling: as for `WanPipeline.from_pretrained`.
        measure: give times too, if it fits: for some seconds parts of the networks are timed (`planning.speed`).

    Returns:
        The `Plan`; print it for a table. `Plan.fits` tells whether, `Plan.advice` what would.

    Raises:
        ValueError: an argument is wrong, or the model is on a hub and not one of `PRESETS`.
    """
    from ..weights.checkpoint import Checkpoint

    parse_memory(memory), parse_tiling(vae_tiling)
    preset, checkpoint = find_model(model)
    nets = networks(checkpoint if isinstance(checkpoint, Checkpoint) else preset, dtype, quantize)
    width, height = width or preset.size[0], height or preset.size[1]
    nets.geometry.check_size(width, height)
    frames = preset.num_frames if num_frames is None else num_frames
    nets.geometry.check_frames(frames)
    defaults = preset.sampling_for(width, height)
    guidance = defaults.guidance_scale if guidance_scale is None else guidance_scale
    passes = 1 if guidance == 1 else 2
    forwards = (defaults.steps if steps is None else steps) * passes
    if forwards < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")

    packed = {quantize: nets}

    def choice(width=width, height=height, frames=frames, quantize=quantize, memory=memory) -> Plan:
        if quantize not in packed:
            packed[quantize] = networks(checkpoint or preset, dtype, quantize)
        title = f"{preset.name} {width}x{height}, {frames} frames"
        shape = nets.geometry.latent_shape(width, height, frames)
        return choose(packed[quantize], title, shape, forwards, memory, vae_tiling)

    found = with_advice(choice(), choice, nets.geometry, (width, height), frames, quantize)
    if measure:
        from ..weights.load import parameters_of
        from .speed import timed

        parameters = checkpoint and parameters_of(checkpoint, nets.dtype, quantize)
        found = timed(found, nets, nets.geometry.latent_shape(width, height, frames), passes, parameters)
    return found


def plan_request(
    request: Request,
    name: str,
    sizes: Callable[[str | None], Networks],
    quantize: str | None = None,
    memory: str | int | None = None,
    vae_tiling: str | tuple[int, int] | None = None,
    kept: bool = False,
    parameters: Callable[[mx.Dtype, str | None], Any] | None = None,
) -> Plan:
    """How a request keeps within the memory there is: what is resident, streamed or tiled, and its peaks.

    Args:
        name: what to call the model.
        sizes: quantisation → the model's networks.
        quantize, memory, vae_tiling: as for `WanPipeline.from_pretrained`.
        kept: whether transformer and VAE stay loaded from one video to the next.
        parameters: (dtype, quantisation) → the transformer's parameters; given, parts of the networks are timed for
            some seconds, and the plan has times too.
    """
    from .speed import timed

    passes = 1 if request.guidance_scale == 1 else 2
    size, frames = (request.width, request.height), request.num_frames

    def shape(width: int, height: int, frames: int) -> tuple[int, int, int]:
        t, h, w = request.geometry.latent_shape(width, height, frames)
        return t + len(request.src_ref_images), h, w

    def choice(
        width=request.width, height=request.height, frames=frames, quantize=quantize, memory=memory
    ) -> Plan:
        return choose(
            sizes(quantize),
            f"{name} {width}x{height}, {frames} frames",
            shape(width, height, frames),
            passes * request.steps_made,
            memory,
            vae_tiling,
            step_cache=request.cache not in (None, "none"),
            videos=None if request.video is None else 1,
            kept=kept,
        )

    found = with_advice(choice(), choice, request.geometry, size, frames, quantize)
    if parameters is not None:
        nets = sizes(quantize)
        found = timed(found, nets, shape(*size, frames), passes, parameters(nets.dtype, quantize))
    return found


def with_advice(
    plan: Plan,
    choice: Callable[..., Plan],
    geometry: Geometry,
    size: tuple[int, int],
    frames: int,
    quantize: str | None,
) -> Plan:
    """The plan and, if it does not fit, options that would, each alone.

    Args:
        plan: as asked for.
        choice: makes a plan with what is changed: width and height, frames, quantize or memory.
        geometry: the model's.
        size, frames, quantize: what was asked for.
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
            except ValueError:  # its sizes do not suit, or it is packed already
                break
    for share in (0.75, 0.65, 0.5, 0.35):
        width, height = (geometry.nearest_side(round(side * share)) for side in size)
        if choice(width=width, height=height).fits:
            found.append(f"--size {width}x{height}")
            break
    for fewer in map(geometry.nearest_frames, (61, 49, 33, 17, 5, 1)):
        if fewer < frames and choice(frames=fewer).fits:
            found.append(f"--frames {fewer}")
            break
    if plan.chosen:
        least = choice(memory=10**8).peak / FILL
        found.append(f"--memory {least / 1e9 + 0.05:.1f}GB")
    return replace(plan, advice=tuple(found))


def find_model(model: str | Path) -> tuple[Preset, Any]:
    """The preset of ``model`` and, if it is on this machine, its `Checkpoint`, else None.

    Raises:
        ValueError: it is on a hub, and its sizes are not known.
    """
    from ..hub.resolve import is_cached, preset_of, resolve
    from ..presets import PRESETS, find_preset, preset_for
    from ..weights.checkpoint import open_checkpoint
    from ..weights.load import config_of

    if not is_cached(model):
        preset = PRESETS.get(str(model)) or preset_of(model)
        if preset is None and not Path(model).expanduser().exists():
            raise ValueError(f"the sizes of {model} are not known before it is here; known: {', '.join(PRESETS)}")
        if preset is not None:
            return preset, None
    checkpoint = open_checkpoint(resolve(model))
    config = config_of(checkpoint)
    return find_preset(checkpoint.model) if checkpoint.model else preset_for(config), checkpoint


def networks(model: Any, dtype: str, quantize: str | None) -> Networks:
    """What is known of a model, a `Preset` or a `Checkpoint`, before its weights are read.

    Raises:
        ValueError: ``dtype`` or ``quantize`` is none, or does not suit.
    """
    from ..models.text_encoder import TextEncoder
    from ..models.transformer import Transformer
    from ..models.vace import VaceTransformer
    from ..weights.component import parameter_shapes
    from ..weights.load import parse_dtype, sizes_of
    from ..weights.quantize import EXPAND, NEAREST, check_mode, plan_quantization

    kind = parse_dtype(dtype)
    if not isinstance(model, Preset):
        return sizes_of(model, kind, quantize)
    check_mode(quantize)
    network = VaceTransformer if model.task == "vace" else Transformer
    shapes = {"transformer": parameter_shapes(network(model.transformer)),
              "text_encoder": parameter_shapes(TextEncoder(model.text_encoder))}  # fmt: skip
    plain = quantize in (None, EXPAND, NEAREST)
    packings = {part: {} if plain else plan_quantization(part, quantize, shapes[part]).packings for part in shapes}
    text_block = peaks.text_block_bytes(model.text_encoder, kind, packings["text_encoder"])
    stored = peaks.text_block_bytes(model.text_encoder, mx.bfloat16, {}) * model.text_encoder.num_layers
    weights = peaks.weight_bytes(model.transformer, kind, packings["transformer"])
    image_encoder = ImageEncoderConfig() if model.transformer.has_image_branch else None
    return Networks(model.transformer, model.text_encoder, model.vae, image_encoder, kind, weights, text_block, stored,
                    packings["transformer"])  # fmt: skip


@contextmanager
def limited_cache(plan: Plan) -> Iterator[None]:
    """Within this block MLX keeps no more freed memory than the plan has room for."""
    before = mx.set_cache_limit(plan.cache_limit)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
