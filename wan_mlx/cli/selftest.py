"""doctor's checks: the machine, MLX's operations at Wan's own shapes against numpy, nano's video; and rates.

Known to have gone wrong on some GPU or other: convolutions that return zeros where scratch memory ran out (mlx #3979),
or whose float32 is TF32 on an M5 (mlx #4242), attention over more than 32,768 keys (mlx #2894, #3360, #3361), NaN out
of narrow floats.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from huggingface_hub import constants

from .. import __version__, cuda
from ..errors import install_command
from ..mac import tf32_is_on
from ..media.write import read_settings, save_video
from ..models import kernels
from ..models.quantized_linear import MODE_NAMES, Packing
from ..pipeline import WanPipeline
from ..planning.machine import available_memory, installed_memory, mlx_version
from ..presets import BUNDLED
from ..storage import fingerprint, free_space

OLDEST_MLX = (0, 32, 4)
PACKAGES = ("mlx", "mlx-lm", "numpy", "huggingface-hub", "sentencepiece", "imageio", "av", "pillow")
LITTLE_MEMORY, LITTLE_FREE, LITTLE_DISK = 8e9, 5e9, 40e9
# max |a - b| / max |b|: wide enough for Winograd, and for CUDA's TF32, far below anything seen in a video.
TOLERANCE = {mx.float32: 5e-3, mx.bfloat16: 4e-2, mx.float16: 1e-2}
# Of float32 where a Mac's user has turned TF32 on: Winograd's is then up to 1.4e-2 on an M5 (computed with MLX's
# matrices).
TF32_TOLERANCE = 3e-2
# The same for weights that are packed and unpacked, about half as much again as on a CPU.
OF_PACKING = {"q8": 0.01, "q6": 0.03, "q5": 0.06, "q4": 0.12, "q3": 0.25, "mxfp8": 0.08, "mxfp4": 0.25, "nvfp4": 0.18}
SOFTMAX_SPREAD = 3.0  # standard deviation of the scores: some keys stand out among tens of thousands
SEED = 20250225

NANO_REFERENCE = Path(__file__).parent.parent / "assets" / "doctor" / "nano.npz"
NANO_REQUEST: dict[str, Any] = dict(
    prompt="a red circle moves right on a blue background", width=64, height=64, num_frames=5, steps=4, seed=7
)
NANO_BLOCK = 4  # pixels: the mean of each such square of a frame is stored
NANO_TOLERANCE = {"float32": 4.0, "bfloat16": 10.0}  # of 255 levels, in any square; noise would be at 100



@dataclass
class Check:
    """One thing looked at: ``status`` is ok, warn or fail; ``advice`` says how to mend it."""

    name: str
    status: str
    said: str
    advice: str = ""

    @classmethod
    def of(cls, name: str, good: bool, said: str, advice: str, otherwise: str = "fail") -> Check:
        return cls(name, "ok" if good else otherwise, said, "" if good else advice)


def all_checks() -> Iterator[Check]:
    """Everything that rates depend on, in the order in which one thing depends on another."""
    yield from surroundings()
    yield from operations()
    for dtype in ("float32", "bfloat16"):
        yield nano(dtype)


def backend() -> str:
    """What MLX computes with, as it names it itself."""
    return "Metal" if mx.metal.is_available() else "CUDA" if cuda.available() else "CPU"


def update_mlx() -> str:
    """The command that updates MLX; on Linux with its backend, which without it would stay of another version."""
    return install_command("-U", {"Metal": "mlx", "CUDA": "mlx[cuda13]", "CPU": "mlx[cpu]"}[backend()])


def wrong() -> str:
    """The advice where an operation's result is."""
    return ("MLX gets this wrong here, and videos would be noise, black or NaN: update the system and MLX "
            f"({update_mlx()}); if it stays, report it at github.com/ml-explore/mlx with this page")  # fmt: skip


def machine() -> dict[str, str]:
    """The machine and its packages, one line each."""
    info = mx.device_info()
    memory = f"{installed_memory() / 1e9:.1f} GB"
    if working_set := info.get("max_recommended_working_set_size"):
        memory += f", of which the GPU may use {int(working_set) / 1e9:.1f}"
    if total := info.get("total_memory"):
        memory += f", and {int(total) / 1e9:.1f} of the GPU"
    installed = {found.name.lower().replace("_", "-"): found.version for found in metadata.distributions()}
    about = {
        "wan_mlx": f"{__version__} in {Path(__file__).parent.parent}",
        "device": f"{info.get('device_name', 'unknown')}, {backend()}, {os.cpu_count()} cores",
        "memory": memory,
        "system": platform.platform(),
        "python": f"{platform.python_version()} ({platform.machine()}) at {sys.executable}",
        "packages": ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed),
    }
    if platform.system() == "Darwin":  # where much swap is used, everything is slow
        about["swap"] = " ".join(answer("sysctl", "-n", "vm.swapusage").split())
    return about


def answer(*command: str) -> str:
    """What a program of the system's prints; nothing where it is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def macos_version() -> str:
    """Of macOS, as the system says it: Python may say 16 for 26 (cpython#135675)."""
    return answer("sw_vers", "-productVersion").strip() or platform.mac_ver()[0]


def shared() -> dict[str, str]:
    """The machine without names and paths."""
    macos = macos_version() if platform.system() == "Darwin" else ""
    return {
        "wan_mlx": __version__,
        "chip": str(mx.device_info().get("device_name", platform.machine())),
        "memory": f"{installed_memory() / 1e9:.1f} GB",
        "system": f"macOS {macos}" if macos else f"{platform.system()} {platform.release()}",
        "mlx": f"{mlx_version()}, {wheel_tag()}, {backend()}",
        "python": platform.python_version(),
    }


def wheel_tag() -> str:
    """The platform that MLX's installed wheel is for, such as "macosx_26_0_arm64"."""
    for name in ("mlx-metal", "mlx"):
        with suppress(metadata.PackageNotFoundError):
            wheel = metadata.distribution(name).read_text("WHEEL") or ""
            if tags := re.findall(r"^Tag: \S+-(\S+)$", wheel, re.MULTILINE):
                return tags[0]
    return "unknown wheel"


def surroundings() -> Iterator[Check]:
    """Checks that compute nothing."""
    version = tuple(int(part) for part in mlx_version().split("+")[0].split(".")[:3] if part.isdigit())
    said = f"{mlx_version()}, {'.'.join(map(str, OLDEST_MLX))} or later is needed"
    yield Check.of("MLX's version", version >= OLDEST_MLX, said, update_mlx())
    gpu = mx.default_device().type == mx.DeviceType.gpu
    advice = "only nano is quick enough for that"
    if sys.platform == "linux":
        advice += f"; with an NVIDIA GPU: {install_command('mlx[cuda13]')}"
    yield Check.of("a GPU", gpu, "in use" if gpu else "none: the CPU computes", advice, "warn")
    memory = installed_memory()
    advice = "use --memory, a small size and few frames"
    yield Check.of("memory", memory >= LITTLE_MEMORY, f"{memory / 1e9:.1f} GB", advice, "warn")
    free = available_memory()
    advice = "other programs hold it, or the machine has little: close some, or the plan gets smaller"
    yield Check.of("free memory", free >= LITTLE_FREE, f"{free / 1e9:.1f} GB that MLX may hold", advice, "warn")
    folder = Path(constants.HF_HUB_CACHE)
    free = free_space(folder)
    advice = "T2V-1.3B is a download of 17.5 GB, the 14B models of 69 to 83; set HF_HOME to a folder on a larger disk"
    yield Check.of("disk for models", free >= LITTLE_DISK, f"{free / 1e9:.0f} GB free for {folder}", advice, "warn")


def videos() -> Check:
    """Whether a video can be written and read back."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = save_video(Path(folder) / "a.mp4", np.full((5, 32, 32, 3), 99, np.uint8), 16, {"prompt": "猫"})
            good, said = read_settings(path) == {"prompt": "猫"}, "a video can be written and read back"
    except Exception as error:
        good, said = False, f"{type(error).__name__}: {error}"
    return Check.of("videos", good, said, install_command("--force-reinstall", "av", "imageio"))


def operations() -> Iterator[Check]:
    """Each operation on the default device against numpy in float32."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    keys_of = {mx.bfloat16: (32_760, 75_600), mx.float32: (32_760, 75_600)}
    for dtype, counts in (keys_of | {mx.float16: (75_600,)} if on_gpu else keys_of).items():
        yield _guarded(f"matmul 1536 to 8960, {name_of(dtype)}", matmul, 1536, 8960, dtype)
        for keys in counts:
            yield _guarded(f"attention over {keys} keys, {name_of(dtype)}", attention, keys, dtype)
    sizes = [(384, 60, 104), (192, 240, 416), (96, 480, 832)]
    for channels, height, width in sizes:
        if not on_gpu:  # hundreds of GFLOP
            height, width = 24, 32
        yield _guarded(f"convolution of {channels} channels, {width}x{height}", convolution, channels, height, width)
    for mode in MODE_NAMES:
        yield _guarded(f"{mode} weights", quantised, mode)


def tolerance(dtype: mx.Dtype) -> float:
    """The relative error that an operation may have here."""
    wide = dtype == mx.float32 and platform.system() == "Darwin" and tf32_is_on()
    return TF32_TOLERANCE if wide else TOLERANCE[dtype]


def _guarded(name: str, check: Callable[..., tuple[float, float, str]], *args) -> Check:
    """The check's outcome as a `Check`, whatever it runs into."""
    try:
        error, allowed, fault = check(*args)
    except Exception as failure:
        return Check.of(name, False, f"{type(failure).__name__}: {failure}", wrong())
    said = fault or f"relative error {error:.1e} of {allowed:g} allowed"
    return Check.of(name, not fault and error <= allowed, said, wrong())


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
    if fault := _fault(y, axes=(0, 2, 3)):
        return 1.0, 0.0, fault
    got, pixels, weights = np.array(y[0]), np.pad(np.array(x[0]), ((1, 1), (1, 1), (0, 0))), np.array(w)
    worst = 0.0
    for top in (0, height // 2, height - 6):
        for left in (0, width // 2, width - 6):
            windows = np.lib.stride_tricks.sliding_window_view(pixels[top : top + 8, left : left + 8], (3, 3), (0, 1))
            want = np.einsum("yxckl,oklc->yxo", windows, weights, optimize=True)
            worst = max(worst, _relative(got[top : top + 6, left : left + 6], want))
    return worst, tolerance(mx.float32), ""


def quantised(mode: str) -> tuple[float, float, str]:
    """Packed and unpacked here, against the original; a product with it, and its unpacking, against the CPU's."""
    packing, w, x = Packing.parse(mode), _random(mx.float32, (256, 1536)), _random(mx.float32, (300, 1536), seed=1)
    packed = packing.pack(w)
    back = packing.unpack(packed, mx.float32)
    if fault := _fault(back, axes=(1,)):
        return 1.0, 0.0, fault
    with mx.stream(mx.cpu):
        want = _numpy(packing.unpack(packed, mx.float32))
    others = max(_relative(_numpy(back), want), _relative(_numpy(x @ back.T), _numpy(x) @ want.T))
    if not others <= tolerance(mx.float32):
        return others, tolerance(mx.float32), ""
    return _relative(_numpy(back), _numpy(w)), OF_PACKING[mode], ""


def nano(dtype: str) -> Check:
    """The bundled model from prompt to frames, against the stored ones.

    In float32 by MLX's operations alone, so that where only bfloat16 is wrong wan_mlx's kernels may be why; and CUDA
    compiles less.
    """
    name = f"nano's video, {dtype}"
    advice = (
        "the whole gives another video than it should: if an operation above failed, that is why; if none did, report "
        "it to wan_mlx with this page"
    )
    try:
        stored = dict(np.load(NANO_REFERENCE))
        if str(stored["weights"]) != _nano_weights():
            advice = "reinstall wan_mlx; if you retrained nano, run `wan-mlx doctor --store-reference`"
            return Check(name, "fail", "the stored frames are of other weights of nano", advice)
        with operations_alone() if dtype == "float32" else nullcontext():
            worst = float(np.abs(nano_means(dtype) - stored["means"].astype(np.float32)).max())
    except Exception as failure:
        return Check(name, "fail", f"{type(failure).__name__}: {failure}", advice)
    said = f"differs by at most {worst:.1f} of 255 levels, {NANO_TOLERANCE[dtype]:g} allowed"
    return Check.of(name, worst <= NANO_TOLERANCE[dtype], said, advice)


@contextmanager
def operations_alone() -> Iterator[None]:
    """Within this block no kernel is compiled: MLX's operations run one by one."""
    with kernels.turned_off():
        mx.disable_compile()
        try:
            yield
        finally:
            if "MLX_DISABLE_COMPILE" not in os.environ:
                mx.enable_compile()


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
    fault = _fault(got, axes=(-1,))
    return _relative(_numpy(got), want), tolerance(dtype), fault


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def _fault(x: mx.array, axes: tuple[int, ...]) -> str:
    """NaN, or rows that are nothing but zeros."""
    bad = int((~mx.isfinite(x)).sum())
    if bad:
        return f"{bad} of {x.size} values are NaN or infinite"
    empty = int((mx.abs(x).max(axis=axes) == 0).sum())
    return f"{empty} rows are nothing but zeros" if empty else ""


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
