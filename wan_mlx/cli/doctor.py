"""``python -m wan_mlx.doctor``: whether this machine computes what Wan needs, how fast, and what to do if not.

The first thing to run, and what to paste into a bug report: paths in the home folder are shown as ``~``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__, check_backend
from ..planning.flops import forward_parts
from ..presets import PRESETS
from ..storage import free_space

if TYPE_CHECKING:
    from .selftest import Check

DESCRIPTION = "Whether this machine computes what Wan needs, how fast, and what to do if not."
OLDEST_MLX = (0, 32, 4)
PACKAGES = ("mlx", "mlx-lm", "numpy", "huggingface-hub", "sentencepiece", "imageio-ffmpeg", "pillow")
# Of T2V-1.3B at 832x480, 81 frames: tokens, and forwards of 50 steps of two passes.
TOKENS, FORWARDS = 32_760, 100
LITTLE_MEMORY, LITTLE_DISK = 8e9, 40e9


def main(argv: list[str] | None = None) -> int:
    """Look at the machine, print what was found; 0 if nothing failed, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m wan_mlx.doctor", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--store-reference", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        check_backend()
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from . import selftest

    if args.store_reference:
        print(selftest.store_reference())
        return 0
    show = (lambda *_: None) if args.json else _show
    started = time.perf_counter()
    about = machine()
    for name, value in about.items():
        show(f"{name:<10}{value}")
    checks = []
    for check in all_checks():
        checks.append(check)
        mark = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}[check.status]
        show(f"{mark} {check.name}: {check.said}" + (f"\n     {check.advice}" if check.advice else ""))
    rates = selftest.rates()
    for name, rate in rates.items():
        show(f"     {name}: {rate:.3g} TFLOP/s")
    verdict = judge(checks, rates)
    show(verdict)
    show(f"({time.perf_counter() - started:.0f} s)")
    if args.json:
        found = {"machine": about, "checks": [vars(check) for check in checks], "tflops": rates, "verdict": verdict}
        print(private(json.dumps(found, indent=1, ensure_ascii=False)))
    return 1 if any(check.status == "fail" for check in checks) else 0


def all_checks() -> Iterator[Check]:
    """Everything, in the order in which one thing depends on another."""
    from . import selftest

    yield from surroundings()
    yield from selftest.operations()
    yield from fused_kernels()
    for dtype in ("float32", "bfloat16"):
        yield selftest.nano(dtype)
    yield ffmpeg()


def machine() -> dict[str, str]:
    """The machine and its packages, one line each."""
    import mlx.core as mx

    info = mx.device_info()
    backend = "Metal" if mx.metal.is_available() else "CUDA" if mx.cuda.is_available() else "CPU"
    working_set = info.get("max_recommended_working_set_size")
    memory = f"{_memory() / 1e9:.1f} GB"
    if working_set:
        memory += f", of which the GPU may use {int(working_set) / 1e9:.1f}"
    if total := info.get("total_memory"):
        memory += f", and {int(total) / 1e9:.1f} of the GPU"
    versions = [f"{name} {metadata.version(name)}" for name in PACKAGES if _has(name)]
    return {
        "wan_mlx": f"{__version__} in {Path(__file__).parent.parent}",
        "device": f"{info.get('device_name', 'unknown')}, {backend}, {os.cpu_count()} cores",
        "memory": memory,
        "system": platform.platform(),
        "python": f"{platform.python_version()} ({platform.machine()}) at {sys.executable}",
        "packages": ", ".join(versions),
        **({"swap": swap} if (swap := _swap()) else {}),
    }


def surroundings() -> Iterator[Check]:
    """Checks that compute nothing."""
    import mlx.core as mx

    from .selftest import Check

    installed: str = mx.__version__  # type: ignore[attr-defined]  # MLX's stubs lack it
    version = tuple(int(part) for part in installed.split("+")[0].split(".")[:3] if part.isdigit())
    oldest = ".".join(map(str, OLDEST_MLX))
    good = version >= OLDEST_MLX
    yield Check("MLX's version", "ok" if good else "fail", f"{installed}, {oldest} or later is needed",
                "" if good else "pip install -U mlx")  # fmt: skip
    if platform.system() == "Darwin":
        native = platform.machine() == "arm64"
        yield Check("Apple silicon", "ok" if native else "fail", platform.machine(),
                    "" if native else "this Python runs under Rosetta: install one for arm64")  # fmt: skip
    gpu = mx.default_device().type == mx.DeviceType.gpu
    yield Check("a GPU", "ok" if gpu else "warn", "in use" if gpu else "none: the CPU computes",
                "" if gpu else "only nano is quick enough for that; on Linux with an NVIDIA GPU: pip install "
                "'wan-mlx[cuda13]' instead of 'wan-mlx[cpu]'")  # fmt: skip
    memory = _memory()
    yield Check("memory", "ok" if memory >= LITTLE_MEMORY else "warn", f"{memory / 1e9:.1f} GB",
                "" if memory >= LITTLE_MEMORY else "use --memory, a small size and few frames")  # fmt: skip
    folder = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    free = free_space(folder)
    yield Check("disk for models", "ok" if free >= LITTLE_DISK else "warn", f"{free / 1e9:.0f} GB free for {folder}",
                "" if free >= LITTLE_DISK else "T2V-1.3B is a download of 17.5 GB, the 14B models of 69 to 83; set "
                "HF_HOME to a folder on a larger disk")  # fmt: skip


def fused_kernels() -> Iterator[Check]:
    """Whether wan_mlx's own kernels can be used on this GPU, for each dtype that people compute in."""
    import mlx.core as mx

    from ..models import kernels
    from .selftest import Check

    if mx.default_device() != mx.gpu:
        return
    if kernels.off():
        yield Check("wan_mlx's kernels", "warn", "turned off", f"unset {kernels.SWITCH} to use them")
        return
    for dtype, width in ((mx.bfloat16, 1536), (mx.float32, 256)):
        bad = [kernel.__name__ for kernel in kernels.TRIALS if not kernels.agrees(kernel, dtype, width)]
        said = f"{', '.join(bad)}: not right here, so MLX's operations are used" if bad else "as MLX's operations"
        advice = "videos are right, but slower to make; please report this" if bad else ""
        name = f"wan_mlx's kernels in {str(dtype).removeprefix('mlx.core.')}"
        yield Check(name, "warn" if bad else "ok", said, advice)


def ffmpeg() -> Check:
    """Whether a video can be written and read back."""
    import numpy as np

    from ..media.write import read_settings, save_video
    from .selftest import Check

    try:
        with tempfile.TemporaryDirectory() as folder:
            path = save_video(Path(folder) / "a.mp4", np.full((5, 32, 32, 3), 99, np.uint8), 16, {"prompt": "猫"})
            good, said = read_settings(path) == {"prompt": "猫"}, "a video can be written and read back"
    except Exception as error:
        good, said = False, f"{type(error).__name__}: {error}"
    advice = "" if good else "pip install --force-reinstall imageio-ffmpeg"
    return Check("ffmpeg", "ok" if good else "fail", said, advice)


def judge(checks: list[Check], rates: dict[str, float]) -> str:
    """The verdict in a sentence or two."""
    bad = [check for check in checks if check.status == "fail"]
    doubtful = [check for check in checks if check.status == "warn"]
    if bad:
        first = bad[0]
        return (f"{len(bad)} of {len(checks)} checks failed: {', '.join(check.name for check in bad)}. "
                f"First: {first.advice}")  # fmt: skip
    parts = forward_parts(PRESETS["t2v-1.3B"].transformer, TOKENS)
    attending = sum(flop for name, flop in parts.items() if name.endswith("attention"))
    tflop = {"attention bfloat16": attending / 1e12, "matmul bfloat16": (sum(parts.values()) - attending) / 1e12}
    seconds = FORWARDS * sum(tflop[name] / rates[name] for name in tflop)
    remarks = f" ({', '.join(check.name for check in doubtful)}: see above)" if doubtful else ""
    return (f"All is well{remarks}. At these rates T2V-1.3B denoises 832x480, 81 frames, 50 steps in about "
            f"{_duration(seconds)}.")  # fmt: skip


def private(text: str) -> str:
    """``text`` with the home folder as ``~``."""
    homes = {str(Path.home()), os.path.realpath(Path.home()), os.path.expanduser("~")}
    for home in sorted(homes - {"/", ""}, key=len, reverse=True):
        text = text.replace(home, "~")
    return text


def _show(line: str) -> None:
    print(private(line), flush=True)


def _has(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _memory() -> float:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _swap() -> str | None:
    """macOS's own line about its swap: where much is used, everything is slow."""
    if platform.system() != "Darwin":
        return None
    done = subprocess.run(["sysctl", "-n", "vm.swapusage"], capture_output=True, text=True)
    return " ".join(done.stdout.split()) or None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"

