"""Functions of `layers` and `rope`, each by a kernel in one pass over memory where MLX's operations take two to four.

The same source serves Metal and CUDA: a group of 32 threads (a simdgroup, a warp) takes one row, which stays in
registers. Statistics and arithmetic are float32, and only the result is rounded.

A kernel is used after its results on this machine match MLX's operations, on a few rows of the wanted width; otherwise,
and on the CPU, the plain function is. Kernels have no gradient, so the networks call the plain functions, and
`block_execution` and `attention_execution` call these.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import mlx.core as mx

from . import layers, rope
from .chips import measured

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
MEAN_AND_FACTOR = """
float sum = 0;
EACH for (int k = 0; k < 4; k++) sum += static_cast<float>(kept[i].at[k]);
const float mean = sum_lanes(sum) / C;
float squares = 0;
EACH for (int k = 0; k < 4; k++) {
  float v = static_cast<float>(kept[i].at[k]) - mean;
  squares += v * v;
}
const float factor = rsqrt(sum_lanes(squares) / C + EPS);
"""
LAYER_NORM = MEAN_AND_FACTOR + """\
EACH {
  Four<float> w = FLOATS(scale, c), b = FLOATS(shift, c);
  for (int k = 0; k < 4; k++)
    kept[i].at[k] = static_cast<T>((static_cast<float>(kept[i].at[k]) - mean) * factor * w.at[k] + b.at[k]);
}
EACH WRITE(out, start + c) = kept[i];
"""


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


class Fused:
    """Calls a kernel where this machine can use it for the arguments, else the ``plain`` function of the same ones."""

    def __init__(self, kernel: Callable, plain: Callable):
        self.kernel, self.plain, self.__name__ = kernel, plain, kernel.__name__
        self.parameters = tuple(inspect.signature(kernel).parameters)

    def __call__(self, *arguments: Any) -> Any:
        return (self.kernel if self.usable(*arguments) else self.plain)(*arguments)

    def usable(self, *arguments: Any) -> bool:
        """Whether the kernel takes these arguments, x (B, L, D) first, and is right."""
        given = dict(zip(self.parameters, arguments, strict=True))
        x, parts = given["x"], len(given.get("parts", "1"))
        channels = x.shape[-1]
        head_dim = channels // given["heads"] if "heads" in given else 128
        return (
            mx.default_device() == mx.gpu
            and x.dtype in TOLERANCE
            and channels % 4 == head_dim % 8 == 0
            and all(given[name].size == channels for name in VECTORS & given.keys())
            and (parts == 1 or x.shape[0] == 1)
            and agrees(self, x.dtype, channels, parts, head_dim)
        )


# Arguments of which a kernel takes one value per channel, for all samples alike.
VECTORS = {"gate", "scale", "shift", "weight"}


def with_kernel(plain: Callable) -> Callable[[Callable], Fused]:
    """Decorates a kernel, with the function that computes the same by MLX's operations."""
    return lambda kernel: Fused(kernel, plain)


def off() -> bool:
    """Whether the user has turned the kernels off."""
    return os.environ.get(SWITCH) == "0"


@contextmanager
def turned_off() -> Iterator[None]:
    """Within this block MLX's operations are used."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    agrees.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
        agrees.cache_clear()


def label(fused: Fused, dtype: mx.Dtype, channels: int) -> str:
    """A kernel for these rows, as `chips.measured` names it."""
    return f"{fused.__name__} {channels} {str(dtype).removeprefix('mlx.core.')}"


@lru_cache(maxsize=64)
def agrees(fused: Fused, dtype: mx.Dtype, channels: int, parts: int = 3, head_dim: int = 128) -> bool:
    """Whether a kernel's results match MLX's on this GPU, for a few rows, and no measurement shows it slower; once."""
    if off() or label(fused, dtype, channels) in measured()["slower"]:
        return False
    said = f"MLX's own operations are used, which is slower: {fused.__name__} for {channels} channels of {dtype}"
    arguments = trial(fused, dtype, channels, 8 * parts - 1, parts, head_dim)
    try:
        results = zip(listed(fused.kernel(*arguments)), listed(fused.plain(*arguments)), strict=True)
        errors = [float(mx.abs(got.astype(mx.float32) - wanted.astype(mx.float32)).max()) for got, wanted in results]
    except (RuntimeError, ValueError) as error:
        log.warning("%s does not run here (%s)", said, error)
        return False
    good = all(error <= TOLERANCE[dtype] for error in errors)  # False for NaN
    if not good:
        log.warning("%s is off by %g here", said, max(errors))
    return good


def trial(
    fused: Fused, dtype: mx.Dtype, channels: int, rows: int, parts: int = 3, head_dim: int = 128
) -> list[Any]:
    """Arguments of a kernel, and of its plain function, with random values."""
    x, y = (2.5 * mx.random.normal((2, 1, rows, channels), key=mx.random.key(0))).astype(dtype)
    gate, scale, shift = mx.random.uniform(-1, 1, (3, channels), key=mx.random.key(1))
    each = -(-rows // parts)
    values = {
        "x": x, "y": y, "parts": [y[:, start : start + each] for start in range(0, rows, each)],
        "gate": gate, "scale": scale, "shift": shift, "weight": scale, "eps": 1e-6,
        "heads": channels // head_dim, "table": rope.rope_table((rows, 1, 1), head_dim),
    }  # fmt: skip
    return [values[name] for name in fused.parameters]


def listed(results: mx.array | Sequence[mx.array]) -> Sequence[mx.array]:
    return [results] if isinstance(results, mx.array) else results


@with_kernel(layers.modulated_norm)
def modulated_norm(x, scale, shift, eps):
    inputs = {"x": x, "scale": scale.flatten(), "shift": shift.flatten()}
    return _run("layer_norm", READ + LAYER_NORM, eps, inputs)[0]


@with_kernel(lambda x, parts, gate: layers.gated_add(x, joined(parts), gate))
def gated_add(x, parts, gate):
    """`layers.gated_add` of x (B, L, D) and parts along L, all but the last equally long, which stay apart."""
    names = [f"y{i}" for i in range(len(parts))]
    choose = "".join(f"row / rows == {i} ? {name} : " for i, name in enumerate(names[:-1])) + names[-1]
    # Not a constant of the template, for each of which the kernel would be compiled again.
    y_parts = "const size_t rows = (size_t)y0_shape[0] * y0_shape[1], y_start = row % rows * C;\n"
    y_parts += f"const DEVICE T* y = {choose};"
    inputs = {"x": x, **dict(zip(names, parts, strict=True)), "gate": gate.flatten()}
    return _run(f"gated_add_{len(parts)}", y_parts + READ_SUM + WRITE_SUM, 0.0, inputs, ("total",))[0]


def _add_and_norm(x, y, gate, scale, shift, eps):
    total = layers.gated_add(x, y, gate)
    return total, layers.modulated_norm(total, scale, shift, eps)


@with_kernel(_add_and_norm)
def add_and_norm(x, y, gate, scale, shift, eps):
    """`layers.gated_add`, and the `layers.modulated_norm` of its result."""
    vectors = {"gate": gate.flatten(), "scale": scale.flatten(), "shift": shift.flatten()}
    steps = Y_WHOLE + READ_SUM + WRITE_SUM + LAYER_NORM
    return _run("add_and_norm", steps, eps, {"x": x, "y": y, **vectors}, ("total", "out"))


@with_kernel(rope.norm_and_rotate)
def norm_and_rotate(x, weight, heads, table, eps):
    length, channels = x.shape[1:]
    cosines, sines = (part.reshape(length, -1) for part in table)
    inputs = {"x": x, "weight": weight.astype(mx.float32), "cosines": cosines, "sines": sines}
    steps = READ_PAIRS + ROOT_MEAN_SQUARE + SCALE_AND_ROTATE
    return _run("rms_norm_and_rotate", steps, eps, inputs, HEAD=channels // heads)[0].reshape(*x.shape[:2], heads, -1)


@with_kernel(layers.gelu_tanh)
def gelu_tanh(x):
    row = math.gcd(x.shape[-1], 512)  # elementwise, so any row length works; short rows use more groups
    return _run("gelu_tanh", READ + GELU, 0.0, {"x": x.reshape(-1, row)})[0].reshape(x.shape)


KERNELS = (modulated_norm, gated_add, add_and_norm, norm_and_rotate, gelu_tanh)


def joined(parts: Sequence[mx.array]) -> mx.array:
    """Parts of tokens (B, L, D) as one array."""
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=1)
