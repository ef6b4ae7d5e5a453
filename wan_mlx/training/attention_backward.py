"""Gradients of attention without an array of all queries by all keys.

On CUDA cuDNN's kernel computes them. MLX calls it where the queries fill tiles of 128, in 16 bits, so queries are
filled up with zeros, whose result's gradient is zero: they add nothing. Keys are filled up as in the forward pass.
Elsewhere MLX would store the scores; here some queries and heads at a time make theirs again.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .. import cuda
from ..cuda.forward import fill_last_tile
from ..models import attention as plain
from ..models.attention_execution import attention, has_fused_kernel
from .pieces import Pieces

# Attention's scores that are made again at a time: 128 MB in float32, and as much again for what is made of them.
SCORES_AT_ONCE = 1 << 25
TILE = 128  # queries, of cuDNN's gradient

Heads = list[mx.array]  # queries, keys and values, or their gradients: (B, L, heads, head_dim)


def has_fused_gradient(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether MLX computes attention's gradients by a fused kernel."""
    return cuda.available() and has_fused_kernel(dtype, head_dim)


def attention_and_gradients(heads: Heads, rest: Callable[[mx.array], mx.array], pieces: Pieces) -> Heads:
    """Gradients for queries, keys and values of self-attention, whose result is needed once.

    Args:
        heads: emptied.
        rest: the result of attention (B, L, heads * head_dim) → the gradient for it. It must not compute anything.
        pieces: what waits to be computed before.
    """
    if has_fused_gradient(heads[0].dtype, heads[0].shape[-1]):
        return _in_one_graph(heads, rest, pieces)
    pieces.run()
    q, k, v = heads
    heads.clear()
    attended = attention(q, k, v, pieces.run)
    pieces.run(attended)
    gradient = rest(attended)
    pieces.run(gradient)
    return attention_gradients(q, k, v, attended, gradient, pieces)


def _in_one_graph(heads: Heads, rest: Callable[[mx.array], mx.array], pieces: Pieces) -> Heads:
    """Both in one graph, because what the kernel keeps of the forward pass for the backward one cannot be had
    otherwise. The function that is differentiated is attention and then one whose "gradient" is ``rest``: nothing of it
    is evaluated before the graph is whole."""
    gradients: list[mx.array] = []
    last = mx.custom_function(lambda attended: attended[:, 0, 0].sum())

    @last.vjp
    def _(attended, cotangent, output):
        gradients.append(rest(attended))
        return gradients[0]

    _, found = mx.vjp(lambda *heads: last(_filled(*heads)), heads, [mx.array(1.0, heads[0].dtype)])
    heads.clear()
    pieces.add(gradients.pop())
    pieces.finish()
    pieces.run(*found)  # not waited for: the next block is prepared meanwhile
    return found


def attend(q: mx.array, k: mx.array, v: mx.array, counts: mx.array | None = None) -> mx.array:
    """`attention`, within what is differentiated or evaluated later: it computes nothing yet.

    ``counts`` (keys,): how many equal keys and values each one stands for, where there is no fused kernel. It is
    written out, as MLX does there itself, because MLX's own would need a mask.
    """
    if has_fused_gradient(q.dtype, q.shape[-1]):
        return _filled(q, k, v)
    if counts is None:
        return attention(q, k, v, lambda *arrays: None)
    dtype = q.dtype
    q, k, v = (x.astype(mx.float32).transpose(0, 2, 1, 3) for x in (q, k, v))
    return (_weights(q, k.swapaxes(-1, -2), counts) @ v).transpose(0, 2, 1, 3).flatten(2).astype(dtype)


def _weights(query: mx.array, key: mx.array, counts: mx.array | None) -> mx.array:
    """Softmax of the scores, float32; ``key`` is float32, (B, heads, head_dim, keys).

    The product of two 16-bit numbers is exact in float32: scores rounded to 16 bits would make weights that are some
    percent off. c equal keys together weigh as one whose score has log(c) added.
    """
    scores = (query.astype(mx.float32) * query.shape[-1] ** -0.5) @ key
    return mx.softmax(scores if counts is None else scores + mx.log(counts), axis=-1, precise=True)


def _filled(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """`attention`, with queries filled up to whole tiles, and keys where that is faster."""
    length = q.shape[1]
    q = mx.pad(q, [(0, 0), (0, -length % TILE), (0, 0), (0, 0)]) if length % TILE else q
    return plain.attention(q, fill_last_tile(k), fill_last_tile(v))[:, :length]


def attention_gradients(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    attended: mx.array,
    gradient: mx.array,
    pieces: Pieces | None = None,
    counts: mx.array | None = None,
) -> Heads:
    """Gradients for queries, keys and values (B, L, heads, head_dim) of `attention`, whose result ``attended``
    (B, L, heads * head_dim) has ``gradient``; ``counts`` as for `attend`.

    Some queries and heads at a time, whose scores are made again: ``dS = P * (dO V^T - sum(dO * O))``. Scores, softmax
    and all sums over queries are float32. With ``pieces`` each group is computed before the next is written down;
    without them one is only made after the other when the results are computed.
    """
    if has_fused_gradient(q.dtype, q.shape[-1]):
        _, found = mx.vjp(_filled, [q, k, v], [gradient])
        return found
    batch, rows, heads, head_dim = q.shape
    dtype, keys = q.dtype, k.shape[1]
    # (B, heads, L, head_dim)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    o, g = (x.reshape(batch, rows, heads, head_dim).transpose(0, 2, 1, 3) for x in (attended, gradient))
    heads_at_once = max(1, min(heads, SCORES_AT_ONCE // (batch * keys * min(rows, 512))))
    rows_at_once = max(1, min(rows, SCORES_AT_ONCE // (batch * keys * heads_at_once)))
    groups: list[Heads] = []
    before: Heads = []
    for head in range(0, heads, heads_at_once):
        own = slice(head, head + heads_at_once)
        key, value = k[:, own], v[:, own]
        wide_key = key.astype(mx.float32).swapaxes(-1, -2)
        dk, dv, dq = mx.zeros(key.shape), mx.zeros(value.shape), []
        for row in range(0, rows, rows_at_once):
            some = slice(row, row + rows_at_once)
            query, out, back = q[:, own, some], o[:, own, some], g[:, own, some]
            if before:
                query, back = mx.depends([query, back], before)
            off = _dot(back, out)
            weights, slopes = _weights_and_slopes(
                _weights(query, wide_key, counts), back @ value.swapaxes(-1, -2), off, head_dim**-0.5
            )
            dv = dv + (weights.swapaxes(-1, -2) @ back).astype(mx.float32)
            dk = dk + (slopes.swapaxes(-1, -2) @ query).astype(mx.float32)
            dq.append(slopes @ key)
            before = [dk, dv, dq[-1]]
            if pieces:
                pieces.run(*before)
                before = []
        groups.append([mx.concatenate(dq, axis=2), dk.astype(dtype), dv.astype(dtype)])
    joined = (mx.concatenate(list(group), axis=1) for group in zip(*groups, strict=True))
    return [x.transpose(0, 2, 1, 3) for x in joined]


@mx.compile
def _dot(a, b):
    return (a.astype(mx.float32) * b.astype(mx.float32)).sum(-1, keepdims=True)


@mx.compile
def _weights_and_slopes(weights, products, off, scale):
    """Softmax of the scores as the products need it and, times ``scale``, its gradient for the scores, in one pass."""
    slopes = weights * (products.astype(mx.float32) - off) * scale
    return weights.astype(products.dtype), slopes.astype(products.dtype)
