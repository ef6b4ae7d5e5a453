"""Small layers that the networks share. Parameters are zero until loaded: no global random state changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce

import mlx.core as mx
import mlx.nn as nn

# Parameters of unmerged LoRAs that a linear layer may have: see `with_side`.
SIDE_KEYS = (
    "lora_a", "lora_b", "lora_dense", "lora_left", "lora_right", "lora_order", "lora_rows", "lora_columns",
)  # fmt: skip


class Linear(nn.Linear):
    """``nn.Linear``, not initialised at random; adds unmerged LoRAs."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True):
        nn.Module.__init__(self)
        self.weight = mx.zeros((out_dim, in_dim))
        if bias:
            self.bias = mx.zeros((out_dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return with_side(self, x, super().__call__)


def with_side(layer: nn.Module, x: mx.array, linear: Callable[[mx.array], mx.array]) -> mx.array:
    """A linear layer's result for ``x`` with its unmerged LoRAs; ``linear`` is the layer without them.

    With the weights and biases ``W`` and ``b`` that is ``(rows * W * columns + lora_b @ lora_a + lora_dense + the sum
    of kron(left, right)) @ x + b``; DoRA has rows or columns, LoKr left and right.
    """
    y = linear(x * layer.lora_columns) if "lora_columns" in layer else linear(x)
    if "lora_rows" in layer:
        y = scale_rows(y, layer.lora_rows, layer.bias if "bias" in layer else mx.array(0.0))
    if "lora_a" in layer:
        y = mx.addmm(y, x @ layer.lora_a.T, layer.lora_b.T)
    if "lora_dense" in layer:
        y = y + x @ layer.lora_dense.T
    for left, right in zip(layer.get("lora_left", ()), layer.get("lora_right", ()), strict=True):
        z = kron_product(x, left, right)
        y = y + (z[..., layer.lora_order] if "lora_order" in layer else z)
    return y


def kron_product(x: mx.array, left: mx.array, right: mx.array) -> mx.array:
    """``x @ kron(left, right).T`` in two small products; x is (…, inputs)."""
    inner = x.reshape(*x.shape[:-1], left.shape[1], right.shape[1]) @ right.T
    return (inner.swapaxes(-1, -2) @ left.T).swapaxes(-1, -2).reshape(*x.shape[:-1], -1)


class Conv1d(nn.Module):
    """A convolution in time, (B, T, inputs) → (B, fewer, outputs), not initialised at random."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.weight = mx.zeros((outputs, kernel, inputs))
        self.bias = mx.zeros((outputs,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.conv1d(x, self.weight, self.stride) + self.bias


class Embedding(nn.Embedding):
    """``nn.Embedding``, not initialised at random."""

    def __init__(self, count: int, dim: int):
        nn.Module.__init__(self)
        self.weight = mx.zeros((count, dim))


def chain(x: mx.array, layers: Iterable[Callable]) -> mx.array:
    """x through the layers, one after the other."""
    return reduce(lambda x, layer: layer(x), layers, x)


@mx.compile
def scale_shift(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """``x * scale + shift`` computed in float32, in x's dtype."""
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


@mx.compile
def gated_add(x: mx.array, y: mx.array, gate: mx.array) -> mx.array:
    """``x + y * gate`` computed in float32, in x's dtype."""
    return (x.astype(mx.float32) + y.astype(mx.float32) * gate).astype(x.dtype)


@mx.compile
def scale_rows(y: mx.array, rows: mx.array, bias: mx.array) -> mx.array:
    """``rows * (y - bias) + bias`` computed in float32, in y's dtype."""
    bias = bias.astype(mx.float32)
    return ((y.astype(mx.float32) - bias) * rows + bias).astype(y.dtype)


@mx.compile
def gelu_tanh(x: mx.array) -> mx.array:
    """tanh-approximated GELU computed in float32, in x's dtype."""
    y = x.astype(mx.float32)
    return (0.5 * y * (1.0 + mx.tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))).astype(x.dtype)


def modulated_norm(x: mx.array, scale: mx.array, shift: mx.array, eps: float) -> mx.array:
    """LayerNorm times ``scale`` plus ``shift``, float32 (1 or B, 1, D) or (D,), in x's dtype; x is (B, L, D).

    Statistics are float32. Scale and shift of the whole batch are rounded to x's dtype, since wider ones would widen
    the result and everything after it.
    """
    if scale.size == x.shape[-1]:
        return mx.fast.layer_norm(x, scale.flatten().astype(x.dtype), shift.flatten().astype(x.dtype), eps)
    return scale_shift(mx.fast.layer_norm(x, None, None, eps), scale, shift)


class AffineNorm(nn.Module):
    """LayerNorm with a weight and a bias."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = mx.ones((dim,))
        self.bias = mx.zeros((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return modulated_norm(x, self.weight, self.bias, self.eps)
