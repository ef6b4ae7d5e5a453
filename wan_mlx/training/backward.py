"""The loss of a batch and its gradients for LoRA's factors, one block at a time.

The forward pass is the package's own (`Execution.run_block`: kernels, fused attention, streamed weights) and keeps
each block's input. The backward pass goes from the last block to the first and makes each block's inside again, in the
three pieces of `Block`: queries, keys and values; attention; what follows, token by token. Each piece is evaluated and
dropped before the next, so no graph is larger than a piece, and streamed blocks can be read in the other direction.
All samples of a step go through a block before the next is read.

``mx.checkpoint`` over whole blocks hardly saves memory in MLX, which evaluates breadth first: it makes all blocks
again before it needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.attention import Pairs
from ..models.execution import Execution, Pacer
from ..models.execution import attention as attention_in_dispatches
from ..models.transformer import Block, ForwardPass, by_runs
from .factors import Factors, of_block, parts, placed

# Layers whose factors a piece of the block depends on.
BEFORE = ("self_attn.q", "self_attn.k", "self_attn.v")
PAIRS = ("cross_attn.k", "cross_attn.v", "cross_attn.k_img", "cross_attn.v_img")
AFTER = ("self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
# Tokens of the piece after attention that are differentiated at a time: about twenty arrays as wide as the
# feed-forward are alive then.
TOKENS_AT_ONCE = 2048
# Attention's scores that are made again at a time: four arrays of 128 MB in float32.
SCORES_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Sample:
    """One clip of a step: what the model is given, and what it should answer.

    Attributes:
        latents: (1, t, h, w, C) with noise.
        timestep: in [0, 1000].
        context: text, (1, text_len, text_dim).
        target: the velocity, float32 (1, t, h, w, C).
        conditions: other arguments of `Transformer.enter`, by name.
    """

    latents: mx.array
    timestep: float
    context: mx.array
    target: mx.array
    conditions: Mapping[str, Any]


@dataclass
class _Way:
    """A sample on its way: its tokens, or their gradient, and what the blocks take beside them."""

    sample: Sample
    this_pass: ForwardPass
    x: mx.array


def loss(model: Execution, factors: Factors, samples: Sequence[Sample], scale: float) -> list[float]:
    """The mean squared error of each sample, without gradients."""
    ways = [_enter(model, sample) for sample in samples]
    for _ in _forward(model, factors, ways, scale):
        pass
    return [number(_loss(model, way, way.x)) for way in ways]


def loss_and_gradients(
    model: Execution, factors: Factors, samples: Sequence[Sample], scale: float
) -> tuple[list[float], Factors]:
    """The mean squared error of each sample, and the gradient of their mean for every factor, float32.

    Args:
        model: a transformer, resident or streamed, without VACE.
        factors: named as in `factors`.
        samples: of one step; they go through each block together.
        scale: alpha / rank.
    """
    ways = [_enter(model, sample) for sample in samples]
    inputs = list(_forward(model, factors, ways, scale))
    losses = []
    for way in ways:
        value, way.x = mx.value_and_grad(lambda x, way=way: _loss(model, way, x))(way.x)
        mx.eval(value, way.x)
        losses.append(number(value))
    gradients: Factors = {}
    for place, block in _blocks(model, reversed(model.model.block_order())):
        own, kept = of_block(factors, place), inputs.pop()
        sums: Factors = {}
        for way, x in zip(ways, kept, strict=True):
            way.x = _block_gradients(block, own, scale, x, way, sums)
        # Contiguous, as factors read from a file are: products of transposed arrays round otherwise.
        gradients |= {f"{place}.{name}": mx.contiguous(array / len(samples)) for name, array in sums.items()}
        mx.eval(gradients, [way.x for way in ways])
    return losses, gradients


def number(array: mx.array) -> float:
    """The only value of an array, once it is computed."""
    return float(array.item())  # type: ignore[arg-type]


def _enter(model: Execution, sample: Sample) -> _Way:
    x, this_pass = model.model.enter(sample.latents, sample.timestep, sample.context, **sample.conditions)
    return _Way(sample, this_pass, x)


def _loss(model: Execution, way: _Way, x: mx.array) -> mx.array:
    return ((model.model.leave(x, way.this_pass) - way.sample.target) ** 2).mean()


def _blocks(model: Execution, places: Iterable[str]) -> Iterator[tuple[str, Block]]:
    """The blocks in any order, each valid until the next."""
    order = list(places)
    yield from zip(order, model.blocks(order) if model.blocks else map(model.model.block, order), strict=True)


def _forward(model: Execution, factors: Factors, ways: Sequence[_Way], scale: float) -> Iterator[list[mx.array]]:
    """Sends the samples through the blocks; yields their tokens before each."""
    pace = Pacer(model.tokens_at_once)
    for place, block in _blocks(model, model.model.block_order()):
        before = [way.x for way in ways]
        with placed(block, of_block(factors, place), scale, model.model.dtype):
            for way in ways:
                way.x = model.run_block(block, way.x, way.this_pass, pace)
            mx.eval([way.x for way in ways])
        pace.finish()
        yield before


def _block_gradients(block: Block, own: Factors, scale: float, x: mx.array, way: _Way, sums: Factors) -> mx.array:
    """The gradient for a block's input ``x`` (1, L, D), where ``way.x`` is that for its result; adds to ``sums``
    the gradients for its factors."""
    this_pass, gradient = way.this_pass, way.x
    runs = block.runs(this_pass.modulation, this_pass.clean)

    def before(x: mx.array, **own: mx.array) -> list[mx.array]:
        with placed(block, own, scale, x.dtype):
            normed = by_runs(block.before_attention, runs, x)
            return list(block.self_attn.queries_keys_values(normed, this_pass.rope))

    def pairs_of(**own: mx.array) -> list[mx.array]:
        with placed(block, own, scale, x.dtype):
            return [
                one for pair in block.cross_attn.keys_values(this_pass.context, this_pass.image_context) for one in pair
            ]

    own_before, own_pairs, own_after = (parts(own, layers) for layers in (BEFORE, PAIRS, AFTER))
    pairs = pairs_of(**own_pairs)
    q, k, v = before(x, **own_before)
    mx.eval(q, k, v, pairs)
    attended = attention_in_dispatches(q, k, v, pace := Pacer())
    pace.finish()
    mx.eval(attended)

    # What follows attention, some tokens at a time.
    pieces, for_attended, for_pairs = [], [], [mx.zeros(one.shape) for one in pairs]
    for tokens, modulation in runs:
        first, last, _ = tokens.indices(x.shape[1])
        for start in range(first, last, TOKENS_AT_ONCE):
            some = slice(start, min(start + TOKENS_AT_ONCE, last))

            def after(
                x: mx.array, attended: mx.array, *pairs: mx.array, m: Any = modulation, **own: mx.array
            ) -> mx.array:
                with placed(block, own, scale, x.dtype):
                    return block.after_attention(_paired(pairs), x, attended, m)

            found = _pullback(after, [x[:, some], attended[:, some], *pairs], own_after, gradient[:, some], sums)
            pieces.append(found[0])
            for_attended.append(found[1])
            for_pairs = [total + one.astype(mx.float32) for total, one in zip(for_pairs, found[2:], strict=True)]
            mx.eval(pieces, for_attended, for_pairs, sums)
    del gradient
    _pullback(
        pairs_of, [], own_pairs, [total.astype(one.dtype) for total, one in zip(for_pairs, pairs, strict=True)], sums
    )

    heads = attention_gradients(q, k, v, attended, mx.concatenate(for_attended, axis=1))
    del q, k, v, attended, for_attended
    (before_x,) = _pullback(before, [x], own_before, heads, sums)
    result = mx.concatenate(pieces, axis=1) + before_x
    mx.eval(result, sums)
    return result


def _paired(pairs: Sequence[mx.array]) -> Pairs:
    return list(zip(pairs[::2], pairs[1::2], strict=True))


def _pullback(
    function: Callable[..., Any], arrays: Sequence[mx.array], own: Factors, cotangents: Any, sums: Factors
) -> list[mx.array]:
    """The gradients for ``arrays`` of ``function(*arrays, **own)``, given those for its results; adds those for ``own``
    to ``sums``."""
    names = list(own)

    def flat(*inputs: mx.array) -> Any:
        return function(*inputs[: len(arrays)], **dict(zip(names, inputs[len(arrays) :], strict=True)))

    given = cotangents if isinstance(cotangents, list) else [cotangents]
    _, found = mx.vjp(flat, [*arrays, *own.values()], given)
    for name, gradient in zip(names, found[len(arrays) :], strict=True):
        sums[name] = sums[name] + gradient if name in sums else gradient
    mx.eval(found)
    return found[: len(arrays)]


def attention_gradients(
    q: mx.array, k: mx.array, v: mx.array, attended: mx.array, gradient: mx.array
) -> list[mx.array]:
    """Gradients for queries, keys and values (B, L, heads, head_dim) of `attention`, whose result ``attended``
    (B, L, heads * head_dim) has ``gradient``.

    Some queries and heads at a time, whose scores are made again, so that no array has all queries by all keys:
    ``dS = P * (dO V^T - sum(dO * O))``. Softmax and all sums over queries are float32.
    """
    batch, rows, heads, head_dim = q.shape
    dtype, scale = q.dtype, head_dim**-0.5
    keys = k.shape[1]
    # (B, heads, L, head_dim)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    o, g = (x.reshape(batch, rows, heads, head_dim).transpose(0, 2, 1, 3) for x in (attended, gradient))
    heads_at_once = max(1, min(heads, SCORES_AT_ONCE // (batch * keys * min(rows, 512))))
    rows_at_once = max(1, min(rows, SCORES_AT_ONCE // (batch * keys * heads_at_once)))
    groups: list[list[mx.array]] = []
    for head in range(0, heads, heads_at_once):
        own = slice(head, head + heads_at_once)
        key, value = k[:, own], v[:, own]
        dk, dv, dq = mx.zeros(key.shape), mx.zeros(value.shape), []
        for row in range(0, rows, rows_at_once):
            some = slice(row, row + rows_at_once)
            query, out, back = q[:, own, some], o[:, own, some], g[:, own, some]
            scores = (query @ key.swapaxes(-1, -2)).astype(mx.float32) * scale
            weights = mx.softmax(scores, axis=-1)
            off = (back.astype(mx.float32) * out.astype(mx.float32)).sum(-1, keepdims=True)
            slopes = (weights * ((back @ value.swapaxes(-1, -2)).astype(mx.float32) - off) * scale).astype(dtype)
            dv = dv + (weights.astype(dtype).swapaxes(-1, -2) @ back).astype(mx.float32)
            dk = dk + (slopes.swapaxes(-1, -2) @ query).astype(mx.float32)
            dq.append(slopes @ key)
            mx.eval(dk, dv, dq)
        groups.append([mx.concatenate(dq, axis=2), dk.astype(dtype), dv.astype(dtype)])
    joined = (mx.concatenate(list(group), axis=1) for group in zip(*groups, strict=True))
    return [x.transpose(0, 2, 1, 3) for x in joined]
