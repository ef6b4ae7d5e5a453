"""Gradients of the functions of `models.layers` and `models.rope` that are not products, each in one pass over memory.

``x`` is the function's input and ``y`` the gradient for its result, both (B, L, C); what is returned is the gradient
for ``x``. Arithmetic is float32 and only the result is rounded. MLX's own gradients keep a dozen float32 arrays as wide
as the feed-forward for a GELU alone. As in `models.kernels`, a kernel is used where it agrees with MLX's operations.
"""

from __future__ import annotations

import math

import mlx.core as mx

from ..models.kernels import MEAN_AND_FACTOR, READ, READ_PAIRS, ROOT_MEAN_SQUARE, _run, trial, with_kernel

READ_GRADIENT = """
Four<T> back[N];
EACH back[i] = VALUES(y, start + c);
"""
WRITE = "EACH WRITE(out, start + c) = kept[i];"
SCALED = """
EACH {
  Four<float> g = FLOATS(gate, c);
  for (int k = 0; k < 4; k++) kept[i].at[k] = static_cast<T>(static_cast<float>(kept[i].at[k]) * g.at[k]);
}
"""
# gelu(v) = v s with s = sigmoid(u), u = 1.5957691216 (v + 0.044715 v^3).
GELU = """
EACH for (int k = 0; k < 4; k++) {
  float v = static_cast<float>(kept[i].at[k]), w = 0.0713548162726f * v * v;
  float s = quick_divide(1.0f, 1 + quick_exp(-v * (1.5957691216f + w)));
  float slope = s + v * s * (1 - s) * (1.5957691216f + 3 * w);
  kept[i].at[k] = static_cast<T>(static_cast<float>(back[i].at[k]) * slope);
}
"""
# With n the normed values and g the gradient for them: factor (g - mean(g) - n mean(g n)).
LAYER_NORM = MEAN_AND_FACTOR + """\
float first = 0, second = 0;
EACH {
  Four<float> w = FLOATS(scale, c);
  for (int k = 0; k < 4; k++) {
    float g = static_cast<float>(back[i].at[k]) * w.at[k];
    first += g;
    second += g * (static_cast<float>(kept[i].at[k]) - mean) * factor;
  }
}
first = sum_lanes(first) / C;
second = sum_lanes(second) / C;
EACH {
  Four<float> w = FLOATS(scale, c);
  for (int k = 0; k < 4; k++) {
    float g = static_cast<float>(back[i].at[k]) * w.at[k];
    float n = (static_cast<float>(kept[i].at[k]) - mean) * factor;
    kept[i].at[k] = static_cast<T>(factor * (g - first - n * second));
  }
}
"""
# The rotation the other way round, times the norm's weight; then factor (g - n mean(g n)).
ROTATE_BACK = """
Four<T> ga[(C + 255) / 256], gb[(C + 255) / 256];
EACH_PAIR {
  ga[i] = VALUES(y, start + FIRST);
  gb[i] = VALUES(y, start + FIRST + HALF);
}
const size_t token = row % (size_t)cosines_shape[0];
#define TURNED(k) \\
  const float g = static_cast<float>(ga[i].at[k]), h = static_cast<float>(gb[i].at[k]); \\
  const float p_ = (g * cosine.at[k] + h * sine.at[k]) * v.at[k]; \\
  const float q_ = (h * cosine.at[k] - g * sine.at[k]) * w.at[k]; \\
  const float m_ = static_cast<float>(a[i].at[k]) * factor, n_ = static_cast<float>(b[i].at[k]) * factor;
#define TABLES \\
  Four<float> v = FLOATS(weight, FIRST), w = FLOATS(weight, FIRST + HALF); \\
  Four<float> cosine = FLOATS(cosines, token * HALF + p % HALF); \\
  Four<float> sine = FLOATS(sines, token * HEAD + HALF + p % HALF);
float dot = 0;
EACH_PAIR {
  TABLES
  for (int k = 0; k < 4; k++) {
    TURNED(k)
    dot += p_ * m_ + q_ * n_;
  }
}
dot = sum_lanes(dot) / C;
EACH_PAIR {
  TABLES
  for (int k = 0; k < 4; k++) {
    TURNED(k)
    a[i].at[k] = static_cast<T>(factor * (p_ - m_ * dot));
    b[i].at[k] = static_cast<T>(factor * (q_ - n_ * dot));
  }
}
EACH_PAIR {
  WRITE(out, start + FIRST) = a[i];
  WRITE(out, start + FIRST + HALF) = b[i];
}
"""


def _scaled(x, gate):
    return (x.astype(mx.float32) * gate).astype(x.dtype)


@mx.compile
def _gelu_tanh(x, y):
    v, g = x.astype(mx.float32), y.astype(mx.float32)
    w = 0.0713548162726 * v * v
    s = 1 / (1 + mx.exp(-v * (1.5957691216 + w)))  # on a CPU half the time of a hyperbolic tangent
    return (g * (s + v * s * (1 - s) * (1.5957691216 + 3 * w))).astype(x.dtype)


def _modulated_norm(x, y, scale, eps):
    v, g = x.astype(mx.float32), y.astype(mx.float32) * scale
    v = v - v.mean(-1, keepdims=True)
    factor = mx.rsqrt((v * v).mean(-1, keepdims=True) + eps)
    n = v * factor
    return (factor * (g - g.mean(-1, keepdims=True) - n * (g * n).mean(-1, keepdims=True))).astype(x.dtype)


def _norm_and_rotate(x, y, weight, heads, table, eps):
    cosines, sines = table
    v = x.astype(mx.float32)
    factor = mx.rsqrt((v * v).mean(-1, keepdims=True) + eps)
    n = v * factor
    pairs = y.astype(mx.float32).reshape(*y.shape[:2], heads, 2, -1)
    g = (pairs * cosines - pairs[..., ::-1, :] * sines).reshape(x.shape) * weight
    return (factor * (g - n * (g * n).mean(-1, keepdims=True))).astype(x.dtype)


@with_kernel(_scaled)
def scaled(x, gate):
    """The gradient ``x`` for ``y * gate``, for y; gate float32 has C values."""
    return _run("scaled", READ + SCALED + WRITE, 0.0, {"x": x, "gate": gate.flatten()})[0]


@with_kernel(_gelu_tanh)
def gelu_tanh(x, y):
    """Of `layers.gelu_tanh`."""
    row = math.gcd(x.shape[-1], 512)
    rows = {"x": x.reshape(-1, row), "y": y.reshape(-1, row)}
    return _run("gelu_tanh_slope", READ + READ_GRADIENT + GELU + WRITE, 0.0, rows)[0].reshape(x.shape)


@with_kernel(_modulated_norm)
def modulated_norm(x, y, scale, eps):
    """Of `layers.modulated_norm`."""
    rows = {"x": x, "y": y, "scale": scale.flatten()}
    return _run("layer_norm_slope", READ + READ_GRADIENT + LAYER_NORM + WRITE, eps, rows)[0]


@with_kernel(_norm_and_rotate)
def norm_and_rotate(x, y, weight, heads, table, eps):
    """Of `rope.norm_and_rotate`."""
    length, channels = x.shape[1:]
    cosines, sines = (part.reshape(length, -1) for part in table)
    rows = {"x": x, "y": y, "weight": weight.astype(mx.float32), "cosines": cosines, "sines": sines}
    steps = READ_PAIRS + ROOT_MEAN_SQUARE + ROTATE_BACK
    return _run("rms_norm_and_rotate_slope", steps, eps, rows, HEAD=channels // heads)[0]


def try_kernels(dtype: mx.Dtype, dim: int, ffn_dim: int, head_dim: int) -> None:
    """Try each kernel now: a trial within a graph that is differentiated would keep all that it computes."""
    if mx.default_device() == mx.gpu:
        for fused in (scaled, modulated_norm, norm_and_rotate, gelu_tanh):
            channels = ffn_dim if fused is gelu_tanh else dim
            fused.usable(*trial(fused, dtype, channels, 8, 1, head_dim))


def rms_norm(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Of ``mx.fast.rms_norm``, whose own gradient is one pass; that for the weight is not wanted."""
    _, (found,) = mx.vjp(lambda x: mx.fast.rms_norm(x, None, eps), [x], [scaled(y, weight)])
    return found
