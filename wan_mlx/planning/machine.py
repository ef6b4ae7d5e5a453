"""The memory limit of MLX: as requested, or this machine's free memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

import mlx.core as mx

from .. import mac

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Shares of the memory that "auto" takes; a Mac's recommended working set leaves room for the system already.
SHARE_OF_METAL, SHARE_OF_CUDA, SHARE_OF_SYSTEM = 0.95, 0.93, 0.85


def mlx_version() -> str:
    """MLX's own."""
    return mx.__version__  # type: ignore[attr-defined]  # its stubs lack it


def parse_memory(memory: str | int | None) -> int | None:
    """Bytes of "8GB" (10^9), "8GiB" (2^30), "500MB" or a number of bytes; None for "auto" and None.

    Raises:
        ValueError: another form.
    """
    if memory is None or memory == "auto":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)\s*", str(memory), re.IGNORECASE)
    if isinstance(memory, int) and not isinstance(memory, bool):
        size = memory
    elif match and match[2].upper() in UNITS:
        size = round(min(float(match[1]), 1e15) * UNITS[match[2].upper()])
    else:
        near = f"; nearest: {memory}GB" if re.fullmatch(r"\d+(\.\d+)?", str(memory)) else ""
        raise ValueError(f"memory is {memory!r}, expected auto or a size such as 8GB{near}")
    if not 1e8 <= size <= 1e15:
        raise ValueError(f"memory is {str(memory):.40}, expected at least 100MB and at most 1000TB")
    return size


def available_memory() -> int:
    """Bytes that MLX may hold on the default device, present use included; leaves room for the system."""
    info, held = mx.device_info(), mx.get_cache_memory() + mx.get_active_memory()
    if mx.default_device().type == mx.DeviceType.gpu:
        if "max_recommended_working_set_size" in info:
            most = int(SHARE_OF_METAL * int(info["max_recommended_working_set_size"]))
            free = mac.free_memory()
            return most if free is None else min(most, int(SHARE_OF_SYSTEM * (free + held)))
        if "free_memory" in info or "total_memory" in info:
            free = int(info["free_memory"] if "free_memory" in info else info["total_memory"])
            return int(SHARE_OF_CUDA * (free + held))
        if "memory_size" in info:
            return int(0.7 * int(info["memory_size"]))
    return int(SHARE_OF_SYSTEM * (system_memory() + held))


def system_memory(root: Path = Path("/")) -> int:
    """Bytes of free main memory on macOS and Linux, there or the smaller limit of a cgroup (v1 or v2).

    Elsewhere half of the installed memory.
    """
    found = [mac.free_memory()]
    meminfo = _read(root / "proc/meminfo")
    if match := re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE):
        found.append(int(match[1]) * 1024)
    own = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    groups = [root / "sys/fs/cgroup" / own[1].lstrip("/")] if own else []
    while groups and groups[-1] != root / "sys/fs/cgroup" and groups[-1].parent != groups[-1]:
        groups.append(groups[-1].parent)
    for group in groups or [root / "sys/fs/cgroup"]:
        found.append(_left(group, "memory.max", "memory.current"))
    found.append(_left(root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
    left = [size for size in found if size is not None]
    if left:
        return max(0, min(left))
    return installed_memory() // 2


def installed_memory() -> int:
    """Bytes of the machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left(group: Path, limit: str, usage: str) -> int | None:
    """Bytes left in a cgroup, its file cache counted as free; None if it has no limit."""
    most, used = _read(group / limit).strip(), _read(group / usage).strip()
    if not most.isdigit() or int(most) >= 2**60:
        return None
    cache = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
    return int(most) - (int(used) if used.isdigit() else 0) + (int(cache[1]) if cache else 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
