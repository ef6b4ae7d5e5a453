"""The loss of a batch and its gradients for LoRA's factors, one block at a time.

The forward pass, the package's own (`run_block`) where attention has a fused kernel, keeps each block's input. The
backward pass goes from the last block to the first and makes each block's inside again (`block_backward`), so no graph
is larger than a block, and streamed blocks can be read in the other direction. All samples of a step go through a block
before the next is read. Of a small model the forward pass keeps everything.

``mx.checkpoint`` over whole blocks hardly saves memory in MLX, which evaluates breadth first: it makes all blocks
again before it needs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..cuda.forward import DeferredFrees
from ..guidance import at_once
from ..models.attention_execution import has_fused_kernel
from ..models.block_execution import run_block
from ..models.configs import TransformerConfig
from ..models.execution import DEFERRED, DEFERRED_WHOLE, Execution
from ..models.pieces import FEED_FORWARD_TOKENS, Pacer
from ..models.transformer import Block, ForwardPass
from .attention_backward import has_fused_gradient
from .block_backward import BlockFactors, KeptBlock, block_gradients
from .factors import Factors, of_block, placed
from .pieces import Pieces
from .slopes import try_kernels

KEPT_AT_MOST = 1 << 30  # bytes of what blocks made in the forward pass: nano's with some clips, not 1.3B's with one


@dataclass(frozen=True)
class Sample:
    """One clip of a step: what the model is given, and what it should answer.

    Attributes:
        latents: (1, t, h, w, C) with noise.
        timestep: in [0, 1000].
        context: text, (1, length, text_dim), of at most text_len rows; those that are missing are zero.
        target: the velocity, float32 (1, t, h, w, C); None: what the model answers without factors.
        conditions: other arguments of `Transformer.enter`, by name.
    """

    latents: mx.array
    timestep: float
    context: mx.array
    target: mx.array | None
    conditions: Mapping[str, Any]


@dataclass
class _Way:
    """A sample on its way: its tokens, or their gradient, and what the blocks take beside them.

    ``counts``: how many equal rows of text each one stands for; None: itself.
    """

    sample: Sample
    this_pass: ForwardPass
    x: mx.array
    counts: mx.array | None = None


def loss(model: Execution, factors: Factors, samples: Sequence[Sample], scale: float) -> list[float]:
    """The mean squared error of each sample, without gradients."""
    ways = [_enter(model, sample) for sample in samples]
    for _ in _forward(model, factors, ways, scale):
        pass
    return [number(_loss(model, way, way.x)) for way in ways]


def loss_and_gradients(
    model: Execution, factors: Factors, samples: Sequence[Sample], scale: float, keeps: bool | None = None
) -> tuple[list[float], Factors]:
    """The mean squared error of each sample, and the gradient of their mean for every factor, float32.

    Args:
        model: a transformer, resident or streamed, without VACE.
        factors: named as in `factors`.
        samples: of one step; they go through each block together.
        scale: alpha / rank.
        keeps: whether the forward pass keeps all; None: where `keeps_blocks` says so.
    """
    config, dtype, is_streamed = model.model.config, model.model.dtype, model.blocks is not None
    try_kernels(dtype, config.dim, config.ffn_dim, config.head_dim)
    if keeps is None:
        tokens = sum(math.prod(one.latents.shape[:4]) for one in samples) // math.prod(config.patch_size)
        keeps = keeps_blocks(config, dtype, tokens, is_streamed)
    if threads(len(samples), is_streamed) == 1:
        return _in_one_thread(model, factors, samples, scale, len(samples), keeps)
    # Half of the samples each, of the same layers: on a CPU no factors are `placed` in them.
    given = [(one.latents, one.context, one.target, dict(one.conditions)) for one in samples]
    mx.eval(model.model.parameters(), factors, given)  # here: the other thread could not
    middle = (len(samples) + 1) // 2
    (losses, gradients), (more, others) = at_once(
        lambda some: _in_one_thread(model, factors, some, scale, len(samples), keeps),
        (samples[:middle],),
        (samples[middle:],),
    )
    return [*losses, *more], {name: array + others[name] for name, array in gradients.items()}


def threads(clips: int, is_streamed: bool) -> int:
    """In how many a step's clips are trained: two on a CPU, where MLX uses one core per thread."""
    return 2 if clips > 1 and not is_streamed and mx.default_device().type == mx.DeviceType.cpu else 1


def _in_one_thread(
    model: Execution, factors: Factors, samples: Sequence[Sample], scale: float, count: int, keeps: bool
) -> tuple[list[float], Factors]:
    """`loss_and_gradients` of some samples of ``count``."""
    ways = [_enter(model, sample) for sample in with_targets(model, samples)]
    pieces, order = Pieces(), model.model.block_order()
    factors_of = {place: BlockFactors(of_block(factors, place), scale, model.model.dtype) for place in order}
    passed: list[Sequence[mx.array | KeptBlock]]  # of each block: the tokens before it, or all that its pass made
    if keeps:
        passed = [_kept(model.model.block(place), factors_of[place], ways, pieces) for place in order]
    else:
        passed = list(_forward(model, factors, ways, scale))
    losses = []
    for way in ways:
        value, way.x = mx.value_and_grad(lambda x, way=way: _loss(model, way, x))(way.x)
        mx.eval(value, way.x)
        losses.append(number(value))
    gradients: Factors = {}
    for place, block in _blocks(model, reversed(order)):
        own, wanted = factors_of.pop(place), place != order[0]
        for way, one in zip(ways, passed.pop(), strict=True):
            if isinstance(one, KeptBlock):
                found = one.back(way.x, wanted)
            else:
                found = block_gradients(block, own, one, way.x, way.this_pass, pieces, wanted, way.counts)
            way.x = way.x if found is None else found
        of_this = own.gradients(count)
        pieces.add(*of_this.values())
        gradients |= {f"{place}.{name}": array for name, array in of_this.items()}
        if model.blocks is not None:  # a streamed block is emptied when the next one is requested
            pieces.finish()
    pieces.finish()
    return losses, gradients


def keeps_blocks(config: TransformerConfig, dtype: mx.Dtype, tokens: int, is_streamed: bool) -> bool:
    """Whether what blocks make of so many tokens, of all clips, is kept for the backward pass, not made again.

    It is where that is little: a quarter of the time for some hundred megabytes. By the sizes alone, not by what memory
    is free: then one run is computed in one way. MLX's fused gradients make the forward pass again themselves.
    """
    is_possible = not is_streamed and not has_fused_gradient(dtype, config.head_dim)
    return is_possible and kept_bytes(config, dtype, tokens) <= KEPT_AT_MOST


def kept_bytes(config: TransformerConfig, dtype: mx.Dtype, tokens: int) -> int:
    """What all blocks keep of so many tokens: arrays as wide as these, and as their feed-forward."""
    return config.num_layers * tokens * (15 * config.dim + 2 * config.ffn_dim) * dtype.size


def _kept(block: Block, factors: BlockFactors, ways: Sequence[_Way], pieces: Pieces) -> list[KeptBlock]:
    """Sends the samples through a block."""
    found = [KeptBlock(block, factors, way.x, way.this_pass, pieces, way.counts) for way in ways]
    for way, one in zip(ways, found, strict=True):
        way.x = one.result
    return found


def number(array: mx.array) -> float:
    """The only value of an array, once it is computed."""
    return float(array.item())  # type: ignore[arg-type]


def with_targets(model: Execution, samples: Sequence[Sample]) -> list[Sample]:
    """The samples, each with a target."""
    ways = {number: _enter(model, sample) for number, sample in enumerate(samples) if sample.target is None}
    if not ways:
        return list(samples)
    for _ in _forward(model, {}, list(ways.values()), 1.0):
        pass
    answers = {number: model.leave(way.x, way.this_pass, Pacer(model.tokens_at_once)) for number, way in ways.items()}
    mx.eval(answers)
    return [replace(one, target=answers.get(number, one.target)) for number, one in enumerate(samples)]


def shortens_text(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether one row of text stands for all the padding.

    It does where attention stores its scores, such as on a CPU, where all rows of padding cost nano two fifths of a
    step. A fused kernel takes 512 keys in no time.
    """
    return not has_fused_kernel(dtype, head_dim)


def _enter(model: Execution, sample: Sample) -> _Way:
    network, config, context = model.model, model.model.config, sample.context
    missing = max(0, config.text_len - context.shape[1])
    padded = mx.pad(context, [(0, 0), (0, missing), (0, 0)])
    x, this_pass = network.enter(sample.latents, sample.timestep, padded, **sample.conditions)
    if missing > 1 and shortens_text(network.dtype, config.head_dim):
        # Rows of zeros stay equal, as do their keys and values: one has the weight of all of them, and its gradient is
        # the sum of theirs.
        rows = context.shape[1]
        this_pass = replace(this_pass, context=network.embed_text(padded[:, : rows + 1]))
        return _Way(sample, this_pass, x, mx.array([1.0] * rows + [missing]))
    return _Way(sample, this_pass, x)


def _loss(model: Execution, way: _Way, x: mx.array) -> mx.array:
    assert way.sample.target is not None, "`with_targets` gives it"
    given = way.sample.conditions.get("clean_frames", 0)  # their velocity is not used
    return ((model.model.leave(x, way.this_pass) - way.sample.target)[:, given:] ** 2).mean()


def _blocks(model: Execution, places: Iterable[str]) -> Iterator[tuple[str, Block]]:
    """The blocks in any order, each valid until the next."""
    order = list(places)
    yield from zip(order, model.blocks(order) if model.blocks else map(model.model.block, order), strict=True)


def _forward(model: Execution, factors: Factors, ways: Sequence[_Way], scale: float) -> Iterator[list[mx.array]]:
    """Sends the samples through the blocks; yields their tokens before each."""
    late = DEFERRED_WHOLE if model.tokens_at_once > FEED_FORWARD_TOKENS else DEFERRED
    pace = Pacer(model.tokens_at_once, DeferredFrees(late))
    dtype, pieces = model.model.dtype, Pieces()
    for place, block in _blocks(model, model.model.block_order()):
        before, own = [way.x for way in ways], of_block(factors, place)
        if shortens_text(dtype, model.model.config.head_dim):  # `run_block` knows no rows that stand for several
            factors_of = BlockFactors(own, scale, dtype)
            for way in ways:
                way.x = KeptBlock(block, factors_of, way.x, way.this_pass, pieces, way.counts).result
        else:
            with placed(block, own, scale, dtype):
                for way in ways:
                    way.x = run_block(block, way.x, way.this_pass, pace)
        if model.blocks is not None:
            mx.eval([way.x for way in ways])
        yield before
