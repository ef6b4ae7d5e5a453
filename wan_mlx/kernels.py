"""Norms with what surrounds them, each in one pass over memory; MLX's own operations take two to four.

One text serves Metal and CUDA: 32 threads that can add among themselves (a simdgroup, a warp) take one row, which stays
in their registers. Statistics and arithmetic are float32, and nothing is rounded before the result is.

A kernel is used once it has given here what MLX's operations give, on a small input (`usable`); until then, and on the
CPU, callers use the operations.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import mlx.core as mx

log = logging.getLogger(__name__)

SWITCH = "WAN_MLX_KERNELS"  # "0" in the environment turns the kernels off
LANES, THREADS = 32, 256
# Dtypes that the kernels take, and how far their results, of size 10 or so, may be from MLX's.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}

# What the two languages call differently, and the type of a few neighbouring values.
METAL = """
#define DEVICE device
inline float sum_lanes(float value) { return metal::simd_sum(value); }
"""
CUDA = """
#define DEVICE
inline __device__ float sum_lanes(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}
"""
FOUR = """
template <typename T> struct alignas(4 * sizeof(T)) Four { T at[4]; };
"""
THREAD = {
    "metal": "const uint thread_number = thread_position_in_grid.x;",
    "cuda": "const unsigned int thread_number = blockIdx.x * blockDim.x + threadIdx.x;",
}
# Each lane has the values 4 * (lane + 32 * i) and the three after them, of rows of C.
ROW = """
const int lane = thread_number % 32;
const size_t row = thread_number / 32;
if (row >= (size_t)x_shape[0]) return;
constexpr int N = (C + 127) / 128;
const size_t start = row * C;
Four<T> kept[N];
#define EACH _Pragma("unroll") for (int i = 0, c = 4 * lane; i < N; i++, c += 128) if (C % 128 == 0 || c < C)
#define VALUES(array, at) (*(const DEVICE Four<T>*)((array) + (at)))
#define FLOATS(array, at) (*(const DEVICE Four<float>*)((array) + (at)))
#define WRITE(array, at) (*(DEVICE Four<T>*)((array) + (at)))
"""
READ = """
EACH kept[i] = VALUES(x, start + c);
"""
# x + y * gate, kept as it is rounded to be written.
READ_SUM = """
EACH {
  Four<T> a = VALUES(x, start + c), b = VALUES(y, start + c);
  Four<float> g = FLOATS(gate, c);
  for (int k = 0; k < 4; k++)
    a.at[k] = static_cast<T>(static_cast<float>(a.at[k]) + static_cast<float>(b.at[k]) * g.at[k]);
  WRITE(total, start + c) = a;
  kept[i] = a;
}
"""
# What a convolution's taps gave, its bias and, if there is one, the shortcut.
SUM = """
EACH {
  Four<T> a = VALUES(x, start + c), b = VALUES(y, start + c), d = VALUES(z, start + c), e = VALUES(shortcut, start + c);
  Four<float> g = FLOATS(bias, c);
  for (int k = 0; k < 4; k++) {
    float sum = static_cast<float>(a.at[k]) + static_cast<float>(b.at[k]) + static_cast<float>(d.at[k]) + g.at[k];
    a.at[k] = static_cast<T>(SHORTCUT ? sum + static_cast<float>(e.at[k]) : sum);
  }
  WRITE(out, start + c) = a;
}
"""
ROOT_MEAN_SQUARE = """
float squares = 0;
EACH for (int k = 0; k < 4; k++) {
  float v = static_cast<float>(kept[i].at[k]);
  squares += v * v;
}
const float factor = rsqrt(sum_lanes(squares) / C + EPS);
"""
RMS_NORM = """
EACH {
  Four<float> w = FLOATS(weight, c);
  Four<T> result;
  for (int k = 0; k < 4; k++) {
    float v = static_cast<float>(kept[i].at[k]) * factor * w.at[k];
    if (SILU) v = v / (1.0f + exp(-v));
    result.at[k] = static_cast<T>(v);
  }
  WRITE(out, start + c) = result;
}
"""
# A value's partner in the rotation is half a head away: ahead for the first half, behind for the second.
ROTATE = """
constexpr int HALF = HEAD / 2;
const size_t token = row % (size_t)cosines_shape[0];
EACH {
  const int at = c % HEAD;
  const int other = at < HALF ? c + HALF : c - HALF;
  Four<T> b = VALUES(x, start + other), result;
  Four<float> v = FLOATS(weight, c), w = FLOATS(weight, other);
  Four<float> cosine = FLOATS(cosines, token * HALF + at % HALF), sine = FLOATS(sines, token * HEAD + at);
  for (int k = 0; k < 4; k++) {
    float mine = static_cast<float>(kept[i].at[k]) * factor * v.at[k];
    float others = static_cast<float>(b.at[k]) * factor * w.at[k];
    result.at[k] = static_cast<T>(mine * cosine.at[k] + others * sine.at[k]);
  }
  WRITE(out, start + c) = result;
}
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
  Four<T> result;
  for (int k = 0; k < 4; k++)
    result.at[k] = static_cast<T>((static_cast<float>(kept[i].at[k]) - mean) * factor * w.at[k] + b.at[k]);
  WRITE(out, start + c) = result;
}
"""


def usable(x: mx.array, *vectors: mx.array) -> bool:
    """Whether the kernels can be used for ``x`` with ``vectors`` that hold one value for each of its channels."""
    channels = x.shape[-1]
    if mx.default_device() != mx.gpu or x.dtype not in TOLERANCE or channels % 4:
        return False
    return all(vector.size == channels for vector in vectors) and agree(x.dtype)


def off() -> bool:
    """Whether the user has turned the kernels off."""
    return os.environ.get(SWITCH) == "0"


@lru_cache(maxsize=8)
def agree(dtype: mx.Dtype) -> bool:
    """Whether the kernels give on this GPU, for a small input, what MLX's operations give; asked once for a dtype."""
    if off():
        return False
    try:
        errors = {name: mx.abs(got.astype(mx.float32) - wanted).max() for name, got, wanted in _trials(dtype)}
        bad = [name for name, error in errors.items() if not error.item() <= TOLERANCE[dtype]]
    except (RuntimeError, ValueError) as error:
        log.warning(
            "MLX's own operations are used, which is slower: the kernels for %s do not run here (%s)", dtype, error
        )
        return False
    if bad:
        log.warning(
            "MLX's own operations are used, which is slower: the kernels for %s are wrong here (%s)", dtype, bad[0]
        )
    return not bad


def _trials(dtype: mx.Dtype) -> Iterator[tuple[str, mx.array, mx.array]]:
    """(name, what a kernel gives, the same in float32 from MLX's operations), on 7 rows of 2 heads of 96 channels."""
    tokens, heads, head_dim, eps = 7, 2, 96, 1e-6
    keys = iter(mx.random.split(mx.random.key(0), 8))

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(keys))

    width = heads * head_dim
    x, y = (normal(1, tokens, width).astype(dtype) for _ in range(2))
    gate, scale, shift, angles = normal(width), normal(width), normal(width), normal(tokens, head_dim // 2)
    wide, sines = x.astype(mx.float32), mx.sin(angles)
    total = (wide + y.astype(mx.float32) * gate).astype(dtype)
    normed = mx.fast.rms_norm(wide, scale, eps)
    yield "rms_norm", rms_norm(x, scale, eps), normed
    yield "rms_norm and SiLU", rms_norm(x, scale, eps, silu=True), normed * mx.sigmoid(normed)
    yield "layer_norm", layer_norm(x, scale, shift, eps), mx.fast.layer_norm(wide, scale, shift, eps)
    yield "gated_add", gated_add(x, y, gate), total.astype(mx.float32)
    yield "sum_taps", sum_taps(x, y, x, gate, y), 2 * (wide + y.astype(mx.float32)) + gate
    added, added_normed = add_and_norm(x, y, gate, scale, shift, eps)
    yield "add_and_norm", added, total.astype(mx.float32)
    yield "add_and_norm", added_normed, mx.fast.layer_norm(total.astype(mx.float32), scale, shift, eps)
    a, b = mx.split(normed.reshape(tokens, heads, head_dim), 2, axis=-1)
    c, s = mx.cos(angles)[:, None], sines[:, None]
    rotated = mx.concatenate([a * c - b * s, b * c + a * s], axis=-1).reshape(1, tokens, width)
    sines = mx.concatenate([-sines, sines], axis=-1)
    yield "rms_norm_and_rotate", rms_norm_and_rotate(x, scale, eps, mx.cos(angles), sines, head_dim), rotated


@lru_cache(maxsize=32)
def _kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], steps: str, eps: float) -> Callable:
    backend = "metal" if mx.metal.is_available() else "cuda"
    make = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    header = (METAL if backend == "metal" else CUDA) + FOUR
    source = THREAD[backend] + ROW + steps.replace("EPS", f"{eps!r}f")
    return make(name=name, input_names=inputs, output_names=outputs, source=source, header=header)


def _run(
    name: str, steps: str, eps: float, inputs: dict[str, mx.array], outputs: Sequence[str] = ("out",), **constants
) -> list[mx.array]:
    """Arrays shaped like ``inputs["x"]``, of whose last axis every row is given to a kernel's lanes."""
    x = inputs["x"]
    rows = x.reshape(-1, x.shape[-1])
    threads = LANES * rows.shape[0]
    results = _kernel(name, tuple(inputs), tuple(outputs), steps, eps)(
        inputs=[rows, *list(inputs.values())[1:]],
        template=[("T", x.dtype), ("C", rows.shape[1]), *constants.items()],
        grid=(-(-threads // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[rows.shape] * len(outputs),
        output_dtypes=[x.dtype] * len(outputs),
    )
    return [result.reshape(x.shape) for result in results]


def rms_norm(x: mx.array, weight: mx.array, eps: float, silu: bool = False) -> mx.array:
    """RMS norm over the last axis times ``weight``, float32 (C,), then SiLU if asked for; in x's dtype."""
    return _run("rms_norm", READ + ROOT_MEAN_SQUARE + RMS_NORM, eps, {"x": x, "weight": weight}, SILU=silu)[0]


def rms_norm_and_rotate(
    x: mx.array, weight: mx.array, eps: float, cosines: mx.array, sines: mx.array, head_dim: int
) -> mx.array:
    """RMS norm of x (B, L, D) over D times ``weight``, float32 (D,), then rotary positions of every head.

    Each head's channels are in halves. ``cosines`` are float32 (L, head_dim / 2), ``sines`` (L, head_dim), negative for
    the first half.
    """
    inputs = {"x": x, "weight": weight, "cosines": cosines, "sines": sines}
    return _run("rms_norm_and_rotate", READ + ROOT_MEAN_SQUARE + ROTATE, eps, inputs, HEAD=head_dim)[0]


def layer_norm(x: mx.array, scale: mx.array, shift: mx.array, eps: float) -> mx.array:
    """LayerNorm over the last axis times ``scale`` plus ``shift``, float32 (C,), in x's dtype."""
    return _run("layer_norm", READ + LAYER_NORM, eps, {"x": x, "scale": scale, "shift": shift})[0]


def gated_add(x: mx.array, y: mx.array, gate: mx.array) -> mx.array:
    """``x + y * gate``, of x and y (..., C) in one dtype and a gate float32 (C,)."""
    return _run("gated_add", READ_SUM, 0.0, {"x": x, "y": y, "gate": gate}, ("total",))[0]


def sum_taps(x: mx.array, y: mx.array, z: mx.array, bias: mx.array, shortcut: mx.array | None = None) -> mx.array:
    """``x + y + z + bias``, plus ``shortcut`` if there is one: all (..., C) in one dtype, but a bias float32 (C,)."""
    inputs = {"x": x, "y": y, "z": z, "bias": bias, "shortcut": x if shortcut is None else shortcut}
    return _run("sum_taps", SUM, 0.0, inputs, SHORTCUT=shortcut is not None)[0]


def add_and_norm(
    x: mx.array, y: mx.array, gate: mx.array, scale: mx.array, shift: mx.array, eps: float
) -> list[mx.array]:
    """``x + y * gate`` as `gated_add` gives it, and its `layer_norm`."""
    inputs = {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift}
    return _run("add_and_norm", READ_SUM + LAYER_NORM, eps, inputs, ("total", "out"))
