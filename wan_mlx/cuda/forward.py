"""Needed by a forward on CUDA: keys that fill a tile of cuDNN's attention, and a bound on frees that MLX defers."""

from __future__ import annotations

import mlx.core as mx

# cuDNN's tile of keys. With an incomplete last tile every tile is slower, as if each were masked: 10.3 ms instead of
# 9.5 for 32,760 tokens on an H200.
KEY_TILE = 128
# At most this many keys may be appended for each existing one.
MOST_APPENDED = 1 / 1024


def keys_to_append(length: int) -> int:
    """Number of keys that `fill_last_tile` appends to ``length``."""
    missing = -length % KEY_TILE
    return missing if mx.cuda.is_available() and missing <= MOST_APPENDED * length else 0


def fill_last_tile(x: mx.array, length: int | None = None) -> mx.array:
    """Pad keys or values with their mean to whole tiles, where that is faster; (B, L, heads, head_dim).

    With ``length`` only so many of x are keys or values, and what is behind them is room.

    The appended keys have almost no weight, for any query: the mean key's product with a query is the mean of all
    keys' products, and the exponential of a mean is at most the mean of the exponentials. So it has at most the average
    weight, and n of them at most n / L of the total. By that share, at most, a result moves towards the mean value;
    bfloat16 rounds a number by up to twice `MOST_APPENDED` of it.
    """
    length = length or x.shape[1]
    return append_mean(x, keys_to_append(length), length)


def append_mean(x: mx.array, count: int, length: int | None = None) -> mx.array:
    """x (B, L, heads, head_dim), or the first ``length`` of L, with its mean appended ``count`` times, in room if any.

    The mean is a constant to gradients: through it each row would get ``count / L`` of an average row's.
    """
    length = length or x.shape[1]
    room, x = x[:, : length + count], x[:, :length]
    if not count:
        return x
    batch, _, *rest = x.shape
    rows = x.flatten(2)
    # Summed in float32, unlike `mx.mean` on CUDA.
    mean = mx.full((1, length), 1 / length, x.dtype) @ mx.stop_gradient(rows)
    means = mx.broadcast_to(mean, (batch, count, rows.shape[-1]))
    if room.shape[1] > length:
        room[:, length:] = means.reshape(batch, count, *rest)
        return room
    return mx.concatenate([rows, means], axis=1).reshape(batch, length + count, *rest)


class DeferredFrees:
    """Bounds to ``most`` bytes the memory that the GPU has released and MLX has not yet freed.

    On CUDA MLX frees memory in a thread, which falls behind by gigabytes when many small pieces are submitted.
    `mx.synchronize` waits for that thread, so it is called when memory has grown since the last call.
    """

    def __init__(self, most: int):
        self.most = most
        self.least = mx.get_active_memory()

    def limit(self) -> None:
        """Wait, if more than ``most`` bytes may be pending."""
        if mx.cuda.is_available() and mx.get_active_memory() > self.least + self.most:
            mx.synchronize()
            self.least = mx.get_active_memory()
