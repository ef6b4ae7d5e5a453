"""The small functions of `layers` and `rope`, with the kernels of `kernels` where this machine can use them.

Kernels have no gradient, so the networks use the plain functions, and `execution` uses these.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import kernels, layers, rope


def modulated_norm(x: mx.array, scale: mx.array, shift: mx.array, eps: float) -> mx.array:
    """Same as `layers.modulated_norm`."""
    if kernels.usable(kernels.layer_norm, x, scale):
        return kernels.layer_norm(x, scale.flatten(), shift.flatten(), eps)
    return layers.modulated_norm(x, scale, shift, eps)


def gated_add(x: mx.array, y: mx.array | Sequence[mx.array], gate: mx.array) -> mx.array:
    """Same as `layers.gated_add`; y (B, L, D) is whole or in parts along L, which a kernel need not join."""
    parts = [y] if isinstance(y, mx.array) else y
    if (len(parts) == 1 or x.shape[0] == 1) and kernels.usable(kernels.gated_add, x, gate, parts=len(parts)):
        return kernels.gated_add(x, parts, gate.flatten())
    return layers.gated_add(x, joined(parts), gate)


def add_and_norm(
    x: mx.array, y: mx.array, gate: mx.array, scale: mx.array, shift: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """`gated_add` and the `modulated_norm` of its result, in one kernel if possible."""
    if kernels.usable(kernels.add_and_norm, x, gate, scale):
        total, normed = kernels.add_and_norm(x, y, gate.flatten(), scale.flatten(), shift.flatten(), eps)
        return total, normed
    total = gated_add(x, y, gate)
    return total, modulated_norm(total, scale, shift, eps)


def gelu_tanh(x: mx.array) -> mx.array:
    """Same as `layers.gelu_tanh`."""
    return kernels.gelu_tanh(x) if kernels.usable(kernels.gelu_tanh, x) else layers.gelu_tanh(x)


def norm_and_rotate(x: mx.array, weight: mx.array, heads: int, table: rope.RopeTable, eps: float) -> mx.array:
    """Same as `rope.norm_and_rotate`."""
    head_dim = x.shape[-1] // heads
    if head_dim % 8 == 0 and kernels.usable(kernels.rms_norm_and_rotate, x, weight, head_dim=head_dim):
        cosines, sines = (part.reshape(x.shape[1], -1) for part in table)
        rotated = kernels.rms_norm_and_rotate(x, weight.astype(mx.float32), eps, cosines, sines, head_dim)
        return rotated.reshape(*x.shape[:2], heads, -1)
    return rope.norm_and_rotate(x, weight, heads, table, eps)


def joined(parts: Sequence[mx.array]) -> mx.array:
    """Parts of tokens (B, L, D) as one array."""
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=1)
