"""The VAE's decoder in a relay of machines: each runs some of its layers, and hands every piece on to the next.

Each computes whole frames, in the pieces in which one machine alone would, so that the result has the same bits on any
chip, and nothing is computed twice; and each holds the causal cache of its own layers alone. Rank 0 has the last
layers, since it writes the video. What moves are the frames between two layers, hundreds of megabytes for each latent
frame, so that a slow link is better served by columns (`vae_tiling`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import cuda
from ..distributed import Group, awaited
from .pieces import finished
from .vae import flow
from .vae22 import Branched
from .vae_execution import PacedCache, VAEExecution, run_layer
from .vae_layers import CausalCache, TemporalConv

Layer = Callable | None
Shape = tuple[int, ...]
AHEAD = 2  # pieces on their way to the next machine, beside the one at work
# FLOP for which a machine takes as long as for a byte that a layer is given or makes: where it convolves over time, and
# elsewhere. Measured on an H200, layer by layer (832x480: 14 to 15 ms for a block of 96 channels, 8 to 9 for one of
# 192, which has as many FLOP); on a Mac, which computes less for each byte it reads, from published rates.
FLOP_PER_BYTE, FLOP_PER_BYTE_ELSEWHERE = (4700.0, 800.0) if cuda.available() else (1400.0, 240.0)
TYPICAL = 10e12  # FLOP per second of a machine whose rate is not known


@dataclass(frozen=True)
class Leg:
    """One machine's layers, in a row.

    Attributes:
        given: shapes of the pieces that enter, of the first latent frame and of every later one; of the first leg, a
            latent frame.
        work: FLOP for a later latent frame, or what takes as long.
    """

    layers: list[Layer]
    given: tuple[list[Shape], list[Shape]]
    work: float

    @property
    def bytes_given(self) -> int:
        """Of a later latent frame, in float32."""
        return 4 * sum(map(math.prod, self.given[1]))


class DryCache(PacedCache):
    """The cache of a pass that computes nothing: only shapes are wanted."""

    def pace(self, y: mx.array, x: mx.array | None = None) -> mx.array:
        return y

    def keep(self, layer: nn.Module, *frames: mx.array) -> None:
        CausalCache.keep(self, layer, *frames)


def legs_of(run: VAEExecution, size: tuple[int, int], count: int) -> list[Leg]:
    """The decoder of latents of ``size`` (height, width) in at most ``count`` legs of nearly equal work, in order."""
    decoder = run.vae.decoder
    layers, whole = decoder.local, decoder.whole
    given = [_given(run, layers, size, frames) for frames in (1, 2)]
    # Where a layer without a shape (SiLU) stands, there is no cut.
    cuts = [place for place, shapes in enumerate(given[1]) if shapes]
    entered = (1, *size, len(decoder.conv1.bias))
    middle = sum(_work(layer, [entered], 2 * _bytes([entered])) for layer in whole)
    middle += 4.0 * size[0] * size[1] * math.prod(entered)  # of attention
    works = [_work(layers[a], given[1][a], _bytes(given[1][a]) + _bytes(given[1][b]))
             for a, b in zip(cuts, cuts[1:], strict=False)]  # fmt: skip
    works[0] += middle
    found = []
    for first, end in balanced(works, count):
        start = cuts[first]
        own = [*(whole if start == 0 else []), *layers[start : cuts[end]]]
        found.append(Leg(own, (given[0][start], given[1][start]), sum(works[first:end])))
    return found


def _given(run: VAEExecution, layers: Sequence[Layer], size: tuple[int, int], frames: int) -> list[list[Shape]]:
    """Shapes of the pieces that enter each layer, and leave the last, of latent frame number ``frames``."""
    places = {id(layer): place for place, layer in enumerate(layers) if layer is not None}
    found: list[list[Shape]] = []

    def noted(layer: Callable, x: mx.array, cache: PacedCache) -> mx.array | Iterator[mx.array]:
        found[places[id(layer)]].append(x.shape)
        return run_layer(layer, x, cache)

    conv, cache = run.vae.decoder.conv1, DryCache()
    for _ in range(frames):
        x = mx.zeros((1, *size, len(conv.bias)), conv.weight.dtype)
        found = [[] for _ in range(len(layers) + 1)]
        found[-1] = [y.shape for y in flow(layers, [x], cache, noted)]
    return found


def _bytes(shapes: Iterable[Shape]) -> int:
    return 4 * sum(map(math.prod, shapes))


def _work(layer: Layer, given: Sequence[Shape], moved: int) -> float:
    """FLOP of a layer for these pieces, of which ``moved`` bytes enter and leave, or what takes as long."""
    parts = layer.layers if isinstance(layer, Branched) else [layer] if isinstance(layer, nn.Module) else []
    flat: list[Any] = [pair for part in parts for pair in tree_flatten(part.parameters())]
    weights = sum(array.size for _, array in flat)
    looks_back = any(isinstance(module, TemporalConv) for part in parts for module in part.modules())
    each = FLOP_PER_BYTE if looks_back else FLOP_PER_BYTE_ELSEWHERE
    return 2.0 * weights * sum(math.prod(shape[:3]) for shape in given) + each * moved


def balanced(works: Sequence[float], count: int) -> list[tuple[int, int]]:
    """(first, end) of at most ``count`` runs of these numbers, the largest sum as small as possible."""
    sums = [sum(works[first:end]) for first in range(len(works)) for end in range(first + 1, len(works) + 1)]
    for most in sorted(sums):
        found, first = [], 0
        while first < len(works) and works[first] <= most:
            end = first + 1
            while end < len(works) and sum(works[first : end + 1]) <= most:
                end += 1
            found.append((first, end))
            first = end
        if first == len(works) and len(found) <= count:
            return found
    raise ValueError(f"{len(works)} numbers in {count} runs")


def pays(group: Group, legs: Sequence[Leg], rate: float | None) -> bool:
    """Whether the link moves what is given from leg to leg in less time than a leg takes at ``rate`` FLOP a second."""
    slowest = max(leg.work for leg in legs) / (rate or TYPICAL)
    moved = max((leg.bytes_given for leg in legs[1:]), default=0)
    is_worth_it = len(legs) > 1 and moved / group.link.bytes_per_second < slowest
    return bool(group.gather_values(is_worth_it)[0])


def relay(run: VAEExecution, latents: mx.array, group: Group, legs: Sequence[Leg]) -> Iterator[mx.array]:
    """Same as `VAEExecution.decode`, on rank 0; the others yield nothing, and are done when it is."""
    group.pair_up()
    number = len(legs) - 1 - group.rank  # of this rank's leg
    if number < 0:
        return
    leg, vae, cache = legs[number], run.vae, PacedCache(ahead=True)
    entering: Iterator[Iterable[mx.array]] = ([z] for z in vae.unpack(latents))
    if number:
        entering = _taken(group, leg, latents.shape[1], vae.decoder.conv1.weight.dtype)
    handed: deque[mx.array] = deque()
    for pieces in entering:
        left = run.flow(leg.layers, pieces, cache)
        if group.rank == 0:
            decoded = vae.to_frames(left)
            finished(decoded)
            yield decoded
            continue
        for piece in left:
            handed.append(group.hand_down(piece))
            if len(handed) > AHEAD:
                awaited(handed.popleft())
    awaited(*handed)


def _taken(group: Group, leg: Leg, count: int, dtype: mx.Dtype) -> Iterator[Iterator[mx.array]]:
    """The pieces of each of ``count`` latent frames, from the rank above."""
    shapes = [shape for index in range(count) for shape in leg.given[index > 0]]
    likes = {shape: mx.zeros(shape, dtype) for shape in shapes}
    mx.eval(likes)

    def begun() -> Iterator[mx.array]:
        coming: deque[mx.array] = deque()
        for shape in shapes:
            coming.append(group.begin_taking(likes[shape]))
            if len(coming) > AHEAD:
                yield group.arrived(coming.popleft())
        while coming:
            yield group.arrived(coming.popleft())

    pieces = begun()
    for index in range(count):
        yield islice(pieces, len(leg.given[index > 0]))
