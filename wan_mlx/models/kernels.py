"""Kernels for the transformer's norms and neighbouring operations, each in one pass over memory; MLX takes two to four.

The same source serves Metal and CUDA: a group of 32 threads (a simdgroup, a warp) takes one row, which stays in
registers. Statistics and arithmetic are float32, and only the result is rounded.

A kernel is used after its results on this machine match MLX's operations, on a few rows of the wanted width
(`usable`); otherwise, and on the CPU, callers use the operations.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

log = logging.getLogger(__name__)

SWITCH = "WAN_MLX_KERNELS"  # "0" in the environment turns the kernels off
LANES, THREADS = 32, 256
# Dtypes of the kernels, and the largest difference of their results, of size 10 or so, from MLX's.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}

# Names that differ between the two languages, and the type of four neighbouring values.
METAL = """
#define DEVICE device
inline float sum_lanes(float value) { return metal::simd_sum(value); }
inline float quick_exp(float x) { return metal::fast::exp(x); }
inline float quick_divide(float x, float y) { return x / y; }
"""
CUDA = """
#define DEVICE
inline __device__ float sum_lanes(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}
inline __device__ float quick_exp(float x) { return __expf(x); }
inline __device__ float quick_divide(float x, float y) { return __fdividef(x, y); }
"""
FOUR = """
template <typename T> struct alignas(4 * sizeof(T)) Four { T at[4]; };
"""
THREAD = {
    "metal": "const uint thread_number = thread_position_in_grid.x;",
    "cuda": "const unsigned int thread_number = blockIdx.x * blockDim.x + threadIdx.x;",
}
# Rows have C values; a lane takes those from 4 * (lane + 32 * i) on, four at a time.
ROW = """
const int lane = thread_number % 32;
const size_t row = thread_number / 32;
if (row >= (size_t)x_shape[0]) return;
constexpr int N = (C + 127) / 128;
const size_t start = row * C;
#define EACH _Pragma("unroll") for (int i = 0, c = 4 * lane; i < N; i++, c += 128) if (C % 128 == 0 || c < C)
#define VALUES(array, at) (*(const DEVICE Four<T>*)((array) + (at)))
#define FLOATS(array, at) (*(const DEVICE Four<float>*)((array) + (at)))
#define WRITE(array, at) (*(DEVICE Four<T>*)((array) + (at)))
"""
# All reads come before all writes: a compiler must assume that a write may change the values read after it, so each
# read would wait for the write before it.
READ = """
Four<T> kept[N];
EACH kept[i] = VALUES(x, start + c);
"""
# x + y * gate, rounded as it will be written; y's row begins at y_start.
READ_SUM = """
Four<T> kept[N];
EACH {
  Four<T> a = VALUES(x, start + c), b = VALUES(y, y_start + c);
  Four<float> g = FLOATS(gate, c);
  for (int k = 0; k < 4; k++)
    kept[i].at[k] = static_cast<T>(static_cast<float>(a.at[k]) + static_cast<float>(b.at[k]) * g.at[k]);
}
"""
WRITE_SUM = "EACH WRITE(total, start + c) = kept[i];"
Y_WHOLE = "const size_t y_start = start;"
# Values that are rotated together are half a head apart; one lane has both: pairs p, p + 1, p + 2, p + 3.
READ_PAIRS = """
constexpr int HALF = HEAD / 2;
#define EACH_PAIR _Pragma("unroll") for (int i = 0, p = 4 * lane; i < (C + 255) / 256; i++, p += 128) \\
  if (C % 256 == 0 || p < C / 2)
#define FIRST (p / HALF * HEAD + p % HALF)
Four<T> a[(C + 255) / 256], b[(C + 255) / 256];
EACH_PAIR {
  a[i] = VALUES(x, start + FIRST);
  b[i] = VALUES(x, start + FIRST + HALF);
}
"""
ROOT_MEAN_SQUARE = """
float squares = 0;
EACH_PAIR for (int k = 0; k < 4; k++) {
  float v = static_cast<float>(a[i].at[k]), w = static_cast<float>(b[i].at[k]);
  squares += v * v + w * w;
}
const float factor = rsqrt(sum_lanes(squares) / C + EPS);
"""
SCALE_AND_ROTATE = """
const size_t token = row % (size_t)cosines_shape[0];
EACH_PAIR {
  Four<float> v = FLOATS(weight, FIRST), w = FLOATS(weight, FIRST + HALF);
  Four<float> cosine = FLOATS(cosines, token * HALF + p % HALF), sine = FLOATS(sines, token * HEAD + HALF + p % HALF);
  for (int k = 0; k < 4; k++) {
    float first = static_cast<float>(a[i].at[k]) * factor * v.at[k];
    float second = static_cast<float>(b[i].at[k]) * factor * w.at[k];
    a[i].at[k] = static_cast<T>(first * cosine.at[k] - second * sine.at[k]);
    b[i].at[k] = static_cast<T>(second * cosine.at[k] + first * sine.at[k]);
  }
}
EACH_PAIR {
  WRITE(out, start + FIRST) = a[i];
  WRITE(out, start + FIRST + HALF) = b[i];
}
"""
# tanh is written as 1 - 2 / (1 + exp(2 u)): one exponential and one division.
GELU = """
EACH for (int k = 0; k < 4; k++) {
  float v = static_cast<float>(kept[i].at[k]);
  kept[i].at[k] = static_cast<T>(quick_divide(v, 1 + quick_exp(v * (-1.5957691216f - 0.0713548162726f * v * v))));
}
EACH WRITE(out, start + c) = kept[i];
"""
LAYER_NORM = """
float sum = 0;
EACH for (int k = 0; k < 4; k++) sum += static_cast<float>(kept[i].at[k]);
const float mean = sum_lanes(sum) / C;
float squares = 0;
EACH for (int k = 0; k < 4; k++) {
  float v = static_cast<float>(kept[i].at[k]) - mean;
  squares += v * v;
}
const float factor = rsqrt(sum_lanes(squares) / C + EPS);
EACH {
  Four<float> w = FLOATS(scale, c), b = FLOATS(shift, c);
  for (int k = 0; k < 4; k++)
    kept[i].at[k] = static_cast<T>((static_cast<float>(kept[i].at[k]) - mean) * factor * w.at[k] + b.at[k]);
}
EACH WRITE(out, start + c) = kept[i];
"""


def usable(kernel: Callable, x: mx.array, *vectors: mx.array, **constants: int) -> bool:
    """Whether a kernel works for ``x`` with ``vectors`` of one value per channel.

    ``constants``: the kernel's other compile-time constants, by name.
    """
    channels = x.shape[-1]
    if mx.default_device() != mx.gpu or x.dtype not in TOLERANCE or channels % 4:
        return False
    return all(vector.size == channels for vector in vectors) and agrees(kernel, x.dtype, channels, **constants)


def off() -> bool:
    """Whether the user has turned the kernels off."""
    return os.environ.get(SWITCH) == "0"


@lru_cache(maxsize=64)
def agrees(kernel: Callable, dtype: mx.Dtype, channels: int, **constants: int) -> bool:
    """Whether a kernel's results match MLX's on this GPU, for a few rows; computed once."""
    if off():
        return False
    what = f"MLX's own operations are used, which is slower: {kernel.__name__} for {channels} channels of {dtype}"
    try:
        pairs = list(TRIALS[kernel](dtype, channels, **constants))
        errors = [float(mx.abs(got.astype(mx.float32) - wanted).max()) for got, wanted in pairs]
    except (RuntimeError, ValueError) as error:
        log.warning("%s does not run here (%s)", what, error)
        return False
    good = all(error <= TOLERANCE[dtype] for error in errors)  # False for NaN
    if not good:
        log.warning("%s is off by %g here", what, max(errors))
    return good


@lru_cache(maxsize=32)
def _made(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], steps: str, eps: float) -> Callable:
    backend = "metal" if mx.metal.is_available() else "cuda"
    make: Any = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    header = (METAL if backend == "metal" else CUDA) + FOUR
    source = THREAD[backend] + ROW + steps.replace("EPS", f"{eps!r}f")
    return make(name=name, input_names=inputs, output_names=outputs, source=source, header=header)


def _run(
    name: str, steps: str, eps: float, inputs: dict[str, mx.array], outputs: Sequence[str] = ("out",), **constants: int
) -> list[mx.array]:
    """Run a kernel: arrays of the shape of ``inputs["x"]``; each row of the last axis is computed by some lanes."""
    x = inputs["x"]
    rows = x.reshape(-1, x.shape[-1])
    threads = LANES * rows.shape[0]
    return _made(name, tuple(inputs), tuple(outputs), steps, eps)(
        inputs=[rows, *list(inputs.values())[1:]],
        template=[("T", x.dtype), ("C", rows.shape[1]), *constants.items()],
        grid=(-(-threads // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[x.shape] * len(outputs),
        output_dtypes=[x.dtype] * len(outputs),
    )


def layer_norm(x: mx.array, scale: mx.array, shift: mx.array, eps: float) -> mx.array:
    """LayerNorm over the last axis times ``scale`` plus ``shift``, float32 (C,), in x's dtype."""
    inputs = {"x": x, "scale": scale, "shift": shift}
    return _run("layer_norm", READ + LAYER_NORM, eps, inputs)[0]


def _try_layer_norm(dtype: mx.Dtype, channels: int) -> Iterator[tuple[mx.array, mx.array]]:
    x, (scale, shift) = _rows(dtype, channels), _vectors(2, channels)
    yield layer_norm(x, scale, shift, 1e-6), mx.fast.layer_norm(x.astype(mx.float32), scale, shift, 1e-6)


def gated_add(x: mx.array, parts: Sequence[mx.array], gate: mx.array) -> mx.array:
    """``x + y * gate``, x and y of one dtype, gate float32 (C,).

    ``parts``: y, or consecutive rows of it, equally many in each part but the last; they need not be joined.
    """
    names, rows = [f"y{i}" for i in range(len(parts))], parts[0].size // x.shape[-1]
    choose = "".join(f"row / ROWS == {i} ? {name} : " for i, name in enumerate(names[:-1])) + names[-1]
    y_parts = f"const size_t y_start = row % ROWS * C;\nconst DEVICE T* y = {choose};"
    inputs = {"x": x, **dict(zip(names, parts, strict=True)), "gate": gate}
    return _run(f"gated_add_{len(parts)}", y_parts + READ_SUM + WRITE_SUM, 0.0, inputs, ("total",), ROWS=rows)[0]


def _try_gated_add(dtype: mx.Dtype, channels: int, parts: int = 1) -> Iterator[tuple[mx.array, mx.array]]:
    rows = 3 * parts - 1
    x, y, (gate,) = _rows(dtype, channels, 0, rows), _rows(dtype, channels, 1, rows), _vectors(1, channels)
    pieces = [y[:, i : i + 3] for i in range(0, rows, 3)]
    yield gated_add(x, pieces, gate), x.astype(mx.float32) + y.astype(mx.float32) * gate


def add_and_norm(
    x: mx.array, y: mx.array, gate: mx.array, scale: mx.array, shift: mx.array, eps: float
) -> list[mx.array]:
    """``x + y * gate``, x and y of one dtype, gate float32 (C,), and its `layer_norm`."""
    inputs = {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift}
    return _run("add_and_norm", Y_WHOLE + READ_SUM + WRITE_SUM + LAYER_NORM, eps, inputs, ("total", "out"))


def _try_add_and_norm(dtype: mx.Dtype, channels: int) -> Iterator[tuple[mx.array, mx.array]]:
    x, y, (gate, scale, shift) = _rows(dtype, channels), _rows(dtype, channels, 1), _vectors(3, channels)
    total = (x.astype(mx.float32) + y.astype(mx.float32) * gate).astype(dtype).astype(mx.float32)
    wanted = total, mx.fast.layer_norm(total, scale, shift, 1e-6)
    yield from zip(add_and_norm(x, y, gate, scale, shift, 1e-6), wanted, strict=True)


def rms_norm_and_rotate(
    x: mx.array, weight: mx.array, eps: float, cosines: mx.array, sines: mx.array, head_dim: int
) -> mx.array:
    """RMS norm of x (B, L, D) over D times ``weight``, float32 (D,), then rotary positions of every head.

    Each head's channels are in halves. ``cosines`` are float32 (L, head_dim / 2), ``sines`` (L, head_dim), negative for
    the first half.
    """
    inputs = {"x": x, "weight": weight, "cosines": cosines, "sines": sines}
    return _run("rms_norm_and_rotate", READ_PAIRS + ROOT_MEAN_SQUARE + SCALE_AND_ROTATE, eps, inputs, HEAD=head_dim)[0]


def _try_rms_norm_and_rotate(
    dtype: mx.Dtype, channels: int, head_dim: int = 128
) -> Iterator[tuple[mx.array, mx.array]]:
    x, (weight,), angles = _rows(dtype, channels), _vectors(1, channels), mx.arange(TRIED * head_dim / 2)
    cosines, sines = (f(angles).reshape(TRIED, 1, -1) for f in (mx.cos, mx.sin))
    normed = mx.fast.rms_norm(x.astype(mx.float32), weight, 1e-6).reshape(TRIED, -1, head_dim)
    a, b = mx.split(normed, 2, axis=-1)
    wanted = mx.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1).reshape(x.shape)
    signed = mx.concatenate([-sines, sines], axis=-1).reshape(TRIED, -1)
    yield rms_norm_and_rotate(x, weight, 1e-6, cosines.reshape(TRIED, -1), signed, head_dim), wanted


def gelu_tanh(x: mx.array) -> mx.array:
    """tanh-approximated GELU."""
    row = math.gcd(x.shape[-1], 512)  # elementwise, so any row length works; short rows use more groups
    return _run("gelu_tanh", READ + GELU, 0.0, {"x": x.reshape(-1, row)})[0].reshape(x.shape)


def _try_gelu_tanh(dtype: mx.Dtype, channels: int) -> Iterator[tuple[mx.array, mx.array]]:
    x = 4 * _rows(dtype, channels)
    yield gelu_tanh(x), nn.gelu_approx(x.astype(mx.float32))


TRIED = 7  # rows


def _rows(dtype: mx.Dtype, channels: int, seed: int = 0, rows: int = TRIED) -> mx.array:
    return mx.random.normal((1, rows, channels), key=mx.random.key(seed)).astype(dtype)


def _vectors(count: int, channels: int) -> mx.array:
    return mx.random.normal((count, channels), key=mx.random.key(2))


TRIALS = {
    layer_norm: _try_layer_norm,
    gated_add: _try_gated_add,
    add_and_norm: _try_add_and_norm,
    rms_norm_and_rotate: _try_rms_norm_and_rotate,
    gelu_tanh: _try_gelu_tanh,
}
