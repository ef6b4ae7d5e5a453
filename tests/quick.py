"""Makes MLX quick on a Linux CPU, and changes no bit: its products of float32, and the kernels that it compiles."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("quick.c")
PREAMBLE = "mlx/backend/cpu/compiled_preamble.h"


def package() -> Path | None:
    """The folder of MLX, where it computes on a Linux CPU, and gcc is there, which it needs itself."""
    mlx = find_spec("mlx") if platform.system() == "Linux" and shutil.which("g++") and shutil.which("gcc") else None
    return Path(mlx.submodule_search_locations[0]) if mlx and mlx.submodule_search_locations else None


def reference_blas(mlx: Path) -> Path | None:
    """The library that MLX's package brings; None where its sums may be other ones."""
    return next(mlx.with_name("mlx_cpu.libs").glob("libblas-*"), None) if platform.machine() == "x86_64" else None


def made(file: str, compiler: str, source: Path, *flags: str | Path) -> Path:
    """The file in the folder where MLX keeps the kernels that it compiles, made if it is not there."""
    ready = Path(tempfile.gettempdir(), "mlx", version("mlx"), "cpu", file)
    if not ready.exists():
        ready.parent.mkdir(parents=True, exist_ok=True)
        mine = ready.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-O3", "-w", "-fPIC", "-shared", *flags, source, "-o", mine], check=True)
        mine.rename(ready)
    return ready


def quick_products() -> ctypes.CDLL | None:
    """quick.c, loaded before MLX, which then finds it first, here and in processes that tests start; None without."""
    if (mlx := package()) is None or reference_blas(mlx) is None:
        return None
    name = f"quick-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    library = made(name, "gcc", SOURCE, "-march=native", "-ffp-contract=off")
    os.environ["LD_PRELOAD"] = str(library)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def precompiled_preamble() -> Path | None:
    """What every kernel of `mx.compile` includes, compiled once for all, where the compiler finds it beside them."""
    if (mlx := package()) is None or not (source := mlx / "include" / PREAMBLE).exists():
        return None
    return made(f"{PREAMBLE}.gch", "g++", source, "-std=c++17", "-I", mlx / "include", "-x", "c++-header")


PRODUCTS = quick_products()
READY = precompiled_preamble()
