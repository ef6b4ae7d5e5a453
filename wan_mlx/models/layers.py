"""The small parts that the networks share. Parameters are zero until loaded: no global random state is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from . import kernels

# Everything after self-attention treats tokens one by one, so it runs on this many at a time: the 5.8x wider
# feed-forward arrays then stay small, and matmuls are still large enough to run at full speed. Where memory is short
# it is fewer (`wan_mlx.planning.choose`).
TOKENS_AT_ONCE = 32768 if mx.cuda.is_available() else 8192
# The feed-forward never takes more: no faster, and its arrays are the largest there are.
FEED_FORWARD_TOKENS = 8192
# From here down memory is so short that nothing is submitted while something else runs beside wide arrays.
FEW_TOKENS = 1024


# What a linear layer may keep beside its weights, of LoRAs that are not merged: `with_side`.
SIDE_KEYS = ("lora_a", "lora_b", "lora_dense")


class Linear(nn.Linear):
    """``nn.Linear``, not initialised at random; adds what LoRAs beside its weights give."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True):
        nn.Module.__init__(self)
        self.weight = mx.zeros((out_dim, in_dim))
        if bias:
            self.bias = mx.zeros((out_dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return with_side(self, x, super().__call__(x))


def with_side(layer: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    """``y``, a linear layer's result for ``x``, plus what LoRAs kept beside its weights add."""
    if "lora_a" in layer:
        y = y + (x @ layer.lora_a.T) @ layer.lora_b.T
    return y + x @ layer.lora_dense.T if "lora_dense" in layer else y


class Embedding(nn.Embedding):
    """``nn.Embedding``, not initialised at random."""

    def __init__(self, count: int, dim: int):
        nn.Module.__init__(self)
        self.weight = mx.zeros((count, dim))


@mx.compile
def scale_shift(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """``x * scale + shift`` computed in float32, in x's dtype."""
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


def gated_add(x: mx.array, y: mx.array | Sequence[mx.array], gate: mx.array) -> mx.array:
    """``x + y * gate`` computed in float32, in x's dtype; y (B, L, D) is whole or the parts of `token_parts`."""
    parts = [y] if isinstance(y, mx.array) else y
    if (len(parts) == 1 or x.shape[0] == 1) and kernels.usable(kernels.gated_add, x, gate, parts=len(parts)):
        return kernels.gated_add(x, parts, gate.flatten())
    return _gated_add(x, joined(parts), gate)


@mx.compile
def _gated_add(x: mx.array, y: mx.array, gate: mx.array) -> mx.array:
    return (x.astype(mx.float32) + y.astype(mx.float32) * gate).astype(x.dtype)


def add_and_norm(
    x: mx.array, y: mx.array, gate: mx.array, scale: mx.array, shift: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """`gated_add` and the `modulated_norm` of its result, in one kernel where there is one."""
    if kernels.usable(kernels.add_and_norm, x, gate, scale):
        return kernels.add_and_norm(x, y, gate.flatten(), scale.flatten(), shift.flatten(), eps)
    total = gated_add(x, y, gate)
    return total, modulated_norm(total, scale, shift, eps)


def gelu_tanh(x: mx.array) -> mx.array:
    """tanh-approximated GELU computed in float32, in x's dtype."""
    if kernels.usable(kernels.gelu_tanh, x):
        return kernels.gelu_tanh(x)
    return _gelu_tanh(x)


@mx.compile
def _gelu_tanh(x: mx.array) -> mx.array:
    y = x.astype(mx.float32)
    return (0.5 * y * (1.0 + mx.tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))).astype(x.dtype)


class RMSNorm(nn.Module):
    """Holds the weight of a query/key norm over all heads; applied by the attention below."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = mx.ones((dim,))


def modulated_norm(x: mx.array, scale: mx.array, shift: mx.array, eps: float) -> mx.array:
    """LayerNorm times ``scale`` plus ``shift``, float32 (1 or B, 1, D) or (D,), in x's dtype; x is (B, L, D).

    Statistics are float32. One kernel does it all if scale and shift are the same for the whole batch; MLX's own rounds
    them to x's dtype, since wider ones would widen the result and everything after it.
    """
    if kernels.usable(kernels.layer_norm, x, scale):
        return kernels.layer_norm(x, scale.flatten(), shift.flatten(), eps)
    if scale.size == x.shape[-1]:
        return mx.fast.layer_norm(x, scale.flatten().astype(x.dtype), shift.flatten().astype(x.dtype), eps)
    return scale_shift(mx.fast.layer_norm(x, None, None, eps), scale, shift)


class AffineNorm(nn.Module):
    """Holds the weight and bias of a LayerNorm; applied by the block that has it."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = mx.ones((dim,))
        self.bias = mx.zeros((dim,))


class LateFrees:
    """Keeps down what a GPU is done with and MLX has not freed.

    On CUDA a thread of MLX's frees it, which falls behind where much is submitted in small pieces: unlimited, by
    gigabytes. `mx.synchronize` waits for that thread, and so is called when memory has grown since it was called last.
    """

    def __init__(self, most: int):
        self.most = most
        self.least = mx.get_active_memory()

    def limit(self) -> None:
        """Wait, if more than ``most`` bytes may be left to free."""
        if mx.cuda.is_available() and mx.get_active_memory() > self.least + self.most:
            mx.synchronize()
            self.least = mx.get_active_memory()


class Pacer:
    """Submits work piece by piece: one piece runs while the next waits, and no more.

    MLX allocates the arrays of whatever is submitted long before the GPU gets there, so a whole block submitted at
    once holds all its temporaries at once. With two pieces in flight memory stays low and the GPU never idles.

    Attributes:
        tokens_at_once: size of the pieces where tokens are independent (`in_token_chunks`).
        late: what limits the memory that is freed late, if anything does.
    """

    def __init__(self, tokens_at_once: int = TOKENS_AT_ONCE, late: LateFrees | None = None):
        self.tokens_at_once, self.late = tokens_at_once, late
        self.running: tuple[mx.array, ...] = ()

    def __call__(self, *arrays: mx.array) -> None:
        """Submit the computation of ``arrays``, and wait until the piece before it is done."""
        mx.async_eval(*arrays)
        mx.eval(*self.running)
        self.running = arrays
        if self.late:
            self.late.limit()

    def finish(self) -> None:
        """Wait for all that was submitted, and hold nothing of it."""
        mx.eval(*self.running)
        self.running = ()

    def settle(self) -> None:
        """Wait for what runs, where memory is short, so that its temporaries are gone before more is submitted."""
        if self.tokens_at_once <= FEW_TOKENS:
            mx.eval(*self.running)

    def submit(self, *arrays: mx.array) -> None:
        """Submit a piece too small to wait for: the GPU would run dry before the next one is there."""
        mx.async_eval(*arrays)
        self.running = (*self.running, *arrays)

    def small(self, *arrays: mx.array) -> None:
        """Submit a piece that is soon done, to be waited for only where memory matters more than time."""
        if self.tokens_at_once > FEED_FORWARD_TOKENS:
            self.submit(*arrays)
        else:
            self(*arrays)


def in_token_chunks(
    function: Callable[[list[mx.array]], mx.array], arrays: list[mx.array], pace: Pacer, at_once: int
) -> mx.array:
    """``function(arrays)`` for a function that treats tokens (B, L, D) independently, ``at_once`` tokens at a time.

    The list, or that of the slices, is the function's to empty, so that nothing is held longer than it is needed. It
    has its result computed: ``pace(result)``.
    """
    parts = token_parts(function, arrays, at_once)
    whole = joined(parts)
    if len(parts) > 1:
        pace.submit(whole)  # or the parts would live until what comes after is computed
    return whole


def token_parts(
    function: Callable[[list[mx.array]], mx.array], arrays: list[mx.array], at_once: int
) -> list[mx.array]:
    """The same, not put together: ``at_once`` tokens in each part but the last."""
    length = arrays[0].shape[1]
    if length <= at_once:
        return [function(arrays)]
    return [function([x[:, start : start + at_once] for x in arrays]) for start in range(0, length, at_once)]


def joined(parts: Sequence[mx.array]) -> mx.array:
    """Parts of tokens (B, L, D) as one array."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
