"""The planner: the fastest `Plan` within a memory budget.

It works from sizes alone (`planning.sizes`, `planning.peak_memory`, `planning.flops`), so it runs before any download.
The budget is for MLX; Python, its packages and the finished frames take about a gigabyte on top.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import mlx.core as mx

from ..caching import StepCache, make_cache
from ..distributed import opened_group
from ..geometry import WAN_2_1, Geometry
from ..guidance import Guidance
from ..models.pieces import TOKENS_AT_ONCE
from ..models.taehv import TAEHVConfig
from ..models.vae_tiling import SMALLEST_TILE
from ..recipes import phase_of, timesteps_of
from ..tasks import TASKS, s2v
from ..types import Request
from ..weights.parameters import Parameters
from . import flops as work
from . import peak_memory as peaks
from . import several, speed
from .machine import available_memory, parse_memory
from .plan import FILL, Plan, Row
from .sizes import Networks, PartSizes, WeightBytes

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
        tiny_vae: whether TAEHV decodes in the VAE's place.
        parallel: how several machines would share it, of which the plan then tells; None if it need not.
    """

    name: str
    request: Request
    quantize: str | None = None
    memory: str | int | None = None
    vae_tiling: str | tuple[int, int] | None = None
    kept: bool = False
    tiny_vae: bool = False
    parallel: str | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(t, h, w) of the latents to denoise; each reference image is one more latent frame, which Fun-Control and
        Animate always have; S2V has three, one for what FramePack makes of the frames before."""
        t, h, w = self.request.latent_shape
        if self.request.task == "s2v":
            return t + peaks.BESIDE_SPEECH, h, w
        return t + max(len(self.request.src_ref_images), self.request.task in ("control", "animate")), h, w


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
    if wanted.parallel is not None:
        (denoise,) = (row for row in found.rows if row.stage == "denoise")
        rate = denoise.flop / denoise.seconds if denoise.seconds else None
        tokens = nets.geometry.seq_len(wanted.latent_shape)
        found = replace(found, several=tuple(
            several.describe(nets.transformer, tokens, wanted.request.passes, rate, wanted.parallel, opened_group())
        ))  # fmt: skip
    return found


def choose(nets: Networks, wanted: Wanted) -> Plan:
    """The fastest plan within the budget, or, if there is none, the one that needs least."""
    asked = parse_memory(wanted.memory)
    budget = available_memory() if asked is None else asked
    request, shape = wanted.request, wanted.latent_shape
    cache = cache_of(request, nets.experts, wanted.name)
    c, experts, vae_weights = nets.transformer, [e.weights for e in nets.experts], peaks.vae_weights(nets.vae)

    def stays(stream: bool, all_stay: bool) -> int:
        """Bytes of the transformers that stay from one video to the next."""
        return wanted.kept * (sum if all_stay else max)(_loaded(weights, stream) for weights in experts)

    older = 3 * peaks.ITEMSIZE * request.width * request.height * s2v.frames_kept(request) if c.hears else 0

    def denoise(step: tuple[bool, int], all_stay: bool = True, shares: bool = False) -> int:
        kept = wanted.kept * (stays(step[0], all_stay) - _loaded(nets.weights, step[0]) + vae_weights)
        heard = peaks.heard(c, request.clips * request.infer_frames, request.infer_frames) if c.hears else 0
        return peaks.denoise(nets, shape, *step, cache, request.passes == 2, shares) + kept + heard + older

    def denoise_alone(step: tuple[bool, int]) -> int:
        return denoise(step, all_stay=False)

    step, all_stay = first_within(FILL * budget, LADDER, denoise), True
    if wanted.kept and step[0] and len(experts) > 1:  # better than streaming: of two experts the one at work
        alone = first_within(FILL * budget, LADDER, denoise_alone)
        if not alone[0]:
            step, all_stay = alone, False
    forwards, shared = forwards_of(request, nets.experts, wanted.name)
    shares = shared > 0 and denoise(step, all_stay, shares=True) <= FILL * budget  # where it costs no larger pieces
    stream, tokens_at_once = step
    held = stays(stream, all_stay)

    # Frames between those that are decoded come as they do, with the VAE still there.
    added = request.frames_written - request.num_frames
    between = peaks.rife(request.width, request.height) if added else 0

    def vae(stage: str, videos: list[tuple[int, int, int]], decoding: bool) -> tuple[tuple[int, int] | None, Row]:
        """The tile, and the stage, of latents of these shapes."""
        longest = max(videos)

        def peak(tile: tuple[int, int] | None) -> int:
            return peaks.vae(nets.vae, longest, tile, decoding) + held + older + between * decoding

        tiling = parse_tiling(wanted.vae_tiling, nets.geometry)
        tiles = tile_choices(longest, nets.geometry) if isinstance(tiling, str) else [tiling]
        tile = first_within(FILL * budget, tiles[:1] if tiling == "off" else tiles, peak)
        flop = sum(work.vae_flop(nets.vae, shape, decoding) * peaks.tile_work(nets.vae, shape, tile, decoding)
                   for shape in videos)  # fmt: skip
        how = "whole frames" if tile is None else f"tiles of {tile[0]}x{tile[1]}"
        return tile, Row(stage, how, peak(tile), flop, vae_weights)

    rows = [Row("encode text", "streamed", peaks.encode_text(nets, TEXT_TOKENS) + held,
                request.passes * work.text_flop(nets.text_encoder.config, TEXT_TOKENS),
                nets.text_encoder.weights.stored_blocks)]  # fmt: skip
    if c.has_image_branch:
        images = work.image_tokens(c) // work.IMAGE_TOKENS
        rows.append(Row("encode images", "resident", peaks.encode_images(nets) + held,
                        images * work.image_flop(nets.image_encoder), peaks.encode_images(nets) // 2))  # fmt: skip
    if c.hears:
        states = s2v.states_heard(request)
        rows.append(Row("encode audio", "resident", peaks.encode_audio(nets, states) + held,
                        work.audio_flop(nets.audio_encoder, states), peaks.audio_weights(nets)))  # fmt: skip
    encoded = [nets.geometry.latent_shape(request.width, request.height, frames)
               for frames in TASKS[request.task].encodes(request)]  # fmt: skip
    encode_tile, row = vae("encode video", encoded or [shape], decoding=False)
    rows += [row] if encoded else []
    if c.face_layers:
        faces, needed = (request.clip_frames or request.num_frames) + (request.passes == 2), peaks.encode_face(nets)
        rows.append(Row("encode face", "resident", needed + held, faces * work.face_flop(c), needed // 4))
    tokens = nets.geometry.seq_len(shape)
    saved = work.shared_parts(c, tokens) if shares else {}
    parts = {name: sum(forwards) * flop - shared * saved.get(name, 0.0)
             for name, flop in work.forward_parts(c, tokens).items()}  # fmt: skip
    reads = sum(weights.stored_outside + (times if stream else 1) * weights.stored_blocks
                for weights, times in zip(experts, forwards, strict=True) if times)  # fmt: skip
    how = "streamed" if stream else "resident"
    how += f", {tokens_at_once} tokens" * (tokens_at_once != TOKENS_AT_ONCE)
    peak = denoise(step, all_stay, shares)
    rows.append(Row("denoise", how, peak, sum(parts.values()), reads, parts["self attention"]))
    clips, (t, h, w) = TASKS[request.task].clips, request.latent_shape
    decoded = (t + (clips.latents_before(request) if clips else 0), h, w)
    decode_tile, row = vae("decode", [decoded], decoding=True)
    if wanted.tiny_vae:
        tiny = TAEHVConfig(z_dim=nets.vae.z_dim, patch=nets.vae.patch)
        decode_tile, peak = None, peaks.tiny(tiny, decoded) + held + older
        row = Row("decode", "by TAEHV", peak, work.tiny_flop(tiny, decoded), peaks.TINY_WEIGHTS)
    if added:
        flop = row.flop + added * work.rife_flop(request.width, request.height)
        row = replace(row, how=f"{row.how}, {request.fps} fps", flop=flop)
    rows.append(row)
    once = ("encode text", "encode images", "encode audio")
    rows = [row if row.stage in once else row.times(request.clips) for row in rows]
    title = f"{wanted.name} {request.width}x{request.height}, {request.num_frames} frames"
    chosen = asked is not None
    return Plan(title, budget, chosen, stream, tokens_at_once, decode_tile, encode_tile, tuple(rows), all_stay=all_stay,
                shares=shares)  # fmt: skip


def forwards_of(request: Request, experts: Sequence[PartSizes], model: str) -> tuple[list[int], int]:
    """How many forwards each of a model's transformers makes, and in how many steps two passes share their beginning.

    Of a step cache as many as are known beforehand. ``model``: the preset's name.
    """
    timesteps = timesteps_of(request)
    total, made, shared = len(timesteps), [0] * len(experts), 0
    for index, timestep in enumerate(timesteps):
        place = _at_work(request, experts, timestep)
        guidance = Guidance.of(request, experts[place].name, timestep)
        made[place] += len(guidance.passes(index, total))
        shared += guidance.shares(index, total)
    known = cache_of(request, experts, model).planned(request.passes)
    share = 1.0 if known is None else known / (request.passes * total)
    return [round(share * count) for count in made], round(share * shared)


def cache_of(request: Request, experts: Sequence[PartSizes], model: str) -> StepCache:
    """The step cache of a run; ``model``: the preset's name."""
    at_work = [_at_work(request, experts, timestep) for timestep in timesteps_of(request)]
    switch = next((index for index, place in enumerate(at_work) if place != at_work[0]), None)
    return make_cache(request.cache, len(at_work), model, request.begin, switch, request.image is not None)


def _at_work(request: Request, experts: Sequence[PartSizes], timestep: float) -> int:
    """Which of the transformers serves a timestep: by its boundary, unless the request's phases say otherwise."""
    phase = phase_of(request, timestep)
    if phase is not None and phase.expert:
        return [expert.name for expert in experts].index(phase.expert)
    return next(place for place, expert in enumerate(experts) if expert.timesteps[0] <= timestep < expert.timesteps[1])


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


def first_within(room: float, choices: Sequence[T], peak: Callable[[T], int]) -> T:
    """The first choice whose peak is within ``room``; if there is none, that with the lowest."""
    peaks = []
    for choice in choices:
        if (needed := peak(choice)) <= room:
            return choice
        peaks.append(needed)
    return choices[peaks.index(min(peaks))]


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
    shorter = [n for n in (64, 48, 32, 16) if n < (request.clip_frames or 0)]
    changes = [
        [(f"--quantize {mode}", replace(wanted, quantize=mode)) for mode in ("q8", "q4") if wanted.quantize is None],
        [(f"--size {width}x{height}", with_request(width=width, height=height)) for width, height in smaller],
        [(f"--frames {frames}", with_request(num_frames=frames)) for frames in fewer if not request.clip_frames],
        [(f"--infer_frames {frames}", with_request(infer_frames=frames, clip_frames=frames)) for frames in shorter],
    ]
    for choices in changes:
        if option := next((option for option, changed in choices if fits(changed)), None):
            yield option
    if plan.chosen:
        least = choose(sizes(wanted.quantize), replace(wanted, memory=10**8)).peak
        yield f"--memory {least / FILL / 1e9 + 0.05:.1f}GB"
