"""Work in pieces of bounded size, submitted one after the other: products in dispatches, tokens in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .. import cuda
from ..cuda.forward import DeferredFrees
from ..heartbeat import WAITS
from . import chips, kernels
from .transformer import Runs

# Everything after self-attention treats tokens one by one, so it runs on this many at a time: the 5.8x wider
# feed-forward arrays stay small, and matmuls are still large enough for full speed. `wan_mlx.planning.choose` lowers it
# where memory is short.
TOKENS_AT_ONCE = 32768 if cuda.available() else 8192
# The feed-forward never takes more: it would be no faster, and its arrays are the largest of all.
FEED_FORWARD_TOKENS = 8192
# With at most this many tokens memory is so short that no work is submitted while wide arrays are in use.
FEW_TOKENS = 1024


def finished(*arrays: mx.array) -> None:
    """Wait until arrays are computed; with other machines, the heartbeat tells if that never ends."""
    with WAITS.of(mx.default_device().type.name):
        mx.eval(*arrays)


class Pacer:
    """Submits work piece by piece: one piece runs while the next waits, or ``waiting`` of them, and no more.

    MLX allocates the arrays of submitted work long before the GPU reaches it, so a whole block submitted at once would
    hold all its temporaries at once. With two pieces in flight memory stays low and the GPU hardly idles:

        pace(a)    a submitted                          a runs
        pace(b)    b submitted, a waited for            b runs
        submit(c)  c submitted, nothing waited for      b, then c run: c is too small to wait for
        pace(d)    d submitted, b and c waited for      d runs
        finish()   d waited for                         nothing runs, nothing is held
    """

    def __init__(
        self, tokens_at_once: int = TOKENS_AT_ONCE, frees: DeferredFrees | None = None, waiting: int = 1
    ):
        self.tokens_at_once, self.frees, self.waiting = tokens_at_once, frees, waiting
        self.pieces: list[tuple[mx.array, ...]] = []  # submitted, and not waited for

    def __call__(self, *arrays: mx.array) -> None:
        """Submit the computation of ``arrays``, and wait until the piece before it, or before those that wait, is done.
        """
        mx.async_eval(*arrays)
        self.pieces.append(arrays)
        while len(self.pieces) > self.waiting:
            finished(*self.pieces.pop(0))
        if self.frees:
            self.frees.limit()

    def submit(self, *arrays: mx.array) -> None:
        """Submit a piece too small to wait for, so that the GPU does not idle before the next one."""
        mx.async_eval(*arrays)
        last = self.pieces.pop() if self.pieces else ()
        self.pieces.append((*last, *arrays))

    def small(self, *arrays: mx.array) -> None:
        """Submit a short piece; wait for it only where memory matters more than time."""
        if self.tokens_at_once > FEED_FORWARD_TOKENS:
            self.submit(*arrays)
        else:
            self(*arrays)

    def settle(self) -> None:
        """Wait for the running piece where memory is short, so that its temporaries are freed before the next one."""
        if self.tokens_at_once <= FEW_TOKENS:
            for arrays in self.pieces:
                finished(*arrays)

    def finish(self) -> None:
        """Wait for all submitted work, and release its arrays."""
        while self.pieces:
            finished(*self.pieces.pop(0))


def tokens_per_dispatch(linear: nn.Module, x: mx.array) -> int:
    """Tokens of x (B, L, D) that one dispatch may multiply by the weights of ``linear``, all dispatches alike."""
    work = 2.0 * x.size * len(linear.weight)
    return math.ceil(x.shape[1] / max(1, math.ceil(work / chips.dispatch_flop())))


def in_dispatches(
    linear: nn.Module, x: mx.array, pace: Pacer, finish: Callable[[mx.array, slice], mx.array] = lambda y, tokens: y
) -> mx.array:
    """``finish(linear(x), all tokens)`` of x (B, L, D), in dispatches of bounded size; ``pace`` is called if several.

    ``finish`` treats tokens independently; it gets the product of some, and which they are.
    """
    length, at_once = x.shape[1], tokens_per_dispatch(linear, x)
    if length <= at_once:
        return finish(linear(x), slice(None))
    parts = []
    for start in range(0, length, at_once):
        tokens = slice(start, start + at_once)
        parts.append(finish(linear(x[:, tokens]), tokens))
        pace(parts[-1])
    return kernels.joined(parts)


def in_token_chunks(
    functions: Runs[Callable[[list[mx.array]], mx.array]], arrays: list[mx.array], pace: Pacer, at_once: int
) -> mx.array:
    """``function(arrays)`` of each run of tokens (B, L, D), which it treats independently, ``at_once`` at a time.

    A function may empty its list of arrays, to release them early, and calls ``pace`` with its result.
    """
    parts: list[mx.array] = []
    for tokens, function in functions:
        of_run = arrays if len(functions) == 1 else [array[:, tokens] for array in arrays]
        parts += token_parts(function, of_run, at_once)
    whole = kernels.joined(parts)
    if len(parts) > 1:
        pace.submit(whole)  # otherwise the parts would live until the next array is computed
    return whole


def token_parts(
    function: Callable[[list[mx.array]], mx.array], arrays: list[mx.array], at_once: int
) -> list[mx.array]:
    """The same, not joined: ``at_once`` tokens in each part but the last."""
    length = arrays[0].shape[1]
    if length <= at_once:
        return [function(arrays)]
    return [function([x[:, start : start + at_once] for x in arrays]) for start in range(0, length, at_once)]
