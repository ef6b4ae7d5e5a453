"""Spatial tiles for the VAE: any video in little memory, and no seams.

Nearly all of the VAE's memory is the causal cache of its wide layers, so a tile goes through the whole video before the
next one starts. Tiles are not blended, because they agree where they meet: only the attention in the middle, at the
resolution of latents, sees a whole frame, so it runs on whole frames, and every other layer runs on a tile with the
margin that its convolutions read. Wrong pixels at the margin's edge are cut off stage by stage. For 256 pixel tiles
that costs less than the overlap that blending needs.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import is_out_of_memory
from ..geometry import WAN_2_1, Geometry
from .vae import VAE, Downsample, ResidualBlock, Upsample
from .vae_execution import PacedCache, VAEExecution

log = logging.getLogger(__name__)

# (start, end) in pixels (or, before scaling, latents); end excluded.
Span = tuple[int, int]
SMALLEST_TILE = 64  # pixels: smaller tiles are mostly margin
RETRIES = (512, 384, 256, 128, SMALLEST_TILE)  # sides to try in order, when memory is not enough


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


def smaller_tile(tile: tuple[int, int] | None, size: tuple[int, int]) -> tuple[int, int] | None:
    """The next smaller tile (None is the whole frame) for a video of ``size``, both (width, height) in pixels."""
    now = [min(pair) for pair in zip(tile or size, size, strict=True)]
    return next(((side, side) for side in RETRIES if side <= max(now) * 3 // 4), None)


def decode(
    run: VAEExecution,
    latents: mx.array,
    tile: tuple[int, int] | None,
    finish: Callable[[mx.array], np.ndarray] = np.array,
    progress: Callable[..., Iterable] = lambda items, total=None: items,
) -> Iterator[np.ndarray]:
    """Decode, in tiles unless ``tile`` is None.

    Args:
        run: the VAE; computes in the dtype of its weights.
        latents: float32 (1, t, h, w, C), normalised.
        tile: largest (width, height) in pixels, without margins.
        finish: converts float32 (1, n, H, W, 3) in [-1, 1] for keeping, same shape; all of a tiled video is kept, so
            the result should be small.
        progress: wraps the iteration.

    Returns:
        An iterator over the frames of `VAE.decode`, 1 and then 4 at a time, after ``finish``. With tiles the first
        come when the last tile is done.

    Raises:
        ValueError: ``latents`` has another shape.
    """
    vae = run.vae
    whole = run.decode(latents)  # checks the shape; computes nothing before the first frame is requested
    if tile is None:
        for frames in progress(whole, total=latents.shape[1]):
            yield finish(frames)
        return
    _, count, height, width, _ = latents.shape
    middle = list(run.flow(vae.decoder.whole, vae.unpack(latents), PacedCache()))
    tiles = decoder_tiles(vae, (height, width), tile)
    canvas = None
    work = iter(progress(range(len(tiles) * count), total=len(tiles) * count))
    for area in tiles:
        rows, columns = (slice(*span) for span in area.target)
        for index, frames in enumerate(_decode_tile(run, middle, area)):
            next(work)
            pixels = finish(frames)
            if canvas is None:
                size = [n * vae.spatial_factor for n in (height, width)]
                canvas = np.empty((1, _first_frame(vae, count), *size, 3), pixels.dtype)
            start = _first_frame(vae, index)
            canvas[:, start : start + pixels.shape[1], rows, columns] = pixels
    del middle
    assert canvas is not None, "there is a tile"
    for index in range(count):
        yield canvas[:, _first_frame(vae, index) : _first_frame(vae, index + 1)]


def decode_in_memory(
    run: VAEExecution,
    latents: mx.array,
    tile: tuple[int, int] | None,
    finish: Callable[[mx.array], Any],
    progress: Callable[..., Iterable],
) -> Iterator[Any]:
    """`decode`; when memory runs out, again with smaller tiles, which give the same frames."""
    factor, given = run.vae.spatial_factor, 0
    size = factor * latents.shape[3], factor * latents.shape[2]
    while True:
        done = 0
        try:
            for frames in decode(run, latents, tile, finish, progress):
                done += 1
                if done > given:
                    given = done
                    yield frames
            return
        except (RuntimeError, MemoryError) as error:
            tile = smaller_tile(tile, size)
            if not is_out_of_memory(error) or tile is None:
                raise
            log.warning("decoding ran out of memory; again in tiles of %dx%d", *tile)
        mx.clear_cache()


def encode(run: VAEExecution, chunks: Iterable[mx.array], tile: tuple[int, int] | None) -> mx.array:
    """Encode, in tiles unless ``tile`` is None; tiles need the whole video in memory.

    Args:
        run: the VAE; computes in the dtype of its weights.
        chunks: float32 (1, 1, H, W, 3), then (1, 4, H, W, 3), in [-1, 1].
        tile: largest (width, height) in pixels, without margins.

    Returns:
        The result of `VAE.encode_chunks`.

    Raises:
        ValueError: a chunk has another shape, or there is none.
    """
    vae = run.vae
    if tile is None:
        return run.encode_chunks(chunks)
    video = list(vae.checked_chunks(chunks))
    height, width = (n // vae.spatial_factor for n in video[0].shape[2:4])
    canvas: list[list[Any]] = [[] for _ in video]
    for area in encoder_tiles(vae, (height, width), tile):
        for parts, part in zip(canvas, _encode_tile(run, video, area), strict=True):
            parts.append((area.target, part))
    del video
    frames = (_put_together(parts, height, width) for parts in canvas)
    latents = []
    for moments in run.flow(vae.encoder.whole, frames, PacedCache()):
        latents.append(vae.pack(moments))
        mx.eval(latents[-1])
    return mx.stack(latents, axis=1)


@dataclass(frozen=True)
class Area:
    """One tile: the part to cut out before the first stage and at the end of each stage, and the result's place.

    Each is (rows, columns); ``source`` and ``target`` in the whole frame, ``cuts`` in the stage's output.
    """

    source: tuple[Span, Span]
    cuts: tuple[tuple[Span, Span], ...]
    target: tuple[Span, Span]


@dataclass(frozen=True)
class Cut:
    """A layer that cuts rows and columns out of a frame, as an array of its own."""

    rows: Span
    columns: Span

    def __call__(self, x: mx.array, cache: PacedCache) -> mx.array:
        if (self.rows, self.columns) == ((0, x.shape[1]), (0, x.shape[2])):
            return x
        # Copied, because a slice would keep the whole frame alive.
        return mx.contiguous(x[:, slice(*self.rows), slice(*self.columns)])


def decoder_tiles(vae: VAE, size: tuple[int, int], tile: tuple[int, int]) -> list[Area]:
    """Tiles of a frame of ``size`` (height, width) in latents, for the decoder; ``tile`` as for `decode`."""
    return _tiles(vae, size, tile, _convolutions(vae.decoder.local), decoder_spans)


def encoder_tiles(vae: VAE, size: tuple[int, int], tile: tuple[int, int]) -> list[Area]:
    """Like `decoder_tiles`, for the encoder."""
    return _tiles(vae, size, tile, _convolutions(vae.encoder.local), encoder_spans)


def split(length: int, largest: int) -> list[Span]:
    """As few equal parts as possible, of at most ``largest``."""
    count = math.ceil(length / largest)
    return [(length * i // count, length * (i + 1) // count) for i in range(count)]


def _tiles(vae, size, tile, convolutions, spans_of) -> list[Area]:
    largest = [max(1, side // vae.spatial_factor) for side in tile[::-1]]
    axes = [
        [spans_of(core, convolutions, length) for core in split(length, most)]
        for length, most in zip(size, largest, strict=True)
    ]
    areas = []
    for rows, columns in product(*axes):
        cuts = tuple(
            (_within(*of_rows), _within(*of_columns)) for of_rows, of_columns in zip(rows, columns, strict=True)
        )
        areas.append(Area((rows[0][0], columns[0][0]), cuts, (rows[-1][1], columns[-1][1])))
    return areas


def _within(outer: Span, inner: Span) -> Span:
    """``inner`` relative to the start of ``outer``."""
    return inner[0] - outer[0], inner[1] - outer[0]


def _grow(span: Span, by: int, length: int) -> Span:
    """``span`` with a margin on both sides, within the frame."""
    return max(0, span[0] - by), min(length, span[1] + by)


def decoder_spans(core: Span, convolutions: Sequence[int], length: int) -> list[tuple[Span, Span]]:
    """For each stage, its input span and the valid part of its output, in pixels of that stage.

    Args:
        core: latents to decode, out of ``length``.
        convolutions: number of 3x3 ones in each stage, without that of the upsampling before it.
    """
    spans, last = [], len(convolutions) - 1
    right = core[0] << last, core[1] << last
    for stage in range(last, -1, -1):
        given = _grow(right, convolutions[stage] + (stage > 0), length << stage)
        if stage:  # the stage before doubles pixels
            given = given[0] // 2 * 2, (given[1] + 1) // 2 * 2
        spans.append((given, right))
        right = given[0] // 2, given[1] // 2
    return spans[::-1]


def encoder_spans(core: Span, convolutions: Sequence[int], length: int) -> list[tuple[Span, Span]]:
    """Like `decoder_spans`, towards ``core``."""
    spans, last = [], len(convolutions) - 1
    right = core
    for stage in range(last, -1, -1):
        size = length << (last - stage)
        given = _grow(right, convolutions[stage], size)
        if stage:  # halving the resolution reads one more pixel, only after the span
            given = given[0], min(given[1] + 1, size)
        spans.append((given, right))
        right = given[0] * 2, given[1] * 2
    return spans[::-1]


def _stages(layers: Sequence) -> list[list]:
    """Layers grouped by resolution; all groups but the first start with the resampling layer."""
    groups: list[list] = [[]]
    for layer in layers:
        if isinstance(layer, Downsample | Upsample):
            groups.append([])
        groups[-1].append(layer)
    return groups


def _convolutions(layers: Sequence) -> list[int]:
    """Number of 3x3 convolutions at each resolution, without resampling layers."""

    def count(layer) -> int:
        return 2 if isinstance(layer, ResidualBlock) else not isinstance(layer, Downsample | Upsample)

    return [sum(map(count, group)) for group in _stages(layers)]


def _with_cuts(layers: Sequence, area: Area) -> list:
    """``layers`` with the cuts of one tile."""
    groups = zip(_stages(layers), area.cuts, strict=True)
    return [layer for group, cut in groups for layer in (*group, Cut(*cut))]


def _decode_tile(run: VAEExecution, middle: Sequence[mx.array], area: Area) -> Iterator[mx.array]:
    """float32 (1, n, H, W, 3) of the tile for each latent frame."""
    cache, layers, first = PacedCache(), _with_cuts(run.vae.decoder.local, area), Cut(*area.source)
    return run.decode_frames((first(frame, cache) for frame in middle), layers, cache)


def _encode_tile(run: VAEExecution, video: Sequence[mx.array], area: Area) -> Iterator[mx.array]:
    """(1, h, w, channels) of the tile for each chunk, before the middle."""
    cache, layers, first = PacedCache(), _with_cuts(run.vae.encoder.local, area), Cut(*area.source)
    for chunk in video:
        frames = run.vae.enter(first(chunk[0], cache)[None])
        (encoded,) = run.flow(layers, run.first_batches(frames), cache)
        mx.eval(encoded)
        yield encoded


def _put_together(parts: list[tuple[tuple[Span, Span], mx.array]], height: int, width: int) -> mx.array:
    """Tiles in row order → the whole (1, height, width, channels); empties ``parts``."""
    rows: dict[Span, list[mx.array]] = {}
    for (of_rows, _), part in parts:
        rows.setdefault(of_rows, []).append(part)
    parts.clear()
    whole = mx.concatenate([mx.concatenate(row, axis=2) for row in rows.values()], axis=1)
    assert whole.shape[1:3] == (height, width)
    return whole


def _first_frame(vae: VAE, index: int) -> int:
    """Number of the first frame decoded from latent frame ``index``."""
    return (index - 1) * vae.temporal_factor + 1 if index else 0
