"""The gradients of one block of the transformer, for its input and for LoRA's factors beside its layers.

Written out, not derived by `mx.vjp`: so what is not needed again is not kept, no gradient of a frozen matrix is
computed, kernels serve both directions, and the order of evaluation is ours. `tests/test_training_gradients.py` holds
it to what MLX derives from `models.transformer.Block`.

In three parts: queries, keys and values; attention; what follows, token by token. The first and the last take some
tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from .. import cuda
from ..models import kernels
from ..models.attention import SelfAttention, split_heads
from ..models.attention_execution import attention
from ..models.layers import SIDE_KEYS
from ..models.quantized_linear import QuantizedLinear
from ..models.rope import rows_of
from ..models.transformer import Block, ForwardPass, Modulation, Runs
from . import slopes
from .attention_backward import TILE, Heads, attend, attention_and_gradients, attention_gradients
from .factors import Factors, times
from .pieces import Pieces

# Tokens whose part after attention is made again at a time, at most: six arrays as wide as the feed-forward are alive
# then. Fewer are slower on a fast GPU, more take more memory: on an H200 4,096 take 5 % longer than 8,192.
TOKENS_AT_ONCE = 4096 if cuda.available() else 2048


class BlockFactors:
    """LoRA's factors of one block, as its layers add them, and their gradients, a part for each piece of the tokens."""

    def __init__(self, own: Mapping[str, mx.array], scale: float, dtype: mx.Dtype):
        self.scale = scale
        self.down = {_layer(name): array.astype(dtype) for name, array in own.items() if name.endswith(".down")}
        ups = {_layer(name): times(array, scale) for name, array in own.items() if name.endswith(".up")}
        self.up = {name: array.astype(dtype) for name, array in ups.items()}
        self._parts: dict[str, list[mx.array]] = {}
        self._new: list[mx.array] = []

    def add(self, layer: str, down: mx.array, up: mx.array) -> None:
        """Gradients for the factors as the layer adds them."""
        self._new += [down, up]
        for name, array in ((f"{layer}.down", down), (f"{layer}.up", up)):
            self._parts.setdefault(name, []).append(array)

    def new(self) -> list[mx.array]:
        """What was added since the last call: to be computed, so that what it is made of can go."""
        new, self._new = self._new, []
        return new

    def gradients(self, samples: int) -> Factors:
        """For the factors themselves, float32, of the samples' mean."""
        found = {}
        for name, parts in self._parts.items():
            total = parts[0].astype(mx.float32)
            if len(parts) > 1:
                total = mx.stack(parts).astype(mx.float32).sum(0)
            # Contiguous, as factors read from a file are: products of transposed arrays round otherwise.
            found[name] = mx.contiguous(times(total, (self.scale if name.endswith(".up") else 1) / samples))
        return found


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


class Product:
    """A linear layer with its factors, for one call: it keeps its input for `back`."""

    def __init__(self, block: Block, name: str, factors: BlockFactors):
        self.layer: Any = block
        for step in name.split("."):
            self.layer = self.layer[int(step)] if step.isdecimal() else self.layer[step]
        self.name, self.factors = name, factors

    def __call__(self, x: mx.array) -> mx.array:
        """x (B, L, inputs) → (B, L, outputs)."""
        self.x, y = x, self.layer(x)
        if self.name not in self.factors.up:
            return y
        self.inner = x @ self.factors.down[self.name].T
        return mx.addmm(y, self.inner, self.factors.up[self.name].T)

    def back(self, y: mx.array, wanted: bool = True, others: mx.array | None = None) -> Any:
        """The gradient for x, if it is ``wanted``, of that for the result, and of ``others`` that x goes to; adds those
        for the factors."""
        x = self.x
        del self.x
        found: Any = self._through(x, y, others) if wanted else None
        if self.name not in self.factors.up:
            return found
        down, up = self.factors.down[self.name], self.factors.up[self.name]
        inner = y @ up
        self.factors.add(self.name, down=_rows(inner).T @ _rows(x), up=_rows(y).T @ _rows(self.inner))
        del self.inner
        return mx.addmm(found, inner, down) if wanted else None

    def _through(self, x: mx.array, y: mx.array, others: mx.array | None) -> mx.array:
        """The gradient through the layer as it is, with LoRAs of its own."""
        if any(key in self.layer for key in SIDE_KEYS):
            (found,) = mx.vjp(self.layer, [x], [y])[1]
            return found if others is None else found + others
        weight = self.layer.weight
        if isinstance(self.layer, QuantizedLinear):
            # Unpacked again, but not before y is there: all layers' matrices would lie unpacked side by side.
            packed = {key: array for key, array in self.layer.items() if isinstance(array, mx.array)}
            packed["weight"] = mx.depends([packed["weight"]], [y])[0]
            weight = self.layer.packing.unpack(packed, y.dtype)
        return y @ weight if others is None else mx.addmm(others, y, weight)


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def block_gradients(
    block: Block,
    factors: BlockFactors,
    x: mx.array,
    gradient: mx.array,
    this_pass: ForwardPass,
    pieces: Pieces,
    wanted: bool = True,
    counts: mx.array | None = None,
) -> mx.array | None:
    """The gradient for a block's input x (1, L, D), if it is ``wanted``, given that for its result; adds those for its
    factors. ``counts``: how many equal rows of text each one stands for.

    What is returned, and the factors' gradients, wait in ``pieces``.
    """
    chunks = list(_chunks(block.runs(this_pass.modulation, this_pass.clean), x.shape[1]))
    cross = _Pairs(block, factors, this_pass, counts)
    found = [_Before(block, factors, x[:, some], m, this_pass, some).heads() for some, m in chunks]
    heads = _joined(found)
    pieces.add(*heads, *cross.arrays)
    del found
    for_x: list[mx.array] = []

    def rest(attended: mx.array) -> mx.array:
        parts = []
        for some, m in chunks:
            after = _After(block, factors, x[:, some], attended[:, some], m, cross, pieces)
            one, other = after.back(gradient[:, some], pieces)
            pieces.add(one, other, *cross.sums, *factors.new())
            for_x.append(one)
            parts.append(other)
        return mx.concatenate(parts, axis=1)

    heads = attention_and_gradients(heads, rest, pieces)
    cross.back()

    def again() -> Iterator[_Before]:
        for some, m in chunks:
            before = _Before(block, factors, x[:, some], m, this_pass, some)
            before.heads()
            yield before

    return _to_input(again(), chunks, heads, for_x, factors, pieces, wanted)


class KeptBlock:
    """A block's forward pass, of which all is kept that `back` needs: it makes nothing again."""

    def __init__(
        self,
        block: Block,
        factors: BlockFactors,
        x: mx.array,
        this_pass: ForwardPass,
        pieces: Pieces,
        counts: mx.array | None = None,
    ):
        self.factors, self.pieces = factors, pieces
        self.chunks = list(_chunks(block.runs(this_pass.modulation, this_pass.clean), x.shape[1]))
        self.cross = _Pairs(block, factors, this_pass, counts)
        self.before = [_Before(block, factors, x[:, some], m, this_pass, some) for some, m in self.chunks]
        q, k, v = self.heads = _joined([before.heads() for before in self.before])
        pieces.run(q, k, v, *self.cross.arrays)
        self.attended = attention(q, k, v, pieces.run)
        pieces.add(self.attended)
        self.after = [
            _After(block, factors, x[:, some], self.attended[:, some], m, self.cross, pieces) for some, m in self.chunks
        ]
        self.result = kernels.joined([after.result for after in self.after])
        pieces.run(self.result)

    def back(self, gradient: mx.array, wanted: bool = True) -> mx.array | None:
        """As `block_gradients`, once."""
        pieces, factors, for_x, parts = self.pieces, self.factors, list[mx.array](), list[mx.array]()
        del self.result
        for after, (some, _) in zip(self.after, self.chunks, strict=True):
            one, other = after.back(gradient[:, some], pieces)
            pieces.add(one, other, *self.cross.sums, *factors.new())
            for_x.append(one)
            parts.append(other)
        del self.after
        gradient = mx.concatenate(parts, axis=1)
        pieces.run(gradient)
        q, k, v = self.heads
        heads = attention_gradients(q, k, v, self.attended, gradient, pieces)
        del q, k, v, self.heads, self.attended
        self.cross.back()
        return _to_input(self.before, self.chunks, heads, for_x, factors, pieces, wanted)


def _joined(heads: Sequence[Heads]) -> Heads:
    """Queries, keys and values of all tokens."""
    return [mx.concatenate(list(parts), axis=1) for parts in zip(*heads, strict=True)]


def _to_input(
    befores: Iterable[_Before],
    chunks: Sequence[tuple[slice, Modulation]],
    heads: Heads,
    for_x: Sequence[mx.array],
    factors: BlockFactors,
    pieces: Pieces,
    wanted: bool,
) -> mx.array | None:
    """From gradients for queries, keys and values, and for the input beside them, to that for the input."""
    parts = []
    for before, (some, _), beside in zip(befores, chunks, for_x, strict=True):
        found = before.back([one[:, some] for one in heads], wanted)
        if found is not None:
            parts.append(beside + found)
        pieces.add(*parts[-1:], *factors.new())
    if not wanted:
        return None
    result = mx.concatenate(parts, axis=1)
    pieces.add(result)
    return result


def tokens_of_piece(length: int) -> int:
    """Of so many tokens: how many at a time, at most `TOKENS_AT_ONCE`, about equally many, in whole tiles."""
    count = -(-length // TOKENS_AT_ONCE)
    return min(length, TOKENS_AT_ONCE, -(-length // count // TILE) * TILE)


def _chunks(runs: Runs[Modulation], length: int) -> Iterator[tuple[slice, Modulation]]:
    """Some of each run's tokens, and its modulation."""
    for tokens, m in runs:
        first, last, _ = tokens.indices(length)
        each = tokens_of_piece(last - first)
        for start in range(first, last, each):
            yield slice(start, min(start + each, last)), m


class _Before:
    """Queries, keys and values of some tokens, and the gradient for these tokens."""

    def __init__(
        self, block: Block, factors: BlockFactors, x: mx.array, m: Modulation, this_pass: ForwardPass, some: slice
    ):
        self.layer: SelfAttention = block.self_attn
        self.eps, self.x, self.m, self.rope = block.eps, x, m, rows_of(this_pass.rope, some)
        self.q, self.k, self.v = (Product(block, f"self_attn.{name}", factors) for name in "qkv")

    def heads(self) -> Heads:
        layer = self.layer
        normed = kernels.modulated_norm(self.x, self.m.scale_attn, self.m.shift_attn, self.eps)
        self.rows = [self.q(normed), self.k(normed)]
        q, k = (
            kernels.norm_and_rotate(y, norm.weight, layer.heads, self.rope, layer.eps)
            for y, norm in zip(self.rows, (layer.norm_q, layer.norm_k), strict=True)
        )
        return [q, k, split_heads(self.v(normed), layer.heads)]

    def back(self, heads: Heads, wanted: bool) -> mx.array | None:
        layer, (dq, dk, dv) = self.layer, (one.flatten(2) for one in heads)
        y = self.v.back(dv, wanted)
        for product, row, norm, one in zip(
            (self.q, self.k), self.rows, (layer.norm_q, layer.norm_k), (dq, dk), strict=True
        ):
            slope = slopes.norm_and_rotate(row, one, norm.weight, layer.heads, self.rope, layer.eps)
            y = product.back(slope, wanted, others=y)
        del self.rows
        return slopes.modulated_norm(self.x, y, self.m.scale_attn, self.eps) if wanted else None


class _Pairs:
    """Keys and values of cross-attention, and the sums of their gradients over the tokens."""

    def __init__(self, block: Block, factors: BlockFactors, this_pass: ForwardPass, counts: mx.array | None):
        layer, sources = block.cross_attn, [("", this_pass.context, block.cross_attn.norm_k)]
        if this_pass.image_context is not None:
            sources.append(("_img", this_pass.image_context, layer.norm_k_img))
        self.heads, self.eps = layer.heads, layer.eps
        self.layers: list[tuple[Product, Product, mx.array]] = []
        self.pairs: list[tuple[mx.array, mx.array]] = []
        self.counts = [counts, None]  # of equal rows that each row of text, and of an image, stands for
        self.rows: list[mx.array] = []
        for name, context, norm in sources:
            k, v = (Product(block, f"cross_attn.{letter}{name}", factors) for letter in "kv")
            self.rows.append(k(context))
            normed = mx.fast.rms_norm(self.rows[-1], norm.weight.astype(context.dtype), self.eps)
            self.pairs.append((split_heads(normed, self.heads), split_heads(v(context), self.heads)))
            self.layers.append((k, v, norm.weight))
        self.sums = [mx.zeros(one.shape) for one in self.arrays]

    @property
    def arrays(self) -> list[mx.array]:
        return [one for pair in self.pairs for one in pair]

    def add(self, gradients: Sequence[mx.array]) -> None:
        self.sums = [total + one.astype(mx.float32) for total, one in zip(self.sums, gradients, strict=True)]

    def back(self) -> None:
        """The factors of the layers that keys and values come from."""
        for (k, v, weight), rows, dk, dv in zip(self.layers, self.rows, self.sums[::2], self.sums[1::2], strict=True):
            dk, dv = (one.astype(rows.dtype).flatten(2) for one in (dk, dv))
            k.back(slopes.rms_norm(rows, dk, weight, self.eps), wanted=False)
            v.back(dv, wanted=False)


class _After:
    """`Block.after_attention` of some tokens, and back: ``result`` is theirs after the block.

    What `back` needs waits in ``pieces``, the result does not.
    """

    def __init__(
        self,
        block: Block,
        factors: BlockFactors,
        x: mx.array,
        attended: mx.array,
        m: Modulation,
        cross: _Pairs,
        pieces: Pieces,
    ):
        self.o, self.cross_q, self.cross_o, self.up, self.down = (
            Product(block, name, factors) for name in ("self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
        )
        self.block, self.factors, self.cross, self.m = block, factors, cross, m
        norm3, layer, one = block.norm3, block.cross_attn, mx.ones_like(m.gate_ffn)
        self.x1, y = kernels.add_and_norm(x, self.o(attended), m.gate_attn, norm3.weight, norm3.bias, block.eps)
        self.row = self.cross_q(y)
        normed = mx.fast.rms_norm(self.row, layer.norm_q.weight.astype(self.row.dtype), layer.eps)
        self.q = split_heads(normed, layer.heads)
        self.results = [attend(self.q, *pair, counts) for pair, counts in zip(cross.pairs, cross.counts, strict=False)]
        seen = self.cross_o(_total(self.results))
        self.x2, y = kernels.add_and_norm(self.x1, seen, one, m.scale_ffn, m.shift_ffn, block.eps)
        pieces.add(self.x1, self.row, self.x2, y, *self.results)
        self.wide = self.up(y)
        fed = kernels.gelu_tanh(self.wide)
        pieces.add(self.wide, fed)
        self.result = kernels.gated_add(self.x2, [self.down(fed)], m.gate_ffn)

    def back(self, gradient: mx.array, pieces: Pieces) -> tuple[mx.array, mx.array]:
        """The gradients for x and ``attended``, given that for the result; once."""
        block, factors, cross, m = self.block, self.factors, self.cross, self.m
        del self.result
        y = slopes.gelu_tanh(self.wide, self.down.back(slopes.scaled(gradient, m.gate_ffn)))
        del self.wide
        pieces.add(y, *factors.new())
        for_x = gradient + slopes.modulated_norm(self.x2, self.up.back(y), m.scale_ffn, block.eps)
        del self.x2
        pieces.add(for_x, *factors.new())
        y = self.cross_o.back(for_x)
        found = [
            attention_gradients(self.q, *pair, result, y, counts=counts)
            for pair, result, counts in zip(cross.pairs, self.results, cross.counts, strict=False)
        ]
        cross.add([array for _, *pair in found for array in pair])
        norm_q = block.cross_attn.norm_q.weight
        y = slopes.rms_norm(self.row, _total([dq for dq, *_ in found]).flatten(2), norm_q, block.cross_attn.eps)
        for_x = for_x + slopes.modulated_norm(self.x1, self.cross_q.back(y), block.norm3.weight, block.eps)
        del self.x1, self.row, self.q, self.results
        return for_x, self.o.back(slopes.scaled(for_x, m.gate_attn))


def _total(arrays: Sequence[mx.array]) -> mx.array:
    total = arrays[0]
    for one in arrays[1:]:
        total = total + one
    return total
