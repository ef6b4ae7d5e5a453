"""This machine's GPU: the published rates of Apple's chips, what `doctor` measured here, and the limits that follow.

macOS ends GPU work that runs for seconds, sooner where it keeps a lit display waiting (mlx#3267, mlx#3302), so a
dispatch must be short on the chip at hand: an M1 is eight times as slow as an M4 Max.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..storage import cache_folder, whole_file

# Seconds of a dispatch at a chip's rate. Products reach about two thirds of a published rate, and a warm or busy GPU
# less: so a real one takes less than half a second.
DISPATCH_SECONDS = 0.25
UNLIMITED = 1e18
RECORD = "machine.json"  # in the cache folder


@dataclass(frozen=True)
class Chip:
    """GPU cores of the smallest and of the largest chip of a name, and the published TFLOP/s of the largest.

    The rate is that of float32, which products in 16 bits do not exceed before M5. An M5's neural accelerators do
    (58 TFLOP/s in float16 on an M5 Max, mlx#3211; 6.4 in bfloat16 on an M5, mlx#3196), but MLX may have come without
    kernels for them.
    """

    fewest: int
    most: int
    tflops: float
    source: str


HARDWARE, FIXED = "huggingface.js packages/tasks/src/hardware.ts", "huggingface.js#1044"
M3_CLOCK, M4_CLOCK = "cores x 256 x 1.398 GHz (hmc-tech.com)", "cores x 256 x 1.678 GHz (hmc-tech.com)"
M5_CLOCK = "cores x 256 x 1.578 GHz (parallax#449)"
CHIPS = {
    "M1": Chip(7, 8, 2.6, HARDWARE),
    "M1 Pro": Chip(14, 16, 5.2, HARDWARE),
    "M1 Max": Chip(24, 32, 10.4, HARDWARE),
    "M1 Ultra": Chip(48, 64, 21.0, HARDWARE),
    "M2": Chip(8, 10, 3.6, HARDWARE),
    "M2 Pro": Chip(16, 19, 6.8, FIXED),
    "M2 Max": Chip(30, 38, 13.6, "applegpuinfo#10"),
    "M2 Ultra": Chip(60, 76, 27.2, HARDWARE),
    "M3": Chip(8, 10, 3.6, M3_CLOCK),
    "M3 Pro": Chip(14, 18, 6.4, M3_CLOCK),
    "M3 Max": Chip(30, 40, 14.2, HARDWARE),
    "M3 Ultra": Chip(60, 80, 28.4, "two M3 Max"),
    "M4": Chip(8, 10, 4.3, M4_CLOCK),
    "M4 Pro": Chip(16, 20, 8.6, M4_CLOCK),
    "M4 Max": Chip(32, 40, 17.2, M4_CLOCK),
    "M5": Chip(8, 10, 4.04, M5_CLOCK),
    "M5 Pro": Chip(16, 20, 8.08, M5_CLOCK),
    "M5 Max": Chip(32, 40, 16.1, M5_CLOCK),
}


def published_rate(device: str) -> float:
    """FLOP/s of the smallest GPU sold as ``device`` ("Apple M2 Max"); of a name not known, of the slowest of its kind.

    MLX does not tell how many cores there are.
    """
    match = re.search(r"\bM\d+(?: (Pro|Max|Ultra))?", device)
    kind = f"M1 {match[1]}" if match and match[1] else "M1"
    chip = CHIPS.get(match[0] if match else kind, CHIPS[kind])
    return 1e12 * chip.tflops * chip.fewest / chip.most


def device_name() -> str:
    """The GPU's name."""
    return str(mx.device_info().get("device_name", "unknown"))


def dispatch_flop() -> float:
    """Floating-point operations that one dispatch may hold: on Metal by the measured rate, or else the published one.

    Elsewhere there is no limit, and one dispatch is 10 % faster than several whose results are joined.
    """
    rate = likely_rate()
    return UNLIMITED if rate is None else DISPATCH_SECONDS * rate


def likely_rate() -> float | None:
    """FLOP per second of this Mac's GPU: the measured ones, or else the published one; None where it is none."""
    if not mx.metal.is_available():
        return None
    rates = measured()["tflops"]
    return 1e12 * min(rates.values()) if rates else published_rate(device_name())


@lru_cache(maxsize=1)
def measured() -> dict[str, Any]:
    """What `doctor` found on this GPU with this MLX: "tflops" (product → rate), "slower" (kernels that do not pay)."""
    try:
        found = json.loads((cache_folder() / RECORD).read_text(encoding="utf-8"))
        if found["of"] == _identity() and all(rate > 0 for rate in found["tflops"].values()):
            return {"tflops": found["tflops"], "slower": frozenset(found["slower"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # nothing was measured, or the file was edited
    return {"tflops": {}, "slower": frozenset()}


def keep_measured(tflops: dict[str, float], slower: list[str]) -> None:
    """Write what `measured` reads; it holds from now on."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"of": _identity(), "tflops": tflops, "slower": sorted(slower)}, indent=1)
    with whole_file(folder / RECORD) as path:
        path.write_text(text, encoding="utf-8")
    measured.cache_clear()


def _identity() -> list[str]:
    return [device_name(), mx.__version__]  # type: ignore[attr-defined]  # its stubs lack it
