"""doctor's look at a Mac: the system, MLX's wheel, and what makes a run slow or ends it. Computes nothing."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator

import mlx.core as mx

from ..errors import install_command
from ..mac import battery, can_stay_awake, tf32_is_on
from .selftest import Check, answer, macos_version, wheel_tag

OLDEST_MACOS = (14, 0)  # MLX's wheels need it
# From this generation of GPUs on there are neural accelerators. MLX has kernels for them in the wheel for macOS 26,
# which is built for 26.2 (mlx#4525); products took 2.7 times as long without (mlx#3821).
ACCELERATED, ACCELERATED_MACOS, ACCELERATED_WHEEL = 17, (26, 2), "macosx_26"


def version() -> tuple[int, ...]:
    """Of macOS: (26, 1)."""
    return tuple(int(part) for part in macos_version().split(".")[:2] if part.isdigit())


def checks() -> Iterator[Check]:
    """All of them, on a Mac; elsewhere none."""
    if platform.system() != "Darwin":
        return
    native = platform.machine() == "arm64" and answer("sysctl", "-n", "sysctl.proc_translated").strip() != "1"
    advice = "this Python runs under Rosetta, or the Mac has an Intel chip: install a Python for arm64"
    yield Check.of("Apple silicon", native, platform.machine(), advice)
    said = ".".join(map(str, version())) or "unknown"
    yield Check.of("macOS", version() >= OLDEST_MACOS, said, "MLX needs macOS 14: update the system")
    yield from accelerators()
    yield float32()
    yield sleep()


def accelerators() -> Iterator[Check]:
    """Whether MLX uses the neural accelerators of an M5 or later."""
    generation = re.search(r"g(\d+)", str(mx.device_info().get("architecture", "")))
    if generation and int(generation[1]) >= ACCELERATED:
        wheel, good = wheel_tag(), version() >= ACCELERATED_MACOS
        advice = (f"products take two to three times as long: MLX has kernels for them in its wheel for "
                  f"{ACCELERATED_WHEEL}, on macOS {'.'.join(map(str, ACCELERATED_MACOS))} or later: update macOS, then "
                  f"SYSTEM_VERSION_COMPAT=0 {install_command('--force-reinstall', 'mlx', 'mlx-metal')}")  # fmt: skip
        said = f"MLX's wheel is for {wheel}, macOS is {'.'.join(map(str, version()))}"
        yield Check.of("neural accelerators", good and wheel.startswith(ACCELERATED_WHEEL), said, advice, "warn")


def float32() -> Check:
    """Whether float32 is multiplied as such."""
    good = not tf32_is_on()
    advice = "an M5 rounds float32 to TF32 in products and convolutions: unset MLX_ENABLE_TF32, wan_mlx turns it off"
    return Check.of("float32", good, "as such" if good else "TF32 is on", advice, "warn")


def sleep() -> Check:
    """What may stop or slow a run of hours."""
    settings = dict(re.findall(r"^\s*(\w+)\s+(\d+)", answer("pmset", "-g"), re.MULTILINE))
    minutes, found = int(settings.get("sleep", 0)), []
    if minutes and not can_stay_awake():
        found.append(f"the Mac sleeps after {minutes} idle minutes, and caffeinate is missing")
    if "1" in (settings.get("lowpowermode"), settings.get("powermode")):  # the second where there is a high mode too
        found.append("Low Power Mode slows the GPU down")
    if (left := battery()) is not None:
        found.append(f"it runs on its battery, {left}% full")
    said = "; ".join(found) or (f"after {minutes} idle minutes, but not during a run" if minutes else "never when idle")
    return Check.of("sleep", not found, said, "connect it to power, leave the lid open; --stop-below 20%", "warn")
