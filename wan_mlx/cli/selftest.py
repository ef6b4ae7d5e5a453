"""doctor's computations: MLX's operations at Wan's own shapes against numpy, their rates, and nano's video.

Known to have gone wrong on some GPU or other: convolutions that return zeros where scratch memory ran out (mlx #3979,
#4242), attention over more than 32,768 keys (mlx #2894, #3360, #3361), NaN out of narrow floats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..pipeline import WanPipeline
from ..planning.speed import worth_timing
from ..presets import BUNDLED
from ..storage import fingerprint

# max |a - b| / max |b|: wide enough for TF32 and Winograd, far below anything that would be seen in a video.
TOLERANCE = {mx.float32: 5e-3, mx.bfloat16: 4e-2}
SOFTMAX_SPREAD = 3.0  # standard deviation of the scores: some keys stand out among tens of thousands
SEED = 20250225

NANO_REFERENCE = Path(__file__).parent.parent / "assets" / "doctor" / "nano.npz"
NANO_REQUEST: dict[str, Any] = dict(
    prompt="a red circle moves right on a blue background", width=64, height=64, num_frames=5, steps=4, seed=7
)
NANO_BLOCK = 4  # pixels: the mean of each such square of a frame is stored
NANO_TOLERANCE = {"float32": 4.0, "bfloat16": 10.0}  # of 255 levels, in any square; noise would be at 100

UPDATE = (
    "MLX gets this wrong here, and videos would be noise, black or NaN: update it (pip install -U mlx) and the system; "
    "if it stays, report it at github.com/ml-explore/mlx with this page"
)


@dataclass
class Check:
    """One thing looked at: ``status`` is ok, warn or fail; ``advice`` says what to do unless it is ok."""

    name: str
    status: str
    said: str
    advice: str = ""


def operations() -> Iterator[Check]:
    """Each operation on the default device against numpy in float32."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    for dtype in (mx.bfloat16, mx.float32):
        yield _guarded(f"matmul 1536 to 8960, {_name(dtype)}", matmul, 1536, 8960, dtype)
        for keys in (32_760, 75_600):
            yield _guarded(f"attention over {keys} keys, {_name(dtype)}", attention, keys, dtype)
    sizes = [(384, 60, 104), (192, 240, 416), (96, 480, 832)]
    for channels, height, width in sizes:
        if not on_gpu:  # hundreds of GFLOP
            height, width = 24, 32
        yield _guarded(f"convolution of {channels} channels, {width}x{height}", convolution, channels, height, width)
    for bits, error in ((8, 0.01), (4, 0.12)):
        yield _guarded(f"{bits}-bit weights", quantised, bits, error)


def _guarded(name: str, check: Callable[..., tuple[float, float, str]], *args) -> Check:
    """The check's outcome as a `Check`, whatever it runs into."""
    try:
        error, allowed, fault = check(*args)
    except Exception as failure:
        return Check(name, "fail", f"{type(failure).__name__}: {failure}", UPDATE)
    said = fault or f"relative error {error:.1e} of {allowed:.0e} allowed"
    good = not fault and error <= allowed
    return Check(name, "ok" if good else "fail", said, "" if good else UPDATE)


def matmul(inner: int, outer: int, dtype: mx.Dtype) -> tuple[float, float, str]:
    """64 tokens through a feed-forward's first linear."""
    x, w = _random(dtype, (64, inner)), _random(dtype, (outer, inner), 1 / inner**0.5, seed=1)
    return _compare(x @ w.T, _numpy(x) @ _numpy(w).T, dtype)


def attention(keys: int, dtype: mx.Dtype) -> tuple[float, float, str]:
    """Two heads, 32 queries, so many keys."""
    q = _random(dtype, (1, 2, 32, 128), SOFTMAX_SPREAD)
    k, v = _random(dtype, (1, 2, keys, 128), seed=1), _random(dtype, (1, 2, keys, 128), seed=2)
    got = mx.fast.scaled_dot_product_attention(q, k, v, scale=128**-0.5)
    scores = _numpy(q) @ _numpy(k).swapaxes(-1, -2) * 128**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return _compare(got, weights / weights.sum(-1, keepdims=True) @ _numpy(v), dtype)


def convolution(channels: int, height: int, width: int) -> tuple[float, float, str]:
    """3x3 in float32, as in the VAE: all of it looked at for NaN and zeros, the corners and the middle compared."""
    x = _random(mx.float32, (1, height, width, channels))
    w = _random(mx.float32, (channels, 3, 3, channels), 1 / (9 * channels) ** 0.5, seed=1)
    y = mx.conv2d(x, w, padding=1)
    if fault := _fault(y, "rows", axes=(0, 2, 3)):
        return 1.0, 0.0, fault
    got, pixels, weights = np.array(y[0]), np.pad(np.array(x[0]), ((1, 1), (1, 1), (0, 0))), np.array(w)
    worst = 0.0
    for top in (0, height // 2, height - 6):
        for left in (0, width // 2, width - 6):
            windows = np.lib.stride_tricks.sliding_window_view(pixels[top : top + 8, left : left + 8], (3, 3), (0, 1))
            want = np.einsum("yxckl,oklc->yxo", windows, weights, optimize=True)
            worst = max(worst, _relative(got[top : top + 6, left : left + 6], want))
    return worst, TOLERANCE[mx.float32], ""


def quantised(bits: int, allowed: float) -> tuple[float, float, str]:
    """Packed and unpacked again, against what was packed."""
    w = _random(mx.float32, (256, 1536))
    back = mx.dequantize(*mx.quantize(w, group_size=64, bits=bits), group_size=64, bits=bits)
    return _relative(np.array(back), np.array(w)), allowed, _fault(back, "rows", axes=(1,))


def rates() -> dict[str, float]:
    """TFLOP/s of what the time goes into, each measured for a fraction of a second."""
    found = {}
    for dtype in (mx.bfloat16, mx.float32):
        w = _random(dtype, (8960, 1536))
        found[f"matmul {_name(dtype)}"] = _rate(
            lambda n, w=w: _random(w.dtype, (n, 1536)), lambda x, w=w: x @ w.T, lambda n: 2 * n * 1536 * 8960, 32
        )
    found["attention bfloat16"] = _rate(
        lambda n: _random(mx.bfloat16, (1, 12, 16 * n, 128)),
        lambda x: mx.fast.scaled_dot_product_attention(x, x, x, scale=128**-0.5),
        lambda n: 4 * 12 * (16 * n) ** 2 * 128,
        8,
        largest=1024,
        power=2,
    )
    w = _random(mx.float32, (96, 3, 3, 96))
    found["convolution float32"] = _rate(
        lambda n: _random(mx.float32, (1, n, 256, 96)),
        lambda x: mx.conv2d(x, w, padding=1),
        lambda n: 2 * n * 256 * 96 * 96 * 9,
        8,
        largest=2048,
    )
    return found


def nano(dtype: str) -> Check:
    """The bundled model from prompt to frames, against the stored ones."""
    name = f"nano's video, {dtype}"
    advice = (
        "the whole gives another video than it should: if an operation above failed, that is why; if none did, report "
        "it to wan_mlx with this page"
    )
    try:
        stored = dict(np.load(NANO_REFERENCE))
        if str(stored["weights"]) != _nano_weights():
            advice = "reinstall wan_mlx; if you retrained nano, run python -m wan_mlx.doctor --store-reference"
            return Check(name, "fail", "the stored frames are of other weights of nano", advice)
        means = nano_means(dtype)
    except Exception as failure:
        return Check(name, "fail", f"{type(failure).__name__}: {failure}", advice)
    worst = float(np.abs(means - stored["means"].astype(np.float32)).max())
    good = worst <= NANO_TOLERANCE[dtype]
    said = f"differs by at most {worst:.1f} of 255 levels, {NANO_TOLERANCE[dtype]:g} allowed"
    return Check(name, "ok" if good else "fail", said, "" if good else advice)


def nano_means(dtype: str) -> np.ndarray:
    """float32 (T, H/4, W/4, 3): the means of squares of nano's frames."""
    pipe = WanPipeline.from_pretrained("nano", dtype=dtype, progress=False, prompt_cache=False)
    frames = pipe(**NANO_REQUEST).frames.astype(np.float32)
    count, height, width, _ = frames.shape
    squares = frames.reshape(count, height // NANO_BLOCK, NANO_BLOCK, width // NANO_BLOCK, NANO_BLOCK, 3)
    return squares.mean(axis=(2, 4))


def store_reference() -> Path:
    """Make the stored frames anew, with the CPU in float32, for nano as it is now."""
    mx.set_default_device(mx.cpu)
    NANO_REFERENCE.parent.mkdir(exist_ok=True)
    means = nano_means("float32").round().astype(np.uint8)
    np.savez_compressed(NANO_REFERENCE, means=means, weights=np.array(_nano_weights()))
    return NANO_REFERENCE


def _nano_weights() -> str:
    return " ".join(fingerprint(path)["sha256"][:16] for path in sorted(BUNDLED["nano"].glob("[!.]*")))


def _rate(make, compute, flop, start: int, largest: int = 1 << 14, power: int = 1) -> float:
    """TFLOP/s of ``compute(make(n))``, of an n from ``start`` on at which it takes long enough to be timed."""

    def seconds_at(n: int) -> float:
        x = make(n)
        started = time.perf_counter()
        mx.eval(compute(x))
        return time.perf_counter() - started

    n, seconds, _ = worth_timing(seconds_at, start, largest, power)
    return flop(n) / seconds / 1e12


def _random(dtype: mx.Dtype, shape: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> mx.array:
    """Normal, from numpy, so that it is the same on every device; evaluated."""
    numbers = np.random.default_rng(SEED + seed).standard_normal(shape, np.float32) * np.float32(scale)
    array = mx.array(numbers).astype(dtype)
    mx.eval(array)
    return array


def _numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def _compare(got: mx.array, want: np.ndarray, dtype: mx.Dtype) -> tuple[float, float, str]:
    """Relative error, the allowed one, and a fault other than an error's size."""
    fault = _fault(got, "rows", axes=(-1,))
    return _relative(_numpy(got), want), TOLERANCE[dtype], fault


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def _fault(x: mx.array, what: str, axes: tuple[int, ...]) -> str:
    """NaN, or rows that are nothing but zeros."""
    bad = int((~mx.isfinite(x)).sum())
    if bad:
        return f"{bad} of {x.size} values are NaN or infinite"
    empty = int((mx.abs(x).max(axis=axes) == 0).sum())
    return f"{empty} {what} are nothing but zeros" if empty else ""


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
