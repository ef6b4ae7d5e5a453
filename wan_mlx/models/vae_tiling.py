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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise, product, repeat
from typing import Any

import mlx.core as mx
import numpy as np

from ..distributed import PIECE, Group
from ..errors import is_out_of_memory
from ..geometry import LARGEST_SIDE
from .chips import likely_rate
from .vae import VAE, Downsample, ResidualBlock, Upsample
from .vae22 import Branched
from .vae_execution import PacedCache, VAEExecution
from .vae_layers import CausalCache, CausalConv
from .vae_relay import legs_of, pays, relay

log = logging.getLogger(__name__)

# (start, end) in pixels (or, before scaling, latents); end excluded.
Span = tuple[int, int]
WORDS_AT_ONCE = PIECE // 4  # of a canvas that machines join
SMALLEST_TILE = 64  # pixels: smaller tiles are mostly margin
RETRIES = (512, 384, 256, 128, SMALLEST_TILE)  # sides to try in order, when memory is not enough


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
    last: LastFrames | None = None,
    group: Group | None = None,
    relayed: bool | None = None,
) -> Iterator[np.ndarray]:
    """Decode, in tiles unless ``tile`` is None.

    Args:
        run: the VAE; computes in the dtype of its weights.
        latents: float32 (1, t, h, w, C), normalised.
        tile: largest (width, height) in pixels, without margins.
        finish: converts float32 (1, n, H, W, 3) in [-1, 1] for keeping, same shape; all of a video in several tiles is
            kept, so the result should be small.
        progress: wraps the iteration.
        last: takes the last frames as they are decoded, too.
        group: the machines that decode together; the frames come out at rank 0.
        relayed: whether they do it in a relay, or else in tiles, at least one for each; None: as suits the link, if
            ``tile`` is None.

    Returns:
        An iterator over the frames of `VAE.decode`, 1 and then 4 at a time, after ``finish``. With several tiles for
        a machine they come while the last ones are decoded.

    Raises:
        ValueError: ``latents`` has another shape.
    """
    vae = run.vae
    whole = run.decode(latents)  # checks the shape; computes nothing before the first frame is requested
    _, count, height, width, _ = latents.shape
    last = last or LastFrames(0)
    last.begin(vae.geometry.spatial * height, vae.geometry.spatial * width, vae.geometry.num_frames(count))
    ahead = tile is None
    if group is not None:
        legs = legs_of(run, (height, width), group.size) if relayed or ahead else []
        if relayed if relayed is not None else ahead and pays(group, legs, likely_rate()):
            whole = relay(run, latents, group, legs)
        else:
            tile = dealt_tile(tile, width, vae.geometry.spatial, group.size)
    if tile is None:
        for frames in progress(whole, total=count):
            last.take(frames)
            yield finish(frames)
        return
    starts = [0, *(vae.geometry.num_frames(index) for index in range(1, count + 1))]
    middle = list(run.flow(vae.decoder.whole, vae.unpack(latents), PacedCache(ahead)))
    tiles, rank, machines = tiles_of(vae, (height, width), tile, decoding=True), 0, 1
    if group is not None:
        rank, machines = group.rank, group.size
    rounds = [tiles[first : first + machines] for first in range(0, len(tiles), machines)]
    kind = finish(mx.zeros((1, 1, 1, 1, 3))).dtype
    sides = (vae.geometry.spatial * height, vae.geometry.spatial * width)
    canvas = np.zeros((1, starts[-1] if rank == 0 else 0, *sides, 3), kind)
    work = iter(progress(range(len(rounds) * count), total=len(rounds) * count))
    for dealt in rounds:
        places = [tuple(slice(*span) for span in one.pixels(vae.config.patch)) for one in dealt]
        parts = _decoded(run, dealt[rank], middle, PacedCache(ahead)) if rank < len(dealt) else repeat(None)
        for (start, end), frames in zip(pairwise(starts), parts, strict=False):
            next(work)
            pixels = None
            if frames is not None:
                last.take(frames, start, *places[rank])
                pixels = finish(frames)
            blocks = [pixels] if group is None else _gathered(group, pixels, places, (1, end - start), kind)
            if rank == 0:
                for (rows, columns), block in zip(places, blocks, strict=True):
                    canvas[:, start:end, rows, columns] = block
                if dealt is rounds[-1]:
                    yield canvas[:, start:end]
    next(work, None)  # which tells that the last one is done
    if group is not None and last.count:
        last.frames = joined(group, last.frames)


def _decoded(run: VAEExecution, tile: Tile, middle: Sequence[mx.array], cache: PacedCache) -> Iterator[mx.array]:
    """A tile of the frames whose middle layers are done."""
    return run.decode_frames((tile.source(frame, cache) for frame in middle), tile.layers, cache)


def _gathered(
    group: Group, own: np.ndarray | None, places: Sequence[tuple[slice, ...]], shape: tuple[int, int], kind: np.dtype
) -> list[np.ndarray]:
    """Everybody's tile of some frames, (1, n, height, width, 3) each; a machine beyond them has none of its own."""
    sides = [tuple(span.stop - span.start for span in place) for place in places]
    padded = np.zeros((*shape, *(max(side) for side in zip(*sides, strict=True)), 3), kind)
    if own is not None:
        padded[:, :, : own.shape[2], : own.shape[3]] = own
    found = np.array(group.gather(mx.array(padded)))
    return [found[rank : rank + 1, :, :high, :wide] for rank, (high, wide) in enumerate(sides)]


def dealt_tile(tile: tuple[int, int] | None, width: int, spatial: int, machines: int) -> tuple[int, int]:
    """The tile (width, height) in pixels for a video ``width`` latents wide, each ``spatial`` pixels: no wider than a
    machine's share."""
    wide, high = tile or (LARGEST_SIDE, LARGEST_SIDE)
    return min(wide, max(SMALLEST_TILE, spatial * math.ceil(width / machines))), high


def joined(group: Group, canvas: np.ndarray) -> np.ndarray:
    """The canvas with everybody's tiles, bit for bit, on all; each pixel is zero on all machines but one."""
    flat = canvas.reshape(-1).view(np.uint8)
    flat = np.concatenate([flat, np.zeros(-len(flat) % 4, np.uint8)]).view(np.uint32)
    for start in range(0, len(flat), WORDS_AT_ONCE):
        piece = slice(start, start + WORDS_AT_ONCE)
        flat[piece] = np.array(group.sum_bits(mx.array(flat[piece])))
    return flat.view(np.uint8)[: canvas.nbytes].view(canvas.dtype).reshape(canvas.shape)


def decode_in_memory(
    run: VAEExecution,
    latents: mx.array,
    tile: tuple[int, int] | None,
    finish: Callable[[mx.array], Any],
    progress: Callable[..., Iterable],
    last: LastFrames | None = None,
    group: Group | None = None,
) -> Iterator[Any]:
    """`decode`; when memory runs out, again with smaller tiles, which give the same frames."""
    given, size = 0, (run.vae.geometry.spatial * latents.shape[3], run.vae.geometry.spatial * latents.shape[2])
    while True:
        try:
            for frames in islice(decode(run, latents, tile, finish, progress, last, group), given, None):
                given += 1
                yield frames
            return
        except (RuntimeError, MemoryError) as error:
            tile = smaller_tile(tile, size)
            if not is_out_of_memory(error) or tile is None or group is not None:  # the others are further on
                raise
            log.warning("decoding ran out of memory; again in tiles of %dx%d", *tile)
        mx.clear_cache()


class LastFrames:
    """The last ``count`` frames of a video as they were decoded, float32 (count, H, W, 3) in [-1, 1]: ``frames``."""

    def __init__(self, count: int):
        self.count = count
        self.frames = np.empty((0, 0, 0, 3), np.float32)

    def begin(self, height: int, width: int, total: int) -> None:
        """Before the first of ``total`` frames."""
        self.frames = np.zeros((min(self.count, total), height, width, 3), np.float32)
        self._first, self._next = total - len(self.frames), 0

    def take(
        self, decoded: mx.array, start: int | None = None, rows: slice = slice(None), columns: slice = slice(None)
    ) -> None:
        """Some frames (1, n, H, W, 3), or a tile of them: of these the first is number ``start``, else the next."""
        start = self._next if start is None else start
        self._next = start + decoded.shape[1]
        if self._next > self._first:
            into, left_out = max(0, start - self._first), max(0, self._first - start)
            self.frames[into : self._next - self._first, rows, columns] = np.array(decoded[0, left_out:])


def encode(run: VAEExecution, chunks: Iterable[mx.array], tile: tuple[int, int] | None) -> mx.array:
    """Encode, in tiles unless ``tile`` is None; tiles need the whole video in memory.

    Args:
        run, tile: as for `decode`.
        chunks: float32 (1, 1, H, W, 3), then (1, 4, H, W, 3), in [-1, 1].

    Returns:
        The result of `VAE.encode_chunks`.

    Raises:
        ValueError: a chunk has another shape, or there is none.
    """
    vae = run.vae
    if tile is None:
        return run.encode_chunks(chunks)
    video = list(vae.checked_chunks(chunks))
    height, width = (n // vae.geometry.spatial for n in video[0].shape[2:4])
    frames: list[mx.array] = []
    for one in tiles_of(vae, (height, width), tile, decoding=False):
        rows, columns = one.target
        for index, part in enumerate(_encode_tile(run, video, one)):
            if index == len(frames):
                frames.append(mx.zeros((1, height, width, part.shape[-1]), part.dtype))
            frames[index][:, slice(*rows), slice(*columns)] = part
            mx.eval(frames[index])
    del video, part
    latents = []
    for moments in run.flow(vae.encoder.whole, (frames.pop(0) for _ in range(len(frames))), PacedCache()):
        latents.append(vae.pack(moments))
        mx.eval(latents[-1])
    return mx.stack(latents, axis=1)


def _encode_tile(run: VAEExecution, video: Sequence[mx.array], tile: Tile) -> Iterator[mx.array]:
    """(1, h, w, channels) of the tile for each chunk, before the middle."""
    cache = PacedCache()
    for chunk in video:
        frames = tile.source(run.vae.enter(chunk), cache)
        (encoded,) = run.flow(tile.layers, run.first_batches(frames), cache)
        mx.eval(encoded)
        yield encoded


@dataclass(frozen=True)
class Cut:
    """A layer that cuts rows and columns out of a frame, as an array of its own."""

    rows: Span
    columns: Span

    def __call__(self, x: mx.array, cache: CausalCache) -> mx.array:
        if (self.rows, self.columns) == ((0, x.shape[1]), (0, x.shape[2])):
            return x
        # Copied, because a slice would keep the whole frame alive.
        return mx.contiguous(x[:, slice(*self.rows), slice(*self.columns)])


@dataclass(frozen=True)
class Tile:
    """One tile: the cut out of the whole frame, the layers with a cut after each resolution, and the result's place,
    (rows, columns) in the whole result."""

    source: Cut
    layers: list[Callable | None]
    target: tuple[Span, Span]

    def pixels(self, patch: int) -> tuple[Span, Span]:
        """The target in pixels, of which the decoder makes ``patch`` squared at once."""
        (top, bottom), (left, right) = self.target
        return (top * patch, bottom * patch), (left * patch, right * patch)


def tiles_of(vae: VAE, size: tuple[int, int], largest: tuple[int, int], decoding: bool) -> list[Tile]:
    """Tiles of a frame of ``size`` (height, width) in latents, each at most ``largest`` (width, height) in pixels."""
    local = vae.decoder.local if decoding else vae.encoder.local
    counts = _convolutions(local)
    axes = [
        [stage_spans(core, counts, length, decoding) for core in split(length, max(1, side // vae.geometry.spatial))]
        for length, side in zip(size, largest[::-1], strict=True)
    ]
    found = []
    for rows, columns in product(*axes):
        cuts = (Cut(_within(*of_rows), _within(*of_columns)) for of_rows, of_columns in zip(rows, columns, strict=True))
        layers = [*_cut_before_resampling(local, cuts), next(cuts)]
        found.append(Tile(Cut(rows[0][0], columns[0][0]), layers, (rows[-1][1], columns[-1][1])))
    return found


def split(length: int, largest: int) -> list[Span]:
    """As few equal parts as possible, of at most ``largest``."""
    count = math.ceil(length / largest)
    return [(length * i // count, length * (i + 1) // count) for i in range(count)]


def _within(outer: Span, inner: Span) -> Span:
    """``inner`` relative to the start of ``outer``."""
    return inner[0] - outer[0], inner[1] - outer[0]


def stage_spans(core: Span, convolutions: Sequence[int], length: int, decoding: bool) -> list[tuple[Span, Span]]:
    """For each stage, its input span and the valid part of its output, in pixels of that stage.

    Args:
        core: latents to decode, or to encode to, out of ``length``.
        convolutions: number of 3x3 ones in each stage, without that of the resampling before it.
        decoding: whether stages double the pixels, or halve them.
    """
    found, last = [], len(convolutions) - 1
    right = (core[0] << last, core[1] << last) if decoding else core
    for stage in range(last, -1, -1):
        size = length << (stage if decoding else last - stage)
        margin = convolutions[stage] + (decoding and stage > 0)  # the upsampling has one, too
        start, end = max(0, right[0] - margin), min(size, right[1] + margin)
        if stage and decoding:  # the stage before doubles pixels
            start, end = start // 2 * 2, (end + 1) // 2 * 2
        elif stage:  # halving the resolution reads one more pixel, only after the span
            end = min(end + 1, size)
        found.append(((start, end), right))
        right = (start // 2, end // 2) if decoding else (2 * start, 2 * end)
    return found[::-1]


def _cut_before_resampling(layers: Sequence[Callable | None], cuts: Iterator[Cut]) -> Iterator[Callable | None]:
    """The layers, with a cut at the end of each resolution but the last."""
    for layer in layers:
        if isinstance(layer, Downsample | Upsample):
            yield next(cuts)
        if isinstance(layer, Branched) and isinstance(layer.layers[-1], Downsample | Upsample):
            layer = replace(layer, cut=next(cuts))
        yield layer


def _flat(layers: Sequence) -> Iterator:
    """The layers, those with a shortcut beside them one by one."""
    for layer in layers:
        yield from layer.layers if isinstance(layer, Branched) else [layer]


def _stages(layers: Sequence) -> list[list]:
    """Layers grouped by resolution; all groups but the first start with the resampling layer."""
    groups: list[list] = [[]]
    for layer in _flat(layers):
        if isinstance(layer, Downsample | Upsample):
            groups.append([])
        groups[-1].append(layer)
    return groups


def _convolutions(layers: Sequence) -> list[int]:
    """Number of 3x3 convolutions at each resolution, without resampling layers."""
    counts = {ResidualBlock: 2, CausalConv: 1}
    return [sum(counts.get(type(layer), 0) for layer in stage) for stage in _stages(layers)]
